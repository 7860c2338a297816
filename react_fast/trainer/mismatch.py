"""How far the rollout engine's probabilities are from the trainer's, and the weights that correct for it."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..ops.importance_weights import importance_weights
from .batch import Batch

# Moments of the weights, from which their effective sample size follows after the last micro-batch.
_MEAN, _SQUARE = "sampling/weight", "sampling/weight_square"


def correct(config: Any, part: Batch, logprobs: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Set the importance weights of a micro-batch, unless `config.importance` is "none", and measure the mismatch.

        x_t = log p(a_t) - log q(a_t),    p the policy before the step's updates, q the sampler
        KL(q, p) is estimated by the means of -x (k1) and of e^x - 1 - x (k3)

    A token whose log q is NaN (a server that returns none) counts as sampled by p and is left out of the metrics.

    Args:
        config: of the trainer.
        part: its `importance` is set.
        logprobs: [B, T-1] under the policy now, which is that before the updates if `part` has no old_logprobs.
    Returns: (metrics by TRL's names, number of tokens they are means over).
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    policy = (logprobs if part.old_logprobs is None else part.old_logprobs).detach()
    known = part.mask & ~part.sampler_logprobs.isnan()
    sampler = torch.where(known, part.sampler_logprobs.to(policy.dtype), policy)
    weights, found = importance_weights(
        policy,
        sampler,
        part.mask,
        level=config.importance_level,
        mode="mask" if config.importance == "mask" else "truncate",
        low=0.0 if config.importance == "none" else config.importance_low,
        high=math.inf if config.importance == "none" else config.importance_high,
    )
    if config.importance != "none":
        part.importance = weights
    count = float(known.sum())
    if not count:
        return {}, 0.0
    x = torch.where(known, policy - sampler, 0.0)
    ratio = torch.exp(x.clamp(-20, 20))

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(known, values, 0.0).sum() / count

    return {
        "sampling/sampling_logp_difference/mean": mean(x.abs()),
        "sampling/sampling_logp_difference/max": x.abs().max(),
        "sampling/importance_sampling_ratio/mean": mean(ratio),
        "sampling/importance_sampling_ratio/max": torch.where(known, ratio, 0.0).max(),
        "sampling/kl_k1": mean(-x),
        "sampling/kl_k3": mean(torch.expm1(x.clamp(-20, 20)) - x),
        "sampling/clipped_ratio": found["importance/outside"],
        _MEAN: mean(weights),
        _SQUARE: mean(weights * weights),
    }, count


def finish(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a whole step: the moments of the weights become "sampling/ess", their effective sample size over
    the number of tokens, (mean w)^2 / mean w^2."""
    done = dict(metrics)
    if _MEAN in done:
        mean, square = done.pop(_MEAN), done.pop(_SQUARE)
        done["sampling/ess"] = min(mean * mean / square, 1.0) if square else 0.0
    return done
