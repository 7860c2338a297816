"""policy_loss beside TRL's lines, forward and backward; the limit is a stream of the same bytes.

PPO clip with a k3 KL and every metric. TRL's loss is its own lines with the metrics it logs and its int64 mask;
compiled, the same through torch.compile. The objectives of a row and of a batch race nobody: only what they cost.
"""

import pytest
import torch

import react_fast as rf

from . import roofline
from .common import DEVICE, QUICK, on_reference, race, stream

# A micro-batch; a batch of long answers; many of them.
SHAPES = [(4, 48)] if QUICK else [(64, 1024), (256, 4096), (1024, 8192)]
# With a pass over the rows, or over the batch, before the one over the tokens.
OBJECTIVES = (rf.SAPO(), rf.GSPO(), rf.GMPO(), rf.VESPO(), rf.KLCov(), rf.ClipCov())


def _work(objective: object, tokens: int) -> roofline.Work:
    if isinstance(objective, (rf.KLCov, rf.ClipCov)):
        return roofline.selection(tokens) + roofline.policy_loss(tokens)
    if isinstance(objective, rf.SAPO):
        return roofline.policy_loss(tokens)
    return roofline.row_states(tokens, streams=2) + roofline.policy_loss(tokens)


def _trl(logp, old, advantages, mask, ref):
    """What GRPOTrainer._compute_loss does with the log-probs, token-mean as its bnpo."""
    A = advantages.unsqueeze(1)
    ratio = torch.exp(logp - old)
    kl = torch.exp(ref - logp) - (ref - logp) - 1
    tokens = -torch.min(ratio * A, torch.clamp(ratio, 0.8, 1.2) * A) + 0.1 * kl
    loss = (tokens * mask).sum() / mask.sum().clamp(min=1.0)
    with torch.no_grad():
        low, high = (ratio < 0.8) & (A < 0), (ratio > 1.2) & (A > 0)
        metrics = [
            (x * mask).sum() / mask.sum() for x in (kl, low.float(), high.float(), (low | high).float())
        ]
        metrics += [((x.float() * mask).sum(-1) / mask.sum(-1)).max() for x in (low, high)]
    return loss, metrics


def _ours(logp, old, advantages, mask, ref, objective=rf.PPOClip()):  # noqa: B008, a frozen value
    return rf.policy_loss(
        logp, old, advantages, mask, ref_logprobs=ref, kl_coef=0.1, kl_gradient="value", objective=objective
    )


def _given(shape):
    logp = (-3 * torch.rand(shape, device=DEVICE)).requires_grad_()
    old, ref = (logp.detach() + 0.2 * torch.randn(shape, device=DEVICE) for _ in range(2))
    return logp, old, torch.randn(shape[0], device=DEVICE), torch.rand(shape, device=DEVICE) < 0.9, ref


def _limit(given):
    logp, old, _, mask, ref = given
    return stream([logp.detach(), old, ref, mask], [torch.empty(logp.shape, device=DEVICE)])


LIMIT = "stream read of logprobs, old, ref and mask, write of the gradient"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_policy_loss_forward_backward(benchmark, shape):
    given = _given(shape)
    logp, old, A, mask, ref = given
    with_counts = (logp, old, A, mask.long(), ref)

    def step(loss, given):
        return lambda: torch.autograd.grad(loss(*given)[0], logp)

    contestants = {
        "react_fast": step(_ours, given),
        "TRL": step(_trl, with_counts),
        "TRL compiled": step(torch.compile(_trl), with_counts),
        "TRL compiled, bool mask": step(torch.compile(_trl), given),
        "limit": _limit(given),
    }
    if logp.numel() <= 64 * 1024:
        contestants["reference"] = on_reference(step(_ours, given))
    race(
        benchmark,
        contestants,
        case=f"policy_loss {list(shape)} float32 forward + backward",
        limit=LIMIT,
        work=roofline.policy_loss(logp.numel()),
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_objectives(benchmark, objective):
    given = logp, old, A, mask, ref = _given(SHAPES[len(SHAPES) // 2])
    race(
        benchmark,
        {
            "react_fast": lambda: torch.autograd.grad(_ours(logp, old, A, mask, ref, objective).loss, logp),
            "limit": _limit(given),
        },
        case=f"policy_loss {type(objective).__name__} {list(logp.shape)} float32 forward + backward",
        limit=LIMIT,
        work=_work(objective, logp.numel()),
    )


def test_overhead_with_gradient(benchmark):
    """A few numbers, forward and backward: checks, dispatch and autograd are all there is."""
    logp, old, A, mask, _ = _given((8, 16))

    def plain(logp, old, A, mask):
        ratio = torch.exp(logp - old)
        loss = -torch.minimum(ratio * A[:, None], ratio.clamp(0.8, 1.2) * A[:, None])
        return (loss * mask).sum() / mask.sum()

    race(
        benchmark,
        {
            "react_fast": lambda: torch.autograd.grad(rf.policy_loss(logp, old, A, mask).loss, logp),
            "react_fast, forward": lambda: rf.policy_loss(logp, old, A, mask).loss,
            "torch": lambda: torch.autograd.grad(plain(logp, old, A, mask), logp),
            "one product": lambda: torch.autograd.grad((logp * old).sum(), logp),
        },
        case="policy_loss [8, 16] float32 forward + backward: overhead",
    )
