"""policy_loss, PPO clip with a k3 KL, forward and backward; the limit is a stream of the same bytes."""

import pytest
import torch

import react_fast as rf

from .common import on_reference, race, stream

# A micro-batch; a batch of long answers; many of them.
SHAPES = [(64, 1024), (256, 4096), (1024, 8192)]


def _torch(logp, old, advantages, mask, ref):
    ratio = torch.exp(logp - old)
    A = advantages[:, None]
    loss = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
    x = logp - ref
    loss = loss + 0.1 * (torch.expm1(-x) + x)
    return torch.where(mask, loss, 0.0).sum() / mask.sum()


def _ours(logp, old, advantages, mask, ref):
    return rf.policy_loss(
        logp, old, advantages, mask, ref_logprobs=ref, kl_coef=0.1, kl_gradient="value"
    ).loss


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy_loss_forward_backward(benchmark, shape):
    logp = (-3 * torch.rand(shape)).requires_grad_()
    old, ref = (logp.detach() + 0.2 * torch.randn(shape) for _ in range(2))
    given = (logp, old, torch.randn(shape[0]), torch.rand(shape) < 0.9, ref)

    def step(loss):
        return lambda: torch.autograd.grad(loss(*given), logp)

    contestants = {
        "react_fast": step(_ours),
        "torch": step(_torch),
        "torch.compile": step(torch.compile(_torch)),
        "limit": stream([logp.detach(), old, ref, given[3]], [torch.empty(shape)]),
    }
    if logp.numel() <= 64 * 1024:
        contestants["reference"] = on_reference(step(_ours))
    race(
        benchmark,
        contestants,
        case=f"policy_loss {list(shape)} float32 forward + backward",
        limit="stream read of logprobs, old, ref and mask, write of the gradient",
        bytes_moved=logp.numel() * (4 * logp.element_size() + 1),
    )
