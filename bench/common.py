"""How every benchmark measures: contestants in turn in one process, medians, ratios within the run.

pytest-benchmark times whole rounds; the median of each contestant is in the test's `extra_info`, from which
bench.report makes the table.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

import react_fast
from react_fast import _core

from . import LIMIT, OURS
from .roofline import Work

Contestant = Callable[[], object]
# Looks at a contestant's first result; raises AssertionError if it is not what the case computes: of a peer the
# reason why it is absent.
Check = Callable[[str, object], None]

DEVICE = os.environ.get("REACT_FAST_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
# A smoke test: tiny shapes, every contestant once; the numbers mean nothing.
QUICK = os.environ.get("REACT_FAST_BENCH_QUICK", "0") != "0"

# REACT_FAST_BENCH_CLOCK=cpu counts the process's processor time, for one thread on a machine that others use too.
CLOCK = "cpu" if os.environ.get("REACT_FAST_BENCH_CLOCK") == "cpu" else "wall"
now = time.process_time if CLOCK == "cpu" else time.perf_counter

ROUNDS = 25
# A contestant stops taking part once it has used this many seconds; slow ones then have fewer samples.
SECONDS = float(os.environ.get("REACT_FAST_BENCH_SECONDS", 4.0))
# At least this many samples; of others than us and the limit two where a sample takes SLOW seconds and one where
# it takes CRAWLING ones, so that the log-prob part stays near 20 minutes of two cores. The warm-up is no sample.
FEWEST, SLOW, CRAWLING = 3, 1.0, 5.0
# Minutes long, a call needs no warm-up: its first one is its only sample.
MINUTES = 60.0
# Fast contestants are repeated inside a sample until it lasts about this long, so that the clock is no issue.
SAMPLE_SECONDS = 2e-3


class AbsentError(Exception):
    """A contestant that cannot run here; the message is the reason."""


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _sample(run: Contestant, repeats: int) -> float:
    wait()
    start = now()
    for _ in range(repeats):
        run()
    wait()
    return (now() - start) / repeats


class _Lane:
    """One contestant and its samples."""

    def __init__(self, name: str, run: Contestant, check: Check | None) -> None:
        self.run, self.key = run, name in (OURS, LIMIT)
        start = now()
        result = run()  # compiles and warms up
        wait()
        first = now() - start
        if check is not None and name != LIMIT:
            check(name, result)
        del result
        if first < SLOW and not QUICK:
            first = min(first, _sample(run, 1))
        self.repeats = max(1, int(SAMPLE_SECONDS / max(first, 1e-9)))
        self.samples: list[float] = [first] if first > MINUTES else []
        self.done = bool(self.samples)

    def measure(self) -> None:
        if self.done:
            return
        if sum(self.samples) * self.repeats < SECONDS or len(self.samples) < self._fewest():
            self.samples.append(_sample(self.run, self.repeats))

    def _fewest(self) -> int:
        slowest = 0.0 if self.key else max(self.samples, default=0.0)
        return 1 if QUICK or slowest > CRAWLING else 2 if slowest > SLOW else FEWEST

    def quartiles(self) -> list[float]:
        if len(self.samples) == 1:
            return self.samples * 3
        return statistics.quantiles(self.samples, n=4)


def _selected(contestants: Mapping[str, Contestant]) -> tuple[dict[str, Contestant], dict[str, str]]:
    """REACT_FAST_BENCH_CONTESTANTS, comma-separated names, keeps only those (and the limit)."""
    names = os.environ.get("REACT_FAST_BENCH_CONTESTANTS")
    if not names:
        return dict(contestants), {}
    wanted = {LIMIT, *(name.strip() for name in names.split(","))}
    taken = {name: run for name, run in contestants.items() if name in wanted}
    return taken, {name: "not selected in this run" for name in contestants if name not in wanted}


def _enter(
    contestants: Mapping[str, Contestant], check: Check | None, absent: dict[str, str]
) -> dict[str, _Lane]:
    """A lane for everyone whose first call works; a peer's failure is why it is absent, ours is an error."""
    lanes = {}
    for name, run in contestants.items():
        try:
            lanes[name] = _Lane(name, run, check)
        except AbsentError as reason:
            absent[name] = str(reason)
        except Exception as error:
            if name in (OURS, LIMIT):
                raise
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return lanes


