"""Memory and race checks: every op once under compute-sanitizer, or once without it where there is none."""

import os
import shutil
import subprocess
import sys

from .events import brief, left, rehearsing, tell

TOOLS = ("memcheck", "racecheck")
CODE = 86  # what the sanitizer ends with if it found something


def _run(tool: str, words: list[str], seconds: float) -> tuple[str, str]:
    """(outcome, what is known of it)"""
    command = [*words, sys.executable, "-m", "bench.gpu.touch", tool]
    # Every allocation for itself, so that an address beyond a tensor belongs to nobody.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        return "ended by its time", ""
    print(done.stdout, done.stderr)
    found = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("========= ")]
    errors = [line for line in found if "Error" in line or "Invalid" in line or "hazard" in line.lower()]
    if done.returncode == CODE:
        return "found something", brief("; ".join(errors[:5]), 1000)
    if done.returncode:
        told = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return "failed", brief(errors[-1] if errors else told[-1] if told else done.returncode)
    return "clean", ""


def main() -> None:
    sanitizer = None if rehearsing() else shutil.which("compute-sanitizer")
    tools = TOOLS if sanitizer else ("none",)
    for number, tool in enumerate(tools):
        words = [sanitizer, "--tool", tool, "--error-exitcode", str(CODE)] if sanitizer else []
        outcome, why = _run(tool, words, (left() - 1) / (len(tools) - number))
        tell("sanitizer", kind="tool", tool=tool, outcome=outcome, why=why)


if __name__ == "__main__":
    main()
