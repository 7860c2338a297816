"""The report as JSON, GraphML and Parquet."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..records import EffectRow, HeatMap, KeyToken, PositionMean
from .text import visible

VERSION = 1
TABLES: dict[str, type] = {
    "key_tokens": KeyToken,
    "by_position": PositionMean,
    "heat_maps": HeatMap,
    "effects": EffectRow,
}
_INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


def write_json(report: Any, path: Path) -> None:
    """One object: version, meta, four tables. NaN is null, infinities are "Infinity" and "-Infinity"."""
    tables = {name: [asdict(row) for row in getattr(report, name)] for name in TABLES}
    content = {"version": VERSION, "meta": dict(report.meta), **tables}
    path.write_text(
        json.dumps(_encoded(content), ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8"
    )


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, as the arguments of CausalityReport."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"path must name a causality report of version {VERSION}, got {found!r} in {path}")
    tables = {name: [_decoded(kind, row) for row in content[name]] for name, kind in TABLES.items()}
    return {"meta": content["meta"], **tables}


def write_graphml(report: Any, path: Path) -> None:
    """Tokens of the examples as nodes. Edges: attribution of a response token to a token before it, and the
    effect of deleting an action on the example's outcome. Zeros and missing numbers have no edge."""
    import networkx

    graph = networkx.MultiDiGraph(name="react_fast causality report")
    for example, heat_map in enumerate(report.heat_maps):
        tokens = [*heat_map.prompt_tokens, *heat_map.response_tokens]
        prompt = len(heat_map.prompt_tokens)
        for place, token in enumerate(tokens):
            role = "prompt" if place < prompt else "response"
            values = {"label": visible(token), "role": role, "example": example, "position": place}
            graph.add_node(_node(example, place), **values)
        for i, row in enumerate(heat_map.scores):
            for place, score in enumerate(row[: prompt + i]):
                if score and math.isfinite(score):
                    ends = _node(example, place), _node(example, prompt + i)
                    graph.add_edge(*ends, kind="attribution", weight=float(score))
    for effect in report.effects:
        if not math.isfinite(effect.mean):
            continue
        outcome = f"e{effect.example}.outcome"
        graph.add_node(outcome, label="outcome", role="outcome", example=effect.example)
        source = _node(effect.example, effect.start)
        if effect.end - effect.start > 1 or source not in graph:
            source = f"e{effect.example}.a{effect.start}-{effect.end}"
            label = visible("".join(effect.tokens))
            graph.add_node(source, label=label, role="action", example=effect.example, position=effect.start)
        numbers = {"weight": effect.mean, "low": effect.low, "high": effect.high}
        numbers |= {} if effect.p_value is None else {"p_value": effect.p_value}
        known = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        graph.add_edge(source, outcome, kind="effect", significant=effect.significant, **known)
    networkx.write_graphml(graph, path)


def write_parquet(report: Any, path: Path) -> None:
    """One long table; `record` says what a row is: key_token, position, heat_map (a score) or effect.
    A column that a record does not have is null. The schema's metadata holds `meta` as JSON."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "to_parquet needs pyarrow, which is not installed: pip install 'react-fast[report]'"
        ) from error
    integer, real, text = pyarrow.int64(), pyarrow.float64(), pyarrow.string()
    columns = dict.fromkeys(("record", "kind", "token"), text)
    columns |= dict.fromkeys(("token_id", "example", "start", "end", "target", "count"), integer)
    columns |= dict.fromkeys(("mean", "standard_error", "low", "high", "p_value"), real)
    columns |= {name: pyarrow.bool_() for name in ("in_response", "significant")}
    meta = json.dumps(_encoded(dict(report.meta)), ensure_ascii=False, allow_nan=False)
    schema = pyarrow.schema(list(columns.items()), metadata={"react_fast": meta})
    parquet.write_table(pyarrow.Table.from_pylist(list(_long(report)), schema=schema), path)


def _long(report: Any) -> Iterator[dict[str, Any]]:
    for token in report.key_tokens:
        yield {"record": "key_token", **asdict(token)}
    for row in report.by_position:
        place = {"start": row.position, "end": row.position + 1}
        yield {"record": "position", "kind": "attribution", **place, **asdict(row)}
    for example, heat_map in enumerate(report.heat_maps):
        tokens = [*heat_map.prompt_tokens, *heat_map.response_tokens]
        prompt = len(heat_map.prompt_tokens)
        for i, scores in enumerate(heat_map.scores):
            for source, score in enumerate(scores[: prompt + i]):
                yield {
                    "record": "heat_map", "kind": "attribution", "example": example, "token": tokens[source],
                    "start": source, "end": source + 1, "target": prompt + i, "mean": score,
                    "in_response": source >= prompt,
                }  # fmt: skip
    for effect in report.effects:
        values = {**asdict(effect), "token": "".join(effect.tokens), "count": effect.samples}
        yield {"record": "effect", "kind": "effect", **values}


def _node(example: int, place: int) -> str:
    return f"e{example}.t{place}"


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _INFINITE.get(value)
    return value


def _decoded(kind: type, row: dict[str, Any]) -> Any:
    values = {field.name: row[field.name] for field in fields(kind)}
    for field in fields(kind):
        if field.type is float:
            values[field.name] = _real(values[field.name])
        elif isinstance(values[field.name], list):
            values[field.name] = _tuples(values[field.name])
    return kind(**values)


def _real(value: Any) -> float:
    return math.nan if value is None else float(value)


def _tuples(values: list[Any]) -> tuple[Any, ...]:
    """Lists as tuples; inside a nested list, which holds scores, null is NaN."""
    return tuple(tuple(_real(item) for item in row) if isinstance(row, list) else row for row in values)
