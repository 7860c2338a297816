"""A text environment as a Gymnasium environment of tokens, for libraries that know arrays alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from .text_env import TextEnv


class TokenView(gymnasium.Env[np.ndarray, int]):
    """A TextEnv, a token at a time.

    An action of the text environment is written token by token. It ends with the end token or with `max_tokens`
    tokens; then the environment answers, whose reward is that token's; the others get 0. What it adds to the
    text is tokenised by itself, or the whole state anew if it does not continue the text.

    Observations are [window] int64: the newest token ids plus 1, the newest last, 0 where there are none. The
    space is MultiDiscrete, which Stable-Baselines3 turns into one-hot features: (vocabulary + 1) * window of them,
    so it is for small vocabularies.

    Args:
        env: a TextEnv; it is stepped, not copied, unless its prompts are messages, which are rendered.
        tokenizer: `tokenizer(text, add_special_tokens=...)["input_ids"]`, `decode(ids, skip_special_tokens=True)`,
            `eos_token_id`.
        window: tokens of an observation.
        max_tokens: longest action in tokens.
        tokens: ids that can be written, so that an action is an index into them; None: all.
        vocabulary: number of ids; None: len(tokenizer).
    Raises: TypeError or ValueError, naming the argument.
    """

    def __init__(
        self,
        env: TextEnv,
        tokenizer: Any,
        *,
        window: int = 32,
        max_tokens: int = 16,
        tokens: Sequence[int] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if not isinstance(env, TextEnv):
            raise TypeError(f"env must be a TextEnv, got {type(env).__name__}")
        if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TypeError(f"tokenizer must be callable and have decode, got {type(tokenizer).__name__}")
        if vocabulary is None and not hasattr(tokenizer, "__len__"):
            raise ValueError("vocabulary must be given for a tokenizer without a length, got None")
        size = len(tokenizer) if vocabulary is None else vocabulary
        for name, value in (("window", window), ("max_tokens", max_tokens), ("vocabulary", size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if tokens is not None and (isinstance(tokens, (str, bytes)) or not hasattr(tokens, "__iter__")):
            raise TypeError(f"tokens must be a list of ids or None, got {tokens!r:.60}")
        self.tokens = list(range(size) if tokens is None else tokens)
        if not self.tokens or not all(hasattr(t, "__index__") and 0 <= t < size for t in self.tokens):
            raise ValueError(f"tokens must hold ids in [0, {size}), got {self.tokens!r:.60}")
        self.size, self._over = size, True
        self.env, self.tokenizer = env.rendered(tokenizer), tokenizer
        self.window, self.max_tokens = window, max_tokens
        self.action_space: Any = spaces.Discrete(len(self.tokens))
        self.observation_space: Any = spaces.MultiDiscrete([size + 1] * window)
        self._ids: list[int] = []
        self._action: list[int] = []
        self._state = ""

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode of the text environment with the same seed and options."""
        super().reset(seed=seed)
        self._state, info = self.env.reset(seed=seed, options=options)
        self._special = self.env.records[info["index"]].conversation is None
        self._ids, self._action, self._over = self._encoded(self._state, self._special), [], False
        return self._observation(), info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Writes one token.

        Returns: as Gymnasium has it; info is the text environment's where it answered, else empty.
        Raises: gymnasium.error.ResetNeeded without an episode under way; TypeError for an action that is no
            integer and IndexError for one outside the space; ValueError for a token id that `vocabulary` lacks;
            what the environment's step raises.
        """
        if self._over:
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is under way")
        if not hasattr(action, "__index__"):
            raise TypeError(f"action must be an integer, got {type(action).__name__}")
        if not 0 <= action < len(self.tokens):
            raise IndexError(f"action must be in [0, {len(self.tokens)}), got {action}")
        token = self.tokens[int(action)]
        self._action.append(token)
        self._ids.append(token)
        if token != self.tokenizer.eos_token_id and len(self._action) < self.max_tokens:
            return self._observation(), 0.0, False, False, {}
        text = self.tokenizer.decode(self._action, skip_special_tokens=True)
        before, self._action = self._state + text, []
        self._state, reward, terminated, truncated, info = self.env.step(text)
        if self._state.startswith(before):
            added = self._state[len(before) :]
            self._ids += self._encoded(added, False) if added else []
        else:
            self._ids = self._encoded(self._state, self._special)
        self._over = terminated or truncated
        return self._observation(), reward, terminated, truncated, info

    def close(self) -> None:
        self.env.close()

    def _encoded(self, text: str, special: bool) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        if max(ids, default=0) >= self.size:
            raise ValueError(
                f"vocabulary must be above every token id, got {self.size} for the id {max(ids)}"
            )
        return ids

    def _observation(self) -> np.ndarray:
        seen = np.zeros(self.window, dtype=np.int64)
        newest = self._ids[-self.window :]
        if newest:
            seen[-len(newest) :] = np.array(newest) + 1
        return seen
