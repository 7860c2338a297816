"""The benchmarks on the device: ours, the limit and the peers that are installed; a case is told when done."""

import sys
import time
from pathlib import Path

from . import process
from .events import DEADLINE, left, log, only, rehearsing

# Log-probs first, which most of a step's time goes to; then the rest by how much of a step they take.
FILES = ("logprob", "linear_logprob", "policy_loss", "advantage", "tokens", "q_learning", "attribution")
# Seconds that a contestant takes in a case at most; torch.compile takes minutes for a GAE loop unrolled over time.
SECONDS, LEAVE = "0.4", "not compiled and not memory"
# Peak memory of every contestant in a process of its own: after everything else.
MEMORY = ("linear_logprob", "memory")


def _pytest(file: str, wanted: str, seconds: float) -> None:
    command = [sys.executable, "-m", "pytest", f"bench/bench_{file}.py", "-k", wanted, "-q", "--no-header"]
    command += ["-p", "bench.gpu.watch", "-p", "no:cacheprovider", "--tb=line", "--benchmark-disable-gc"]
    deadline = str(time.time() + seconds)
    environment = {
        "REACT_FAST_GPU_STAGE": "measure", "REACT_FAST_BENCH_SECONDS": SECONDS, DEADLINE: deadline
    }  # fmt: skip
    if rehearsing():  # what torch.compile makes takes longer than everything else
        environment["REACT_FAST_BENCH_CONTESTANTS"] = "react_fast,torch,eager"
        environment["REACT_FAST_BACKEND"] = "triton"
    # The case that runs at the deadline may end.
    process.run(command, seconds + 5, cwd=Path.cwd(), environment=environment, log=log())


def main() -> None:
    names = only()
    files = [file for file in FILES if not names or file in names or (file == "tokens" and len(names) > 2)]
    for number, file in enumerate(files):
        if Path(f"bench/bench_{file}.py").exists() and left() > 1:
            _pytest(file, LEAVE, (left() - 6) / (len(files) - number))
    if MEMORY[0] in files and not rehearsing() and left() > 30:
        _pytest(*MEMORY, left() - 6)


if __name__ == "__main__":
    main()
