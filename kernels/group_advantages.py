"""Rewards relative to their group; one program a group, float64 inside.

    c_i = r_i - b_i      A_i = c_i / (max(std, min_std) + eps), or c_i

Roofline: 12 bytes read and 4 written a reward, 8 of the sorts' order, for some thousands: the launch and the sorts
are the cost. A group's members are adjacent after the sorts and read from its first member on, three times
(sum, squares, result), so a group's numbers depend on its members alone. Nothing waits for the device: every
sorted position gets a program, and those that begin no group stop at once.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant
from .whiten import moments

# Members read at a time: groups hold 4 to 64 responses.
BLOCK = 64


@triton.jit
def _members(group_ids, order, start, group, good, BLOCK: tl.constexpr):
    """(position in the batch, belongs to the group) of BLOCK sorted places from `start` on."""
    place = start + tl.arange(0, BLOCK)
    at = tl.load(order + place, place < good, 0)
    same = tl.load(group_ids + at, place < good, 0) == group
    return at, same & (place < good)


@triton.jit
def _batch_std(batch, ddof):
    """Of (count, mean, M2)."""
    freedom = tl.load(batch) - ddof
    return tl.where(freedom > 0.0, tl.sqrt(tl.load(batch + 2) / tl.where(freedom > 0.0, freedom, 1.0)), 0.0)


@triton.jit
def group_advantages_kernel(
    rewards, group_ids, order, good_count, upstream, aside, batch, out, along_out, eps: tl.float64,
    min_std: tl.float64, ddof, BASELINE: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # BASELINE: the place in ops/_group_advantages.py's BASELINES; 2 and 4 are not relative to the group.
    RELATIVE: tl.constexpr = (BASELINE != 2) & (BASELINE != 4)
    first = tl.program_id(0).to(tl.int64)
    good = tl.load(good_count)
    group = tl.load(group_ids + tl.load(order + first))
    before = tl.load(group_ids + tl.load(order + tl.maximum(first - 1, 0)))
    if (first < good) & ((first == 0) | (before != group)):
        floor = tl.full([], min_std, tl.float64)
        # Members, mean, extremes.
        count = tl.zeros([], tl.int64)
        total = tl.zeros([], tl.float64)
        weight = tl.zeros([], tl.float64)  # of all members, and times reward
        weighted = tl.zeros([], tl.float64)
        low = tl.full([], float("inf"), tl.float64)
        high = tl.full([], float("-inf"), tl.float64)
        start = first
        found = tl.full([], BLOCK, tl.int64)
        while found == BLOCK:
            at, same = _members(group_ids, order, start, group, good, BLOCK)
            r = tl.load(rewards + at, same, 0.0).to(tl.float64)
            found = tl.sum(same.to(tl.int64), 0)
            count += found
            total += tl.sum(r, 0)
            if BASELINE == 3:
                w = tl.load(aside + at, same, 0.0).to(tl.float64)
                weight += tl.sum(w, 0)
                weighted += tl.sum(w * r, 0)
            low = tl.minimum(low, tl.min(tl.where(same, r, float("inf")), 0))
            high = tl.maximum(high, tl.max(tl.where(same, r, float("-inf")), 0))
            start += BLOCK
        n = count.to(tl.float64)
        mean = total / n
        flat = low == high
        # Squares around the mean.
        m2 = tl.zeros([], tl.float64)
        for start in range(first, first + count, BLOCK):
            at, same = _members(group_ids, order, start, group, good, BLOCK)
            gap = tl.where(same, tl.load(rewards + at, same, 0.0).to(tl.float64) - mean, 0.0)
            m2 += tl.sum(gap * gap, 0)
        freedom = n - ddof
        std = tl.where((freedom > 0) & (flat == 0), tl.sqrt(m2 / tl.where(freedom > 0, freedom, 1.0)), 0.0)
        divisor = tl.full([], 1.0, tl.float64)
        if SCALE == 1:
            divisor = tl.where(std > floor, std, floor) + tl.full([], eps, tl.float64)
        if SCALE == 2:
            spread = _batch_std(batch, ddof)
            divisor = tl.where(spread > floor, spread, floor) + tl.full([], eps, tl.float64)
        others = tl.full([], 1.0, tl.float64)
        if BASELINE == 1:
            others = n / tl.where(count > 1, n - 1.0, 1.0)
        centre = mean
        if not RELATIVE:
            centre = tl.zeros([], tl.float64)
        if BASELINE == 3:
            centre = tl.where(weight > 0.0, weighted / tl.where(weight > 0.0, weight, 1.0), mean)
        alone = RAW & (count == 1)
        relative = (flat == 0) | (RELATIVE == 0)
        if BACKWARD:
            plain = tl.zeros([], tl.float64)  # sum of the upstream
            along = tl.zeros([], tl.float64)  # -dL/dstd
            for start in range(first, first + count, BLOCK):
                at, same = _members(group_ids, order, start, group, good, BLOCK)
                r = tl.load(rewards + at, same, 0.0).to(tl.float64)
                g = tl.load(upstream + at, same, 0.0).to(tl.float64)
                plain += tl.sum(g, 0)
                gap = r - centre
                if BASELINE == 4:
                    gap = r - tl.load(aside + at, same, 0.0).to(tl.float64)
                along += tl.sum(tl.where(same, g * (others * gap) / (divisor * divisor), 0.0), 0)
            if SCALE == 2:
                tl.store(along_out + first, tl.where((relative == 0) | alone, 0.0, along))
            through = (SCALE == 1) & (std > floor) & (std > 0.0) & (freedom > 0)
            slope = tl.where(through, along / tl.where(through, freedom * std, 1.0), 0.0)
            for start in range(first, first + count, BLOCK):
                at, same = _members(group_ids, order, start, group, good, BLOCK)
                r = tl.load(rewards + at, same, 0.0).to(tl.float64)
                g = tl.load(upstream + at, same, 0.0).to(tl.float64)
                share = tl.where(same, 1.0 / n, 0.0)  # dcentre/dr
                if not RELATIVE:
                    share = tl.where(same, 0.0, 0.0).to(tl.float64)
                if BASELINE == 3:
                    w = tl.load(aside + at, same, 0.0).to(tl.float64)
                    share = tl.where(weight > 0.0, w / tl.where(weight > 0.0, weight, 1.0), share)
                d = others * (g - plain * share) / divisor - slope * (r - mean)
                d = tl.where(alone, g, tl.where(relative, d, 0.0))
                tl.store(out + at, d.to(out.dtype.element_ty), same)
        else:
            for start in range(first, first + count, BLOCK):
                at, same = _members(group_ids, order, start, group, good, BLOCK)
                r = tl.load(rewards + at, same, 0.0).to(tl.float64)
                gap = r - centre
                if BASELINE == 4:
                    gap = r - tl.load(aside + at, same, 0.0).to(tl.float64)
                value = others * gap / divisor
                value = tl.where(alone, r, tl.where(relative, value, 0.0))
                tl.store(out + at, value.to(out.dtype.element_ty), same)


def group_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, valid: torch.Tensor | None, upstream: torch.Tensor | None,
    aside: torch.Tensor | None, baseline: int, scale: int, raw: bool, eps: float, ddof: int, min_std: float,
) -> torch.Tensor:  # fmt: skip
    """[N]; with an upstream gradient [N] the gradient of the rewards."""
    rewards, group_ids = rewards.contiguous(), group_ids.contiguous()
    wide = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    out = torch.zeros(rewards.shape, dtype=wide, device=rewards.device)
    if len(rewards) == 0:
        return out
    out_of_group = rewards.isnan()
    if valid is not None:
        out_of_group |= ~valid
    order = group_ids.argsort(stable=True)
    order = order[out_of_group[order].to(torch.int8).argsort(stable=True)]
    backward, by_batch = upstream is not None, scale == 2
    batch = moments(rewards, ~out_of_group) if by_batch else rewards
    along = torch.zeros(rewards.shape, dtype=torch.float64, device=rewards.device) if by_batch else rewards
    group_advantages_kernel[(len(rewards),)](
        rewards, group_ids, order, (~out_of_group).sum(), rewards if upstream is None else upstream.contiguous(),
        rewards if aside is None else aside.contiguous(), batch, out, along, eps=eps, min_std=min_std, ddof=ddof,
        BASELINE=baseline, SCALE=scale, RAW=raw, BACKWARD=backward, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    if backward and by_batch:
        out -= _through_batch_std(rewards, out_of_group, batch, along.sum(), ddof, min_std).to(wide)
    return out


def _through_batch_std(
    rewards: torch.Tensor, left_out: torch.Tensor, batch: torch.Tensor, along: torch.Tensor, ddof: int,
    min_std: float,
) -> torch.Tensor:  # fmt: skip
    """-dL/dstd dstd/dr, of a std that every group shares; without a sync."""
    count, mean, m2 = batch.unbind()
    freedom = count - ddof
    std = torch.where(freedom > 0, m2 / freedom.clamp_min(1), 0.0).sqrt()
    through = (std > min_std) & (std > 0)
    slope = torch.where(through, along / torch.where(through, freedom * std, 1.0), 0.0)
    return torch.where(left_out, 0.0, slope * (rewards.double() - mean))


def _variants() -> list[Variant]:
    signature = {
        "rewards": "*fp32", "group_ids": "*i64", "order": "*i64", "good_count": "*i64", "upstream": "*fp32",
        "aside": "*i64", "batch": "*fp64", "out": "*fp32", "along_out": "*fp64", "eps": "fp64",
        "min_std": "fp64", "ddof": "i32",
    }  # fmt: skip
    return [
        Variant(
            group_advantages_kernel,
            signature,
            {"BASELINE": baseline, "SCALE": scale, "RAW": False, "BACKWARD": backward, "BLOCK": BLOCK},
            num_warps=1,
        )
        for baseline, scale in ((0, 1), (1, 0), (2, 1), (3, 2), (4, 0))
        for backward in (False, True)
    ]


VARIANTS = _variants()
