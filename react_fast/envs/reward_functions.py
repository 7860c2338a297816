"""Rewards from users' functions: of a row or of a batch, plain or asynchronous, one or several with weights."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .calls import Arguments, Calls, cause, is_async, run
from .notes import Notes, TrainerState, as_number, is_number

if TYPE_CHECKING:
    from .record import Record

_MARK = "_react_fast_reward"
_ON_ERROR = "'raise', 'skip' or a finite number"


class RewardError(ValueError):
    """A reward function failed or gave no reward: its name, the row and the cause in one line."""


class Action(NamedTuple):
    """One row of a call.

    Attributes:
        state: the one that the action was taken in.  text: the action.  record: its record.
        ids: the action's tokens; None: not known.
        columns: keys of the metadata of all records, this one or others.
    """

    state: str
    text: str
    record: "Record"
    ids: list[int] | None = None
    columns: tuple[str, ...] = ()

    @property
    def prompt(self) -> Any:
        """The state, or the messages that it was rendered from."""
        said = self.record.conversation
        return self.state if said is None else said

    @property
    def completion(self) -> Any:
        """The action, or the message that answers the record's messages."""
        answer = [{"role": "assistant", "content": self.text}]
        return self.text if self.record.conversation is None else answer


class Payment(NamedTuple):
    """What an action earned.

    Attributes:
        total: sum of weight x reward over the functions that apply; None if none does.
        parts: reward of every function by name, without its weight; None where it does not apply or was skipped.
        failed: names of functions whose call failed and was skipped or replaced.
        logged: means of what the functions gave to `log_metric` in the call that paid this action.
        extra: what they gave to `log_extra` for this action, by column.
        counts: what they gave to `log_count` for this action, by `rewards/<function>/<name>`.
    """

    total: float | None
    parts: dict[str, float | None]
    failed: tuple[str, ...]
    logged: Mapping[str, float] = {}
    extra: Mapping[str, Any] = {}
    counts: Mapping[str, float] = {}


