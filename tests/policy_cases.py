"""Batches, and the equations in plain torch, for the tests of policy_loss, value_loss and importance_weights.

The equations are vectorised over a padded float64 batch and written from the docstring; the reference backend
loops over sequences, so the two share no code.
"""

from dataclasses import dataclass, fields, replace

import pytest
import torch

import react_fast as rf
from react_fast import (
    CISPO,
    DRO,
    GMPO,
    GSPO,
    LUSPO,
    SAPO,
    VESPO,
    ClipCov,
    DPPOBinaryKL,
    DPPOBinaryTV,
    GSPOToken,
    KLCov,
    PPOClip,
    Reinforce,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm")
OBJECTIVES = (
    Reinforce(),
    PPOClip(),
    PPOClip(0.7, 1.3, dual_clip=1.5),
    PPOClip(0.9, 1.1, ratio_cap=1.05),
    PPOClip(0.8, 1.2, dual_clip=1.6, ratio_cap=1.4),
)


@dataclass(frozen=True)
class Batch:
    logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor
    ref_logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    importance: torch.Tensor | None = None

    def each(self, change) -> "Batch":
        """The batch with `change` applied to every tensor."""
        return Batch(**{k: None if v is None else change(v) for k, v in vars(self).items()})

    def floats(self, change) -> "Batch":
        """The batch with `change` applied to every tensor but the mask."""
        return replace(self.each(change), mask=self.mask)

    def loss(self, **options: object) -> rf.PolicyLoss:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return rf.policy_loss(**given, **options)

    def gradients(self, **options: object) -> list[torch.Tensor]:
        """[loss, d loss / d logprobs, and d loss / d entropy where there is entropy]."""
        leaves = replace(self, logprobs=self.logprobs.detach().clone().requires_grad_())
        wanted = [leaves.logprobs]
        if self.entropy is not None:
            leaves = replace(leaves, entropy=self.entropy.detach().clone().requires_grad_())
            wanted.append(leaves.entropy)
        loss = leaves.loss(**options).loss
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def batch(shape, dtype=torch.float32, *, full: bool = True) -> Batch:
    """Ratios on both sides of every bound; a third of the tokens masked; `full`: with ref, entropy, importance."""
    logprobs = (-3 * torch.rand(shape)).to(dtype)

    def near(scale: float) -> torch.Tensor:
        return (logprobs + scale * torch.randn(shape)).to(dtype)

    extra = (near(0.5), torch.rand(shape).to(dtype), (torch.rand(shape) + 0.5).to(dtype)) if full else ()
    return Batch(logprobs, near(0.4), torch.randn(shape).to(dtype), torch.rand(shape) < 0.7, *extra)


def token_weights(mask: torch.Tensor, aggregation: str, denominator: float | None) -> torch.Tensor:
    counts = mask.double().sum(1, keepdim=True).clamp(min=1)
    tokens, rows = mask.sum().clamp(min=1), mask.any(1).sum().clamp(min=1)
    weight = {
        "token_mean": 1 / torch.as_tensor(denominator or tokens).double(),
        "seq_mean_token_mean": 1 / (counts * (denominator or rows)),
        "seq_mean_token_sum": 1 / torch.as_tensor(denominator or rows).double(),
        "token_sum_norm": 1 / torch.as_tensor(denominator or 1).double(),
    }[aggregation]
    return torch.where(mask, weight, torch.zeros(mask.shape, dtype=torch.float64))


def surrogate(objective, logp, ratio, A) -> torch.Tensor:
    if isinstance(objective, Reinforce):
        return -A * logp
    cap = objective.ratio_cap or float("inf")
    clipped = ratio.clip(objective.ratio_min, objective.ratio_max)
    loss = torch.stack([-ratio.clip(max=cap) * A, -clipped * A]).amax(0)
    if objective.dual_clip:
        loss = torch.where(A < 0, torch.minimum(loss, -objective.dual_clip * A), loss)
    return loss


KL = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: torch.exp(-x) - 1 + x, "abs": torch.abs}


def formula(b: Batch, objective, *, aggregation="token_mean", denominator=None, kl_coef=0.0, kl_estimator="k3",
            kl_gradient="ratio", entropy_coef=0.0) -> torch.Tensor:  # fmt: skip
    """The loss as the docstring prints it: no clamp, no gradient tricks, [B, T] advantages."""
    ratio = torch.exp(b.logprobs - b.old_logprobs)
    terms = surrogate(objective, b.logprobs, ratio, b.advantages)
    if b.importance is not None:
        terms = b.importance * terms
    if b.ref_logprobs is not None:
        k = KL[kl_estimator](b.logprobs - b.ref_logprobs)
        terms = terms + kl_coef * (ratio * k if kl_gradient == "ratio" else k)
    if b.entropy is not None:
        terms = terms - entropy_coef * b.entropy
    return (token_weights(b.mask, aggregation, denominator) * terms).sum()


def magnitude(b: Batch, *, aggregation="token_mean", denominator=None, kl_coef=0.0, entropy_coef=0.0,
              **_: object) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(weights, per-token size of everything that is added up, times how its rounding grows).

    A log-ratio x carries |x| eps from its subtraction, which exp turns into the relative error of r; the
    products beside it add a few more roundings. So a term of size s has an error of about (4 + |x|) eps s.
    """
    x = b.logprobs - b.old_logprobs
    ratio = x.exp().clamp(min=1)
    size = ratio * b.advantages.abs() * (1 + b.logprobs.abs())
    if b.importance is not None:
        size = size * b.importance
    if b.ref_logprobs is not None:
        y = b.logprobs - b.ref_logprobs
        size = size + abs(kl_coef) * ratio * (torch.exp(-y) + 1 + y.abs() + y * y) * (1 + y.abs())
    if b.entropy is not None:
        size = size + abs(entropy_coef) * b.entropy.abs()
    return token_weights(b.mask, aggregation, denominator), size * (4 + x.abs())


# ---- every objective of the table -------------------------------------------------------------------------

# Bounds narrow enough that a batch meets each; soft gates steep enough to close; covariances on both sides.
TOKEN = (
    CISPO(0.8, 1.2),
    SAPO(3.0, 4.0),
    DPPOBinaryTV(0.05, 0.04, 1.3),
    DPPOBinaryKL(0.01, 0.02, 1.3),
    DRO(0.7),
)
BATCH = (KLCov(0.1, 0.5), ClipCov(0.7, 1.3, 0.1, 0.02, 2.0, seed=3))
ROW = (
    GSPO(0.95, 1.05),
    GSPO(0.9, 1.1, dual_clip=1.02, ratio_cap=1.05),
    GSPOToken(0.95, 1.05),
    LUSPO(0.95, 1.05),
    GMPO(0.8, 1.3),
    VESPO(0.5, 0.3, 0.4, 0.2),
)
ALL = TOKEN + BATCH + ROW
SMALL = {"kl_coef": 0.1, "entropy_coef": 0.01, "aggregation": "seq_mean_token_mean"}


def named(values):
    return [pytest.param(v, id=str(v)) for v in values]


def everything(b, **options):
    loss, metrics = b.loss(**options)
    return [loss.detach(), torch.stack(list(metrics.values())), *b.gradients(**options)[1:]]


def row_advantages(b):
    return replace(b, advantages=b.advantages[:, 0].contiguous())
