"""Tables from accumulated moments."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..ops.moments import RunningMoments
from .records import KeyToken, PositionMean
from .statistics import benjamini_hochberg, student_interval, student_p_value


def key_tokens(
    moments: RunningMoments, kind: str, k: int, min_count: int, *, text: Callable[[int], str]
) -> list[KeyToken]:
    """The k ids whose 95% interval is farthest from 0; see CausalityTracker.key_tokens."""
    table = _table(moments, min_count)
    p_value = student_p_value(table["mean"], table["standard_error"], table["count"])
    significant = benjamini_hochberg(p_value)
    # Negative where 0 is inside: then by how far inside.
    distance = np.maximum(table["low"], -table["high"])
    return [
        KeyToken(
            token_id=int(table["id"][i]),
            token=text(int(table["id"][i])),
            kind=kind,
            p_value=float(p_value[i]),
            significant=bool(significant[i]),
            **_row(table, i),
        )
        for i in np.argsort(-distance, kind="stable")[:k]
    ]


def position_means(moments: RunningMoments, min_count: int) -> list[PositionMean]:
    """Mean and interval of every position with enough observations, in order."""
    table = _table(moments, min_count)
    return [PositionMean(position=int(place), **_row(table, i)) for i, place in enumerate(table["id"])]


def _table(moments: RunningMoments, min_count: int) -> dict[str, np.ndarray]:
    """Columns of the ids with enough observations."""
    names = ("count", "mean", "standard_error")
    columns = {name: getattr(moments, name).cpu().numpy() for name in names}
    ids = np.flatnonzero(columns["count"] >= min_count)
    table = {"id": ids, **{name: values[ids].astype(float) for name, values in columns.items()}}
    table["low"], table["high"] = student_interval(table["mean"], table["standard_error"], table["count"])
    return table


def _row(table: dict[str, np.ndarray], i: int) -> dict[str, Any]:
    numbers = {name: float(table[name][i]) for name in ("mean", "standard_error", "low", "high")}
    return {"count": int(table["count"][i]), **numbers}
