"""Backward of the log-prob kernels: the chosen tokens first, then one pass over the logits, in place or not.

Roofline, per row of V logits of e bytes: V e read, V e written (131072 bf16: 175 ns of 3 TB/s), one exp each.
"""

import torch
import triton
import triton.language as tl

from . import tuned
from .logprob_lanes import (
    FREE,
    FREE_OUT,
    UNALIGNED,
    _aligned,
    _cap,
    _cap_slope,
    _chosen,
    _difference,
    _expm1,
    _inverse,
    _row_base,
    _row_tile,
    _split,
    _tile,
    _triple,
    _wide,
    variants,
)


# With upstream gradients g_k of logp_k, their sum g, and h of H:
#   d x_j = exp(d_j) (a + b d_j) slope_j,   a = (h (log(sum) - H) - g) / (sum T),   b = -h / (sum T)
# but for a chosen token, with its own g_k (repeated ids added up) and p from logp, where 1 - p does not cancel:
#   d x_y = (g_k (1 - p) - (g - g_k) p - h p (logp + H)) slope_y / T
@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def chosen_kernel(
    logits, ids, mask, temperatures, stats, entropy_in, d_logp, d_entropy, slopes, gradients, rows: tl.int64,
    vocab, tokens: tl.int64, inner: tl.int64, outer_stride: tl.int64, stride: tl.int64, t_high, t_middle, t_low,
    cap_high, cap_middle, cap_low, MASKED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, HAS_LOGP:
    tl.constexpr, HAS_ENTROPY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """slopes [2, rows], a and b (both 0: nothing but the chosen tokens has a gradient), and gradients
    [rows, tokens] of the chosen tokens' logits; all of it before a backward in place writes over them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    counts = live
    if MASKED:
        counts = live & (tl.load(mask + row, live, 0) != 0)
    shared = _triple(t_high, t_middle, t_low, WIDE)
    t = (tl.load(temperatures + row, counts, 1.0) if PER_ROW else tl.zeros([ROWS], WIDE) + shared).to(
        tl.float64
    )
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


@triton.jit(do_not_specialize=FREE_OUT, do_not_specialize_on_alignment=UNALIGNED)
def backward_kernel(
    logits, ids, temperatures, floors, stats, slopes, gradients, d_logits, rows: tl.int64, vocab, tokens:
    tl.int64, inner: tl.int64, outer_stride: tl.int64, stride: tl.int64, out_inner: tl.int64, out_outer_stride:
    tl.int64, out_stride: tl.int64, t_high, t_middle, t_low, cap_high, cap_middle, cap_low, PER_ROW:
    tl.constexpr, CAPPED: tl.constexpr, FLOORED: tl.constexpr, HAS_ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
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


def backward(
    logits: torch.Tensor, rows: int, vocab: int, inner: int, outer_stride: int, stride: int, ids: torch.Tensor,
    mask: torch.Tensor | None, temperatures: torch.Tensor | None, floors: torch.Tensor | None, tokens: int,
    temperature: float, softcap: float, stats: torch.Tensor, entropy: torch.Tensor, d_logp: torch.Tensor | None,
    d_entropy: torch.Tensor | None, d_logits: torch.Tensor,
) -> None:  # fmt: skip
    """Fill d_logits, [rows, vocab] contiguous or the logits themselves; upstream gradients of None are zero."""
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


_ROWS = [_row_tile(1), _row_tile(20)]
VARIANTS = [
    *variants(chosen_kernel, _ROWS, num_warps=1),
    *variants(
        backward_kernel, [_tile(1 << 17, 4096) | {"TOKENS": rows["TOKENS"]} for rows in _ROWS], num_warps=16
    ),
]
