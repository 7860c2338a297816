"""What a GPU does with this library, in one command: `python -m bench.gpu --out DIR [--minutes 9] [--only ...]`.

Stages, each a process of its own with a share of the minutes: build (where react_fast cannot be imported),
ceilings (copy bandwidth, GEMM rate), tests (every op against the float64 reference), sanitizer (memory and race
checks), measure (the benchmarks, with the peers that are installed), training, autotune. No network;
`--wheels DIR` adds what this Python lacks (bench/gpu/wheels.py), and the record names what is lacking still.
DIR gets `run.json`, `summary.md`, `tuned.json`, `events.jsonl` and `log.txt`; a kill loses the case that was
running. The commit is git's, or REACT_FAST_COMMIT where there is no git.

Without CUDA, or with `--rehearse`, the same under Triton's interpreter with tiny shapes: what works here is the
suite, its numbers mean nothing. `python -m bench.gpu --readme RUN.json ...` takes runs into bench/results.
"""
