"""The report: what the tracker found, and the ways to look at it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..records import EffectRow, HeatMap, KeyFeature, PositionMean
from . import export, parquet
from .text import storable

Destination = str | PathLike[str]


@dataclass(frozen=True)
class CausalityReport:
    """What the tracker found.

    Attributes:
        features: tokens, spans, positions, kinds of actions and groups with their mean attribution or effect.
        by_position: mean attribution by place in the sequence.
        heat_maps: examples; an effect's `example` is an index into them.
        effects: of deleting actions of the examples.
        meta: what was tracked (model, steps, counts, ...); JSON values.
    Raises: ValueError in one line where a heat map's scores do not fit its tokens.
    """

    features: Sequence[KeyFeature] = ()
    by_position: Sequence[PositionMean] = ()
    heat_maps: Sequence[HeatMap] = ()
    effects: Sequence[EffectRow] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, heat_map in enumerate(self.heat_maps):
            rows = len(heat_map.response_tokens)
            columns = len(heat_map.prompt_tokens) + rows
            totals = len(heat_map.totals)
            if totals not in (0, columns):
                raise ValueError(f"heat_maps[{i}].totals must be [{columns}] or none, got [{totals}]")
            if totals and not heat_map.scores:
                continue
            if len(heat_map.scores) != rows or any(len(row) != columns for row in heat_map.scores):
                found = [len(heat_map.scores), *sorted({len(row) for row in heat_map.scores})]
                raise ValueError(f"heat_maps[{i}].scores must be [{rows}, {columns}], got {found}")

    def to_html(self, path: Destination) -> Path:
        """Writes one self-contained page, which loads nothing from anywhere."""
        from .page import render

        return _written(path, lambda place: place.write_text(storable(render(self)), encoding="utf-8"))

    def to_json(self, path: Destination) -> Path:
        """Writes everything as one JSON object; NaN is null. `from_json` reads it."""
        return _written(path, lambda place: export.write_json(self, place))

    def to_graphml(self, path: Destination) -> Path:
        """Writes the causal graph: tokens, features and outcomes are nodes, attributions and effects are edges."""
        return _written(path, lambda place: export.write_graphml(self, place))

    def to_parquet(self, path: Destination) -> Path:
        """Writes one long table, which `from_parquet` reads. Raises: ImportError without pyarrow."""
        return _written(path, lambda place: parquet.write_parquet(self, place))

    def show(self, *, limit: int = 20, console: Any = None) -> None:
        """Prints heat maps, key features and the examples' effects, `limit` rows each. Needs rich."""
        from .terminal import show

        show(self, limit=limit, console=console)

    @classmethod
    def from_json(cls, path: Destination) -> "CausalityReport":
        """The report that `to_json` wrote. Raises: ValueError for another version."""
        return cls(**export.read_json(Path(path)))

    @classmethod
    def from_parquet(cls, path: Destination) -> "CausalityReport":
        """The report that `to_parquet` wrote. Raises: ValueError for another; ImportError without pyarrow."""
        return cls(**parquet.read_parquet(Path(path)))


def _written(path: Destination, write: Any) -> Path:
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    write(place)
    return place
