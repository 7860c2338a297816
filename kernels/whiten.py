"""Moments of the counting elements, and whitening by them.

    n, mean, M2 = sum (x - mean)^2      y = (x - mean) / sqrt(M2 / (n - ddof) + eps), plus the mean if it stays

Roofline, per element in float32: moments 4 + 1 bytes read (x, mask), whiten 5 read and 4 written, its backward
9 + 9 read and 4 written: bandwidth-bound (a million elements: 1.7 us, 3 us and 7.3 us of 3 TB/s), where the
dozen float64 operations an element of the moments fit in at one half the vector rate.

Blocks' results are joined by one program in the blocks' order, and nothing waits for the device: what whitens
reads the moments where they are. kernels/advantage.py leaves its moments in PARTS parts, which every program that
whitens adds up itself: two launches from rewards to whitened advantages.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant

# 16 elements a thread at 4 warps: both passes over a block run on registers.
BLOCK = 2048
# Block results that the last program holds at a time.
FOLD = 512
# Parts that a scan leaves its moments in, and programs that scale by their union: some eight programs for each of
# 132 multiprocessors, and 24 KiB of parts a program stay below a fifth of the traffic of 8M elements.
PARTS = 1024
# The interpreter's time goes by elements: small blocks, and with them many to join, for its tests.
INTERPRETED_BLOCK, INTERPRETED_FOLD, INTERPRETED_PARTS = 32, 4, 4


@triton.jit
def _counting(x, mask, start, total, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(positions, counts): BLOCK elements from `start` on."""
    at = start + tl.arange(0, BLOCK)
    counts = at < total
    if MASKED:
        counts = counts & (tl.load(mask + at, counts, 0) != 0)
    return at, counts


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
def moments_kernel(x, mask, parts, total, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at, counts = _counting(x, mask, block * BLOCK, total, MASKED, BLOCK)
    value = tl.load(x + at, counts, 0.0).to(tl.float64)
    n = tl.sum(counts.to(tl.int32), 0).to(tl.float64)
    mean = tl.sum(value, 0) / tl.maximum(n, 1.0)
    gap = tl.where(counts, value - mean, 0.0)
    tl.store(parts + block, n)
    tl.store(parts + tl.num_programs(0) + block, mean)
    tl.store(parts + 2 * tl.num_programs(0) + block, tl.sum(gap * gap, 0))


@triton.jit
def merge_kernel(parts, out, size, FOLD: tl.constexpr):
    n = tl.zeros([], tl.float64)
    mean = tl.zeros([], tl.float64)
    m2 = tl.zeros([], tl.float64)
    for start in range(0, size, FOLD):
        part = parts + start + tl.arange(0, FOLD).to(tl.int64)
        inside = start + tl.arange(0, FOLD) < size
        part_n = tl.load(part, inside, 0.0)
        part_mean = tl.load(part + size, inside, 0.0)
        part_m2 = tl.load(part + 2 * size, inside, 0.0)
        part_n, part_mean, part_m2 = tl.reduce((part_n, part_mean, part_m2), 0, _merge)
        n, mean, m2 = _merge(n, mean, m2, part_n, part_mean, part_m2)
    tl.store(out, n)
    tl.store(out + 1, mean)
    tl.store(out + 2, m2)


@triton.jit
def _union(stats, PARTS: tl.constexpr):
    """(n, mean, M2) of all parts: every program adds them up, in the same order.

    M2 = sum M2_p + n_p (mean_p - mean)^2, and the mean relative to one of the parts', so that equal parts leave no
    rounding.
    """
    p = tl.arange(0, PARTS)
    n_p = tl.load(stats + p)
    mean_p = tl.load(stats + PARTS + p)
    n = tl.sum(n_p, 0)
    centre = tl.where(n > 0.0, tl.max(tl.where(n_p > 0.0, mean_p, float("-inf")), 0), tl.load(stats + PARTS))
    mean = centre + tl.sum(tl.where(n_p > 0.0, n_p * (mean_p - centre), 0.0), 0) / tl.maximum(n, 1.0)
    gap = tl.where(n_p > 0.0, mean_p - mean, 0.0)
    return n, mean, tl.sum(tl.load(stats + 2 * PARTS + p) + n_p * gap * gap, 0)


@triton.jit
def _statistics(stats, eps, ddof, PARTS: tl.constexpr):
    """(count, mean, 1 / standard deviation, n - ddof); 1 and 0 when there is nothing to scale by: centred only."""
    n, mean, m2 = _union(stats, PARTS)
    freedom = n - ddof
    few = (n < 2.0) | (freedom <= 0.0)
    variance = m2 / tl.where(few, 1.0, freedom) + tl.full([], eps, tl.float64)
    few = few | (variance == 0.0)
    scale = tl.where(few, 1.0, 1.0 / tl.sqrt(tl.where(few, 1.0, variance)))
    return n, mean, scale, tl.where(few, 0.0, freedom)


@triton.jit
def whiten_kernel(
    x, mask, stats, out, total, eps: tl.float64, ddof, MASKED: tl.constexpr, SHIFT: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, mean, scale, _ = _statistics(stats, eps, ddof, PARTS)
    # The shift in two parts, since the mean is no float32.
    high = mean.to(WIDE)
    low = (mean - high.to(tl.float64)).to(WIDE)
    for block in range(tl.program_id(0), tl.cdiv(total, BLOCK), tl.num_programs(0)):
        at, counts = _counting(x, mask, tl.full([], block, tl.int64) * BLOCK, total, MASKED, BLOCK)
        y = ((tl.load(x + at, counts, 0.0).to(WIDE) - high) - low) * scale.to(WIDE)
        if not SHIFT:
            y = y + mean.to(WIDE)
        tl.store(out + at, tl.where(counts, y, 0.0), at < total)


@triton.jit
def sums_kernel(
    upstream, x, mask, stats, partial, total, MASKED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """(sum g, sum g (x - mean)) of a block."""
    _, mean, _ = _union(stats, PARTS)
    block = tl.program_id(0).to(tl.int64)
    at, counts = _counting(x, mask, block * BLOCK, total, MASKED, BLOCK)
    g = tl.load(upstream + at, counts, 0.0).to(tl.float64)
    gap = tl.where(counts, tl.load(x + at, counts, 0.0).to(tl.float64) - mean, 0.0)
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
    SHIFT: tl.constexpr, FIXED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, counts = _counting(x, mask, tl.program_id(0).to(tl.int64) * BLOCK, total, MASKED, BLOCK)
    n, mean, scale, freedom = _statistics(stats, eps, ddof, PARTS)
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


def _sizes() -> tuple[int, int, int]:
    """(BLOCK, FOLD, PARTS)."""
    if triton.knobs.runtime.interpret:
        return INTERPRETED_BLOCK, INTERPRETED_FOLD, INTERPRETED_PARTS
    return BLOCK, FOLD, PARTS


def parts_shape() -> tuple[int, int]:
    """Of moments in parts, (count, mean, M2) by part; those of `moments` are one part."""
    return 3, _sizes()[2]


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
    parts = torch.empty((3, blocks), dtype=torch.float64, device=x.device)
    if blocks:
        moments_kernel[(blocks,)](parts=parts, **shared)
    return merge(parts)


def merge(parts: Tensor) -> Tensor:
    """[3, P] float64 to [3]: the moments of all parts."""
    out = torch.empty(3, dtype=torch.float64, device=parts.device)
    merge_kernel[(1,)](parts, out, parts.shape[1], FOLD=_sizes()[1])
    return out


def _stats(stats: Tensor) -> dict:
    """[3] or [3, P] as the kernels take it."""
    return {"stats": stats.contiguous(), "PARTS": stats.shape[1] if stats.dim() == 2 else 1}


def whiten(
    x: Tensor, mask: Maybe, stats: Tensor, shift_mean: bool, eps: float, ddof: int, fixed: bool,
    out: Maybe = None,
) -> Tensor:  # fmt: skip
    """`out` may be x."""
    out = torch.empty(x.shape, dtype=_wide(x), device=x.device) if out is None else out
    blocks, shared = _input(x, mask)
    if blocks:
        WIDE = tl.float64 if x.dtype == torch.float64 else tl.float32
        whiten_kernel[(min(blocks, PARTS),)](
            out=out, eps=eps, ddof=ddof, SHIFT=shift_mean, WIDE=WIDE, **_stats(stats), **shared
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
    upstream, moments_given = upstream.contiguous(), _stats(stats)
    sums = torch.empty(2, dtype=torch.float64, device=x.device)
    if not fixed:
        partial = torch.empty((blocks, 2), dtype=torch.float64, device=x.device)
        sums_kernel[(blocks,)](upstream, partial=partial, **moments_given, **shared)
        add_kernel[(1,)](partial, sums, blocks, FOLD=_sizes()[1])
    whiten_backward_kernel[(blocks,)](
        upstream, sums=sums, out=out, eps=eps, ddof=ddof, SHIFT=shift_mean, FIXED=fixed, **moments_given,
        **shared,
    )  # fmt: skip
    return out


def _variants() -> list[Variant]:
    found = [
        Variant(merge_kernel, {"parts": "*fp64", "out": "*fp64", "size": "i32"}, {"FOLD": FOLD}),
        Variant(add_kernel, {"partial": "*fp64", "out": "*fp64", "blocks": "i32"}, {"FOLD": FOLD}),
    ]
    even = ("total",)
    for pointer in ("*fp32", "*bf16", "*fp64"):
        wide = "*fp64" if pointer == "*fp64" else "*fp32"
        signature = {
            "x": pointer, "mask": "*i1", **dict.fromkeys(("upstream", "out"), wide),
            **dict.fromkeys(("stats", "parts", "partial", "sums"), "*fp64"), "total": "i32", "eps": "fp64",
            "ddof": "i32",
        }  # fmt: skip
        shape = {"MASKED": True, "BLOCK": BLOCK}
        found.append(Variant(moments_kernel, signature, shape, divisible=even))
        for parts in (1, PARTS):
            given = {"PARTS": parts, **shape}
            shift = {"SHIFT": False, **given}
            WIDE = tl.float64 if pointer == "*fp64" else tl.float32
            found += [
                Variant(whiten_kernel, signature, {"WIDE": WIDE, **shift}, divisible=even),
                Variant(sums_kernel, signature, given, divisible=even),
                Variant(whiten_backward_kernel, signature, {"FIXED": False, **shift}, divisible=even),
            ]
    return found


VARIANTS = _variants()
