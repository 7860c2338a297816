"""Memory and race checks: every op once as it is, which compiles the kernels, and once under each checker."""

import shutil
import sys
import tempfile
from pathlib import Path

from . import process
from .events import brief, left, rehearsing, tell

# A call of CUDA's that fails is torch's or Triton's to report; some are meant to.
PLAIN, TOOLS = "none", {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
CODE = 86  # what the checker ends with if it found something
CUDA = "/usr/local/cuda/bin"  # where it is beside a toolkit that is not on the path


def _run(tool: str, words: list[str], seconds: float) -> tuple[str, str]:
    """(outcome, what is known of it)"""
    command = [*words, sys.executable, "-m", "bench.gpu.touch", tool]
    # Every allocation for itself, so that an address beyond a tensor belongs to nobody.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        state = process.run(command, seconds, cwd=Path.cwd(), environment=environment, log=log)
        text = log.read_text(errors="replace")
    print(text, flush=True)
    found = [line for line in text.splitlines() if line.startswith("========= ")]
    errors = [line for line in found if "Error" in line or "Invalid" in line or "hazard" in line.lower()]
    if state == f"failed with code {CODE}":
        return "found something", brief("; ".join(errors[:5]), 1000)
    if state == "done":
        return "clean", ""
    return state, brief(errors[-1] if errors else text.splitlines()[-1])


def main() -> None:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA)
    sanitizer = None if rehearsing() else found
    tools = (PLAIN, *TOOLS) if sanitizer else (PLAIN,)
    for number, tool in enumerate(tools):
        words = [str(sanitizer), "--tool", tool, "--error-exitcode", str(CODE), *TOOLS.get(tool, ())]
        words = words if tool != PLAIN else []
        outcome, why = _run(tool, words, (left() - 1) / (len(tools) - number))
        tell("sanitizer", kind="tool", tool=tool, outcome=outcome, why=why)


if __name__ == "__main__":
    main()
