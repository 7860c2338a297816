"""One line of JSON a fact, appended the moment it is known: a kill loses only the case that was running."""

import json
import os
import time
from pathlib import Path
from typing import Any

# Where the processes of a run write, and when they must be done (seconds since the epoch).
FILE, DEADLINE, REHEARSAL = "REACT_FAST_GPU_EVENTS", "REACT_FAST_GPU_DEADLINE", "REACT_FAST_GPU_REHEARSAL"
# Comma-separated kernel files: only these; none: all. The run's folder.
ONLY, OUT = "REACT_FAST_GPU_ONLY", "REACT_FAST_GPU_OUT"
CRASHED = 75  # the code of a process that ends because its GPU context is lost


def tell(stage: str, file: Path | None = None, /, **facts: Any) -> None:
    """Append a fact of a stage to the run's file, or to `file`; nothing happens outside a run."""
    path = file or os.environ.get(FILE)
    if not path:
        return
    line = json.dumps({"stage": stage, **facts}, default=str) + "\n"
    place = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(place, line.encode())
    finally:
        os.close(place)


def told(file: Path) -> list[dict[str, Any]]:
    """Every whole line; the last one may have been cut off by a kill."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def left() -> float:
    """Seconds until the stage must be done; without end outside a run."""
    return float(os.environ.get(DEADLINE, "inf")) - time.time()


def rehearsing() -> bool:
    return os.environ.get(REHEARSAL, "0") != "0"


def only() -> list[str]:
    return [name for name in os.environ.get(ONLY, "").split(",") if name]


def log() -> Path:
    """Where processes of a stage print to."""
    return Path(os.environ.get(OUT, ".")) / "log.txt"


def brief(error: object, size: int = 200) -> str:
    """One line of a message."""
    return " ".join(str(error).split())[:size]


def replace(file: Path, text: str) -> None:
    """Whole or not at all."""
    scratch = file.with_name(file.name + ".new")
    scratch.write_text(text)
    os.replace(scratch, file)
