"""What the device can do at most: the rates of a copy and of a bfloat16 GEMM on random numbers."""

import statistics
from collections.abc import Callable

import torch

from ..common import DEVICE, now, wait
from .events import rehearsing, tell

# Twenty times the largest second-level cache; a GEMM that fills every multiprocessor.
BYTES, SIDE, ROUNDS = (1 << 16, 64, 3) if rehearsing() else (1 << 31, 8192, 20)


def seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median of single calls, by events on the device's own clock where there is one."""
    for _ in range(3):
        run()
    wait()
    found = []
    for _ in range(rounds):
        if DEVICE == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = now()
            run()
            found.append(now() - start)
    return statistics.median(found)


def main() -> None:
    source = torch.randint(0, 255, (BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    taken = seconds(lambda: target.copy_(source))
    tell("ceilings", kind="rate", what="copy_bytes_per_second", rate=2 * BYTES / taken)
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    out = torch.empty_like(a)
    taken = seconds(lambda: torch.mm(a, b, out=out))
    tell("ceilings", kind="rate", what="gemm_flops_per_second", rate=2 * SIDE**3 / taken)


if __name__ == "__main__":
    main()
