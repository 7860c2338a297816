"""Log-probability kernels: the chosen tokens of every row, and the row's entropy, from logits.

    u = softcap * tanh(x / softcap), or x        d_j = (u_j - max u) / T        sum = sum_j exp(d_j)
    logp_k = d_y(k) - log(sum)        H = log(sum) - sum_j exp(d_j) d_j / sum

j runs over the kept tokens: those with x_j not below the row's floor, and the chosen ones.

Roofline, per row of V logits of e bytes: V e bytes read forward (H100: V = 131072 bf16 is 256 KiB, 87 ns of
3 TB/s a row); V e read and V e written backward. One exponential an element each way, 16 a clock and
multiprocessor, is 60% of the forward's time in bf16: bandwidth-bound as long as it is one.

A row is cut into chunks of one size for every number of rows: a program folds a chunk, and where there are several
a second kernel merges them in order and finishes the row. So a row's result does not depend on the batch, and few
long rows fill the device as well as many. What is done once a row or token, not once a logit, is in float64.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from . import tuned
from .aot import Variant

# Blocks in a chunk: 16384 logits are 32 KiB of bf16, some 10 us of a multiprocessor's share of 3 TB/s among 8
# programs, far above the start of a program; one row of 128k vocabulary is 8 programs.
CHUNK_BLOCKS = 4
# Tokens of a row taken at a time, and row-token pairs in a program of the kernels that work once a row: one warp,
# since they wait for scattered reads and want many programs.
MAX_TOKENS = 16
ROW_BLOCK = 32
# Runtime integers that change with the batch: 64 bits wide and without a variant for 1 or for multiples of 16, so
# that no number of rows or sequence length compiles anything.
FREE = ("rows", "tokens", "inner", "outer_stride", "stride")
FREE_OUT = (*FREE, "out_inner", "out_outer_stride", "out_stride")


@triton.jit
def _cap(x, softcap, WIDE: tl.constexpr):
    """softcap * tanh(x / softcap); a forbidden token stays -inf."""
    a = x / softcap
    size = tl.abs(a)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    tanh = tl.where(a < 0, -far, far)
    if tl.float32 == WIDE:
        # 1 - e cancels near 0: an odd polynomial of relative error 3e-9 there.
        z = a * a
        p = -0.00589515765 * z + 0.0207959713
        p = p * z - 0.0537838302
        p = p * z + 0.133319241
        p = p * z - 0.33333298
        tanh = tl.where(size < 0.6, a * z * p + a, tanh)
    return tl.where(x == float("-inf"), x, softcap * tanh)


@triton.jit
def _cap_slope(x, softcap):
    """1 - tanh^2 = 4 e / (1 + e)^2, without cancellation."""
    e = tl.exp(-2.0 * tl.abs(x / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _inverse(t, WIDE: tl.constexpr):
    """1 / T in two numbers: one float32 alone would be off by up to 6e-8, the same for every logit of the row,
    and so would not average out."""
    inverse = 1.0 / t.to(tl.float64)
    high = inverse.to(WIDE)
    return high, (inverse - high.to(tl.float64)).to(WIDE)


@triton.jit
def _difference(u, largest, inverse_high, inverse_low):
    """(u - largest) / T, at least -750: exp is 0 there, and 0 * d is 0 for a forbidden token too. The low part of
    1 / T joins behind the bound, since it may be 0 and a forbidden token's gap is infinite."""
    gap = u - largest
    d = gap * inverse_high
    return tl.where(d < -750.0, -750.0, d + gap * inverse_low)


@triton.jit
def _log1p(x):
    """log(1 + x): what rounding 1 + x to s loses is put back by the factor x / (s - 1), so that a confident row
    keeps full relative accuracy (Goldberg 1991, theorem 4)."""
    s = 1.0 + x
    lost_all = s == 1.0
    return tl.where(lost_all, x, tl.log(s) * (x / tl.where(lost_all, 1.0, s - 1.0)))


@triton.jit
def _triple(high, middle, low, WIDE: tl.constexpr):
    """A Python number, which reaches a kernel as float32, from the three that sum to it."""
    return tl.full([], 0.0, WIDE) + high + middle + low


