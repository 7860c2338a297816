"""Tables from accumulated moments."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ops.moments import RunningMoments
from .features import POSITIONS, Features
from .records import KeyFeature, PositionMean, Window
from .statistics import benjamini_hochberg, student_interval, student_p_value, welch

Table = dict[str, np.ndarray]
_NUMBERS = ("mean", "standard_error", "low", "high")
_DRIFT = ("drift", "drift_low", "drift_high", "drift_p")
# Rounding of an effective count.
_SLACK = 1e-9


def key_features(
    features: Features,
    kind: str,
    families: Sequence[str],
    k: int,
    min_count: int,
    *,
    name: Callable[[str, Sequence[int]], str],
) -> list[KeyFeature]:
    """The k features whose 95% interval is farthest from 0, then those without one; see
    CausalityTracker.key_features.

    Args:
        name: of a feature, from its family and its ids.
    """
    windows = features.drift.windows()
    halves = [_columns(moments) for moments in _halves([moments for _, _, moments in windows])]
    tables = [_with_drift(features, family, min_count, halves) for family in families]
    if not tables:
        return []
    owner = np.concatenate([np.full(len(table["id"]), i) for i, table in enumerate(tables)])
    table = {column: np.concatenate([one[column] for one in tables]) for column in tables[0]}
    p_value = student_p_value(table["mean"], table["standard_error"], table["effective_count"])
    # Observations without any spread are one text's own number again and again: they tell nothing of others.
    same = ~(table["standard_error"] > 0)
    for values in (p_value, table["low"], table["high"]):
        values[same] = np.nan
    table["drift_p"][~(table["drift_high"] > table["drift_low"])] = np.nan
    significant, drifted = (_significant(values) for values in (p_value, table["drift_p"]))
    # Negative where 0 is inside: then by how far inside.
    distance = np.where(same, -np.inf, np.maximum(table["low"], -table["high"]))
    found = []
    for i in np.argsort(-distance, kind="stable")[:k]:
        family = families[owner[i]]
        ids = _ids(features, family, int(table["id"][i]))
        found.append(
            KeyFeature(
                kind=kind,
                family=family,
                name=name(family, ids),
                ids=ids,
                p_value=float(p_value[i]),
                significant=bool(significant[i]),
                effective_count=float(table["effective_count"][i]),
                drift_significant=bool(drifted[i]),
                windows=_windows(windows, int(table["column"][i])),
                drift=float(table["drift"][i]),
                drift_low=float(table["drift_low"][i]),
                drift_high=float(table["drift_high"][i]),
                **_row(table, i),
            )
        )
    return found


def _significant(p_value: np.ndarray) -> np.ndarray:
    """[n] bool, after Benjamini-Hochberg over those that are known."""
    found, known = np.zeros(len(p_value), dtype=bool), np.isfinite(p_value)
    found[known] = benjamini_hochberg(p_value[known])
    return found


def position_means(moments: RunningMoments, min_count: int) -> list[PositionMean]:
    """Mean and interval of every position with enough observations, in order."""
    table = _table(moments, min_count)
    return [PositionMean(position=int(place), **_row(table, i)) for i, place in enumerate(table["id"])]


def _with_drift(features: Features, family: str, min_count: int, halves: Sequence[Table]) -> Table:
    """Columns of a family's features with enough observations, and of how they changed over training.

    "column" is a feature's place in `features.drift`, -1 if it is not followed there.
    """
    table = _table(getattr(features, f"by_{family}"), min_count)
    ids, first = table["id"], features.first.get(family, 0)
    table["column"] = first + ids
    if family == "token_at_position":
        table["column"] = np.full(len(ids), -1)
    elif family == "position":
        table["column"] = np.where(ids < POSITIONS, first + ids, -1)
    elif family == "token":
        keys = features.tokens.keys.cpu().numpy()
        slot = features.tokens.slot(features.by_token.count.new_tensor(ids)).cpu().numpy()
        table["column"] = np.where(keys[slot] == ids, first + slot, -1)
    table |= dict(zip(_DRIFT, np.full((4, len(ids)), np.nan), strict=True))
    if len(halves) == 2:
        place = np.maximum(table["column"], 0)
        earlier, later = (
            [half[name][place] for name in ("mean", "standard_error", "count")] for half in halves
        )
        for name, values in zip(_DRIFT, welch(earlier, later), strict=True):
            table[name] = np.where(table["column"] >= 0, values, np.nan)
    return table


def _halves(windows: Sequence[RunningMoments]) -> list[RunningMoments]:
    """Moments of all features in the earlier and the later half of the windows; none if there is only one."""
    middle = len(windows) // 2
    found = []
    for part in (windows[:middle], windows[middle:]) if middle else ():
        whole = RunningMoments(len(part[0].count), part[0].count.device)
        for moments in part:
            whole.merge(moments)
        found.append(whole)
    return found


def _windows(windows: Sequence[tuple[int, int, RunningMoments]], column: int) -> tuple[Window, ...]:
    """A feature's windows that saw it at least once."""
    found = []
    for first, last, moments in windows if column >= 0 else ():
        count, mean = int(moments.count[column]), float(moments.mean[column])
        if count:
            error = np.array(float(moments.standard_error[column]))
            bounds = student_interval(np.array(mean), error, np.array(count))
            low, high = map(float, bounds) if count > 1 else (np.nan, np.nan)
            found.append(Window(first, last, count, mean, low, high))
    return tuple(found)


def _ids(features: Features, family: str, number: int) -> tuple[int, ...]:
    """Ids of the tokens, or the feature's own number."""
    if family == "token_at_position":
        return features.place_ids(number)
    return features.span_ids(number) if family == "span" else (number,)


def _columns(moments: RunningMoments) -> Table:
    names = ("count", "effective_count", "mean", "standard_error")
    return {name: getattr(moments, name).cpu().numpy().astype(float) for name in names}


def _table(moments: RunningMoments, min_count: int) -> Table:
    """Columns of the ids with enough observations."""
    columns = _columns(moments)
    ids = np.flatnonzero(columns["effective_count"] >= min_count - _SLACK)
    table = {"id": ids, **{name: values[ids] for name, values in columns.items()}}
    table["low"], table["high"] = student_interval(
        table["mean"], table["standard_error"], table["effective_count"]
    )
    return table


def _row(table: Table, i: int) -> dict[str, Any]:
    return {"count": int(table["count"][i]), **{name: float(table[name][i]) for name in _NUMBERS}}
