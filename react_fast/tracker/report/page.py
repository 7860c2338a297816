"""The report as one HTML page: what the template `page.html.j2` needs, and its rendering."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import jinja2

from ..records import KeyFeature
from .examples import examples
from .figures import Scale, curve, graph, scale_of, spark, trend, whisker
from .text import interval, number, probability, tick, visible

KINDS = {
    "return_effect": (
        "Causal effect on the return",
        "Interventional, measured by the credit while training: an episode’s return, less that with an action"
        " replaced (credit “causal”: by what the policy draws anew there; “shapley”: by nothing). Over the"
        " episodes whose rewards were the most surprising; positions count the response’s tokens from 0.",
    ),
    "effect": ("Effect", "Interventional: means over the interventions that were carried out."),
    "attribution": (
        "Attribution",
        "Observational: means over every training sequence that the tracker observed.",
    ),
}
_LABELS = {
    "every": "observed: one step in",
    "decay": "weight kept a step",
    "observed_calls": "micro-batches seen",
    "observed_tokens": "tokens observed",
    "interventions": "interventions",
    "return_effects": "effects on the return",
}
_KEY = ("token", "span", "position", "token_at_position")
# Of the graph.
_CAPTIONS = {
    "return_effect": "Effects on the return, measured by interventions while training",
    "effect": "Measured effects over all interventions",
    "attribution": "Attribution over all of training; no intervention was accumulated",
}
# Rows of a table, edges of a graph, panels of the drift, features in the summary.
ROWS, EDGES, PANELS, NAMED = 100, 14, 12, 8


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
    key = {kind: _of(report, kind, _KEY) for kind in KINDS}
    wide = [row for kind in KINDS for row in _of(report, kind, ("kind", "group"))]
    acted = {kind: _acted(features) for kind, features in key.items()}
    causes = next((features for features in acted.values() if features), [])
    return environment.get_template("page.html.j2").render(
        facts=[
            (_LABELS.get(name, str(name).replace("_", " ")), _fact(value))
            for name, value in report.meta.items()
        ],
        summary=_summary(causes),
        graph=graph([_cause(feature) for feature in causes[:EDGES]]),
        caption=_CAPTIONS[causes[0].kind] if causes else "",
        tables=[
            _table(*KINDS[kind], features)
            for kind, features in key.items()
            if features or kind != "return_effect"
        ],
        wide=[
            _table(title, "", [row for row in wide if row.kind == kind]) for kind, (title, _) in KINDS.items()
        ],
        panels=_panels([one for part in (acted, key) for features in part.values() for one in features]),
        examples=examples(report),
        curve=curve(report.by_position),
        positions=report.by_position,
    )


def named(feature: KeyFeature) -> str:
    """A feature's name as a reader sees it."""
    if feature.family in ("token", "span"):
        return visible(feature.name)
    if feature.family == "token_at_position":
        return f"{visible(feature.name)} at {feature.ids[1]}"
    return f"position {feature.name}" if feature.family == "position" else feature.name


def _of(report: Any, kind: str, families: Sequence[str]) -> list[KeyFeature]:
    return [one for one in report.features if one.kind == kind and one.family in families]


def _acted(features: Sequence[KeyFeature]) -> list[KeyFeature]:
    """Without positions, which cause nothing by themselves, and without places of a token that acts like it does
    everywhere."""
    known = {(one.ids, one.direction) for one in features if one.family == "token"}
    return [
        one
        for one in features
        if one.family != "position"
        and (one.family != "token_at_position" or (one.ids[:1], one.direction) not in known)
    ]


def _fact(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _summary(features: Sequence[KeyFeature]) -> list[dict[str, Any]]:
    """What reliably raises and what lowers the outcome, the most telling first."""
    found = []
    for direction, sign in (("raises", "pos"), ("lowers", "neg")):
        rows = [feature for feature in features if feature.direction == direction][:NAMED]
        top = max((abs(feature.mean) for feature in rows), default=0.0)
        items = [{**_cause(row), "strength": round(abs(row.mean) / top, 3)} for row in rows]
        found.append({"direction": direction, "sign": sign, "rows": items})
    return found if any(side["rows"] for side in found) else []


def _cause(feature: KeyFeature) -> dict[str, Any]:
    return {
        "text": named(feature),
        "mean": feature.mean,
        "low": feature.low,
        "high": feature.high,
        "sure": feature.significant,
        "kind": feature.kind,
    }


def _table(title: str, note: str, features: Sequence[KeyFeature]) -> dict[str, Any]:
    shown = features[:ROWS]
    scale = scale_of([row.mean for row in shown], [bound for row in shown for bound in (row.low, row.high)])
    rows = [
        {
            "feature": row,
            "text": named(row),
            "whisker": whisker(scale, row.mean, row.low, row.high),
            "spark": spark(row.windows),
        }
        for row in shown
    ]
    left = len(features) - len(shown)
    drift = any(math.isfinite(row.drift) for row in shown)
    return {"title": title, "note": note, "rows": rows, "left": left, "drift": drift, "ends": ends(scale)}


def ends(scale: Scale) -> dict[str, Any]:
    return {"low": scale.low, "high": scale.high, "zero": scale(0.0)}


def _panels(features: Sequence[KeyFeature]) -> list[dict[str, Any]]:
    """Features over training: those that changed most reliably first, then the most telling, in turn."""
    known = [one for one in features if len(one.windows) > 1]
    moved = sorted(
        (one for one in known if one.drift_significant),
        key=lambda one: -max(one.drift_low, -one.drift_high),
    )
    order: dict[int, KeyFeature] = {}
    for pair in zip_longest(moved, known):
        order |= {id(one): one for one in pair if one is not None}
    return [
        {"feature": one, "text": named(one), "trend": trend(one.windows)}
        for one in list(order.values())[:PANELS]
    ]
