"""The report as one HTML page: what the template `page.html.j2` needs, and its rendering."""

import math
from collections.abc import Sequence
from typing import Any

import jinja2

from ..records import EffectRow, HeatMap, KeyToken
from .figures import Scale, curve, scale_of, sign, whisker
from .text import interval, number, probability, tick, visible

_KINDS = (
    ("attribution", "Attribution by token", "Mean over every training sequence that the tracker observed."),
    ("effect", "Effect by token", "Mean over the interventions on single tokens that were carried out."),
)

_LABELS = {
    "every": "observed: one step in",
    "observed_calls": "micro-batches seen",
    "observed_tokens": "tokens observed",
    "interventions": "interventions on single tokens",
}


def render(report: Any) -> str:
    """The page of a CausalityReport as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {f.__name__: f for f in (number, tick, visible, interval, probability)}
    return environment.get_template("page.html.j2").render(
        facts=[
            (_LABELS.get(name, str(name).replace("_", " ")), _fact(value))
            for name, value in report.meta.items()
        ],
        examples=[_example(i, heat_map) for i, heat_map in enumerate(report.heat_maps)],
        effects=_effects(report),
        tables=[
            _table(kind, title, note, [token for token in report.key_tokens if token.kind == kind])
            for kind, title, note in _KINDS
        ],
        curve=curve(report.by_position),
        positions=report.by_position,
    )


def _fact(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _totals(heat_map: HeatMap) -> list[float]:
    """Attribution of the whole response to each token: sums of the columns; NaN if a number is missing."""
    return [_sum(column) for column in zip(*heat_map.scores, strict=True)]


def _sum(scores: Sequence[float]) -> float:
    return math.fsum(scores) if all(map(math.isfinite, scores)) else math.nan


def _example(index: int, heat_map: HeatMap) -> dict[str, Any]:
    prompt = len(heat_map.prompt_tokens)
    tokens = [*heat_map.prompt_tokens, *heat_map.response_tokens]
    totals = _totals(heat_map) or [math.nan] * prompt
    top = max((abs(value) for value in totals if math.isfinite(value)), default=0.0)
    chips = [
        {
            "place": place,
            "text": visible(token),
            "total": total,
            "sign": sign(total),
            "strength": round(abs(total) / top, 3) if top and math.isfinite(total) else 0,
            "breaks": "\n" in token,
        }
        for place, (token, total) in enumerate(zip(tokens, totals, strict=True))
    ]
    return {
        "number": index + 1,
        "title": heat_map.title,
        "prompt": chips[:prompt],
        "response": chips[prompt:],
        "top": top,
        # Row i: the P + i tokens before response token i. Four digits are more than a screen shows.
        "rows": [[_rounded(score) for score in row[: prompt + i]] for i, row in enumerate(heat_map.scores)],
    }


def _rounded(score: float) -> float | None:
    return float(f"{score:.4g}") if math.isfinite(score) else None


def _effects(report: Any) -> list[dict[str, Any]]:
    """The effects, grouped by example, beside the attribution of the same tokens."""
    totals = [_totals(heat_map) for heat_map in report.heat_maps]
    groups = []
    for example in sorted({row.example for row in report.effects}):
        rows = [row for row in report.effects if row.example == example]
        scores = totals[example] if 0 <= example < len(totals) else []
        groups.append({"number": example + 1, **_group(rows, [_attributed(row, scores) for row in rows])})
    return groups


def _attributed(row: EffectRow, totals: Sequence[float]) -> float:
    inside = totals[row.start : row.end]
    return _sum(inside) if inside else math.nan


def _group(rows: Sequence[EffectRow], attributed: Sequence[float]) -> dict[str, Any]:
    scale = scale_of([row.mean for row in rows], _bounds(rows))
    beside = scale_of(attributed)
    return {
        "ends": _ends(scale),
        "beside_ends": _ends(beside),
        "sampled": any(row.samples > 1 for row in rows),
        "rows": [
            {
                "row": row,
                "token": visible("".join(row.tokens)),
                "interval": interval(row.low, row.high) if row.samples > 1 else "not sampled",
                "effect": whisker(scale, row.mean, row.low, row.high),
                "attribution": score,
                "attribution_bar": whisker(beside, score, math.nan, math.nan),
            }
            for row, score in zip(rows, attributed, strict=True)
        ],
    }


def _table(kind: str, title: str, note: str, tokens: Sequence[KeyToken]) -> dict[str, Any]:
    scale = scale_of([token.mean for token in tokens], _bounds(tokens))
    rows = [
        {
            "token": token,
            "text": visible(token.token),
            "whisker": whisker(scale, token.mean, token.low, token.high),
        }
        for token in tokens
    ]
    return {"kind": kind, "title": title, "note": note, "rows": rows, "ends": _ends(scale)}


def _bounds(rows: Sequence[KeyToken] | Sequence[EffectRow]) -> list[float]:
    return [bound for row in rows for bound in (row.low, row.high)]


def _ends(scale: Scale) -> dict[str, Any]:
    return {"low": scale.low, "high": scale.high, "zero": scale(0.0)}
