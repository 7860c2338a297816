"""What reward functions say beside their rewards: numbers to log, columns for the samples, counts."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainerState:
    """How far a training is, as transformers' TrainerState calls it: `trainer_state` of reward functions.

    Attributes:
        global_step: finished training steps; in a rollout those before it, in an evaluation its own included.
        max_steps: training steps in all.
        epoch: prompts of the finished steps / training records.
        is_world_process_zero, is_local_process_zero: whether this process is the first of all, and of its machine.
    """

    global_step: int
    max_steps: int
    epoch: float
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True


class Notes:
    """What functions say about a call of `rows` rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._metrics: dict[str, list[float]] = {}
        self._extra: dict[str, list[Any]] = {}
        self._counts: dict[str, list[float]] = {}

    def logs(self, label: str) -> dict[str, Callable[..., None]]:
        """`log_metric`, `log_extra` and `log_count` for the function of that name."""
        count = functools.partial(self._count, label)
        return {"log_metric": self._metric, "log_extra": self._column, "log_count": count}

    def means(self) -> dict[str, float]:
        """Of what `log_metric` got, by name."""
        return {name: sum(values) / len(values) for name, values in dict(self._metrics).items()}

    def columns(self, row: int) -> Mapping[str, Any]:
        """What `log_extra` got for a row."""
        return {name: column[row] for name, column in dict(self._extra).items()}

    def counts(self, row: int) -> Mapping[str, float]:
        """What `log_count` got for a row."""
        return {name: column[row] for name, column in dict(self._counts).items()}

    def _metric(self, name: str, value: float) -> None:
        number = _finite("log_metric", name, value)
        self._metrics.setdefault(name, []).append(number)

    def _column(self, column: str, values: Sequence[Any]) -> None:
        given = self._rows("log_extra", column, values)
        self._extra[str(column)] = [v if isinstance(v, (str, int, float)) else str(v) for v in given]

    def _count(self, label: str, name: str, values: Sequence[float]) -> None:
        given = self._rows("log_count", name, values)
        self._counts[f"rewards/{label}/{name}"] = [_finite("log_count", name, value) for value in given]

    def _rows(self, log: str, name: str, values: Any) -> list[Any]:
        given = None if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__") else list(values)
        if given is None or len(given) != self.rows:
            raise ValueError(f"{log} needs {self.rows} values for {name!r}, got {values!r:.60}")
        return given


def _finite(log: str, name: str, value: Any) -> float:
    number = as_number(value)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{log} needs a finite number for {name!r}, got {value!r:.60}")
    return number


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_number(value: Any) -> float | None:
    """What a function gave as a float; None if it is no number, such as a text."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except Exception:  # too large, several numbers, or whatever an object does
        return None
