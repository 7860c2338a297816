"""Records from a JSON Lines file, one object a line: `prompt`, and perhaps `reference` and `metadata`; or the two
answers of a preference, `chosen` and `rejected`.

`document` and `summary` are other names of prompt and reference.
"""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from .record import Record, check_messages

# field -> (accepted types, their name in an error)
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": ((str, list), "a string or a list of messages"),
    "reference": ((str, type(None)), "a string or null"),
    "chosen": ((str,), "a string"),
    "rejected": ((str,), "a string"),
    "metadata": ((dict,), "an object"),
}
_OTHER_NAMES = {"prompt": "document", "reference": "summary"}


def load_jsonl(path: str | PathLike[str]) -> list[Record]:
    """The records of a file, in its order. Empty lines are skipped; a byte order mark is allowed.

    Args:
        path: UTF-8 text, one JSON object a line:
            {"prompt": str, "reference": str or null, "metadata": object}, where the prompt may be messages, too,
            [{"role": str, "content": str}, ...], or
            {"document": str, "summary": str or null, "metadata": object}, or with
            {"chosen": str, "rejected": str} for a preference: a record with the chosen answer as reference and
            metadata["rejected"].
    Raises: FileNotFoundError or IsADirectoryError if there is no such file; ValueError naming file and line
        for a line that is no UTF-8, no JSON, no object, lacks `prompt`, or holds an unknown field, an empty
        prompt, one of `chosen` and `rejected` alone, or `reference` beside them; TypeError naming file and line
        for a field of the wrong type; ValueError for a file without records.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, a JSON Lines file was wanted")
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    records = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def _record(line: bytes, where: str) -> Record:
    fields = _object(line, where)
    for name, other in _OTHER_NAMES.items():
        if other in fields and name in fields:
            raise ValueError(f"{where}: fields {name!r} and {other!r} are the same, give one of them")
        if other in fields:
            fields[name] = fields.pop(other)
    unknown = sorted(fields.keys() - _FIELDS.keys())
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    if "prompt" not in fields:
        raise ValueError(f"{where}: field 'prompt' is missing")
    for name, value in fields.items():
        types, wanted = _FIELDS[name]
        if not isinstance(value, types):
            raise TypeError(f"{where}: field {name!r} must be {wanted}, got {type(value).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in _text(value)):
            raise ValueError(f"{where}: field {name!r} is no Unicode text: it holds half a surrogate pair")
    if isinstance(fields["prompt"], list):
        check_messages(f"{where}: field 'prompt'", fields["prompt"])
    if not fields["prompt"]:
        raise ValueError(f"{where}: field 'prompt' is empty")
    return Record(**(fields if {"chosen", "rejected"}.isdisjoint(fields) else _preference(fields, where)))


def _text(value: Any) -> str:
    """Every character of a field that must be text."""
    if isinstance(value, list):
        return "".join(
            str(part) for message in value if isinstance(message, dict) for part in message.values()
        )
    return value if isinstance(value, str) else ""


def _preference(fields: dict[str, Any], where: str) -> dict[str, Any]:
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise ValueError(f"{where}: field {name!r} is missing")
    if "reference" in fields:
        raise ValueError(f"{where}: field 'reference' must not stand beside 'chosen', which takes its place")
    metadata = {**fields.get("metadata", {}), "rejected": fields["rejected"]}
    return {"prompt": fields["prompt"], "reference": fields["chosen"], "metadata": metadata}


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8, byte {error.start + 1} is 0x{line[error.start]:02x}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: invalid JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(value).__name__}")
    return value
