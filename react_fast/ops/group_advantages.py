"""Rewards relative to their group: torch or numpy in and out."""

import torch

from .. import reference
from . import _check
from ._arrays import numpy_too
from ._group_advantages import BASELINES, SCALES
from ._group_advantages import group_advantages as _group_advantages
from .backend import use_reference


@numpy_too
def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    baseline: str = "mean",
    scale: str = "std",
    eps: float = 1e-4,
    ddof: int = 1,
    min_std: float = 0.0,
    singleton: str = "zero",
    valid: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    baselines: torch.Tensor | None = None,
) -> torch.Tensor:
    """A response's reward relative to the other responses to the same prompt.

        A_i = (r_i - b_i) / (max(std, min_std) + eps)

    Args:
        rewards: [N] float32, bfloat16, float16 or float64. A NaN reward is left out of its group and gets 0.
        group_ids: [N] int32 or int64, any numbers in any order; groups may differ in size.
        baseline: b is the group's "mean", the mean of the others ("leave_one_out"), the mean weighted by `lengths`
            ("length_weighted"), `baselines` ("given"), or 0 ("none").
        scale: "std" of the group, or "batch_std" of all rewards, with `ddof`, centred and in two passes (0 for no
            more than `ddof` rewards), or "none" for no division.
        eps, min_std: not negative; with a scale not both 0.
        ddof: 0 or 1.
        singleton: a group of one gets 0 ("zero") or its reward ("raw"); baselines "none" and "given" need no
            others and treat it like any group.
        valid: [N] bool or 0/1 integers; a false member is left out of its group (and of the batch) and gets 0.
        lengths: [N] int32 or int64, not negative: tokens of each response. A group of empty ones has its mean.
        baselines: [N] like `rewards`, without a gradient.
    Returns: [N] float32 (float64 for float64). With a baseline from the group itself, a group of equal rewards
        gives exactly 0. Differentiable in `rewards`.
    Raises: TypeError for a wrong dtype; ValueError for a wrong shape, device, name or number, or lengths or
        baselines that are missing or not asked for.
    Source: GRPO, Shao et al. 2024 (arXiv:2402.03300); scale "none": Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783);
        leave-one-out: Kool et al. 2019; length-weighted: OPO, Hao et al. 2025 (arXiv:2505.23585).
        Elsewhere: eps is 1e-4 in TRL, 1e-6 in verl, 1e-9 in OpenRLHF, with ddof 1 everywhere; a group of one gets
        its raw reward in verl ("raw"); NeMo-RL divides by the std of the others.
    """
    _check.floating("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be [N], got {list(rewards.shape)}")
    _check.integer("group_ids", group_ids)
    _check.shape("group_ids", group_ids, rewards.shape, "rewards")
    _check.device("group_ids", group_ids, rewards.device, "rewards")
    if valid is not None:
        valid = _check.mask("valid", valid, rewards.shape, "rewards", rewards.device)
    _check.choice("baseline", baseline, BASELINES)
    _check.choice("scale", scale, SCALES)
    _check.choice("singleton", singleton, ("zero", "raw"))
    aside = _aside(rewards, baseline, lengths, baselines)
    eps = _check.number("eps", eps, low=0.0)
    min_std = _check.number("min_std", min_std, low=0.0)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if scale != "none" and eps == 0 and min_std == 0:
        raise ValueError("eps must be above 0 when there is a scale and min_std is 0, got 0")
    if use_reference():
        return reference.group_advantages(
            rewards, group_ids, baseline=baseline, scale=scale, eps=eps, ddof=ddof, min_std=min_std,
            singleton=singleton, valid=valid, lengths=lengths, baselines=baselines,
        )  # fmt: skip
    raw = singleton == "raw" and baseline not in ("none", "given")
    options = (BASELINES.index(baseline), SCALES.index(scale), raw, eps, ddof, min_std)
    return _group_advantages(rewards, group_ids, valid, None, aside, *options)


def _aside(
    rewards: torch.Tensor, baseline: str, lengths: torch.Tensor | None, baselines: torch.Tensor | None
) -> torch.Tensor | None:
    """What the baseline needs beside the rewards."""
    for name, x, wanted in (("lengths", lengths, "length_weighted"), ("baselines", baselines, "given")):
        if (x is None) == (baseline == wanted):
            raise ValueError(
                f"{name} must be given with baseline {wanted!r} and with no other, got baseline {baseline!r} "
                f"and {name} {'None' if x is None else 'of ' + str(list(x.shape))}"
            )
    if lengths is not None:
        _check.integer("lengths", lengths)
        _check.shape("lengths", lengths, rewards.shape, "rewards")
        _check.device("lengths", lengths, rewards.device, "rewards")
        looked_at = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and len(lengths) and int(lengths.min()) < 0:
            raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
    if baselines is not None:
        _check.dtype("baselines", _check.tensor("baselines", baselines), rewards.dtype, "rewards")
        _check.shape("baselines", baselines, rewards.shape, "rewards")
        _check.device("baselines", baselines, rewards.device, "rewards")
        if baselines.requires_grad:
            raise ValueError("baselines must not require a gradient, got a tensor that does; pass .detach()")
    return lengths if lengths is not None else baselines
