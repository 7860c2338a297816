"""What `react-fast train --help` says about every key: type and range, default, meaning; read from the tree."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .config import RunConfig
from .section import Section

_KINDS = {"string": "text", "number": "number", "integer": "integer", "null": "none", "object": "mapping"}


class Key(NamedTuple):
    """One key of a section, every part as it is printed."""

    name: str
    values: str
    default: str
    meaning: str


def sections(root: type[Section] = RunConfig) -> Iterator[tuple[str, str, list[Key]]]:
    """(dotted name, "" at the top; what it is for; its keys) of every section of a tree, in the tree's order."""
    schema = root.model_json_schema()
    yield from _sections("", schema, schema.get("$defs", {}))


def _sections(
    name: str, section: Mapping[str, Any], parts: Mapping[str, Any]
) -> Iterator[tuple[str, str, list[Key]]]:
    keys, inner = [], []
    for key, field in section["properties"].items():
        if "$ref" in field:
            inner.append((f"{name}.{key}".lstrip("."), parts[field["$ref"].rpartition("/")[2]]))
        else:
            inner += [(f"{name}.{key}.NAME", parts[one]) for one in _named(field)]
            meaning = " ".join(field["description"].split())
            keys.append(Key(key, values(field), shown(field.get("default")), meaning))
    yield name, " ".join(section.get("description", "").split()), keys
    for path, part in inner:
        yield from _sections(path, part, parts)


def _named(field: Mapping[str, Any]) -> list[str]:
    """Sections that a mapping's entries may be."""
    entries = field.get("additionalProperties", {})
    choices = entries.get("anyOf", []) if isinstance(entries, Mapping) else []
    return [one["$ref"].rpartition("/")[2] for one in choices if "$ref" in one]


def values(field: Mapping[str, Any]) -> str:
    """What a field of a JSON schema takes: "integer >= 1", "number in [0, 1)", "adamw | adam | sgd"."""
    if "anyOf" in field:
        return " | ".join(values(one) for one in field["anyOf"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    kind = field.get("type", "anything")
    if kind == "boolean":
        return "true | false"
    if kind == "array":
        return f"list of {values(field.get('items', {}))}"
    return f"{_KINDS.get(kind, kind)}{_range(field)}"


def _range(field: Mapping[str, Any]) -> str:
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    left = f"[{low:g}" if low is not None else f"({above:g}" if above is not None else ""
    right = f"{high:g}]" if high is not None else f"{below:g})" if below is not None else ""
    if left and right:
        return f" in {left}, {right}"
    if left:
        return f" >= {low:g}" if low is not None else f" > {above:g}"
    return f" <= {right[:-1]}" if high is not None else f" < {right[:-1]}" if right else ""


def shown(default: Any) -> str:
    """A value as YAML takes it."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return f"[{', '.join(map(shown, default))}]"
    return f"{default:g}" if isinstance(default, float) else str(default).replace("\n", "\\n")


def algorithms() -> Iterator[tuple[str, str, str]]:
    """(name, what it is in one line, its options with their defaults) of every algorithm."""
    from .algorithms import ALGORITHMS

    for name, kind in ALGORITHMS.items():
        fields: Any = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        options = ", ".join(f"{field.name}: {shown(field.default)}" for field in fields)
        yield name, " ".join((kind.__doc__ or "").split("\n\n")[0].split()), options or "none"


def show(console: Console | None = None) -> None:
    """Print all of it."""
    console = console or Console()
    for name, purpose, keys in sections():
        rows = [(f"--{key.name}", *key[1:]) if not name else key for key in keys]
        title = f"--{name}.KEY" if name else "Keys of the tree's top"
        _print(console, f"{title}: {purpose}", ("key", "values", "default", "meaning"), rows)
    title = "--algorithm.options {key: value, ...}: fields of the class of --algorithm.name"
    _print(console, title, ("name", "algorithm", "options: defaults"), algorithms())


def _print(console: Console, title: str, columns: tuple[str, ...], rows: Any) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    widths = (None, 22, 24, None) if len(columns) == 4 else (None, 32, None)
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(column, no_wrap=not i, overflow="fold", max_width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(Text(title))
    console.print(table)
