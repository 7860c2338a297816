"""Every public op once, forward and backward, on few odd numbers: `python -m bench.gpu.touch TOOL`.

What the memory and race checkers look at: small enough for a launch that takes a thousand times as long.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import react_fast as rf
from tests.op_cases import OPS

from ..common import DEVICE
from . import launches
from .events import brief, left, only, tell


def _placed(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(DEVICE)
    return value.requires_grad_() if value.is_floating_point() else value


def _floats(found: Any) -> list[torch.Tensor]:
    parts = found if isinstance(found, tuple) else getattr(found, "loss", found)
    parts = parts if isinstance(parts, tuple) else (parts,)
    return [x for x in parts if isinstance(x, torch.Tensor) and x.requires_grad]


def _called(op: Callable[..., Any], arguments: dict[str, Any], options: dict[str, Any]) -> None:
    placed = {name: _placed(value) for name, value in arguments.items()}
    try:
        results = _floats(op(**placed, **options))
    except ValueError:  # an argument that wants no gradient
        for value in placed.values():
            if isinstance(value, torch.Tensor):
                value.requires_grad_(False)
        results = _floats(op(**placed, **options))
    if results:
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])


def _long_rows() -> None:
    """Few long rows, which a device cuts into chunks."""
    n = 9001 if DEVICE == "cuda" else 70
    rewards, values = torch.randn(2, 2, n, device=DEVICE).unbind()
    mask = torch.rand(2, n, device=DEVICE) < 0.8
    for whiten in (False, True):
        rf.gae(rewards, values, gamma=0.99, lam=0.95, mask=mask, whiten=whiten)


def _objectives() -> None:
    """What rows or the batch say to their tokens."""
    for objective in (rf.GSPO(), rf.VESPO(), rf.KLCov(), rf.ClipCov()):
        logp = -torch.rand(3, 7, device=DEVICE)
        old, mask = logp - 0.1, torch.ones(3, 7, dtype=torch.bool, device=DEVICE)
        logp.requires_grad_()
        A = torch.randn(3, device=DEVICE)
        rf.policy_loss(logp, old, A, mask, objective=objective).loss.backward()


HEAD = 4100 if DEVICE == "cuda" else 2100


def _heads() -> None:
    """Vocabularies of several blocks: rows that are cut over programs, and rows that each have one."""
    for rows in (3, 300 if DEVICE == "cuda" else 6):
        hidden = torch.randn(rows, 16, device=DEVICE, requires_grad=True)
        weight = torch.randn(HEAD, 16, device=DEVICE, requires_grad=True)
        ids = torch.randint(0, HEAD, (rows,), device=DEVICE)
        logp, entropy = rf.linear_token_logprobs(hidden, weight, ids, return_entropy=True)
        (logp + entropy).sum().backward()


def _wide_rows() -> None:
    """A row in several chunks."""
    logits = torch.randn(2, 70_001 if DEVICE == "cuda" else 35_001, device=DEVICE, requires_grad=True)
    rf.token_logprobs(logits, torch.tensor([5, 30_000], device=DEVICE)).sum().backward()


def _steps() -> None:
    rewards, values = torch.randn(2, 2, 19, device=DEVICE).requires_grad_().unbind()
    rf.n_step_returns(rewards, values, gamma=0.9, n=5).sum().backward()
    A, G = rf.gae(rewards, values, gamma=0.9, lam=0.9)
    (A + G).sum().backward()
    mask = torch.ones(2, 19, dtype=torch.bool, device=DEVICE)
    logp, ref = torch.randn(2, 2, 19, device=DEVICE).unbind()
    rf.kl_rewards(torch.randn(2, device=DEVICE), logp, ref, mask, kl_coef=0.1)


CASES: dict[str, Callable[[], None]] = {
    **{name: partial(_called, *given) for name, given in OPS.items()},
    "few long rows": _long_rows,
    "objectives of rows and batches": _objectives,
    "heads of several blocks": _heads,
    "wide rows": _wide_rows,
    "several steps": _steps,
}


def _into(seen: set[str]) -> Callable[[str, Any], None]:
    return lambda kernel, _: seen.add(kernel)


def main() -> None:
    tool, names = sys.argv[1], only()
    torch.set_default_device(DEVICE)  # for what an op's case makes itself
    for name, call in CASES.items():
        launched: set[str] = set()
        outcome, why = "passed", ""
        if left() < 2:
            outcome, why = "skipped", "no time left"
        else:
            try:
                with (
                    rf.use_backend("triton"),
                    launches.watched(_into(launched)),
                ):
                    call()
                    if DEVICE == "cuda":
                        torch.cuda.synchronize()
            except Exception as error:
                outcome, why = "failed", brief(f"{type(error).__name__}: {error}")
        if names and not any(kernel.split(".")[0] in names for kernel in launched):
            continue
        tell(
            "sanitizer",
            kind="check",
            tool=tool,
            case=name,
            outcome=outcome,
            why=why,
            kernels=sorted(launched),
        )


if __name__ == "__main__":
    main()
