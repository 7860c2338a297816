"""What the kernels of the returns share: a program's row, its flags, its counting steps, and the scan's joins."""

import triton
import triton.language as tl

from .aot import Variant


@triton.jit
def _bounds(row, offsets, length, total, PACKED: tl.constexpr):
    """(first step, number of steps) of a row; offsets that leave the pack are cut at its ends."""
    row = tl.full([], row, tl.int64)
    if not PACKED:
        return row * length, tl.full([], length, tl.int64)
    size = tl.full([], total, tl.int64)
    begin = tl.minimum(tl.maximum(tl.load(offsets + row), 0), size)
    end = tl.minimum(tl.maximum(tl.load(offsets + row + 1), begin), size)
    return begin, end - begin


@triton.jit
def _flag(flags, at, inside, HAS: tl.constexpr, DEFAULT: tl.constexpr):
    if HAS:
        return (tl.load(flags + at, inside, 0) != 0) & inside
    return inside & DEFAULT


@triton.jit
def _number(numbers, at, wanted, HAS: tl.constexpr, WIDE: tl.constexpr):
    """0 where not wanted: what stands there is not read."""
    if HAS:
        return tl.load(numbers + at, wanted, 0.0).to(WIDE)
    return tl.where(wanted, 0.0, 0.0).to(WIDE)


@triton.jit
def _join(a_near, b_near, a_far, b_far):
    """Compose y -> b + a y: the far map, later in the scan's direction, is applied to the near one's result."""
    return a_near * a_far, b_far + a_far * b_near


@triton.jit
def _join_cut(a_near, b_near, a_far, b_far):
    """As `_join`, but a = 0 is a cut that not even NaN crosses."""
    return a_near * a_far, tl.where(a_far == 0.0, b_far, b_far + a_far * b_near)


@triton.jit
def _after(a, b, m):
    """b + a m; a = 0 is a cut."""
    return tl.where(a == 0.0, b, b + a * m)


@triton.jit
def _pick(x, i, k):
    """x[k] of a block: a sum over a single term, so exact."""
    return tl.sum(tl.where(i == k, x, 0.0), 0)


@triton.jit
def _lam_of(row, lams, lam, PER_ROW: tl.constexpr, WIDE: tl.constexpr):
    if PER_ROW:
        return tl.load(lams + row).to(WIDE)
    return tl.full([], lam, tl.float64).to(WIDE)


@triton.jit
def _flags_of(
    terminated, truncated, mask, at, inside, ENDS: tl.constexpr, CUTS: tl.constexpr, MASKED: tl.constexpr
):
    counts = _flag(mask, at, inside, MASKED, True)
    ends = _flag(terminated, at, counts, ENDS, False)
    cut = _flag(truncated, at, counts, CUTS, False) & (ends == 0)
    return counts, ends, cut


@triton.jit
def _messages(
    rewards, values, bootstrap_values, terminated, truncated, at, inside, discount, lam_row,
    VALUES: tl.constexpr, ENDS: tl.constexpr, CUTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(r, V, V_boot, stops, a, b) of a block of GAE's steps: m_t = b_t + a_t m, m the message behind the block."""
    ends = _flag(terminated, at, inside, ENDS, False)
    cut = _flag(truncated, at, inside, CUTS, False) & (ends == 0)
    r = _number(rewards, at, inside, True, WIDE)
    v = _number(values, at, inside, VALUES, WIDE)
    boot = _number(bootstrap_values, at, cut, CUTS, WIDE)
    stops = ends | cut
    a = tl.where(inside, tl.where(stops, 0.0, discount * lam_row), 1.0)
    b = tl.where(inside, (1.0 - lam_row) * v + lam_row * (r + discount * boot), 0.0)
    a, b = tl.associative_scan((a, b), 0, _join_cut, reverse=True)
    return r, v, boot, stops, a, b


@triton.jit
def _counting_steps(
    mask, places, first_out, second_out, n, MASKED: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr
):
    """(number of counting steps, the first one, how many are listed: all or none); zeros where masked.

    All pointers are at the row's first step; a row has fewer than 2^31 steps. In a row with gaps `places` gets
    where the counting steps stand, so that blocks are blocks of counting steps: neither gaps nor padding on either
    side change what is joined with what.
    """
    steps = n.to(tl.int32)
    count = steps
    low = tl.full([], 0, tl.int32)
    listed = tl.full([], 0, tl.int32)
    if MASKED:
        i = tl.arange(0, BLOCK)
        count = tl.full([], 0, tl.int32)
        low = steps
        high = tl.full([], -1, tl.int32)
        for k in range(tl.cdiv(steps, BLOCK)):
            step = k * BLOCK + i
            inside = step < steps
            counts = (tl.load(mask + step, inside, 0) != 0) & inside
            tl.store(first_out + step, tl.where(inside, 0.0, 0.0), inside & (counts == 0))
            if SECOND:
                tl.store(second_out + step, tl.where(inside, 0.0, 0.0), inside & (counts == 0))
            count += tl.sum(counts.to(tl.int32), 0)
            low = tl.minimum(low, tl.min(tl.where(counts, step, steps), 0))
            high = tl.maximum(high, tl.max(tl.where(counts, step, -1), 0))
        listed = tl.where(high - low + 1 > count, count, 0)
        if listed > 0:
            seen = tl.full([], 0, tl.int32)
            for k in range(tl.cdiv(steps, BLOCK)):
                step = k * BLOCK + i
                inside = step < steps
                counts = (tl.load(mask + step, inside, 0) != 0) & inside
                rank = seen + tl.cumsum(counts.to(tl.int32), 0) - 1
                tl.store(places + rank, step, counts)
                seen += tl.sum(counts.to(tl.int32), 0)
            tl.debug_barrier()  # other threads of this program read what these wrote
    return count, low, listed


@triton.jit
def _places(places, low, listed, rank, MASKED: tl.constexpr):
    """Where in the row the counting steps of these ranks stand."""
    if not MASKED:
        return rank
    return tl.where(rank < listed, tl.load(places + rank, rank < listed, 0), low + rank)


VARIANTS: list[Variant] = []
