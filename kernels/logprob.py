"""Log-probability kernels: one token a row, and the row's entropy, from logits.

    u = softcap * tanh(x / softcap), or x        d_j = (u_j - max u) / T        sum = sum_j exp(d_j)
    logp = d_y - log(sum)        H = log(sum) - sum_j exp(d_j) d_j / sum

Roofline, per row of V logits of e bytes: V e bytes read forward (H100: V = 131072 bf16 is 256 KiB, 87 ns of
3 TB/s a row); V e read and V e written backward. One exponential an element each way, 16 a clock and
multiprocessor, is 60% of the forward's time in bf16: bandwidth-bound as long as it is one.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from .aot import Variant

# Elements a program holds at a time. 4096 over 8 warps are 16 a thread: two 16-byte loads in bf16, four in
# float32, and the block's maximum and sum stay out of each other's way in 40 registers.
MAX_BLOCK = 4096
WARPS = 8


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
def _row_offset(row, inner, outer_stride, stride):
    return (row // inner) * outer_stride + (row % inner) * stride


@triton.jit
def forward_kernel(
    logits, ids, mask, temperatures, logp_out, entropy_out, stats, rows, vocab, inner, outer_stride, stride,
    t_high, t_middle, t_low, cap_high, cap_middle, cap_low,
    MASKED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    counts = live
    if MASKED:
        counts = live & (tl.load(mask + row, live, 0) != 0)
    shared = _triple(t_high, t_middle, t_low, WIDE)
    t = tl.load(temperatures + row, counts, 1.0) if PER_ROW else tl.zeros([ROWS], WIDE) + shared
    inverse_high, inverse_low = _inverse(t, WIDE)
    softcap = _triple(cap_high, cap_middle, cap_low, WIDE)
    base = logits + _row_offset(row, inner, outer_stride, stride)
    largest = tl.full([ROWS], float("-inf"), WIDE)
    ties = tl.zeros([ROWS], WIDE)
    rest = tl.zeros([ROWS], WIDE)
    moment = tl.zeros([ROWS], WIDE)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = counts[:, None] & (column < vocab)[None, :]
        u = tl.load(base[:, None] + column[None, :], inside, float("-inf")).to(WIDE)
        if CAPPED:
            u = _cap(u, softcap, WIDE)
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
        largest = top
    # The scalars of a row in float64: a dozen operations beside thousands of loads.
    wrong = (t > 0) == 0
    empty = (largest == float("-inf")) & (rest == 0.0)
    beside_one = (ties.to(tl.float64) - 1.0) + rest.to(tl.float64)
    log_sum = tl.where(wrong | (largest == float("inf")), float("nan"), _log1p(beside_one))
    y = tl.load(ids + row, counts, 0).to(tl.int64)
    valid = (y >= 0) & (y < vocab)
    u_y = tl.load(base + y, counts & valid, float("nan")).to(WIDE)
    if CAPPED:
        u_y = _cap(u_y, softcap, WIDE)
    logp = (u_y.to(tl.float64) - largest.to(tl.float64)) / t.to(tl.float64) - log_sum
    logp = tl.where(logp > 0.0, 0.0, logp)
    logp = tl.where(empty & valid & (wrong == 0), float("-inf"), logp)
    tl.store(logp_out + row, tl.where(counts, logp, 0.0).to(WIDE), live)
    tl.store(stats + row, largest, live)
    tl.store(stats + rows + row, log_sum.to(WIDE), live)
    if ENTROPY:
        entropy = tl.where(empty & (wrong == 0), 0.0, log_sum - moment.to(tl.float64) / (1.0 + beside_one))
        tl.store(entropy_out + row, tl.where(counts, entropy, 0.0).to(WIDE), live)


# d x_j = exp(d_j) (a + b d_j) slope_j with a = (h (log(sum) - H) - g) / (sum T) and b = -h / (sum T), g and h the
# upstream gradients of logp and H; the chosen token has g slope_y / T on top.
@triton.jit
def backward_kernel(
    logits, ids, mask, temperatures, stats, entropy_in, d_logp, d_entropy, d_logits, rows, vocab, inner,
    outer_stride, stride, t_high, t_middle, t_low, cap_high, cap_middle, cap_low,
    MASKED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, HAS_LOGP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    counts = live
    if MASKED:
        counts = live & (tl.load(mask + row, live, 0) != 0)
    shared = _triple(t_high, t_middle, t_low, WIDE)
    t = tl.load(temperatures + row, counts, 1.0) if PER_ROW else tl.zeros([ROWS], WIDE) + shared
    inverse_high, inverse_low = _inverse(t, WIDE)
    softcap = _triple(cap_high, cap_middle, cap_low, WIDE)
    largest = tl.load(stats + row, counts, 0.0)
    log_sum = tl.load(stats + rows + row, counts, 0.0)
    g = tl.zeros([ROWS], WIDE)
    h = tl.zeros([ROWS], WIDE)
    entropy = tl.zeros([ROWS], WIDE)
    if HAS_LOGP:
        g = tl.load(d_logp + row, counts, 0.0)
    if HAS_ENTROPY:
        h = tl.load(d_entropy + row, counts, 0.0)
        entropy = tl.load(entropy_in + row, counts, 0.0)
    # A row without an allowed token has log(sum) = -inf; one without upstream gradient need not be read.
    used = counts & (log_sum != float("-inf")) & ((g != 0.0) | (h != 0.0))
    log_sum = tl.where(used, log_sum, 0.0)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    scale = (tl.exp(-log_sum.to(tl.float64)) / t.to(tl.float64)).to(WIDE)
    a = (h * (log_sum - entropy) - g) * scale
    b = -h * scale

    base = logits + _row_offset(row, inner, outer_stride, stride)
    inside = used[:, None] & (column < vocab)[None, :]
    x = tl.load(base[:, None] + column[None, :], inside, float("-inf")).to(WIDE)
    u = x
    if CAPPED:
        u = _cap(x, softcap, WIDE)
    d = _difference(u, reference[:, None], inverse_high[:, None], inverse_low[:, None])
    value = tl.exp(d) * (a[:, None] + b[:, None] * d)

    # 1 - p of the chosen token cancels where p is near 1, so it is taken from logp, in float64.
    y = tl.load(ids + row, used, 0).to(tl.int64)
    valid = used & (y >= 0) & (y < vocab)
    u_y = tl.load(base + y, valid, 0.0).to(WIDE)
    if CAPPED:
        u_y = _cap(u_y, softcap, WIDE)
    logp = (u_y.to(tl.float64) - reference.to(tl.float64)) / t.to(tl.float64) - log_sum.to(tl.float64)
    p_y = tl.exp(tl.where(logp > 0.0, 0.0, logp))
    h_term = tl.where(p_y > 0.0, h.to(tl.float64) * p_y * (logp + entropy.to(tl.float64)), 0.0)
    chosen = ((g.to(tl.float64) * (1.0 - p_y) - h_term) / t.to(tl.float64)).to(WIDE)
    allowed = valid & (u_y != float("-inf"))
    value = tl.where((column[None, :] == y[:, None]) & allowed[:, None], chosen[:, None], value)
    if CAPPED:
        value = value * _cap_slope(x, softcap)
    value = tl.where(used[:, None], value, 0.0)
    out = d_logits + (row * vocab)[:, None] + column[None, :]
    tl.store(out, value.to(d_logits.dtype.element_ty), live[:, None] & (column < vocab)[None, :])


def _tile(vocab: int) -> tuple[int, int]:
    """(ROWS, BLOCK): several rows of a small vocabulary share a program. By vocabulary alone, so that a row's
    result does not depend on the batch."""
    block = min(MAX_BLOCK, triton.next_power_of_2(max(vocab, 16)))
    return MAX_BLOCK // block, block


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _split(x: float) -> tuple[float, float, float]:
    """Three float32 numbers whose sum is the float64 one: Triton passes Python floats as float32."""
    high = float(np.float32(x))
    middle = float(np.float32(x - high))
    return high, middle, float(np.float32(x - high - middle))


def forward(
    logits: torch.Tensor, rows: int, vocab: int, inner: int, outer_stride: int, stride: int, ids: torch.Tensor,
    mask: torch.Tensor | None, temperatures: torch.Tensor | None, temperature: float, softcap: float,
    logp: torch.Tensor, entropy: torch.Tensor | None, stats: torch.Tensor,
) -> None:  # fmt: skip
    """Fill logp and entropy ([rows]) and stats ([2, rows]: largest logit, log of the sum)."""
    if rows == 0:
        return
    ROWS, BLOCK = _tile(vocab)
    forward_kernel[(triton.cdiv(rows, ROWS),)](
        logits, ids, logits if mask is None else mask, logits if temperatures is None else temperatures,
        logp, logp if entropy is None else entropy, stats, rows, vocab, inner, outer_stride, stride,
        *_split(temperature), *_split(softcap),
        MASKED=mask is not None, PER_ROW=temperatures is not None, CAPPED=softcap > 0,
        ENTROPY=entropy is not None, WIDE=_wide(logits.dtype), ROWS=ROWS, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def backward(
    logits: torch.Tensor, rows: int, vocab: int, inner: int, outer_stride: int, stride: int, ids: torch.Tensor,
    mask: torch.Tensor | None, temperatures: torch.Tensor | None, temperature: float, softcap: float,
    stats: torch.Tensor, entropy: torch.Tensor, d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None,
    d_logits: torch.Tensor,
) -> None:  # fmt: skip
    """Fill d_logits ([rows, vocab] contiguous) from the upstream gradients (None: zero)."""
    if rows == 0 or vocab == 0:
        return
    ROWS, BLOCK = _tile(vocab)
    backward_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(vocab, BLOCK))](
        logits, ids, logits if mask is None else mask, logits if temperatures is None else temperatures,
        stats, entropy, stats if d_logp is None else d_logp, stats if d_entropy is None else d_entropy, d_logits,
        rows, vocab, inner, outer_stride, stride, *_split(temperature), *_split(softcap),
        MASKED=mask is not None, PER_ROW=temperatures is not None, CAPPED=softcap > 0,
        HAS_LOGP=d_logp is not None, HAS_ENTROPY=d_entropy is not None, WIDE=_wide(logits.dtype), ROWS=ROWS,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _variants() -> list[Variant]:
    """Both kernels at a full block, plain and with everything on."""
    variants = []
    scalars = dict.fromkeys(("rows", "vocab", "inner", "outer_stride", "stride"), "i32")
    scalars |= dict.fromkeys(("t_high", "t_middle", "t_low", "cap_high", "cap_middle", "cap_low"), "fp32")
    rows = {"ids": "*i64", "mask": "*i1", "temperatures": "*fp32", "stats": "*fp32"}
    for dtype in ("*fp32", "*bf16"):
        for full in (False, True):
            tile = {"ROWS": 1, "BLOCK": MAX_BLOCK, "WIDE": tl.float32}
            common = dict.fromkeys(("MASKED", "PER_ROW", "CAPPED"), full) | tile
            variants.append(
                Variant(
                    forward_kernel,
                    {"logits": dtype, "logp_out": "*fp32", "entropy_out": "*fp32"} | rows | scalars,
                    common | {"ENTROPY": full},
                    num_warps=WARPS,
                    divisible=("vocab", "outer_stride", "stride"),
                )
            )
            variants.append(
                Variant(
                    backward_kernel,
                    {"logits": dtype, "d_logits": dtype, "entropy_in": "*fp32", "d_logp": "*fp32"}
                    | {"d_entropy": "*fp32"}
                    | rows
                    | scalars,
                    common | {"HAS_LOGP": True, "HAS_ENTROPY": full},
                    num_warps=WARPS,
                    divisible=("vocab", "outer_stride", "stride"),
                )
            )
    return variants


VARIANTS = _variants()
