"""Peak memory of one forward and backward: `python -m bench.memory CONTESTANT CASE` in a process of its own.

Prints {"bytes": ...} or {"absent": reason}. On CPU it is the largest resident set during the call, less the
resident set before it (inputs, libraries, and a small call of the same contestant that starts threads and loads
code), less the bytes of the gradients that the call returns, in their leaves' dtype. On CUDA max_memory_allocated
takes the place of the resident set. Nothing is accumulated into an existing .grad. torch.compile compiles for the
full size inside the call, and what compiling takes counts.
"""

import ctypes
import json
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .common import DEVICE, OURS, QUICK, AbsentError, wait
from .heads import QWEN, Head, Inputs, gradients, sized
from .peers.contestants import LINEAR, WHOLE_LOGITS, LinearOp

ROWS, SMALL_ROWS, SMALL_VOCAB = 4096, 64, 2048


@dataclass(frozen=True)
class Case:
    title: str
    dtype: torch.dtype
    frozen: bool
    contestants: tuple[str, ...]


def _title(dtype: str, head: str) -> str:
    size = f"[{ROWS}, {QWEN.dim}, {QWEN.vocab}]"
    return f"memory of linear_token_logprobs, {QWEN.name} {size}, {dtype}, {head} head"


# Everyone in bfloat16; float32 and the frozen head, which would take the others minutes more, for ours alone.
CASES = {
    "trained-bfloat16": Case(_title("bfloat16", "trained"), torch.bfloat16, False, tuple(LINEAR)),
    "frozen-bfloat16": Case(_title("bfloat16", "frozen"), torch.bfloat16, True, (OURS,)),
    "trained-float32": Case(_title("float32", "trained"), torch.float32, False, (OURS,)),
}
# float32 copies of whole logits alive at once (logits, log_softmax, two gradients), and what has to stay free.
COPIES, SPARE = 4, 2 << 30


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) << 10
    return 0


def _resident() -> int:
    return _status("VmRSS") or _peak()


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts ru_maxrss in bytes
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _start_over() -> None:
    """Give freed memory back and forget the peak so far (proc(5), clear_refs), where the system can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _refuse_if_too_large(name: str, head: Head, rows: int) -> None:
    available = 0
    meminfo = Path("/proc/meminfo")
    if DEVICE == "cuda":
        available = torch.cuda.mem_get_info()[0]
    elif meminfo.exists():
        found = [line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")]
        available = int(found[0].split()[1]) << 10 if found else 0
    needed = COPIES * 4 * rows * head.vocab + SPARE
    if name in WHOLE_LOGITS and available and available < needed:
        raise AbsentError(f"may need {needed / 2**30:.0f} GiB, {available / 2**30:.0f} GiB are free")


def _once(op: LinearOp, inputs: Inputs, case: Case) -> int:
    """One forward and backward; bytes of the gradients."""
    leaves = inputs.require(True, not case.frozen)
    logp = op(inputs.hidden, inputs.weight, inputs.ids)
    found = gradients(logp, leaves, inputs.upstream)
    wait()
    return sum(x.numel() * x.element_size() for x in found)


def measure(name: str, case: Case) -> int:
    """Bytes that the contestant takes at its peak, beyond inputs and gradients."""
    head, rows = sized(QWEN), 64 if QUICK else ROWS
    op = LINEAR[name](head)
    _refuse_if_too_large(name, head, rows)
    _once(op, Inputs(Head("small", head.dim, SMALL_VOCAB), case.dtype, SMALL_ROWS), case)
    inputs = Inputs(head, case.dtype, rows)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        own = _once(op, inputs, case)
        return torch.cuda.max_memory_allocated() - before - own
    _start_over()
    before = _resident()
    own = _once(op, inputs, case)
    return max(0, _peak() - before - own)


def main() -> None:
    name, case = sys.argv[1:]
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go, before anything that matters
    torch.manual_seed(0)
    try:
        print(json.dumps({"bytes": measure(name, CASES[case])}))
    except (AbsentError, ImportError) as reason:
        print(json.dumps({"absent": " ".join(str(reason).split())}))


if __name__ == "__main__":
    main()
