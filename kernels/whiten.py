"""Moments of the counting elements, and whitening by them.

    n, mean, M2 = sum (x - mean)^2      y = (x - mean) / sqrt(M2 / (n - ddof) + eps), plus the mean if it stays

Roofline, per element in float32: moments 4 + 1 bytes read (x, mask), whiten 5 read and 4 written, its backward
9 + 9 read and 4 written: bandwidth-bound (a million elements: 1.7 us, 3 us and 7.3 us of 3 TB/s), where the
dozen float64 operations an element of the moments fit in at one half the vector rate.

Blocks' results are joined by one program in the blocks' order, and nothing waits for the device: what whitens
reads the moments where they are.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant

# 16 elements a thread at 4 warps: both passes over a block run on registers.
BLOCK = 2048
# Block results that the last program holds at a time.
FOLD = 512
# The interpreter's time goes by elements: small blocks, and with them many to join, for its tests.
INTERPRETED_BLOCK, INTERPRETED_FOLD = 32, 4


@triton.jit
def _counting(x, mask, start, total, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(positions, counts): BLOCK elements from `start` on."""
    at = start + tl.arange(0, BLOCK)
    counts = at < total
    if MASKED:
        counts = counts & (tl.load(mask + at, counts, 0) != 0)
    return at, counts


