"""A Gymnasium environment of texts: S_t = f(S_{t-1}, A_{t-1}, I), R_t = g(S_t, A_t, I, T)."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium

from .calls import is_async
from .notes import TrainerState, as_number
from .record import Record, check_messages, rendered
from .reward_functions import (
    Action,
    Payment,
    RewardFunction,
    WeightedRewards,
    needs_care,
    nothing_applies,
)
from .reward_model import RewardModel
from .rewards import exact_match
from .spaces import UnicodeText, as_text

Transition = Callable[[str, str, Record], str]
Reward = Callable[[str, str, Record], float]
Terminal = Callable[[str, Record], bool]
Step = tuple[str, float, bool, bool, dict[str, Any]]


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
        records: the tasks, at least one. Shared between clones, never written to. Prompts of messages have one
            turn, and need `rendered` before an episode.
        transition: f(state, action, record) -> next state. Called after every action, the last one too.
        reward: g(state, action, record) -> number; `state` is the one in which the action was taken; NaN and
            infinity are handed on. Or a function in another form of `RewardFunction` (TRL's, `async def`, marked
            with `@reward`), a `RewardFunction`, `WeightedRewards`, or a list of such functions. An episode needs a
            reward: such functions may give None for a turn, and then add nothing, but not all for all turns.
        max_turns: actions in an episode, at least 1.
        terminal: terminal(next_state, record) -> bool, asked after every transition.
        max_length: longest state or action in characters.
    Raises: ValueError for no records and numbers below 1, TypeError for what is no `Record`, integer or function.

    To be pickled, f, g and `terminal` must be importable functions. `AsyncVectorEnv` needs
    `shared_memory=False`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        transition: Transition = append,
        reward: Reward | RewardFunction | WeightedRewards | Sequence[Any] = exact_match,
        max_turns: int = 1,
        terminal: Terminal | None = None,
        max_length: int = 1 << 20,
    ) -> None:
        if isinstance(records, (str, bytes)) or not hasattr(records, "__len__"):
            raise TypeError(f"records must be a list of Record objects, got {type(records).__name__}")
        if not len(records):
            raise ValueError("records must hold at least one record, got none")
        wrong = next((record for record in records if not isinstance(record, Record)), None)
        if wrong is not None:
            raise TypeError(f"records must hold Record objects, got {type(wrong).__name__}")
        talks = [i for i, record in enumerate(records) if not isinstance(record.prompt, str)]
        for i in talks:
            if not isinstance(records[i].prompt, (list, tuple)):
                problem = f"must be a text or a list of messages, got {type(records[i].prompt).__name__}"
                raise TypeError(f"records[{i}].prompt {problem}")
            check_messages(f"records[{i}].prompt", records[i].prompt)
        for name, value in (("max_turns", max_turns), ("max_length", max_length)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_turns > 1 and any(record.conversation is not None for record in records):
            raise ValueError(f"max_turns must be 1 for prompts of messages, got {max_turns}")
        for name, function in (("transition", transition), ("terminal", terminal)):
            if not callable(function) and (name, function) != ("terminal", None):
                raise TypeError(f"{name} must be a function, got {type(function).__name__}")
            if is_async(function):
                raise TypeError(f"{name} must be a plain function, got an asynchronous one")
        self.records = records
        self.transition = transition
        self.reward = _as_reward(reward)
        several = isinstance(self.reward, WeightedRewards)
        self._columns = tuple(dict.fromkeys(key for r in records for key in r.metadata)) if several else ()
        self.max_turns = max_turns
        self.terminal = terminal
        self.observation_space = UnicodeText(max_length)
        self.action_space = UnicodeText(max_length)
        self._index: int | None = None
        self._state = ""
        self._turn = 0
        self._over = True
        self._paid = False

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begins the episode of record `options["index"]`, or of one drawn from `self.np_random`.

        Returns: (S_0, info) with info = {"index": of the record, "turn": 0}.
        Raises: IndexError if there is no such record, ValueError for another option, TypeError for messages that
            were not rendered.
        """
        super().reset(seed=seed)
        unknown = set(options or ()) - {"index"}
        if unknown:
            raise ValueError(f"options may hold 'index', got {sorted(map(str, unknown))[0]!r}")
        index = (options or {}).get("index")
        self._index = int(self.np_random.integers(len(self.records))) if index is None else self._known(index)
        prompt = self.records[self._index].prompt
        if not isinstance(prompt, str):
            raise TypeError("prompt must be a text: env.rendered(tokenizer) makes one of messages")
        self._state = as_text("prompt", prompt, self.observation_space)
        self._turn = 0
        self._over = self._paid = False
        return self._state, self._info()

    def _known(self, index: Any) -> int:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(f"options['index'] must be an integer, got {type(index).__name__}")
        if not 0 <= index < len(self.records):
            raise IndexError(f"options['index'] must be in [0, {len(self.records)}), got {int(index)}")
        return int(index)

    def step(self, action: str) -> Step:
        """Takes one action: reward from g, next state from f.

        Returns: (state, reward, terminated, truncated, info); with several rewards info["rewards"] has each by
            name, None where it does not apply, info["logged"] and info["extra"] what they logged;
            info["counts"], if there is anything to count, holds numbers such as {"rewards/judge/failed": 1}.
        Raises: gymnasium.error.ResetNeeded without an episode under way; TypeError or ValueError if the
            action, the state that f returned, or the reward that g returned is not what it has to be.
        """
        return _together([self], [action], None)[0]

    @staticmethod
    def step_many(
        envs: "Sequence[TextEnv]", actions: Sequence[str], ids: Sequence[list[int]] | None = None
    ) -> list[Step]:
        """`step` of many environments, with the same results; for clones of one environment, whose class does not
        replace `step`, rewards that are batched or asynchronous are called for all of them at once, and so are
        tools.

        Args:
            ids: tokens of the actions, for functions that ask for `completion_ids`; None: not known.
        Raises: what `step` raises; then no environment's state has changed, if it comes from an action or reward.
        """
        if len({env._alike() for env in envs}) != 1 or type(envs[0]).step is not TextEnv.step:
            return [env.step(action) for env, action in zip(envs, actions, strict=True)]
        return _together(envs, actions, ids)

    def _taken(self, action: Any, ids: list[int] | None) -> Action:
        if self._over or self._index is None:
            raise gymnasium.error.ResetNeeded("call reset() before step(): no episode is under way")
        text = as_text("action", action, self.action_space)
        return Action(self._state, text, self.records[self._index], ids, self._columns)

    def _step(self, action: Action, payment: Payment, state: str, counts: dict[str, float]) -> Step:
        self._state = as_text("the state from transition", state, self.observation_space)
        self._turn += 1
        over, out_of_turns = self._ended(action), self._turn >= self.max_turns
        terminated = out_of_turns if over is None else over
        self._over = terminated or out_of_turns
        self._paid = self._paid or payment.total is not None
        if self._over and not self._paid:
            raise nothing_applies(action.record)
        info = self._info()
        if payment.parts:
            info["rewards"] = payment.parts
        if payment.logged:
            info["logged"] = dict(payment.logged)
        if payment.extra:
            info["extra"] = dict(payment.extra)
        counts = {**counts, **payment.counts, **{f"rewards/{name}/failed": 1 for name in payment.failed}}
        if counts:
            info["counts"] = counts
        return self._state, payment.total or 0.0, terminated, self._over and not terminated, info

    def _alike(self) -> tuple[Any, ...]:
        """Equal for environments that may be stepped together."""
        return type(self), id(self.reward)

    @classmethod
    def _moved(cls, envs: "Sequence[Any]", actions: Sequence[Action]) -> list[tuple[str, dict[str, float]]]:
        """The next state of every environment, and what info["counts"] adds."""
        return [(env.transition(*action[:3]), {}) for env, action in zip(envs, actions, strict=True)]

    def _ended(self, action: Action) -> bool | None:
        """Whether the task is over; None: with the last turn."""
        return None if self.terminal is None else bool(self.terminal(self._state, action.record))

    def rendered(self, tokenizer: Any) -> "TextEnv":
        """The environment with texts in place of messages, by the tokenizer's chat template.

        Raises: ValueError in one line without a chat template, the reward models' included, or if one refuses.
        """
        if all(isinstance(record.prompt, str) for record in self.records):
            return self
        for one in getattr(self.reward, "functions", ()):
            if isinstance(one.function, RewardModel):
                one.function.check_template()
        other = self.clone()
        other.records = [rendered(record, tokenizer) for record in self.records]
        return other

    def inform(self, state: TrainerState | None) -> None:
        """Tell reward functions in TRL's form, those of clones included, how far the training is."""
        if isinstance(self.reward, WeightedRewards):
            self.reward.trainer_state = state

    def clone(self) -> "TextEnv":
        """An independent copy that goes on from here: same state, turn and random numbers; shared records."""
        other = copy.copy(self)
        other.observation_space = copy.deepcopy(self.observation_space)
        other.action_space = copy.deepcopy(self.action_space)
        other._np_random = copy.deepcopy(self._np_random)
        return other

    def _info(self) -> dict[str, Any]:
        return {"index": self._index, "turn": self._turn}


