"""JSONL files of a run: one record a line, flushed at once, cut back when a run resumes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL file that Reporter wrote; a line torn by a kill is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = _parsed(line)
        if record is not None:
            records.append(record)
    return records


def append(file: TextIO, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def drop_torn_line(path: Path) -> None:
    """A process killed while writing leaves a last line without its end."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)


def cut_after(path: Path, phase: str, step: int) -> None:
    """Cut the file before the first record of `phase` beyond `step`: what follows came later."""
    kept = 0
    with path.open("rb") as file:
        for line in file:
            record = _parsed(line) or {}
            if record.get("phase") == phase and record.get("step", 0) > step:
                break
            kept += len(line)
    os.truncate(path, kept)


def _parsed(line: str | bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