@triton.jit
def moments_kernel(x, mask, partial, total, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at, counts = _counting(x, mask, block * BLOCK, total, MASKED, BLOCK)
    value = tl.load(x + at, counts, 0.0).to(tl.float64)
    n = tl.sum(counts.to(tl.int32), 0).to(tl.float64)
    mean = tl.sum(value, 0) / tl.maximum(n, 1.0)
    gap = tl.where(counts, value - mean, 0.0)
    tl.store(partial + block * 3, n)
    tl.store(partial + block * 3 + 1, mean)
    tl.store(partial + block * 3 + 2, tl.sum(gap * gap, 0))


@triton.jit
def _merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Chan, Golub & LeVeque 1979; an empty part leaves the other as it is."""
    n = n_a + n_b
    share = tl.where(n > 0.0, n_b / tl.where(n > 0.0, n, 1.0), 0.0)
    gap = mean_b - mean_a
    mean = tl.where(n_a == 0.0, mean_b, tl.where(n_b == 0.0, mean_a, mean_a + gap * share))
    m2 = m2_a + m2_b + tl.where((n_a == 0.0) | (n_b == 0.0), 0.0, gap * gap * (n_a * share))
    return n, mean, m2


@triton.jit
def merge_kernel(partial, out, blocks, FOLD: tl.constexpr):
    n = tl.zeros([], tl.float64)
    mean = tl.zeros([], tl.float64)
    m2 = tl.zeros([], tl.float64)
    for start in range(0, blocks, FOLD):
        block = start + tl.arange(0, FOLD).to(tl.int64)
        inside = block < blocks
        part_n = tl.load(partial + block * 3, inside, 0.0)
        part_mean = tl.load(partial + block * 3 + 1, inside, 0.0)
        part_m2 = tl.load(partial + block * 3 + 2, inside, 0.0)
        part_n, part_mean, part_m2 = tl.reduce((part_n, part_mean, part_m2), 0, _merge)
        n, mean, m2 = _merge(n, mean, m2, part_n, part_mean, part_m2)
    tl.store(out, n)
    tl.store(out + 1, mean)
    tl.store(out + 2, m2)


@triton.jit
def _statistics(stats, eps, ddof):
    """(count, mean, 1 / standard deviation, n - ddof); 1 and 0 when there is nothing to scale by: centred only."""
    n = tl.load(stats)
    freedom = n - ddof
    few = (n < 2.0) | (freedom <= 0.0)
    variance = tl.load(stats + 2) / tl.where(few, 1.0, freedom) + tl.full([], eps, tl.float64)
    few = few | (variance == 0.0)
    scale = tl.where(few, 1.0, 1.0 / tl.sqrt(tl.where(few, 1.0, variance)))
    return n, tl.load(stats + 1), scale, tl.where(few, 0.0, freedom)


@triton.jit
def whiten_kernel(
    x, mask, stats, out, total, eps: tl.float64, ddof, MASKED: tl.constexpr, SHIFT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, counts = _counting(x, mask, tl.program_id(0).to(tl.int64) * BLOCK, total, MASKED, BLOCK)
    _, mean, scale, _ = _statistics(stats, eps, ddof)
    # The shift in two parts, since the mean is no float32.
    high = mean.to(WIDE)
    low = (mean - high.to(tl.float64)).to(WIDE)
    y = ((tl.load(x + at, counts, 0.0).to(WIDE) - high) - low) * scale.to(WIDE)
    if not SHIFT:
        y = y + mean.to(WIDE)
    tl.store(out + at, tl.where(counts, y, 0.0), at < total)


@triton.jit
def sums_kernel(upstream, x, mask, stats, partial, total, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(sum g, sum g (x - mean)) of a block."""
    block = tl.program_id(0).to(tl.int64)
    at, counts = _counting(x, mask, block * BLOCK, total, MASKED, BLOCK)
    g = tl.load(upstream + at, counts, 0.0).to(tl.float64)
    gap = tl.where(counts, tl.load(x + at, counts, 0.0).to(tl.float64) - tl.load(stats + 1), 0.0)
    tl.store(partial + block * 2, tl.sum(g, 0))
    tl.store(partial + block * 2 + 1, tl.sum(g * gap, 0))


@triton.jit
def add_kernel(partial, out, blocks, FOLD: tl.constexpr):
    plain = tl.zeros([], tl.float64)
    weighted = tl.zeros([], tl.float64)
    for start in range(0, blocks, FOLD):
        block = start + tl.arange(0, FOLD).to(tl.int64)
        plain += tl.sum(tl.load(partial + block * 2, block < blocks, 0.0), 0)
        weighted += tl.sum(tl.load(partial + block * 2 + 1, block < blocks, 0.0), 0)
    tl.store(out, plain)
    tl.store(out + 1, weighted)


@triton.jit
def whiten_backward_kernel(
    upstream, x, mask, stats, sums, out, total, eps: tl.float64, ddof, MASKED: tl.constexpr,
    SHIFT: tl.constexpr, FIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, counts = _counting(x, mask, tl.program_id(0).to(tl.int64) * BLOCK, total, MASKED, BLOCK)
    n, mean, scale, freedom = _statistics(stats, eps, ddof)
    d = scale * tl.load(upstream + at, counts, 0.0).to(tl.float64)
    if not FIXED:
        centring = -scale
        if not SHIFT:
            centring = 1.0 - scale
        constant = centring * tl.load(sums) / tl.maximum(n, 1.0)
        scaling = -(scale * scale * scale) * tl.load(sums + 1) / tl.where(freedom > 0.0, freedom, 1.0)
        gap = tl.load(x + at, counts, 0.0).to(tl.float64) - mean
        d = d + constant + tl.where(freedom > 0.0, scaling, 0.0) * gap
    tl.store(out + at, tl.where(counts, d, 0.0).to(out.dtype.element_ty), at < total)


# ---- launchers: the arguments and results of the operators in react_fast/ops/_advantage.py ---------------------

Tensor = torch.Tensor
Maybe = torch.Tensor | None


def _sizes() -> tuple[int, int]:
    """(BLOCK, FOLD)."""
    return (INTERPRETED_BLOCK, INTERPRETED_FOLD) if triton.knobs.runtime.interpret else (BLOCK, FOLD)


def _input(x: Tensor, mask: Maybe) -> tuple[int, dict]:
    """(blocks, the arguments every kernel shares)."""
    x, block = x.contiguous(), _sizes()[0]
    counting = x if mask is None else mask.contiguous()
    shared = {"x": x, "mask": counting, "total": x.numel(), "MASKED": mask is not None, "BLOCK": block}
    return triton.cdiv(x.numel(), block), shared


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def moments(x: Tensor, mask: Maybe) -> Tensor:
    """[3] float64: count, mean, M2."""
    blocks, shared = _input(x, mask)
    partial = torch.empty((blocks, 3), dtype=torch.float64, device=x.device)
    out = torch.empty(3, dtype=torch.float64, device=x.device)
    if blocks:
        moments_kernel[(blocks,)](partial=partial, **shared)
    merge_kernel[(1,)](partial, out, blocks, FOLD=_sizes()[1])
    return out


def whiten(
    x: Tensor, mask: Maybe, stats: Tensor, shift_mean: bool, eps: float, ddof: int, fixed: bool,
    out: Maybe = None,
) -> Tensor:  # fmt: skip
    """`out` may be x."""
    out = torch.empty(x.shape, dtype=_wide(x), device=x.device) if out is None else out
    blocks, shared = _input(x, mask)
    if blocks:
        WIDE = tl.float64 if x.dtype == torch.float64 else tl.float32
        whiten_kernel[(blocks,)](
            stats=stats.contiguous(), out=out, eps=eps, ddof=ddof, SHIFT=shift_mean, WIDE=WIDE, **shared
        )
    return out


def whiten_backward(
    upstream: Tensor,
    x: Tensor,
    mask: Maybe,
    stats: Tensor,
    shift_mean: bool,
    eps: float,
    ddof: int,
    fixed: bool,
) -> Tensor:
    """The gradient of x; `fixed` moments have none."""
    out = torch.empty(x.shape, dtype=_wide(x), device=x.device)
    blocks, shared = _input(x, mask)
    if blocks == 0:
        return out
    upstream, stats = upstream.contiguous(), stats.contiguous()
    sums = torch.empty(2, dtype=torch.float64, device=x.device)
    if not fixed:
        partial = torch.empty((blocks, 2), dtype=torch.float64, device=x.device)
        sums_kernel[(blocks,)](upstream, stats=stats, partial=partial, **shared)
        add_kernel[(1,)](partial, sums, blocks, FOLD=_sizes()[1])
    whiten_backward_kernel[(blocks,)](
        upstream, stats=stats, sums=sums, out=out, eps=eps, ddof=ddof, SHIFT=shift_mean, FIXED=fixed, **shared
    )
    return out


def _variants() -> list[Variant]:
    found = [
        Variant(merge_kernel, {"partial": "*fp64", "out": "*fp64", "blocks": "i32"}, {"FOLD": FOLD}),
        Variant(add_kernel, {"partial": "*fp64", "out": "*fp64", "blocks": "i32"}, {"FOLD": FOLD}),
    ]
    size = {"total": "i32"}
    even = ("total",)
    for pointer in ("*fp32", "*bf16", "*fp64"):
        wide = "*fp64" if pointer == "*fp64" else "*fp32"
        WIDE = tl.float64 if pointer == "*fp64" else tl.float32
        inputs = {"x": pointer, "mask": "*i1"}
        both = {"upstream": wide, **inputs, "stats": "*fp64"}
        scalars = {"out": wide, **size, "eps": "fp64", "ddof": "i32"}
        shape = {"MASKED": True, "BLOCK": BLOCK}
        shift = {"SHIFT": False, **shape}
        found += [
            Variant(moments_kernel, {**inputs, "partial": "*fp64", **size}, shape, divisible=even),
            Variant(
                whiten_kernel,
                {**inputs, "stats": "*fp64", **scalars},
                {"WIDE": WIDE, **shift},
                divisible=even,
            ),
            Variant(sums_kernel, {**both, "partial": "*fp64", **size}, shape, divisible=even),
            Variant(
                whiten_backward_kernel,
                {**both, "sums": "*fp64", **scalars},
                {"FIXED": False, **shift},
                divisible=even,
            ),
        ]
    return found


VARIANTS = _variants()
