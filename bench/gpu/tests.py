"""Every op's tests on the device, against the float64 reference; bench.gpu.watch tells the results."""

import importlib.util
import os
import re
from pathlib import Path

from . import sessions
from .events import left, only, rehearsing

FOLDER = Path("tests")
# A test that takes longer hangs: the slowest compiles a few dozen kernels.
SECONDS = 120
WORKERS = 8


def files() -> list[str]:
    """Test files that use the fixture `backend` and belong to an op, not to a trainer or another library."""
    found = [
        file
        for file in sorted(FOLDER.glob("test_*.py"))
        if re.search(r"def \w+\([^)]*\bbackend\b", file.read_text())
        and not re.search("integrations|trainer|bench", file.name)
    ]
    names = only()
    return [str(file) for file in found if not names or any(file.stem == f"test_{name}" for name in names)]


def main() -> None:
    options = []
    # The kernels are compiled on the CPU, and that takes most of the time.
    workers = 0 if rehearsing() else min(WORKERS, (os.cpu_count() or 2) // 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        options += ["-n", str(workers), "--dist", "load"]
    if importlib.util.find_spec("pytest_timeout"):
        options += [f"--timeout={min(SECONDS, max(10, int(left())))}"]
    if chosen := files():
        sessions.run("tests", [*options, *chosen])


if __name__ == "__main__":
    main()
