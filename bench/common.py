"""How every benchmark measures: contestants in turn in one process, medians, ratios within the run.

pytest-benchmark times whole rounds; the median of each contestant is in the test's `extra_info`, from which
bench.report makes the table.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import react_fast
from react_fast import _core

Contestant = Callable[[], object]

ROUNDS = 25
# A contestant stops taking part once it has used this many seconds; slow ones then have fewer samples.
SECONDS = 4.0
# Fast contestants are repeated inside a sample until it lasts about this long, so that the clock is no issue.
SAMPLE_SECONDS = 2e-3


def _sample(run: Contestant, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


class _Lane:
    """One contestant and its samples."""

    def __init__(self, run: Contestant) -> None:
        self.run = run
        first = min(_sample(run, 1) for _ in range(2))  # the first call compiles and warms up
        self.repeats = max(1, int(SAMPLE_SECONDS / max(first, 1e-9)))
        self.samples: list[float] = []

    def measure(self) -> None:
        if sum(self.samples) * self.repeats < SECONDS or len(self.samples) < 3:
            self.samples.append(_sample(self.run, self.repeats))


def race(
    benchmark: Any,
    contestants: Mapping[str, Contestant],
    *,
    case: str,
    limit: str | None = None,
    bytes_moved: int | None = None,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Run the contestants in turn and record medians.

    Args:
        benchmark: pytest-benchmark's fixture.
        contestants: name -> call without arguments. "react_fast" is ours, "limit" the physical limit.
        case: what is measured, "gae [64, 1024] float32".
        limit: what the contestant "limit" does, for the table.
        bytes_moved: bytes read plus written by the op, for GB/s.
        rounds: rounds to run.
    Returns: median seconds of each contestant.
    """
    lanes = {name: _Lane(run) for name, run in contestants.items()}
    order = list(lanes)

    def one_round() -> None:
        order.append(order.pop(0))  # nobody always runs behind the same neighbour
        for name in order:
            lanes[name].measure()

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    finally:
        gc.enable()
    medians = {name: statistics.median(lane.samples) for name, lane in lanes.items()}
    benchmark.extra_info.update(
        case=case,
        limit=limit,
        bytes_moved=bytes_moved,
        threads=torch.get_num_threads(),
        isa=_core.isa(),
        median_seconds=medians,
        samples={name: len(lane.samples) for name, lane in lanes.items()},
        quartiles_seconds={name: statistics.quantiles(lane.samples, n=4) for name, lane in lanes.items()},
    )
    return medians


def stream(
    reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor] = (), elements: int | None = None
) -> Contestant:
    """The physical limit: the same bytes read and written once with the same threads and no arithmetic.

    Args:
        reads, writes: contiguous tensors; `writes` are overwritten.
        elements: what the op counts as its size; below 64k elements the ops stay on one thread, and so does
            this. By default the largest tensor's.
    """
    tensors = [list(reads), list(writes)]  # keeps the memory alive as long as the contestant
    spans = [[(t.data_ptr(), t.numel() * t.element_size()) for t in side] for side in tensors]
    count = elements if elements is not None else max(t.numel() for side in tensors for t in side)
    chunks = max(1, min(256, sum(size for side in spans for _, size in side) // 65536))

    def run(alive: list[list[torch.Tensor]] = tensors) -> int:
        return _core.stream(spans[0], spans[1], chunks, count, torch.get_num_threads())

    return run


def on_reference(run: Contestant) -> Contestant:
    """The same call on the reference backend."""

    def reference() -> object:
        with react_fast.use_backend("reference"):
            return run()

    return reference
