"""Geometry of the drawings, in plain numbers; the template writes the SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import PositionMean, Window
from .text import tick

# A whisker may reach this many times as far as the farthest mean before it is cut off with an arrow.
_REACH = 3.0


@dataclass(frozen=True)
class Scale:
    """Linear map of [low, high], which holds 0, to 0..100."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    def cuts(self, value: float) -> bool:
        return not self.low <= value <= self.high


def scale_of(means: Iterable[float], bounds: Iterable[float] = (), *, reach: float = _REACH) -> Scale:
    """Scale that shows all means, and of their intervals as much as keeps the means apart."""
    finite = [value for value in means if math.isfinite(value)]
    reach *= max((abs(value) for value in finite), default=0.0)
    finite += [min(max(value, -reach), reach) for value in bounds if not math.isnan(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return Scale(-1.0, 1.0)
    margin = 0.04 * (high - low)
    return Scale(low - margin, high + margin)


def whisker(scale: Scale, mean: float, low: float, high: float) -> dict[str, Any] | None:
    """Places of the zero line, the dot and the interval; None without a mean."""
    if not math.isfinite(mean):
        return None
    known = not (math.isnan(low) or math.isnan(high))
    return {
        "zero": scale(0.0),
        "mean": scale(mean),
        "low": scale(low) if known else scale(mean),
        "high": scale(high) if known else scale(mean),
        "sign": sign(mean),
        "cut_low": known and scale.cuts(low),
        "cut_high": known and scale.cuts(high),
    }


def sign(value: float) -> str:
    """Class of a colour: pos, neg, zero or none."""
    if math.isnan(value):
        return "none"
    return "pos" if value > 0 else "neg" if value < 0 else "zero"


def ticks(scale: Scale, wanted: int = 6) -> list[float]:
    """Round numbers inside the scale, about `wanted` of them."""
    rough = (scale.high - scale.low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return [i * step for i in range(first, last + 1)]


def curve(rows: Sequence[PositionMean]) -> dict[str, Any] | None:
    """Line, band and axes of the mean by position; None without one. A missing position breaks the line."""
    rows = sorted((row for row in rows if math.isfinite(row.mean)), key=lambda row: row.position)
    if not rows:
        return None
    y = scale_of([row.mean for row in rows], [bound for row in rows for bound in (row.low, row.high)])
    first, last = rows[0].position, rows[-1].position
    x = Scale(first - 0.5, last + 0.5)
    pieces: list[list[PositionMean]] = []
    for row in rows:
        if pieces and row.position == pieces[-1][-1].position + 1:
            pieces[-1].append(row)
        else:
            pieces.append([row])
    step = max(1, math.ceil((last - first + 1) / 8))
    return {
        "zero": 100 - y(0.0),
        "lines": [_points(x, y, [(row.position, row.mean) for row in piece]) for piece in pieces],
        "bands": [_band(x, y, piece) for piece in pieces if len(piece) > 1],
        "dots": [
            {"x": x(row.position), "y": 100 - y(row.mean), "low": 100 - y(row.low), "high": 100 - y(row.high)}
            for piece in pieces
            if len(piece) == 1
            for row in [_bounded(piece[0])]
        ],
        "y_ticks": [{"at": 100 - y(value), "text": tick(value)} for value in ticks(y)],
        "x_ticks": [{"at": x(position), "text": str(position)} for position in range(first, last + 1, step)],
    }


def _band(x: Scale, y: Scale, rows: Sequence[PositionMean]) -> str:
    bounded = [_bounded(row) for row in rows]
    upper = [(row.position, row.high) for row in bounded]
    lower = [(row.position, row.low) for row in reversed(bounded)]
    return _points(x, y, upper + lower)


def _bounded(row: PositionMean) -> PositionMean:
    if math.isnan(row.low) or math.isnan(row.high):
        return PositionMean(row.position, row.count, row.mean, row.standard_error, row.mean, row.mean)
    return row


def _points(x: Scale, y: Scale, points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x(across)},{round(100 - y(up), 2)}" for across, up in points)


def graph(causes: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Edges from causes, one below the other, to their outcome; None without a cause.

    Args:
        causes: each with mean, low, high and `sure`.
    Returns: causes with the edge's sign, width and curve in a box of 100 by 10 for each cause.
    """
    causes = [cause for cause in causes if math.isfinite(cause["mean"])]
    if not causes:
        return None
    top = max(abs(cause["mean"]) for cause in causes)
    height = 10 * len(causes)
    rows = []
    for i, cause in enumerate(causes):
        share = abs(cause["mean"]) / top if top else 0.0
        start, end = 10 * i + 5, round(height / 2 + (10 * i + 5 - height / 2) * 0.12, 2)
        path = f"M0,{start} C55,{start} 55,{end} 100,{end}"
        rows.append({**cause, "sign": sign(cause["mean"]), "width": round(1 + 7 * share, 2), "path": path})
    return {"rows": rows, "height": height}


def trend(windows: Sequence[Window]) -> dict[str, Any]:
    """Line and band of a mean over training steps, with the numbers at its ends."""
    y = scale_of([w.mean for w in windows], [bound for w in windows for bound in (w.low, w.high)], reach=1.5)
    x = Scale(windows[0].first - 0.5, windows[-1].last + 0.5)
    middle = [(w.first + w.last) / 2 for w in windows]
    bounds = [(w.mean, w.mean) if math.isnan(w.low) else (w.low, w.high) for w in windows]
    upper = [(step, high) for step, (_, high) in zip(middle, bounds, strict=True)]
    lower = [(step, low) for step, (low, _) in zip(middle, bounds, strict=True)]
    return {
        "zero": round(100 - y(0.0), 2),
        "line": _points(x, y, [(step, w.mean) for step, w in zip(middle, windows, strict=True)]),
        "band": _points(x, y, [*upper, *reversed(lower)]),
        "low": y.low,
        "high": y.high,
        "first": windows[0].first,
        "last": windows[-1].last,
    }


def spark(windows: Sequence[Window]) -> str:
    """Points of a mean over training in a box of 100 by 100; none for fewer than two windows."""
    if len(windows) < 2:
        return ""
    y = scale_of([w.mean for w in windows])
    x = Scale(min(windows[0].first, 0), windows[-1].last)
    return _points(x, y, [((w.first + w.last) / 2, w.mean) for w in windows])