def _as_reward(reward: Any) -> Any:
    if isinstance(reward, (list, tuple)):
        return WeightedRewards(reward)
    if isinstance(reward, RewardFunction):
        return WeightedRewards([reward])
    if not callable(reward):
        raise TypeError(f"reward must be a function or a list of functions, got {type(reward).__name__}")
    if isinstance(reward, WeightedRewards) or not needs_care(reward):
        return reward
    return WeightedRewards([reward])


def _together(envs: Sequence[TextEnv], actions: Sequence[str], ids: Sequence[list[int]] | None) -> list[Step]:
    """A step of environments that are alike."""
    known = [None] * len(envs) if ids is None else ids
    taken = [env._taken(a, i) for env, a, i in zip(envs, actions, known, strict=True)]
    payments = _payments(envs[0].reward, taken)
    moved = type(envs[0])._moved(envs, taken)
    steps = zip(envs, taken, payments, moved, strict=True)
    return [env._step(action, payment, *where) for env, action, payment, where in steps]


def _payments(reward: Any, actions: Sequence[Action]) -> list[Payment]:
    if isinstance(reward, WeightedRewards):
        return reward.many(actions)
    return [Payment(_number(reward(*action[:3])), {}, ()) for action in actions]


def _number(value: Any) -> float:
    number = as_number(value)
    if number is None:
        raise TypeError(f"the result of reward must be a number, got {type(value).__name__}")
    return number
