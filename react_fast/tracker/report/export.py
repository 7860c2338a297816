"""The report as JSON and GraphML."""

import json
import math
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from ..records import EffectRow, HeatMap, KeyFeature, PositionMean
from .text import storable, visible

VERSION = 2
TABLES: dict[str, type] = {
    "features": KeyFeature,
    "by_position": PositionMean,
    "heat_maps": HeatMap,
    "effects": EffectRow,
}
_INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


def write_json(report: Any, path: Path) -> None:
    """One object: version, meta, four tables. NaN is null, infinities are "Infinity" and "-Infinity"."""
    tables = {name: [asdict(row) for row in getattr(report, name)] for name in TABLES}
    content = {"version": VERSION, "meta": dict(report.meta), **tables}
    text = json.dumps(encoded(content), ensure_ascii=False, allow_nan=False, indent=1)
    path.write_text(storable(text) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, as the arguments of CausalityReport."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path must name a causality report, got no JSON in {path}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"path must name a causality report of version {VERSION}, got {found!r} in {path}")
    missing = [name for name in ("meta", *TABLES) if name not in content]
    if missing:
        raise ValueError(f"path must name a causality report, got one without {missing[0]!r} in {path}")
    tables = {name: [_decoded(kind, row) for row in content[name]] for name, kind in TABLES.items()}
    return {"meta": content["meta"], **tables}


def write_graphml(report: Any, path: Path) -> None:
    """Tokens of the examples and the features as nodes. Edges: attribution of a response token to a token before
    it (in a long text, of the outcome to a token), the effect of an action on the example's outcome, the mean of a
    feature on the outcome over all of training. Zeros and missing numbers have no edge."""
    import networkx

    graph = networkx.MultiDiGraph(name="react_fast causality report")
    for example, heat_map in enumerate(report.heat_maps):
        _add_heat_map(graph, example, heat_map)
    for effect in report.effects:
        if math.isfinite(effect.mean):
            _add_effect(graph, effect)
    for i, feature in enumerate(report.features):
        _add_feature(graph, f"f{i}", feature)
    for row in report.by_position:
        graph.add_node(f"p{row.position}", label=str(row.position), role="position", **_known(asdict(row)))
    graph.graph["meta"] = json.dumps(encoded(dict(report.meta)), ensure_ascii=False)
    nodes = (values for _, values in graph.nodes(data=True))
    edges = (values for *_, values in graph.edges(data=True))
    for values in (graph.graph, *nodes, *edges):
        values.update(storable(values, xml=True))
    networkx.write_graphml(graph, path)


def _add_heat_map(graph: Any, example: int, heat_map: HeatMap) -> None:
    prompt = len(heat_map.prompt_tokens)
    for place, token in enumerate([*heat_map.prompt_tokens, *heat_map.response_tokens]):
        role = "prompt" if place < prompt else "response"
        values = {"label": visible(token), "role": role, "example": example, "position": place}
        graph.add_node(_node(example, place), **values)
    edges = [
        (place, _node(example, prompt + i), score)
        for i, row in enumerate(heat_map.scores)
        for place, score in enumerate(row[: prompt + i])
    ]
    edges += [(place, _outcome(graph, example), score) for place, score in enumerate(heat_map.totals)]
    for place, target, score in edges:
        if score and math.isfinite(score):
            graph.add_edge(_node(example, place), target, kind="attribution", weight=float(score))


def _add_effect(graph: Any, effect: EffectRow) -> None:
    source = _node(effect.example, effect.start)
    if effect.end - effect.start > 1 or source not in graph:
        source = f"e{effect.example}.a{effect.start}-{effect.end}"
        label = visible("".join(effect.tokens))
        graph.add_node(source, label=label, role="action", example=effect.example, position=effect.start)
    numbers = {"weight": effect.mean, "low": effect.low, "high": effect.high, "samples": effect.samples}
    numbers |= {} if effect.p_value is None else {"p_value": effect.p_value}
    target = _outcome(graph, effect.example)
    graph.add_edge(source, target, kind="effect", significant=effect.significant, **_known(numbers))


def _add_feature(graph: Any, node: str, feature: KeyFeature) -> None:
    values = asdict(feature)
    name, windows, ids, kind, mean = (values.pop(key) for key in ("name", "windows", "ids", "kind", "mean"))
    told = {"role": values.pop("family"), "ids": " ".join(map(str, ids)), "name": visible(name)}
    graph.add_node(node, label=told["name"], windows=json.dumps(encoded(windows)), **told)
    graph.add_node("outcome", label="outcome", role="outcome")
    graph.add_edge(node, "outcome", kind=f"mean {kind}", **_known({"weight": mean, **values}))


def _outcome(graph: Any, example: int) -> str:
    name = f"e{example}.outcome"
    graph.add_node(name, label="outcome", role="outcome", example=example)
    return name


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """Without the numbers that are not finite, which GraphML readers refuse."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _node(example: int, place: int) -> str:
    return f"e{example}.t{place}"


def encoded(value: Any) -> Any:
    """The value as JSON has it: lists for tuples, null for NaN, words for infinities."""
    if isinstance(value, dict):
        return {key: encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _INFINITE.get(value)
    return value


def _decoded(kind: Any, value: Any) -> Any:
    """The inverse of `encoded` for a record, a tuple or a number of this type."""
    if is_dataclass(kind):
        types = get_type_hints(kind)
        values = {field.name: _decoded(types[field.name], value[field.name]) for field in fields(kind)}
        return cast(Any, kind)(**values)
    if get_origin(kind) is tuple:
        return tuple(_decoded(get_args(kind)[0], item) for item in value)
    if kind is float:
        return math.nan if value is None else float(value)
    return value
