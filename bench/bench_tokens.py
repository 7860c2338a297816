"""Ops over steps and tokens that race nobody: what they cost beside a stream of the same bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import react_fast as rf

from . import roofline
from .common import DEVICE, LIMIT, OURS, QUICK, race, stream
from .roofline import Work

SHAPES = [(4, 16)] if QUICK else [(256, 4096), (1024, 8192)]
ROWS, VOCAB = (4, 50) if QUICK else (1024, 32768)
GAMMA, LAM = 0.99, 0.95
Op = Callable[..., Any]


def _backward(op: Op) -> Op:
    """Forward and backward, for the first tensor."""

    def run(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(op(x, *others).sum(), x)

    return run


# name -> (op(x, y, z, w, mask), how many of the four streams it reads, how many it writes, its work)
STEPS: dict[str, tuple[Op, int, int, Callable[[int], Work]]] = {
    "reverse_linear_scan": (
        lambda x, y, z, w, mask: rf.reverse_linear_scan(x, y), 2, 1, roofline.reverse_linear_scan,
    ),
    "vtrace with mask": (
        lambda x, y, z, w, mask: rf.vtrace(x, y, z, gamma=GAMMA, mask=mask), 3, 2, roofline.vtrace,
    ),
    "retrace with mask": (
        lambda x, y, z, w, mask: rf.retrace(x, y, z, w, gamma=GAMMA, lam=LAM, mask=mask), 4, 1, roofline.retrace,
    ),
    "importance_weights": (
        lambda x, y, z, w, mask: rf.importance_weights(x, y, mask, low=0.5, high=2.0), 2, 1,
        roofline.importance_weights,
    ),
    "kl_rewards": (
        lambda x, y, z, w, mask: rf.kl_rewards(x, y, z, mask, kl_coef=0.1), 3, 1, roofline.kl_rewards,
    ),
    "moments with mask": (lambda x, y, z, w, mask: rf.moments(x, mask=mask), 1, 0, roofline.moments),
    "value_loss forward + backward": (
        _backward(lambda x, y, z, w, mask: rf.value_loss(x, y, z, mask, clip=0.2)), 3, 1, roofline.value_loss,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_steps(benchmark, name, shape):
    op, reads, writes, work = STEPS[name]
    streams = (-torch.rand(4, *shape, device=DEVICE)).unbind()
    mask = torch.rand(shape, device=DEVICE) < 0.9
    read = [*streams[:reads], *([mask] if op is not STEPS["reverse_linear_scan"][0] else [])]
    written = [torch.empty(shape, device=DEVICE) for _ in range(writes)]
    race(
        benchmark, {OURS: lambda: op(*streams, mask), LIMIT: stream(read, written)}, rounds=9,
        case=f"{name} {list(shape)} float32", limit="stream of the same bytes", work=work(mask.numel()),
    )  # fmt: skip


def test_guided_logits(benchmark):
    logits, q = torch.randn(2, ROWS, VOCAB, device=DEVICE).to(torch.bfloat16).unbind()
    out = torch.empty(ROWS, VOCAB, device=DEVICE)
    race(
        benchmark, {OURS: lambda: rf.guided_logits(logits, q, beta=2.0), LIMIT: stream([logits, q], [out])},
        case=f"guided_logits [{ROWS}, {VOCAB}] bfloat16", limit="stream of logits, Q and the result", rounds=9,
        work=roofline.guided_logits(ROWS, VOCAB, 2),
    )  # fmt: skip