def race(
    benchmark: Any,
    contestants: Mapping[str, Contestant],
    *,
    case: str,
    limit: str | None = None,
    work: Work | None = None,
    rounds: int = ROUNDS,
    check: Check | None = None,
    absent: Mapping[str, str] | None = None,
    known: Mapping[str, float] | None = None,
    unit: str | None = None,
) -> dict[str, float]:
    """Run the contestants in turn and record medians.

    Args:
        benchmark: pytest-benchmark's fixture.
        contestants: name -> call without arguments. "react_fast" is ours, "limit" the physical limit.
        case: what is measured, "gae [64, 1024] float32".
        limit: what the contestant "limit" does, for the table.
        work: bytes and FLOPs of the op (bench.roofline), for rates.
        rounds: rounds to run.
        check: called once with the name and the first result of every contestant but the limit.
        absent: contestants that are not here -> the reason, for the table.
        known: contestants of one call that was timed apart, in this run -> its seconds.
        unit: what the limit is one of, "GEMM", where everyone's time is worth counting in it.
    Returns: median seconds of each contestant.
    """
    taken, missing = _selected(contestants)
    missing.update(absent or {})
    lanes = _enter(taken, check, missing)
    order = list(lanes)

    def one_round() -> None:
        order.append(order.pop(0))  # nobody always runs behind the same neighbour
        for name in order:
            lanes[name].measure()

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(one_round, rounds=1 if QUICK else rounds, iterations=1)
    finally:
        gc.enable()
    told = dict(known or {})
    medians = {name: statistics.median(lane.samples) for name, lane in lanes.items()} | told
    benchmark.extra_info.update(
        case=case,
        limit=limit,
        unit=unit,
        bytes_moved=work and work.bytes,
        flops=work and work.flops,
        path=work and work.path,
        median_seconds=medians,
        samples={name: len(lane.samples) for name, lane in lanes.items()} | dict.fromkeys(told, 1),
        quartiles_seconds={name: lane.quartiles() for name, lane in lanes.items()}
        | {name: [seconds] * 3 for name, seconds in told.items()},
        absent=missing,
        **surroundings(),
    )
    return medians


def surroundings() -> dict[str, Any]:
    """Where a case ran, for the table."""
    accelerator = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    return {
        "accelerator": accelerator,
        "threads": torch.get_num_threads(),
        "isa": _core.isa(),
        "clock": CLOCK,
    }


def stream(
    reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor] = (), elements: int | None = None
) -> Contestant:
    """The physical limit: the same bytes read and written once with the same threads and no arithmetic.

    On CUDA it is a copy of half the bytes, since a copy both reads and writes them.

    Args:
        reads, writes: contiguous tensors; `writes` are overwritten.
        elements: what the op counts as its size; below 64k elements the ops stay on one thread, and so does
            this. By default the largest tensor's.
    """
    tensors = [list(reads), list(writes)]  # keeps the memory alive as long as the contestant
    if DEVICE == "cuda":
        return _copy(sum(t.numel() * t.element_size() for side in tensors for t in side))
    spans = [[(t.data_ptr(), t.numel() * t.element_size()) for t in side] for side in tensors]
    count = elements if elements is not None else max(t.numel() for side in tensors for t in side)
    chunks = max(1, min(256, sum(size for side in spans for _, size in side) // 65536))

    def run(alive: list[list[torch.Tensor]] = tensors) -> int:
        return _core.stream(spans[0], spans[1], chunks, count, torch.get_num_threads())

    return run


def _copy(size: int) -> Contestant:
    source = torch.empty(max(1, size // 2), dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def on_reference(run: Contestant) -> Contestant:
    """The same call on the reference backend."""

    def reference() -> object:
        if DEVICE == "cuda":
            raise AbsentError("plain loops: not timed on a GPU")
        with react_fast.use_backend("reference"):
            return run()

    return reference


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def built(
    table: Mapping[str, Callable[..., Any]], *arguments: Any, leave: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Call every builder of a table: (name -> what it made, name -> why it is absent)."""
    made: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name, build in table.items():
        if name in leave:
            continue
        try:
            made[name] = build(*arguments)
        except AbsentError as reason:
            absent[name] = str(reason)
        except ImportError as error:
            absent[name] = f"not installed or not importable here ({' '.join(str(error).split())[:100]})"
    return made, absent
