"""Gymnasium environments with discrete actions as environments of texts."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from .calls import cause
from .notes import is_number
from .record import Record
from .text_env import Step, TextEnv

_KINDS = (spaces.Discrete, spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text)


def render(space: gymnasium.Space[Any], value: Any) -> str:
    """A member of a space as text: numbers with three digits, arrays by rows, dictionaries by `key: value` lines.

    Raises: TypeError for a space of another kind, such as Graph.
    """
    if isinstance(space, spaces.Dict):
        return "\n".join(f"{key}: {render(part, value[key])}" for key, part in space.spaces.items())
    if isinstance(space, spaces.Tuple):
        return "; ".join(render(part, one) for part, one in zip(space.spaces, value, strict=True))
    if not isinstance(space, _KINDS):
        raise TypeError(f"describe must be given for observations in {type(space).__name__}")
    return str(value) if isinstance(value, str) else _array(np.asarray(value))


def _array(value: np.ndarray) -> str:
    if value.ndim > 1:
        return ("\n" * (value.ndim - 1)).join(map(_array, value))
    form = "{:.3g}" if value.dtype.kind == "f" else "{:d}"
    return " ".join(form.format(number) for number in np.atleast_1d(value).tolist())


class GymTextEnv(TextEnv):
    """A Gymnasium environment with Discrete actions, seen as text: observations are described, actions are named.

    A record is a seed: the prompt is the first observation behind that seed. After it the environment's own
    generator (`np_random`) is seeded anew with the seed of `reset`, if any: episodes of one record begin alike
    and go their ways. The state is the whole text so far, so a policy may remember:

        S_0 = instruction, first observation;    S_t = S_{t-1}, action, observation

    info["counts"] has "actions/illegal", which the trainer logs as the sum of a step.

    Args:
        env: id, or function without arguments that makes one, such as functools.partial(gymnasium.make, id,
            is_slippery=False).
        actions: a name for every action, in order; None: their numbers. Blanks at the ends and case aside, an
            action is a name or a number.
        describe: observation -> text; None: `render`.
        instruction: text before the first observation.
        layout: what stands around every observation; `{observation}` is its text.
        seeds: their number, counted from 0, or the seeds.
        on_illegal: what an action that is none does: "noop": nothing, the observation is shown again;
            "truncate": ends the episode, truncated.
        penalty: reward for such an action.
        max_turns: actions in an episode; running out of them truncates.
        max_length: longest state or action in characters.
    Raises: TypeError or ValueError, naming the argument.
    """

    def __init__(
        self,
        env: str | Callable[[], gymnasium.Env[Any, Any]],
        *,
        actions: Sequence[str] | None = None,
        describe: Callable[[Any], str] | None = None,
        instruction: str = "",
        layout: str = "{observation}\n>",
        seeds: int | Sequence[int] = 64,
        on_illegal: str = "noop",
        penalty: float = 0.0,
        max_turns: int = 32,
        max_length: int = 1 << 20,
    ) -> None:
        if not isinstance(env, str) and not callable(env):
            raise TypeError(f"env must be an id or a function that makes one, got {type(env).__name__}")
        if not isinstance(layout, str) or layout.count("{observation}") != 1:
            raise ValueError(f"layout must hold {{observation}} once, got {layout!r}")
        if on_illegal not in ("noop", "truncate"):
            raise ValueError(f"on_illegal must be 'noop' or 'truncate', got {on_illegal!r}")
        if describe is not None and not callable(describe):
            raise TypeError(f"describe must be a function, got {type(describe).__name__}")
        if not isinstance(instruction, str):
            raise TypeError(f"instruction must be a str, got {type(instruction).__name__}")
        if not is_number(penalty):
            raise ValueError(f"penalty must be a finite number, got {penalty!r}")
        self.make, self.layout, self.describe = env, layout, describe
        self.on_illegal, self.penalty = on_illegal, float(penalty)
        self.env = self._made()
        if not isinstance(self.env, gymnasium.Env):
            raise TypeError(f"env must make a gymnasium.Env, got {type(self.env).__name__}")
        space: Any = self.env.action_space
        if not isinstance(space, spaces.Discrete):
            raise TypeError(f"env must have Discrete actions, got {space}")
        self.first, self.names = int(space.start), _names(actions, space)
        self.numbers = {str(space.start + i): i for i in range(int(space.n))}
        self.numbers |= {name.strip().casefold(): i for i, name in enumerate(self.names)}
        records = [Record(instruction + self._begun(seed), None, {"seed": seed}) for seed in _seeds(seeds)]
        super().__init__(records, reward=_own, max_turns=max_turns, max_length=max_length)
        self.instruction = instruction

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins the episode of record `options["index"]`, or of one drawn from `self.np_random`."""
        _, info = super().reset(seed=seed, options=options)
        self._state = self.instruction + self._begun(self.records[info["index"]].metadata["seed"])
        if seed is not None:
            self.env.unwrapped.np_random = np.random.default_rng(seed)
        return self._state, info

    def step(self, action: str) -> Step:
        """Takes one action, if it is one; the reward is the environment's.

        Raises: what TextEnv's step raises, for an action that is no text and without an episode under way.
        """
        text = self._taken(action, None).text
        number = self.numbers.get(text.strip().casefold())
        reward, terminated, truncated = self.penalty, False, self.on_illegal == "truncate"
        if number is not None:
            found = self.env.step(self.first + number)
            self._seen, reward, terminated, truncated = (
                found[0],
                float(found[1]),
                bool(found[2]),
                bool(found[3]),
            )
        self._state = f"{self._state}{text}\n{self._shown()}"
        self._turn += 1
        self._over = terminated or truncated or self._turn >= self.max_turns
        info = {**self._info(), "counts": {"actions/illegal": float(number is None)}}
        return self._state, reward, terminated, self._over and not terminated, info

    def clone(self) -> "GymTextEnv":
        """An independent copy that goes on from here.

        Raises: TypeError if an episode is under way and the environment cannot be copied.
        """
        other: Any = super().clone()
        if self._over:
            other.env = self._made()
            return other
        try:
            other.env, other._seen = copy.deepcopy((self.env, self._seen))
        except Exception as error:
            raise TypeError(f"{self.env} cannot be copied within an episode: {cause(error)}") from error
        return other

    def close(self) -> None:
        self.env.close()

    def _made(self) -> gymnasium.Env[Any, Any]:
        return gymnasium.make(self.make) if isinstance(self.make, str) else self.make()

    def _begun(self, seed: int) -> str:
        self._seen = self.env.reset(seed=seed)[0]
        return self._shown()

    def _shown(self) -> str:
        """The newest observation."""
        seen, space = self._seen, self.env.observation_space
        seen = render(space, seen) if self.describe is None else self.describe(seen)
        if not isinstance(seen, str):
            raise TypeError(f"describe must give a str, got {type(seen).__name__}")
        return self.layout.replace("{observation}", seen)


def _names(actions: Any, space: Any) -> list[str]:
    if actions is None:
        return [str(space.start + i) for i in range(int(space.n))]
    named = isinstance(actions, Sequence) and not isinstance(actions, str)
    if not named or not all(isinstance(name, str) and name.strip() for name in actions):
        raise TypeError(f"actions must be a list of names, got {actions!r:.60}")
    if len({name.strip().casefold() for name in actions}) != int(space.n) or len(actions) != int(space.n):
        raise ValueError(f"actions must be {int(space.n)} different names, got {list(actions)!r:.60}")
    return list(actions)


def _seeds(seeds: Any) -> list[int]:
    whole = isinstance(seeds, int) and not isinstance(seeds, bool)
    if not whole and (isinstance(seeds, (str, bytes)) or not isinstance(seeds, Sequence)):
        raise TypeError(f"seeds must be their number or a list of integers, got {seeds!r:.60}")
    found = range(seeds) if whole else seeds
    if not found or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in found):
        raise ValueError(
            f"seeds must be at least one, none of them negative or no integer, got {seeds!r:.60}"
        )
    return list(found)


def _own(state: str, action: str, record: Record) -> float:
    raise ValueError("the rewards of a Gymnasium environment come from its steps alone")
