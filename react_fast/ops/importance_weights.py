"""Corrections for tokens that another policy sampled: weights, and masks of what to leave out."""

import math

import torch

from .. import reference
from . import _check
from ._importance_weights import (
    IMPORTANCE_METRICS,
    LEVELS,
    MODES,
    NORMALIZE,
    high_entropy_mask_op,
    importance_weights_op,
)
from .backend import use_reference
from .policy_loss import check_advantages, check_like, check_tokens

__all__ = ["high_entropy_mask", "importance_weights", "off_policy_mask"]


def importance_weights(
    logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    level: str = "token",
    mode: str = "truncate",
    low: float,
    high: float,
    bound_level: str | None = None,
    veto: float = 0.0,
    normalize: bool | str = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights that correct for tokens sampled by another policy (a rollout engine, an older checkpoint).

        w = exp(l),  l = l_t                 level "token",  l_t = logprobs - behavior_logprobs clamped to
                     +-20 sum of l_t of the row   level "sequence", clamped to +-20 mean of l_t of the row
                     level "geometric"

    mode "truncate": w clipped to [low, high]; "mask": w where low <= w <= high, else 0. With `bound_level`
    (mode "mask") the bounds hold the w of that level while the weights keep their own. Constants: no
    gradient.

    In other libraries: TRL's {token,sequence}_{truncate,mask} are level and mode. verl's rollout_is with one
    number is "truncate" with low=0, with "low_high" it is "mask" (IcePop); its seq_mean_k1 and seq_sum_k1
    rejections are bound_level "geometric" and "sequence" with the bounds inverted (they bound exp(-l)).
    OpenRLHF's and NeMo-RL's seq-mask-tis is level="token", mode="mask", bound_level="geometric"; OpenRLHF's
    tis is "truncate", its icepop "mask". TRL takes a sampler log-prob that is NaN as equal: pass
    behavior_logprobs.where(~behavior_logprobs.isnan(), logprobs). VESPO's weights enter its ratio.

    Args:
        logprobs, behavior_logprobs: [B, T] or packed [N]; float32, bfloat16, float16 or float64.
        mask: like `logprobs`, bool or 0/1.
        low, high: bounds, 0 <= low <= high; infinity is allowed.
        bound_level: "token" | "sequence" | "geometric"; None: `level`.
        veto: a row with a counting token of exp(l_t) < veto weighs 0 altogether; 0: none.
        normalize: True or "tokens" divides by the mean over counting tokens, "sequences" by the mean over
            rows that count of their first weight (verl's for level "sequence"); all 0 stays 0.
        cu_seqlens: [B + 1] int32 or int64 for packed input; needed for the row levels, a veto and
        "sequences".
    Returns: (weights, metrics): weights like `logprobs` in float32 (float64 for float64), 0 where masked;
        metrics as 0-d tensors importance/{raw_mean,raw_max} before bounds, {mean,max,ess} after bounds, veto
        and normalisation (ess: effective sample size over the number of tokens), and outside and vetoed, the
        fractions of tokens out of bounds and in vetoed rows.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value.
    Source: truncation: Ionides 2008, Espeholt et al. 2018 (arXiv:1802.01561); for rollout engines: Yao et al.
        2025, "Your efficient RL framework secretly brings you off-policy RL training"; mask: IcePop, Ling
        team 2025 (arXiv:2510.18855); sequences and veto: Liu et al. 2025, "When speed kills stability".
    """
    mask = check_tokens("logprobs", logprobs, mask, cu_seqlens)
    check_like("behavior_logprobs", behavior_logprobs, logprobs, "logprobs")
    _check.choice("level", level, LEVELS)
    _check.choice("mode", mode, MODES)
    low = _check.number("low", low, low=0.0)
    high = _check.number("high", high, low=low, infinite=True)
    if bound_level is not None:
        _check.choice("bound_level", bound_level, LEVELS)
        if mode != "mask":
            raise ValueError(f"bound_level must be None for mode {mode!r}, got {bound_level!r}")
    veto = _check.number("veto", veto, low=0.0)
    normalize = "tokens" if normalize is True else normalize
    if normalize is not False:
        _check.choice("normalize", normalize, NORMALIZE[1:])
    if logprobs.dim() == 1 and cu_seqlens is None:
        _refuse_without_rows(level, bound_level, veto, normalize)
    if use_reference():
        if cu_seqlens is not None:
            _check.rising("cu_seqlens", cu_seqlens, len(logprobs), "the packed tokens")
        return reference.importance_weights(
            logprobs, behavior_logprobs, mask, level=level, mode=mode, low=low, high=high,
            bound_level=bound_level, veto=veto, normalize=normalize, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    weights, stats = importance_weights_op(
        logprobs.detach(), behavior_logprobs.detach(), mask, cu_seqlens, LEVELS.index(level),
        MODES.index(mode), low, high, LEVELS.index(bound_level or level), veto, NORMALIZE.index(normalize),
    )  # fmt: skip
    return weights, dict(zip(IMPORTANCE_METRICS, stats.unbind(), strict=True))


def _refuse_without_rows(level: str, bound_level: str | None, veto: float, normalize: bool | str) -> None:
    """Packed tokens without cu_seqlens have no rows."""
    for name, value, needs in (
        ("level", level, level != "token"),
        ("bound_level", bound_level, bound_level not in (None, "token")),
        ("veto", veto, veto > 0),
        ("normalize", normalize, normalize == "sequences"),
    ):
        if needs:
            raise ValueError(f"cu_seqlens must be given for packed logprobs and {name} {value!r}, got None")


def off_policy_mask(
    logprobs: torch.Tensor,
    behavior_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    threshold: float,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tokens to keep: all but those with A < 0 of sequences that have become too unlikely (OPSM).

        keep = mask and (A >= 0 or mean over the row of (behavior_logprobs - logprobs) <= threshold)

    TRL and slime let what is dropped count in the averages and keep its KL: pass the result as `importance`,
    in the dtype of the log-probs, times the weights if there are any. To leave it out altogether, pass it as
    `mask`.

    Args:
        logprobs, behavior_logprobs, mask, cu_seqlens: see `importance_weights`.
        advantages: like `logprobs`, or one per sequence [B].
        threshold: number >= 0, DeepSeek's delta.
    Returns: bool like `logprobs`, false where masked.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value.
    Source: DeepSeek-V3.2 2025 (arXiv:2512.02556), section 3.1; TRL's off_policy_mask_threshold, slime's OPSM.
    """
    mask = check_tokens("logprobs", logprobs, mask, cu_seqlens)
    check_like("behavior_logprobs", behavior_logprobs, logprobs, "logprobs")
    check_advantages(advantages, logprobs, cu_seqlens)
    threshold = _check.number("threshold", threshold, low=0.0)
    if logprobs.dim() == 1 and cu_seqlens is None:
        raise ValueError("cu_seqlens must be given for packed logprobs, got None")
    if use_reference():
        if cu_seqlens is not None:
            _check.rising("cu_seqlens", cu_seqlens, len(logprobs), "the packed tokens")
        return reference.off_policy_mask(
            logprobs, behavior_logprobs, advantages, mask, threshold=threshold, cu_seqlens=cu_seqlens
        )
    geometric = LEVELS.index("geometric")
    near, _ = importance_weights_op(
        logprobs.detach(), behavior_logprobs.detach(), mask, cu_seqlens, geometric, MODES.index("mask"),
        math.exp(-threshold), math.inf, geometric, 0.0, 0,
    )  # fmt: skip
    better = advantages >= 0
    if better.shape != logprobs.shape:
        if cu_seqlens is None:
            better = better[:, None]
        else:
            better = better.repeat_interleave(cu_seqlens.diff(), output_size=len(logprobs))
    return mask & (better | (near > 0))


def high_entropy_mask(entropy: torch.Tensor, mask: torch.Tensor, *, fraction: float) -> torch.Tensor:
    """Which tokens are among the `fraction` of highest entropy: the forks, where learning pays.

        keep = mask and H >= quantile of the counting tokens' H at 1 - fraction, interpolated linearly

    TRL's top_entropy_quantile lets what is dropped count in the averages and keep its KL: pass the result as
    `importance` to `policy_loss`; to leave it out altogether, pass it as `mask`. A statistic of the call.

    Args:
        entropy: any shape; float32, bfloat16, float16 or float64.
        mask: like `entropy`, bool or 0/1.
        fraction: share to keep, in (0, 1].
    Returns: bool like `entropy`, false where masked.
    Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value.
    Source: Wang et al. 2025, "Beyond the 80/20 rule" (arXiv:2506.01939).
    """
    _check.floating("entropy", entropy)
    mask = _check.mask("mask", mask, entropy.shape, "entropy", entropy.device)
    fraction = _check.number("fraction", fraction, low=0.0, high=1.0, low_open=True)
    if use_reference():
        return reference.high_entropy_mask(entropy, mask, fraction=fraction)
    return high_entropy_mask_op(entropy.detach(), mask, fraction)
