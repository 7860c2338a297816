"""A run's record, made of its events: `run.json`, one schema for this suite, the tables and the tests."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import launches, wheels
from .events import brief

SCHEMA = 1
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "accelerate", "trl", "liger-kernel", "cut-cross-entropy",
    "quack-kernels", "verl",
)  # fmt: skip
Event = dict[str, Any]


def _commit(root: Path) -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes); None where there is no git or no repository."""
    try:
        words = [["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]]
        told = [
            subprocess.run(["git", *w], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
            for w in words
        ]
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("REACT_FAST_COMMIT"), None
    return told[0], bool(told[1])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any] | None:
    """The GPU, or None; asked in the suite's own process, which takes no memory on it."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        "name": found.name,
        "capability": f"{10 * major + minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def libraries() -> dict[str, Any]:
    """Versions of what is installed, and what each stage lacks."""
    return {"versions": _versions(), "missing": wheels.missing()}


def header(root: Path, minutes: float, rehearsed: bool) -> dict[str, Any]:
    commit, dirty = _commit(root)
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit,
        "uncommitted_changes": dirty,
        "rehearsed": rehearsed,
        "device": None if rehearsed else device(),
        **libraries(),
        "minutes": minutes,
    }


def _of(events: Sequence[Event], stage: str, kind: str) -> list[Event]:
    chosen = (e for e in events if e["stage"] == stage and e.get("kind") == kind)
    return [{k: v for k, v in e.items() if k not in ("stage", "kind")} for e in chosen]


def tests(events: Sequence[Event]) -> dict[str, Any]:
    """Counts, the reason of every failure, and for every kernel the tests that launched it."""
    told = _of(events, "tests", "test")
    ended = {t["test"] for t in told}
    crashed = dict.fromkeys(b["test"] for b in _of(events, "tests", "began") if b["test"] not in ended)
    counts = {o: sum(t["outcome"] == o for t in told) for o in ("passed", "failed", "skipped")}
    of_kernel: dict[str, dict[str, int]] = {name: {"passed": 0, "failed": 0} for name in launches.names()}
    for test in told:
        for name in test["kernels"]:
            if test["outcome"] in of_kernel.get(name, {}):
                of_kernel[name][test["outcome"]] += 1
    return {
        **counts,
        "failures": [{"test": t["test"], "why": t.get("why", "")} for t in told if t["outcome"] == "failed"],
        "not_ended": list(crashed),
        "not_collected": list({f["file"]: f for f in _of(events, "tests", "file")}.values()),
        "out_of_time": sum(t.get("why") == "no time left" for t in told),
        "kernels": of_kernel,
        "never_launched": [name for name, found in of_kernel.items() if not any(found.values())],
    }


def made(head: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """The record so far."""
    return {
        **head,
        "stages": {
            e["name"]: {k: e[k] for k in ("state", "seconds")} for e in events if e["stage"] == "suite"
        },
        "ceilings": {c["what"]: c["rate"] for c in _of(events, "ceilings", "rate")},
        "tests": tests(events),
        "sanitizer": _of(events, "sanitizer", "check"),
        "sanitizer_tools": _of(events, "sanitizer", "tool"),
        "cases": _of(events, "measure", "case"),
        "unmeasured": [
            {"test": t["test"], "why": brief(t.get("why", ""))}
            for t in (*_of(events, "measure", "test"), *_of(events, "measure", "file"))
            if t.get("outcome") != "passed"
        ],
        "training": _of(events, "training", "contestant"),
        "tuned": _of(events, "autotune", "kernel"),
    }


def dumped(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"