@triton.jit
def _row_base(row, inner, outer_stride, stride, ALIGNED: tl.constexpr):
    """Where rows begin; ALIGNED: at multiples of 16 elements, which allows 16-byte loads."""
    base = (row // inner) * outer_stride + (row % inner) * stride
    return tl.multiple_of(base, 16) if ALIGNED else base


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation: what rounding lost is put back as in _log1p (Kahan)."""
    e = tl.exp(x)
    same, gone = e == 1.0, e == 0.0
    slope = x / tl.log(tl.where(same | gone, 0.5, e))
    return tl.where(same, x, tl.where(gone, -1.0, (e - 1.0) * slope))


@triton.jit
def _fold(u, largest, ties, rest, moment, inverse_high, inverse_low, ENTROPY: tl.constexpr, WIDE: tl.constexpr):
    """Logits [ROWS, n] into the sums of their rows: sum_j exp(d_j) = ties + rest, moment = sum_j exp(d_j) d_j."""
    top = tl.maximum(largest, tl.max(u, 1))
    # Until an allowed token is seen any finite reference gives exp(-inf) = 0; NaN stays NaN.
    reference = tl.where(top == float("-inf"), 0.0, top)
    same = top == largest
    shift = tl.where(same, 0.0, _difference(largest, reference, inverse_high, inverse_low))
    factor = tl.exp(shift)
    d = _difference(u, reference[:, None], inverse_high[:, None], inverse_low[:, None])
    # Ties with the largest logit are counted apart: what a confident row adds to them would vanish beside 1.
    tie = u == reference[:, None]
    e = tl.where(tie, 0.0, tl.exp(d))
    if ENTROPY:
        moment = factor * (moment + shift * (ties + rest)) + tl.sum(e * d, 1)
    rest = factor * (rest + tl.where(same, 0.0, ties)) + tl.sum(e, 1)
    ties = tl.where(same, ties, 0.0) + tl.sum(tie.to(WIDE), 1)
    return top, ties, rest, moment


@triton.jit
def _merge(largest, ties, rest, moment, top_b, ties_b, rest_b, moment_b, inverse_high, inverse_low):
    """The sums of two parts of a row."""
    top = tl.maximum(largest, top_b)
    reference = tl.where(top == float("-inf"), 0.0, top)
    first, second = top == largest, top == top_b
    shift = tl.where(first, 0.0, _difference(largest, reference, inverse_high, inverse_low))
    shift_b = tl.where(second, 0.0, _difference(top_b, reference, inverse_high, inverse_low))
    factor, factor_b = tl.exp(shift), tl.exp(shift_b)
    moment = factor * (moment + shift * (ties + rest)) + factor_b * (moment_b + shift_b * (ties_b + rest_b))
    rest = factor * (rest + tl.where(first, 0.0, ties)) + factor_b * (rest_b + tl.where(second, 0.0, ties_b))
    ties = tl.where(first, ties, 0.0) + tl.where(second, ties_b, 0.0)
    return top, ties, rest, moment


@triton.jit
def _chosen(base, ids, row, k, tokens, counts, vocab):
    """Ids [ROWS, TOKENS] of tokens k, where they may be read, and their logits (+inf elsewhere)."""
    inside = counts[:, None] & (k < tokens)[None, :]
    y = tl.load(ids + (row * tokens)[:, None] + k[None, :], inside, 0).to(tl.int64)
    valid = inside & (y >= 0) & (y < vocab)
    return y, valid, tl.load(base[:, None] + y, valid, float("inf"))


@triton.jit
def _finish(
    base, row, live, counts, t, softcap, floor, inverse_high, inverse_low, largest, ties, rest, moment, ids,
    repeats, logp_out, entropy_out, stats, rows, vocab, tokens, CAPPED: tl.constexpr, FLOORED: tl.constexpr,
    ENTROPY: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    if FLOORED:  # chosen tokens below the floor join, each once
        for first in range(0, tokens, TOKENS):
            k = first + tl.arange(0, TOKENS)
            _, valid, x = _chosen(base, ids, row, k, tokens, counts, vocab)
            below = valid & (x.to(WIDE) < floor[:, None])
            if TOKENS > 1:
                below = below & (tl.load(repeats + (row * tokens)[:, None] + k[None, :], valid, 1) == 0)
            u = _cap(x.to(WIDE), softcap, WIDE) if CAPPED else x.to(WIDE)
            largest, ties, rest, moment = _fold(
                tl.where(below, u, float("-inf")), largest, ties, rest, moment, inverse_high, inverse_low, ENTROPY,
                WIDE,
            )  # fmt: skip
    wrong = ((t > 0) == 0) | (floor != floor)
    empty = (largest == float("-inf")) & (rest == 0.0) & (wrong == 0)
    beside_one = (ties.to(tl.float64) - 1.0) + rest.to(tl.float64)
    log_sum = tl.where(wrong | (largest == float("inf")), float("nan"), _log1p(beside_one))
    for first in range(0, tokens, TOKENS):
        k = first + tl.arange(0, TOKENS)
        _, valid, x = _chosen(base, ids, row, k, tokens, counts, vocab)
        u = (_cap(x.to(WIDE), softcap, WIDE) if CAPPED else x.to(WIDE)).to(tl.float64)
        logp = (u - largest.to(tl.float64)[:, None]) / t.to(tl.float64)[:, None] - log_sum[:, None]
        logp = tl.where(logp > 0.0, 0.0, logp)
        logp = tl.where(empty[:, None] & (u == u), float("-inf"), logp)
        logp = tl.where(counts[:, None], tl.where(valid, logp, float("nan")), 0.0)
        out = logp_out + (row * tokens)[:, None] + k[None, :]
        tl.store(out, logp.to(WIDE), live[:, None] & (k < tokens)[None, :])
    tl.store(stats + row, largest, live)
    tl.store(stats + rows + row, log_sum.to(WIDE), live)
    if ENTROPY:
        entropy = tl.where(empty, 0.0, log_sum - moment.to(tl.float64) / (1.0 + beside_one))
        tl.store(entropy_out + row, tl.where(counts, entropy, 0.0).to(WIDE), live)


@triton.jit(do_not_specialize=FREE)
def fold_kernel(
    logits, ids, repeats, mask, temperatures, floors, logp_out, entropy_out, stats, sums, rows: "i64", vocab,
    tokens: "i64", inner: "i64", outer_stride: "i64", stride: "i64", t_high, t_middle, t_low, cap_high, cap_middle,
    cap_low, MASKED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, FLOORED: tl.constexpr,
    ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One chunk of ROWS rows: finished where a row is one chunk (TOKENS > 0), else its sums [chunks, 4, rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    chunk = tl.program_id(1)
    live = row < rows
    counts = live
    if MASKED:
        counts = live & (tl.load(mask + row, live, 0) != 0)
    shared = _triple(t_high, t_middle, t_low, WIDE)
    t = tl.load(temperatures + row, counts, 1.0) if PER_ROW else tl.zeros([ROWS], WIDE) + shared
    floor = tl.load(floors + row, counts, 0.0) if FLOORED else tl.zeros([ROWS], WIDE)
    inverse_high, inverse_low = _inverse(t, WIDE)
    softcap = _triple(cap_high, cap_middle, cap_low, WIDE)
    base = logits + _row_base(row, inner, outer_stride, stride, ALIGNED)
    largest = tl.full([ROWS], float("-inf"), WIDE)
    ties = tl.zeros([ROWS], WIDE)
    rest = tl.zeros([ROWS], WIDE)
    moment = tl.zeros([ROWS], WIDE)
    begin = chunk * CHUNK
    for start in range(begin, tl.minimum(begin + CHUNK, vocab), BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = counts[:, None] & (column < vocab)[None, :]
        u = tl.load(base[:, None] + column[None, :], inside, float("-inf")).to(WIDE)
        if FLOORED:
            u = tl.where(u < floor[:, None], float("-inf"), u)
        if CAPPED:
            u = _cap(u, softcap, WIDE)
        largest, ties, rest, moment = _fold(
            u, largest, ties, rest, moment, inverse_high, inverse_low, ENTROPY, WIDE
        )
    if TOKENS > 0:
        _finish(
            base, row, live, counts, t, softcap, floor, inverse_high, inverse_low, largest, ties, rest, moment, ids,
            repeats, logp_out, entropy_out, stats, rows, vocab, tokens, CAPPED, FLOORED, ENTROPY, WIDE, TOKENS,
        )  # fmt: skip
    else:
        out = sums + chunk * 4 * rows + row
        tl.store(out, largest, live)
        tl.store(out + rows, ties, live)
        tl.store(out + 2 * rows, rest, live)
        tl.store(out + 3 * rows, moment, live)


@triton.jit(do_not_specialize=FREE)
def finish_kernel(
    logits, ids, repeats, mask, temperatures, floors, logp_out, entropy_out, stats, sums, rows: "i64", vocab,
    tokens: "i64", inner: "i64", outer_stride: "i64", stride: "i64", t_high, t_middle, t_low, cap_high, cap_middle,
    cap_low, MASKED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, FLOORED: tl.constexpr,
    ENTROPY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    counts = live
    if MASKED:
        counts = live & (tl.load(mask + row, live, 0) != 0)
    shared = _triple(t_high, t_middle, t_low, WIDE)
    t = tl.load(temperatures + row, counts, 1.0) if PER_ROW else tl.zeros([ROWS], WIDE) + shared
    floor = tl.load(floors + row, counts, 0.0) if FLOORED else tl.zeros([ROWS], WIDE)
    inverse_high, inverse_low = _inverse(t, WIDE)
    softcap = _triple(cap_high, cap_middle, cap_low, WIDE)
    base = logits + _row_base(row, inner, outer_stride, stride, False)
    part = sums + row
    largest = tl.load(part, live, 0.0)
    ties = tl.load(part + rows, live, 0.0)
    rest = tl.load(part + 2 * rows, live, 0.0)
    moment = tl.load(part + 3 * rows, live, 0.0)
    for _ in range(1, tl.cdiv(vocab, CHUNK)):
        part += 4 * rows
        largest, ties, rest, moment = _merge(
            largest, ties, rest, moment, tl.load(part, live, 0.0), tl.load(part + rows, live, 0.0),
            tl.load(part + 2 * rows, live, 0.0), tl.load(part + 3 * rows, live, 0.0), inverse_high, inverse_low,
        )  # fmt: skip
    _finish(
        base, row, live, counts, t, softcap, floor, inverse_high, inverse_low, largest, ties, rest, moment, ids,
        repeats, logp_out, entropy_out, stats, rows, vocab, tokens, CAPPED, FLOORED, ENTROPY, WIDE, TOKENS,
    )  # fmt: skip


# With upstream gradients g_k of logp_k, their sum g, and h of H:
#   d x_j = exp(d_j) (a + b d_j) slope_j,   a = (h (log(sum) - H) - g) / (sum T),   b = -h / (sum T)
# but for a chosen token, with its own g_k (repeated ids added up) and p from logp, where 1 - p does not cancel:
#   d x_y = (g_k (1 - p) - (g - g_k) p - h p (logp + H)) slope_y / T
@triton.jit(do_not_specialize=FREE)
def chosen_kernel(
    logits, ids, mask, temperatures, stats, entropy_in, d_logp, d_entropy, slopes, gradients, rows: "i64", vocab,
    tokens: "i64", inner: "i64", outer_stride: "i64", stride: "i64", t_high, t_middle, t_low, cap_high, cap_middle,
    cap_low, MASKED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, HAS_LOGP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """slopes [2, rows], a and b (both 0: nothing but the chosen tokens has a gradient), and gradients [rows, tokens]
    of the chosen tokens' logits; all of it before a backward in place writes over them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    counts = live
    if MASKED:
        counts = live & (tl.load(mask + row, live, 0) != 0)
    shared = _triple(t_high, t_middle, t_low, WIDE)
    t = (tl.load(temperatures + row, counts, 1.0) if PER_ROW else tl.zeros([ROWS], WIDE) + shared).to(tl.float64)
    softcap = _triple(cap_high, cap_middle, cap_low, WIDE)
    largest = tl.load(stats + row, counts, 0.0).to(tl.float64)
    log_sum = tl.load(stats + rows + row, counts, 0.0).to(tl.float64)
    base = logits + _row_base(row, inner, outer_stride, stride, False)
    g = tl.zeros([ROWS], tl.float64)
    h = tl.zeros([ROWS], tl.float64)
    entropy = tl.zeros([ROWS], tl.float64)
    some = tl.zeros([ROWS], tl.int32)
    if HAS_LOGP:
        for first in range(0, tokens, TOKENS):
            k = first + tl.arange(0, TOKENS)
            inside = counts[:, None] & (k < tokens)[None, :]
            part = tl.load(d_logp + (row * tokens)[:, None] + k[None, :], inside, 0.0)
            g += tl.sum(part.to(tl.float64), 1)
            some = tl.maximum(some, tl.max((part != 0.0).to(tl.int32), 1))
    if HAS_ENTROPY:
        h = tl.load(d_entropy + row, counts, 0.0).to(tl.float64)
        entropy = tl.load(entropy_in + row, counts, 0.0).to(tl.float64)
    # A row without an allowed token has log(sum) = -inf; one without upstream gradient need not be read.
    used = counts & (log_sum != float("-inf")) & ((some != 0) | (h != 0.0))
    log_sum = tl.where(used, log_sum, 0.0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    scale = tl.exp(-log_sum) / t
    tl.store(slopes + row, tl.where(used, (h * (log_sum - entropy) - g) * scale, 0.0).to(WIDE), live)
    tl.store(slopes + rows + row, tl.where(used, -h * scale, 0.0).to(WIDE), live)
    for first in range(0, tokens, TOKENS):
        k = first + tl.arange(0, TOKENS)
        y, valid, x = _chosen(base, ids, row, k, tokens, used, vocab)
        own = tl.zeros([ROWS, TOKENS], tl.float64)
        if HAS_LOGP:
            for other in range(0, tokens):
                same = y == tl.load(ids + row * tokens + other, used, 0)[:, None]
                part = tl.load(d_logp + row * tokens + other, used, 0.0).to(tl.float64)
                own += tl.where(same, part[:, None], 0.0)
        u = (_cap(x.to(WIDE), softcap, WIDE) if CAPPED else x.to(WIDE)).to(tl.float64)
        logp = (u - reference[:, None]) / t[:, None] - log_sum[:, None]
        logp = tl.where(logp > 0.0, 0.0, logp)
        p = tl.exp(logp)
        h_term = tl.where(p > 0.0, h[:, None] * p * (logp + entropy[:, None]), 0.0)
        value = (-own * _expm1(logp) - (g[:, None] - own) * p - h_term) / t[:, None]
        if CAPPED:
            value = value * _cap_slope(x.to(tl.float64), softcap.to(tl.float64))
        value = tl.where(valid & (u != float("-inf")), value, 0.0)
        out = gradients + (row * tokens)[:, None] + k[None, :]
        tl.store(out, value.to(WIDE), live[:, None] & (k < tokens)[None, :])


@triton.jit(do_not_specialize=FREE_OUT)
def backward_kernel(
    logits, ids, temperatures, floors, stats, slopes, gradients, d_logits, rows: "i64", vocab, tokens: "i64",
    inner: "i64", outer_stride: "i64", stride: "i64", out_inner: "i64", out_outer_stride: "i64", out_stride: "i64",
    t_high, t_middle, t_low, cap_high, cap_middle, cap_low, PER_ROW: tl.constexpr, CAPPED: tl.constexpr,
    FLOORED: tl.constexpr, HAS_ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One block of ROWS rows. d_logits may be the logits: what a program writes only it reads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    live = row < rows
    a = tl.load(slopes + row, live, 0.0)
    b = tl.load(slopes + rows + row, live, 0.0)
    used = (a != 0.0) | (b != 0.0)
    shared = _triple(t_high, t_middle, t_low, WIDE)
    t = tl.load(temperatures + row, used, 1.0) if PER_ROW else tl.zeros([ROWS], WIDE) + shared
    inverse_high, inverse_low = _inverse(t, WIDE)
    softcap = _triple(cap_high, cap_middle, cap_low, WIDE)
    largest = tl.load(stats + row, used, 0.0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    base = logits + _row_base(row, inner, outer_stride, stride, ALIGNED)
    out = d_logits + _row_base(row, out_inner, out_outer_stride, out_stride, ALIGNED)
    inside = used[:, None] & (column < vocab)[None, :]
    x = tl.load(base[:, None] + column[None, :], inside, float("-inf")).to(WIDE)
    if FLOORED:
        x = tl.where(x < tl.load(floors + row, used, 0.0)[:, None], float("-inf"), x)
    u = _cap(x, softcap, WIDE) if CAPPED else x
    d = _difference(u, reference[:, None], inverse_high[:, None], inverse_low[:, None])
    value = tl.exp(d) * ((a[:, None] + b[:, None] * d) if HAS_ENTROPY else a[:, None])
    if CAPPED:
        value = value * _cap_slope(x, softcap)
    value = tl.where(used[:, None], value, 0.0)
    tl.store(
        out[:, None] + column[None, :],
        value.to(d_logits.dtype.element_ty),
        live[:, None] & (column < vocab)[None, :],
    )
    tl.debug_barrier()  # the chosen tokens' gradients come last, whichever thread wrote there
    for first in range(0, tokens, TOKENS):
        k = first + tl.arange(0, TOKENS)
        slot = (row * tokens)[:, None] + k[None, :]
        mine = live[:, None] & (k < tokens)[None, :]
        y = tl.load(ids + slot, mine, -1).to(tl.int64)
        mine = mine & (y >= start) & (y < start + BLOCK) & (y < vocab)
        chosen = tl.load(gradients + slot, mine, 0.0)
        tl.store(out[:, None] + y, chosen.to(d_logits.dtype.element_ty), mine)


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _split(x: float) -> tuple[float, float, float]:
    """Three float32 numbers whose sum is the float64 one: Triton passes Python floats as float32."""
    high = float(np.float32(x))
    middle = float(np.float32(x - high))
    return high, middle, float(np.float32(x - high - middle))


def _tile(vocab: int, most: int) -> dict[str, int]:
    """Several rows of a small vocabulary share a program. By vocabulary alone, so that a row's result does not
    depend on the batch."""
    block = min(most, triton.next_power_of_2(max(vocab, 16)))
    return {"ROWS": most // block, "BLOCK": block}


def _row_tile(tokens: int) -> dict[str, int]:
    """For kernels that work once a row."""
    found = min(MAX_TOKENS, triton.next_power_of_2(max(tokens, 1)))
    return {"ROWS": ROW_BLOCK // found, "TOKENS": found}


def _aligned(*strides: int) -> bool:
    return all(stride % 16 == 0 for stride in strides)


def _repeats(ids: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
    """[rows, tokens]: the id stands further left in its row too, or an equal one was met first in sorted order."""
    ordered, order = ids.view(rows, tokens).sort(-1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter_(-1, order, again)


def forward(
    logits: torch.Tensor, rows: int, vocab: int, inner: int, outer_stride: int, stride: int, ids: torch.Tensor,
    mask: torch.Tensor | None, temperatures: torch.Tensor | None, floors: torch.Tensor | None, tokens: int,
    temperature: float, softcap: float, logp: torch.Tensor, entropy: torch.Tensor | None, stats: torch.Tensor,
) -> None:  # fmt: skip
    """Fill logp [rows, tokens], entropy [rows] and stats ([2, rows]: largest logit, log of the sum)."""
    if rows == 0:
        return
    launch = dict(tuned.options("logprob.forward", logits.device))
    tile, row_tile = _tile(vocab, launch.pop("BLOCK")), _row_tile(tokens)
    chunk = CHUNK_BLOCKS * tile["BLOCK"]
    chunks = max(1, triton.cdiv(vocab, chunk))
    sums = logits if chunks == 1 else stats.new_empty((chunks, 4, rows))
    repeats = _repeats(ids, rows, tokens) if floors is not None and tokens > 1 else ids
    arguments = (
        logits, ids, repeats, logits if mask is None else mask, logits if temperatures is None else temperatures,
        logits if floors is None else floors, logp, logp if entropy is None else entropy, stats, sums, rows, vocab,
        tokens, inner, outer_stride, stride, *_split(temperature), *_split(softcap),
    )  # fmt: skip
    shared = {
        "MASKED": mask is not None, "PER_ROW": temperatures is not None, "CAPPED": softcap > 0,
        "FLOORED": floors is not None, "ENTROPY": entropy is not None, "WIDE": _wide(logits.dtype), "CHUNK": chunk,
    }  # fmt: skip
    fold_kernel[(triton.cdiv(rows, tile["ROWS"]), chunks)](
        *arguments, **shared, **tile, **launch, ALIGNED=_aligned(outer_stride, stride),
        TOKENS=row_tile["TOKENS"] if chunks == 1 else 0,
    )  # fmt: skip
    if chunks > 1:
        finish_kernel[(triton.cdiv(rows, row_tile["ROWS"]),)](*arguments, **shared, **row_tile, num_warps=1)


def backward(
    logits: torch.Tensor, rows: int, vocab: int, inner: int, outer_stride: int, stride: int, ids: torch.Tensor,
    mask: torch.Tensor | None, temperatures: torch.Tensor | None, floors: torch.Tensor | None, tokens: int,
    temperature: float, softcap: float, stats: torch.Tensor, entropy: torch.Tensor, d_logp: torch.Tensor | None,
    d_entropy: torch.Tensor | None, d_logits: torch.Tensor,
) -> None:  # fmt: skip
    """Fill d_logits from the upstream gradients (None: zero): [rows, vocab] contiguous, or the logits themselves."""
    if rows == 0 or vocab == 0:
        return
    slopes, gradients = stats.new_empty((2, rows)), stats.new_empty((rows, tokens))
    given = logits if temperatures is None else temperatures
    layout = (inner, outer_stride, stride)
    scalars = (*_split(temperature), *_split(softcap))
    shared = {
        "PER_ROW": temperatures is not None, "CAPPED": softcap > 0, "HAS_ENTROPY": d_entropy is not None,
        "WIDE": _wide(logits.dtype),
    }  # fmt: skip
    row_tile = _row_tile(tokens)
    chosen_kernel[(triton.cdiv(rows, row_tile["ROWS"]),)](
        logits, ids, logits if mask is None else mask, given, stats, entropy, stats if d_logp is None else d_logp,
        stats if d_entropy is None else d_entropy, slopes, gradients, rows, vocab, tokens, *layout, *scalars,
        **shared, **row_tile, MASKED=mask is not None, HAS_LOGP=d_logp is not None, num_warps=1,
    )  # fmt: skip
    in_place = d_logits.data_ptr() == logits.data_ptr()
    out_layout = layout if in_place else (rows, 0, vocab)
    launch = dict(tuned.options("logprob.backward", logits.device))
    tile = _tile(vocab, launch.pop("BLOCK"))
    backward_kernel[(triton.cdiv(rows, tile["ROWS"]), triton.cdiv(vocab, tile["BLOCK"]))](
        logits, ids, given, logits if floors is None else floors, stats, slopes, gradients, d_logits, rows, vocab,
        tokens, *layout, *out_layout, *scalars, **shared, **tile, **launch, FLOORED=floors is not None,
        ALIGNED=_aligned(*layout[1:], *out_layout[1:]), TOKENS=row_tile["TOKENS"],
    )  # fmt: skip


def _variants() -> list[Variant]:
    """Every kernel, plain and with everything on; the fold for one chunk a row and for several."""
    scalars = dict.fromkeys(FREE_OUT, "i64") | {"vocab": "i32"}
    scalars |= dict.fromkeys(("t_high", "t_middle", "t_low", "cap_high", "cap_middle", "cap_low"), "fp32")
    pointers = {"ids": "*i64", "mask": "*i1", "repeats": "*i1"}
    names = "temperatures floors logp_out entropy_out entropy_in stats sums d_logp d_entropy slopes gradients"
    pointers |= dict.fromkeys(names.split(), "*fp32")
    found = []
    for dtype in ("*fp32", "*bf16"):
        for full in (False, True):
            switches = ("MASKED", "PER_ROW", "CAPPED", "FLOORED", "ENTROPY", "HAS_ENTROPY")
            constants = dict.fromkeys(switches, full) | {"HAS_LOGP": True, "ALIGNED": True, "WIDE": tl.float32}
            rows = _row_tile(20 if full else 1)
            for kernel, tile in (
                (fold_kernel, _tile(1 << 17, 4096) | {"TOKENS": 0}),
                (fold_kernel, _tile(1 << 9, 4096) | {"TOKENS": rows["TOKENS"]}),
                (finish_kernel, rows),
                (chosen_kernel, rows),
                (backward_kernel, _tile(1 << 17, 4096) | {"TOKENS": rows["TOKENS"]}),
            ):
                known = constants | tile | {"CHUNK": CHUNK_BLOCKS * 4096}
                signature = pointers | scalars | {"logits": dtype, "d_logits": dtype}
                found.append(
                    Variant(
                        kernel,
                        {n: signature[n] for n in kernel.arg_names if n in signature},
                        {n: known[n] for n in kernel.arg_names if n in known},
                        num_warps=8 if "BLOCK" in tile else 1,
                        divisible=("vocab",),
                    )
                )
    return found


VARIANTS = _variants()
