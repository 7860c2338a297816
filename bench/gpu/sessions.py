"""pytest under bench.gpu.watch, begun again behind the test that took its process or GPU context with it."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import process
from .events import CRASHED, left, log

OPTIONS = ["-p", "bench.gpu.watch", "-p", "no:cacheprovider", "-q", "--no-header", "--tb=line"]
OPTIONS += ["--continue-on-collection-errors"]  # a file whose import fails costs its own tests alone
MOST = 10  # processes; what crashes more often is better looked at


def run(stage: str, words: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """All tests that `words` (files and options) select, until the stage's time is over."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *words]
    for number in range(MOST):
        given = {
            "REACT_FAST_GPU_STAGE": stage,
            "REACT_FAST_GPU_SESSION": f"{os.getpid()}.{number}",
            **(environment or {}),
        }
        state = process.run(command, max(1.0, left()), cwd=Path.cwd(), environment=given, log=log())
        # A signal's number is negative.
        if not state.startswith(("failed with code -", f"failed with code {CRASHED}")) or left() < 1:
            return
