"""The benchmarks on the device: ours, the limit and the peers that are installed; a case is told when done."""

from . import sessions
from .events import left, only, rehearsing

FILES = ("logprob", "linear_logprob", "policy_loss", "advantage", "tokens", "q_learning", "attribution")
# Seconds that a contestant takes in a case at most; torch.compile takes minutes for a GAE loop unrolled over time.
SECONDS, LEAVE = "0.4", "not compiled and not memory"


def main() -> None:
    names = only()
    files = [f"bench/bench_{file}.py" for file in FILES if not names or file in names]
    environment = {"REACT_FAST_BENCH_SECONDS": SECONDS}
    if rehearsing():  # what torch.compile makes takes longer than everything else
        environment |= {
            "REACT_FAST_BENCH_CONTESTANTS": "react_fast,torch,eager",
            "REACT_FAST_BACKEND": "triton",
        }
    if not files:
        return
    sessions.run("measure", ["-k", LEAVE, "--benchmark-disable-gc", *files], environment)
    # Peak memory of every contestant in a process of its own: after everything else.
    if "bench/bench_linear_logprob.py" in files and not rehearsing() and left() > 30:
        sessions.run("measure", ["-k", "memory", "bench/bench_linear_logprob.py"], environment)


if __name__ == "__main__":
    main()
