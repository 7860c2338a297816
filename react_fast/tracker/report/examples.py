"""What the page shows of single texts: heat map, graph and table of effects."""

import math
from collections.abc import Sequence
from typing import Any

from ..records import EffectRow, HeatMap
from .figures import graph, scale_of, sign, whisker
from .text import interval, running, visible

# Numbers of all matrices that a page holds; later examples show their totals alone.
NUMBERS = 300_000
# Tokens that a browser lays out at once; bars of the overview, which only long texts have.
BLOCK, BARS = 250, 120
ROWS, EDGES = 100, 10


def examples(report: Any) -> list[dict[str, Any]]:
    """Every example with its heat map, its effects, or both."""
    found, room = [], NUMBERS
    of_example: dict[int, list[EffectRow]] = {}
    for row in report.effects:
        of_example.setdefault(row.example, []).append(row)
    for i in sorted({*range(len(report.heat_maps)), *of_example}):
        heat_map = report.heat_maps[i] if 0 <= i < len(report.heat_maps) else None
        rows = of_example.get(i, [])
        size = (
            0
            if heat_map is None
            else len(heat_map.scores) * len(heat_map.prompt_tokens + heat_map.response_tokens)
        )
        room -= size
        found.append(
            {
                "number": i + 1,
                "title": "" if heat_map is None else heat_map.title,
                "map": None if heat_map is None else _map(heat_map, rows, matrix=size > 0 and room >= 0),
                "effects": _effects(rows, [] if heat_map is None else heat_map.sums()) if rows else None,
            }
        )
    return found


def _map(heat_map: HeatMap, effects: Sequence[EffectRow], *, matrix: bool) -> dict[str, Any]:
    prompt = len(heat_map.prompt_tokens)
    tokens, totals = [*heat_map.prompt_tokens, *heat_map.response_tokens], heat_map.sums()
    top = max((abs(value) for value in totals if math.isfinite(value)), default=0.0)
    chips = [
        {
            "text": running(token),
            "sign": sign(total),
            "strength": _strength(total, top),
            "breaks": "\n" in token,
        }
        for token, total in zip(tokens, totals, strict=True)
    ]
    sides = [("Prompt", chips[:prompt], False), ("Response", chips[prompt:], matrix)]
    data = {
        "totals": [_rounded(total) for total in totals],
        # Row i: the P + i tokens before response token i. Four digits are more than a screen shows.
        "rows": [[_rounded(x) for x in row[: prompt + i]] for i, row in enumerate(heat_map.scores)]
        if matrix
        else [],
        "effects": [
            [
                row.start,
                row.end,
                *map(_rounded, (row.mean, row.low, row.high)),
                row.samples > 1,
                row.significant,
            ]
            for row in effects
        ],
    }
    return {
        "sides": [(name, list(_blocks(side)), choose) for name, side, choose in sides],
        "overview": _overview(totals, top) if len(tokens) > BLOCK else [],
        "tokens": len(tokens),
        "matrix": matrix,
        "top": top,
        "data": data,
    }


def _blocks(chips: Sequence[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    """Cut behind a line break where there is one in the block's second half."""
    found, begin = [], 0
    while begin < len(chips):
        end = begin + BLOCK
        breaks = [i for i in range(begin + BLOCK // 2, min(end, len(chips))) if chips[i]["breaks"]]
        end = breaks[-1] + 1 if breaks and end < len(chips) else end
        found.append(chips[begin:end])
        begin = end
    return found


def _overview(totals: Sequence[float], top: float) -> list[dict[str, Any]]:
    """The strongest token of each of equally long stretches."""
    step = math.ceil(len(totals) / BARS)
    found = []
    for begin in range(0, len(totals), step):
        part = range(begin, min(begin + step, len(totals)))
        place = max(part, key=lambda i: abs(totals[i]) if math.isfinite(totals[i]) else -1.0)
        found.append({"place": place, "sign": sign(totals[place]), "strength": _strength(totals[place], top)})
    return found


def _strength(value: float, top: float) -> float:
    return round(abs(value) / top, 3) if top and math.isfinite(value) else 0


def _rounded(score: float) -> float | None:
    return float(f"{score:.4g}") if math.isfinite(score) else None


def _effects(rows: Sequence[EffectRow], totals: Sequence[float]) -> dict[str, Any]:
    """The effects, the most telling first, beside the attribution of the same tokens."""
    ranked = sorted(rows, key=reliability, reverse=True)
    shown = ranked[:ROWS]
    scores = [_attributed(row, totals) for row in shown]
    scale = scale_of([row.mean for row in shown], [bound for row in shown for bound in (row.low, row.high)])
    beside = scale_of(scores)
    sampled = any(row.samples > 1 for row in rows)
    causes = [
        {
            "text": visible("".join(row.tokens)), "mean": row.mean, "low": row.low, "high": row.high,
            "sure": row.significant or row.samples < 2, "kind": "effect",
        }
        for row in ranked[:EDGES]
    ]  # fmt: skip
    return {
        "ends": {"low": scale.low, "high": scale.high},
        "beside_ends": {"low": beside.low, "high": beside.high},
        "sampled": sampled,
        "left": len(ranked) - len(shown),
        "graph": graph(causes),
        "rows": [
            {
                "row": row,
                "token": visible("".join(row.tokens)),
                "interval": interval(row.low, row.high) if row.samples > 1 else "not sampled",
                "effect": whisker(scale, row.mean, row.low, row.high),
                "attribution": score,
                "attribution_bar": whisker(beside, score, math.nan, math.nan),
            }
            for row, score in zip(shown, scores, strict=True)
        ],
    }


def reliability(row: EffectRow) -> float:
    """How far the interval is from 0; without one, the effect."""
    bounds = max(row.low, -row.high)
    return (
        bounds
        if row.samples > 1 and not math.isnan(bounds)
        else abs(row.mean)
        if row.mean == row.mean
        else -math.inf
    )


def _attributed(row: EffectRow, totals: Sequence[float]) -> float:
    inside = totals[row.start : row.end]
    return math.fsum(inside) if inside and all(map(math.isfinite, inside)) else math.nan