@dataclass(frozen=True)
class RewardFunction:
    """A function and how it is called.

    Args:
        function: one of
            g(state, action, record) -> number or None;
            f(prompts, completions, **columns) -> list of numbers or None, TRL's form, known by the name
                `completions`: prompts are the states that the actions were taken in, completions the actions, or,
                where the record's prompt is messages, those and [{"role": "assistant", "content": action}]; the
                columns are lists: the records' metadata by their keys (None where a record lacks one),
                `reference`, `completion_ids` (the actions' tokens, None where not known); beside them
                `trainer_state`, a `TrainerState` (None outside of a Trainer),
                `log_metric(name, number)`, whose means over a call are logged, and `log_extra(column, values)`,
                whose values, one a row, stand beside the samples; only those that the function names, or all
                if it takes `**`. If it names `log_count`: `log_count(name, numbers)`, one a row, whose sums are
                logged as `rewards/<function>/<name>`;
            f(states, actions, records) -> list, with `batched`.
            Each may be `async def`. None: the function does not apply to the row.
        weight: factor in the total.
        name: in logs, `rewards/<name>/mean`; None: the function's own.
        timeout, retries, concurrency: of one call, see `Calls`.
        on_error: what a row gets whose call failed in the end, or gave NaN or infinity: "raise": a RewardError;
            "skip": nothing, as if the function did not apply; a number: that. The last two are counted in
            `rewards/<name>/failed`. A batched call fails for all its rows.
        batched: whether it takes lists; None: if it has TRL's form.
    Raises: TypeError or ValueError, naming the argument.
    """

    function: Callable[..., Any]
    weight: float = 1.0
    name: str | None = None
    timeout: float | None = None
    retries: int = 0
    on_error: str | float = "raise"
    batched: bool | None = None
    concurrency: int = 16

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be callable, got {type(self.function).__name__}")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise TypeError(f"name must be a text or None, got {self.name!r}")
        if not (self.batched is None or isinstance(self.batched, bool)):
            raise TypeError(f"batched must be True, False or None, got {self.batched!r}")
        if not is_number(self.weight):
            raise ValueError(f"weight must be a finite number, got {self.weight!r}")
        known = isinstance(self.on_error, str) and self.on_error in ("raise", "skip")
        if not known and not is_number(self.on_error):
            raise ValueError(f"on_error must be {_ON_ERROR}, got {self.on_error!r}")
        _ = self.calls

    @property
    def calls(self) -> Calls:
        return Calls(self.timeout, self.retries, self.concurrency)

    @property
    def label(self) -> str:
        if self.name is not None:
            return self.name
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return getattr(function, "__name__", type(function).__name__)

    def asked(self, actions: Sequence[Action], given: Mapping[str, Any]) -> list[Arguments]:
        """The arguments of every call that is needed: one call for all rows, or one for each.

        Args: given: what a function in TRL's form can ask for beside the columns, by name.
        """
        if self._is_trl:
            return [self._columns(actions, given)]
        rows = [(a.state, a.text, a.record) for a in actions]
        return [tuple(map(list, zip(*rows, strict=True)))] if self.batched else list(rows)

    def answered(self, results: list[Any], actions: Sequence[Action]) -> list[tuple[float | None, bool]]:
        """(reward, whether the call failed) of every row, from the results of the calls.

        Raises: RewardError.
        """
        if self.batched or self._is_trl:
            results = self._spread(results[0], len(actions))
        return [self._checked(value, row, actions[row]) for row, value in enumerate(results)]

    @property
    def _is_trl(self) -> bool:
        return self.batched is not False and "completions" in _parameters(self.function)

    def _columns(self, actions: Sequence[Action], given: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call in TRL's form."""
        names = _parameters(self.function)
        keys = list(dict.fromkeys(key for a in actions for key in (*a.columns, *a.record.metadata)))
        columns: dict[str, Any] = {str(key): [a.record.metadata.get(key) for a in actions] for key in keys}
        columns |= {
            "prompts": [a.prompt for a in actions],
            "completions": [a.completion for a in actions],
            "reference": [a.record.reference for a in actions],
            "completion_ids": [a.ids for a in actions],
            **given,
        }
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
        unknown_to_trl = ("log_count",)
        wanted = {key for key in columns if key in names or (takes_all and key not in unknown_to_trl)}
        return {key: value for key, value in columns.items() if key in wanted}

    def _spread(self, result: Any, rows: int) -> list[Any]:
        if isinstance(result, Exception):
            return [result] * rows
        try:
            values = [] if isinstance(result, (str, bytes, Mapping, Set)) else list(result)
        except TypeError:
            values = []
        if len(values) == rows:
            return values
        wrong = f"must give a list of {rows} rewards, got {type(result).__name__} {result!r:.40}"
        return [ValueError(wrong)] * rows

    def _checked(self, value: Any, row: int, action: Action) -> tuple[float | None, bool]:
        if value is None:
            return None, False
        if not isinstance(value, Exception):
            number = as_number(value)
            if number is not None and math.isfinite(number):
                return number, False
            value = ValueError(f"must give a finite number or None, got {str(value)[:60]!r}")
        if self.on_error == "raise":
            where = f"row {row}, prompt {str(action.record.prompt)[:40]!r}"
            raise RewardError(f"reward {self.label!r} failed on {where}: {cause(value)}") from value
        return (None if self.on_error == "skip" else float(self.on_error)), True


class WeightedRewards:
    """A reward of several: the sum of weight x reward over the functions that apply to the row.

    Called with (state, action, record) it gives the total. In a TextEnv every part is kept too, and the trainer
    logs `rewards/<name>/mean`, `rewards/<name>/std` (TRL's names) and, if calls failed, `rewards/<name>/failed`.

    Args:
        functions: functions in a form of `RewardFunction`, marked with `@reward` or not, or RewardFunctions.
        weights: a weight for each, in place of its own; None: its own.
    Attributes:
        trainer_state: what functions in TRL's form get as such; a Trainer keeps it current.
    Raises: TypeError or ValueError for none, for another number of weights, and for two of one name.
    """

    def __init__(self, functions: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        if isinstance(functions, (str, bytes)) or not isinstance(functions, Sequence):
            raise TypeError(f"functions must be a list of functions, got {type(functions).__name__}")
        if not functions:
            raise ValueError("functions must hold at least one function, got none")
        if weights is not None and not isinstance(weights, (list, tuple)):
            raise TypeError(f"weights must be a list of numbers or None, got {type(weights).__name__}")
        if weights is not None and len(weights) != len(functions):
            raise ValueError(f"weights must be {len(functions)} like functions, got {len(weights)}")
        given = [None] * len(functions) if weights is None else weights
        self.functions = tuple(as_reward(f, weight=w) for f, w in zip(functions, given, strict=True))
        self.trainer_state: TrainerState | None = None
        labels = [f.label for f in self.functions]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"functions must have names of their own, got {label!r} twice")

    def __call__(self, state: str, action: str, record: "Record") -> float:
        """The total.

        Raises: RewardError if a function fails, or if none applies.
        """
        payment = self.many([Action(state, action, record)])[0]
        if payment.total is None:
            raise nothing_applies(record)
        return payment.total

    def many(self, actions: Sequence[Action]) -> list[Payment]:
        """What every action earned. A function is called once for all of them if it is batched; asynchronous
        functions, and those with a timeout, run at one time.

        Raises: RewardError if a function fails that may not.
        """
        if not actions:
            return []
        notes = Notes(len(actions))
        jobs = [
            (one.calls, one.function, one.asked(actions, self._given(notes, one.label)))
            for one in self.functions
        ]
        answers = zip(self.functions, run(jobs), strict=True)
        found = zip(*(function.answered(result, actions) for function, result in answers), strict=True)
        logged = notes.means()
        return [self._payment(row, logged, notes.columns(i), notes.counts(i)) for i, row in enumerate(found)]

    def _given(self, notes: Notes, label: str) -> dict[str, Any]:
        """What a function in TRL's form can ask for that is no column of the records."""
        return {**notes.logs(label), "trainer_state": self.trainer_state}

    def _payment(self, row: Sequence[tuple[float | None, bool]], *said: Mapping[str, Any]) -> Payment:
        named = list(zip(self.functions, row, strict=True))
        due = [function.weight * value for function, (value, _) in named if value is not None]
        parts = {function.label: value for function, (value, _) in named}
        failed = tuple(function.label for function, (_, wrong) in named if wrong)
        total = _total(due) if due else None
        return Payment(total, parts, failed, *said)


def reward(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Marks a function as a reward: `@reward` or `@reward(weight=2.0, timeout=5, retries=2, on_error="skip")`.

    The function stays as it is, and can be called and pickled; the options, those of `RewardFunction`, hold
    wherever it is used as a reward.

    Raises: TypeError or ValueError for a wrong option, where the function is defined.
    """
    if function is None:
        return functools.partial(reward, **options)
    RewardFunction(function, **options)
    try:
        setattr(function, _MARK, options)
    except AttributeError:
        kind = type(function).__name__
        raise TypeError(f"function must be one that can be marked, got {kind}; use RewardFunction") from None
    return function


def as_reward(function: Any, weight: float | None = None) -> RewardFunction:
    """The function with the options of its mark, if any; with another weight if one is given."""
    if not isinstance(function, RewardFunction):
        function = RewardFunction(function, **getattr(function, _MARK, {}))
    if weight is None:
        return function
    return RewardFunction(**{**vars(function), "weight": weight})


def is_reward(function: Any) -> bool:
    """Whether it is marked with `@reward`."""
    return isinstance(getattr(function, _MARK, None), dict)


def needs_care(function: Any) -> bool:
    """Whether a call is more than g(state, action, record) -> number."""
    known = isinstance(function, RewardFunction) or is_reward(function) or is_async(function)
    return known or "completions" in _parameters(function)


def nothing_applies(record: "Record") -> RewardError:
    """The error for an episode that no function rewarded."""
    return RewardError(
        f"no reward applies to the record with prompt {str(record.prompt)[:40]!r}: all gave None"
    )


def _total(due: Sequence[float]) -> float:
    try:
        total = math.fsum(due)
    except (OverflowError, ValueError):
        total = math.nan
    if not math.isfinite(total):
        raise RewardError(f"the sum of weight x reward must be finite, got {total} of {due!r:.60}")
    return total


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled functions have none
        return {}
