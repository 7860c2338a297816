"""KL to a reference policy as part of the reward."""

import math

import torch

from .. import reference
from . import _check
from ._kl_rewards import kl_rewards_op
from ._policy_loss import KL_ESTIMATORS
from .backend import use_reference
from .policy_loss import check_advantages, check_like, check_tokens

__all__ = ["kl_rewards"]


def kl_rewards(
    rewards: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    clip: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rewards of every token with a penalty for leaving the reference policy.

        r_t = rewards_t - kl_coef k(x_t),   x = logprobs - ref_logprobs clamped to +-20

    with k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x, abs = |x|, then k clipped to [-clip, clip]. One reward
    per sequence stands at its last counting token (lost in a row without any, and TRL puts it one token
    later, on the first padding). As a reward k1 has the gradient of the KL, since its expectation is what is
    optimised. verl clips k3 at 10, OpenRLHF all kinds at 10; TRL and verl's k1 do not.

    Args:
        rewards: like `logprobs`, or one per sequence [B].
        logprobs: [B, T] or packed [N], those of the sampled tokens; float32, bfloat16, float16 or float64.
        ref_logprobs: like `logprobs`.
        mask: like `logprobs`, bool or 0/1. What stands where it is false is never read.
        kl_coef: number.
        estimator: "k1" | "k2" | "k3" | "abs".
        clip: number above 0, or None.
        cu_seqlens: [B + 1] int32 or int64 for packed input; needed for rewards [B].
    Returns: (rewards, metrics): like `logprobs` in float32 (float64 for float64), 0 where masked, without
        gradient; metrics["kl"] is the mean of k over counting tokens, as a 0-d tensor.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value.
    Source: Ziegler et al. 2019 (arXiv:1909.08593); estimators: Schulman 2020, "Approximating KL divergence".
    """
    mask = check_tokens("logprobs", logprobs, mask, cu_seqlens)
    check_like("ref_logprobs", ref_logprobs, logprobs, "logprobs")
    check_advantages(rewards, logprobs, cu_seqlens, "rewards")
    kl_coef = _check.number("kl_coef", kl_coef)
    _check.choice("estimator", estimator, KL_ESTIMATORS)
    if clip is not None:
        clip = _check.number("clip", clip, low=0.0, low_open=True)
    if use_reference():
        if cu_seqlens is not None:
            _check.rising("cu_seqlens", cu_seqlens, len(logprobs), "the packed tokens")
        return reference.kl_rewards(
            rewards, logprobs, ref_logprobs, mask, kl_coef=kl_coef, estimator=estimator, clip=clip,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
    shaped, stats = kl_rewards_op(
        rewards.detach(), logprobs.detach(), ref_logprobs.detach(), mask, cu_seqlens, kl_coef,
        KL_ESTIMATORS.index(estimator), math.inf if clip is None else clip,
    )  # fmt: skip
    return shaped, {"kl": stats[0]}
