"""The report as one long Parquet table."""

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..records import EffectRow, HeatMap, KeyFeature, PositionMean, Window
from .export import VERSION, encoded
from .text import storable

_OF_FEATURE = [field.name for field in fields(KeyFeature) if field.name != "windows"]
_OF_EFFECT = [field.name for field in fields(EffectRow)]
_OF_POSITION = [field.name for field in fields(PositionMean)]


def write_parquet(report: Any, path: Path) -> None:
    """One long table; `record` says what a row is: feature, window (of the feature with this `index`), position,
    token (of an example; its mean is the total, where that is all there is), score (of a heat map) or effect. A
    column that a record does not have is null. The schema's metadata holds `meta` and the titles as JSON."""
    pyarrow, parquet = _library()
    integer, real, text = pyarrow.int64(), pyarrow.float64(), pyarrow.string()
    columns = dict.fromkeys(("record", "kind", "family", "name"), text)
    columns |= dict.fromkeys(("index", "example", "start", "end", "target", "position"), integer)
    columns |= dict.fromkeys(("first", "last", "count", "samples"), integer)
    columns |= dict.fromkeys(("mean", "standard_error", "low", "high", "p_value", "effective_count"), real)
    columns |= dict.fromkeys(("drift", "drift_low", "drift_high"), real)
    columns |= dict.fromkeys(("in_response", "significant", "drift_significant"), pyarrow.bool_())
    columns |= {"ids": pyarrow.list_(integer), "tokens": pyarrow.list_(text)}
    about = {"version": VERSION, "meta": dict(report.meta), "titles": [one.title for one in report.heat_maps]}
    metadata = {"react_fast": storable(json.dumps(encoded(about), ensure_ascii=False, allow_nan=False))}
    schema = pyarrow.schema(list(columns.items()), metadata=metadata)
    rows = [storable(row) for row in _long(report)]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


def read_parquet(path: Path) -> dict[str, Any]:
    """What `write_parquet` wrote, as the arguments of CausalityReport."""
    _, parquet = _library()
    table = parquet.read_table(path)
    about = json.loads((table.schema.metadata or {}).get(b"react_fast", b"{}"))
    if about.get("version") != VERSION:
        raise ValueError(
            f"path must name a causality report of version {VERSION}, got {about.get('version')!r} in {path}"
        )
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("feature", "window", "position", "token", "score", "effect")
    }
    for row in table.to_pylist():
        rows[row["record"]].append(row)
    windows: dict[int, list[Window]] = {}
    for row in rows["window"]:
        windows.setdefault(row["index"], []).append(Window(**{f.name: row[f.name] for f in fields(Window)}))
    return {
        "meta": about["meta"],
        "features": [
            KeyFeature(
                **{**_part(row, _OF_FEATURE), "ids": tuple(row["ids"])}, windows=tuple(windows.get(i, ()))
            )
            for i, row in enumerate(rows["feature"])
        ],
        "by_position": [PositionMean(**_part(row, _OF_POSITION)) for row in rows["position"]],
        "heat_maps": [
            _heat_map(
                title, *([row for row in rows[name] if row["example"] == i] for name in ("token", "score"))
            )
            for i, title in enumerate(about["titles"])
        ],
        "effects": [
            EffectRow(**{**_part(row, _OF_EFFECT), "tokens": tuple(row["tokens"])}) for row in rows["effect"]
        ],
    }


def _long(report: Any) -> Iterator[dict[str, Any]]:
    for i, feature in enumerate(report.features):
        yield {"record": "feature", "index": i, **{name: getattr(feature, name) for name in _OF_FEATURE}}
        for window in feature.windows:
            yield {
                "record": "window",
                "index": i,
                "kind": feature.kind,
                "name": feature.name,
                **asdict(window),
            }
    for row in report.by_position:
        yield {"record": "position", "kind": "attribution", **asdict(row)}
    for example, heat_map in enumerate(report.heat_maps):
        tokens = [*heat_map.prompt_tokens, *heat_map.response_tokens]
        prompt = len(heat_map.prompt_tokens)
        totals = heat_map.totals or [None] * len(tokens)
        for place, token in enumerate(tokens):
            yield {
                "record": "token", "kind": "attribution", "example": example, "name": token, "start": place,
                "end": place + 1, "mean": totals[place], "in_response": place >= prompt,
            }  # fmt: skip
        for i, scores in enumerate(heat_map.scores):
            for source, score in enumerate(scores):
                yield {
                    "record": "score", "kind": "attribution", "example": example, "name": tokens[source],
                    "start": source, "end": source + 1, "target": prompt + i, "mean": score,
                    "in_response": source >= prompt,
                }  # fmt: skip
    for effect in report.effects:
        yield {"record": "effect", "kind": "effect", "name": "".join(effect.tokens), **asdict(effect)}


def _heat_map(title: str, tokens: list[dict[str, Any]], scores: list[dict[str, Any]]) -> HeatMap:
    prompt, response = (
        tuple(row["name"] for row in tokens if row["in_response"] == side) for side in (False, True)
    )
    totals = tuple(row["mean"] for row in tokens if row["mean"] is not None)
    rows: dict[int, list[float]] = {}
    for row in scores:
        rows.setdefault(row["target"], []).append(row["mean"])
    return HeatMap(prompt, response, tuple(map(tuple, rows.values())), title, totals)


def _part(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _library() -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow, which is not installed: pip install 'react-fast[report]'"
        ) from error
    return pyarrow, parquet
