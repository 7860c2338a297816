"""Benchmarks: `make bench` installs the peers, runs them all and makes the tables.

`python -m bench.report --run [--only logprob advantage ...]` runs some; `python -m bench.errors` measures errors;
`python -m bench.memory CONTESTANT CASE` the peak memory of one call; `python -m bench.peers.run_suites` runs other
trainers' own tests with and without our patch. In the environment:
    REACT_FAST_BENCH_THREADS      threads, by default all cores
    REACT_FAST_BENCH_DEVICE       cpu or cuda; by default cuda where there is one
    REACT_FAST_BENCH_CONTESTANTS  comma-separated names: only these, and the limit
    REACT_FAST_BENCH_ROWS         rows of hidden states of the linear cases
    REACT_FAST_BENCH_SECONDS      a contestant's time in a case, by default 4
    REACT_FAST_BENCH_QUICK        1: tiny linear cases, every contestant once; the numbers mean nothing
"""

from pathlib import Path

# Contestants by name: ours, and the physical limit.
OURS, LIMIT = "react_fast", "limit"
RESULTS = Path(__file__).parent / "results"
