"""Rewards relative to their group as the equations say it; see react_fast.ops.group_advantages."""

import torch

from .advantage import _wide


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
    wide = _wide(rewards)
    ids = group_ids.tolist()
    members: dict[int, list[int]] = {}
    for i, group in enumerate(ids):
        if (valid is None or valid[i]) and not wide[i].isnan():
            members.setdefault(group, []).append(i)
    everyone = sorted(i for rows in members.values() for i in rows)
    batch_std = _std(wide[everyone].double(), ddof)
    nothing = wide[:0].sum()
    advantages = [nothing] * len(ids)
    relative = baseline not in ("none", "given")
    for rows in members.values():
        group = wide[rows].double()
        if len(rows) == 1 and singleton == "raw" and relative:
            found = group
        elif relative and group.max() == group.min():
            continue
        else:
            found = group - _baseline(group, rows, baseline, lengths, baselines)
            if scale != "none":
                std = batch_std if scale == "batch_std" else _std(group, ddof)
                found = found / (std.clamp_min(min_std) + eps)
        for i, value in zip(rows, found, strict=True):
            advantages[i] = value.to(wide.dtype)
    return torch.stack(advantages) if advantages else wide


def _std(x: torch.Tensor, ddof: int) -> torch.Tensor:
    if len(x) <= ddof or x.max() == x.min():
        return x.new_zeros(())
    return ((x - x.mean()) ** 2).sum().div(len(x) - ddof).sqrt()


def _baseline(
    group: torch.Tensor,
    rows: list[int],
    baseline: str,
    lengths: torch.Tensor | None,
    baselines: torch.Tensor | None,
) -> torch.Tensor:
    n = len(group)
    if baseline == "none":
        return torch.zeros_like(group)
    if baseline == "leave_one_out":
        return (group.sum() - group) / max(n - 1, 1)
    if baseline == "given":
        assert baselines is not None
        return baselines[rows].double()
    if baseline == "length_weighted":
        assert lengths is not None
        weights = lengths[rows].double()
        if weights.sum() > 0:
            return (weights * group).sum() / weights.sum()
    return group.mean()
