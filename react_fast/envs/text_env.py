"""A Gymnasium environment of texts: S_t = f(S_{t-1}, A_{t-1}, I), R_t = g(S_t, A_t, I, T)."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from .rewards import exact_match
from .spaces import UnicodeText, as_text


@dataclass(frozen=True)
class Record:
    """One task: the input I (`prompt`) and the target T (`reference`)."""

    prompt: str
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


Transition = Callable[[str, str, Record], str]
Reward = Callable[[str, str, Record], float]
Terminal = Callable[[str, Record], bool]


def append(state: str, action: str, record: Record) -> str:
    """The default f: the text so far, then the action. Nothing is put between them."""
    return state + action


class TextEnv(gymnasium.Env[str, str]):
    """An episode is one record; a state is the text that the policy conditions on; an action is a text.

        S_0 = I,    S_t = f(S_{t-1}, A_{t-1}, I),    R_t = g(S_t, A_t, I, T)

    With no `terminal`, the task is `max_turns` actions long and the last one *terminates* the episode: there
    is nothing after it whose value could be bootstrapped. With `terminal`, reaching such a state terminates;
    running out of turns before that is a limit from outside the task, and *truncates*.

    Args:
        records: the tasks, at least one. Shared between clones, never written to.
        transition: f(state, action, record) -> next state. Called after every action, the last one too.
        reward: g(state, action, record) -> number; `state` is the one in which the action was taken.
        max_turns: actions in an episode, at least 1.
        terminal: terminal(next_state, record) -> bool, asked after every transition.
        max_length: longest state or action in characters.
    Raises: ValueError for no records or max_turns below 1, TypeError if a record is no `Record`.

    To be pickled, f, g and `terminal` must be importable functions. `AsyncVectorEnv` needs
    `shared_memory=False`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        transition: Transition = append,
        reward: Reward = exact_match,
        max_turns: int = 1,
        terminal: Terminal | None = None,
        max_length: int = 1 << 20,
    ) -> None:
        if not len(records):
            raise ValueError("records must hold at least one record, got none")
        if not isinstance(records[0], Record):
            raise TypeError(f"records must hold Record objects, got {type(records[0]).__name__}")
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {max_turns}")
        self.records = records
        self.transition = transition
        self.reward = reward
        self.max_turns = max_turns
        self.terminal = terminal
        self.observation_space = UnicodeText(max_length)
        self.action_space = UnicodeText(max_length)
        self._index: int | None = None
        self._state = ""
        self._turn = 0
        self._over = True

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins the episode of record `options["index"]`, or of one drawn from `self.np_random`.

        Returns: (S_0, info) with info = {"index": of the record, "turn": 0}.
        Raises: IndexError if there is no such record, ValueError for another option.
        """
        super().reset(seed=seed)
        unknown = set(options or ()) - {"index"}
        if unknown:
            raise ValueError(f"options may hold 'index', got {sorted(map(str, unknown))[0]!r}")
        index = (options or {}).get("index")
        self._index = int(self.np_random.integers(len(self.records))) if index is None else self._known(index)
        self._state = as_text("prompt", self.records[self._index].prompt, self.observation_space)
        self._turn = 0
        self._over = False
        return self._state, self._info()

    def _known(self, index: Any) -> int:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(f"options['index'] must be an integer, got {type(index).__name__}")
        if not 0 <= index < len(self.records):
            raise IndexError(f"options['index'] must be in [0, {len(self.records)}), got {int(index)}")
        return int(index)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Takes one action: reward from g, next state from f.

        Raises: gymnasium.error.ResetNeeded without an episode under way; TypeError or ValueError if the
            action, the state that f returned, or the reward that g returned is not what it has to be.
        """
        if self._over or self._index is None:
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is under way")
        action = as_text("action", action, self.action_space)
        record = self.records[self._index]
        reward = _number(self.reward(self._state, action, record))
        self._state = as_text(
            "the state from transition", self.transition(self._state, action, record), self.observation_space
        )
        self._turn += 1
        out_of_turns = self._turn >= self.max_turns
        terminated = out_of_turns if self.terminal is None else bool(self.terminal(self._state, record))
        self._over = terminated or out_of_turns
        return self._state, reward, terminated, self._over and not terminated, self._info()

    def clone(self) -> "TextEnv":
        """An independent copy that goes on from here: same state, turn and random numbers; shared records."""
        other = copy.copy(self)
        other.observation_space = copy.deepcopy(self.observation_space)
        other.action_space = copy.deepcopy(self.action_space)
        other._np_random = copy.deepcopy(self._np_random)
        return other

    def _info(self) -> dict[str, Any]:
        return {"index": self._index, "turn": self._turn}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the result of reward must be a number, got {type(value).__name__}") from error
