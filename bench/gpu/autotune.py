"""The launch options of kernels/tuned.json, searched on this device: `tuned.json` in the run's folder.

A candidate is taken if it computes what the present options do, spills nothing, and is faster by more than the
timing's noise. Every kernel's result is told, and the table written, before the next one is searched.
"""

import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import react_fast as rf
from react_fast.kernels import tuned

from ..common import DEVICE
from . import launches
from .ceilings import seconds
from .events import OUT, brief, left, only, rehearsing, replace, tell

Options = dict[str, int]
# 8 to 32 numbers a thread, in two to sixteen warps; a block must be a power of two.
GRID: dict[str, tuple[int, ...]] = {
    "BLOCK": (32, 64) if rehearsing() else (1024, 2048, 4096, 8192),
    "num_warps": (4,) if rehearsing() else (4, 8, 16),
}
GAIN = 0.98  # of the present options' time
ROWS, VOCAB, DIM = (4, 96, 16) if rehearsing() else (2048, 131072, 256)
ROUNDS = 1 if rehearsing() else 15


def _logprob(backward: bool) -> Callable[[], torch.Tensor]:
    logits = torch.randn(ROWS, VOCAB, device=DEVICE).to(torch.bfloat16).requires_grad_(backward)
    ids = torch.randint(0, VOCAB, (ROWS,), device=DEVICE)
    if not backward:
        return lambda: rf.token_logprobs(logits, ids)
    logp = rf.token_logprobs(logits, ids)
    upstream = torch.randn_like(logp)
    return lambda: torch.autograd.grad(logp, logits, upstream, retain_graph=True)[0]


def _linear(frozen: bool) -> Callable[[], torch.Tensor]:
    """The fold and what it multiplies (frozen head), or that and the turn (trained head), with small GEMMs."""
    hidden = torch.randn(ROWS, DIM, device=DEVICE).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(VOCAB, DIM, device=DEVICE) / DIM**0.5).to(torch.bfloat16).requires_grad_(not frozen)
    ids = torch.randint(0, VOCAB, (ROWS,), device=DEVICE)
    upstream = torch.randn(ROWS, device=DEVICE)
    leaves = [hidden] if frozen else [hidden, weight]

    def run() -> torch.Tensor:
        logp = rf.linear_token_logprobs(hidden, weight, ids)
        return torch.autograd.grad(logp, leaves, upstream.to(logp.dtype))[0]

    return run


CASES: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
    "logprob.forward": lambda: _logprob(False),
    "logprob.backward": lambda: _logprob(True),
    "linear_logprob.fold": lambda: _linear(True),
    "linear_logprob.turn": lambda: _linear(False),
    "linear_logprob.rescale": lambda: _linear(True),
}


def candidates(kernel: str) -> list[Options]:
    """The present options, then every other point of the grid."""
    present = tuned.options(kernel, torch.device(DEVICE))
    grid = [dict(zip(GRID, point, strict=True)) for point in itertools.product(*GRID.values())]
    return [present, *(one for one in grid if one != present)]


def _tried(run: Callable[[], torch.Tensor], want: torch.Tensor | None) -> tuple[torch.Tensor, float, int]:
    """(result, median seconds, bytes spilled) of one candidate. ValueError if it computes another."""
    spilled = [0]

    def look(_: str, compiled: Any) -> None:
        spilled[0] = max(spilled[0], getattr(compiled, "n_spills", None) or 0)

    with launches.watched(look):
        found = run()
    # An accumulation in another order may round a bfloat16 the other way.
    rtol, atol = (1e-4, 1e-5) if found.dtype == torch.float32 else (2e-2, 1e-3)
    if want is not None and not torch.allclose(found.float(), want.float(), rtol=rtol, atol=atol):
        raise ValueError("computes something else")
    return found.detach(), seconds(run, ROUNDS), spilled[0]


def searched(kernel: str) -> dict[str, Any]:
    """Every candidate's time or why it is out, and the winner, the first of them if none is faster."""
    run = CASES[kernel]()
    want: torch.Tensor | None = None
    tried: list[dict[str, Any]] = []
    for one in candidates(kernel):
        if tried and left() < 3:
            tried.append({"options": one, "out": "no time left"})
            continue
        try:
            with tuned.trial(kernel, one):
                found, taken, spilled = _tried(run, want)
        except Exception as error:
            if want is None:
                raise
            tried.append({"options": one, "out": brief(error)})
            continue
        want = found if want is None else want
        tried.append(
            {"options": one, "seconds": taken, "spilled": spilled} | ({"out": "spills"} if spilled else {})
        )
    present = tried[0]
    rest = [t for t in tried[1:] if "out" not in t and t["seconds"] < GAIN * present["seconds"]]
    best = min(rest, key=lambda t: t["seconds"], default=present)
    return {"name": kernel, "options": best["options"], "present": present["options"],
            "gain": present["seconds"] / best["seconds"], "tried": tried}  # fmt: skip


def _written(winners: Mapping[str, Options]) -> None:
    """kernels/tuned.json with this device's entries, in its form: a line a kernel."""
    folder = os.environ.get(OUT)
    if not folder:
        return
    key = "default"
    if DEVICE == "cuda":
        major, minor = torch.cuda.get_device_capability()
        key = str(10 * major + minor)
    table = tuned.table()
    for kernel, chosen in winners.items():
        if chosen != table[kernel].get(key, table[kernel]["default"]):
            table[kernel][key] = chosen
    lines = (f' "{kernel}": {json.dumps(entry)}' for kernel, entry in table.items())
    replace(Path(folder) / "tuned.json", "{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    winners: dict[str, Options] = {}
    names = only()
    with rf.use_backend("triton"):
        for kernel in CASES:
            if left() < 3 or (names and kernel.split(".")[0] not in names):
                continue
            torch.manual_seed(0)
            try:
                found = searched(kernel)
            except Exception as error:
                tell("autotune", kind="kernel", name=kernel, out=brief(f"{type(error).__name__}: {error}"))
                continue
            tell("autotune", kind="kernel", **found)
            winners[kernel] = found["options"]
            _written(winners)


if __name__ == "__main__":
    main()
