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

import torch
import triton
import triton.language as tl

from . import tuned
from .logprob_backward import backward as backward
from .logprob_lanes import (
    FREE,
    UNALIGNED,
    _aligned,
    _cap,
    _chosen,
    _difference,
    _inverse,
    _log1p,
    _row_base,
    _row_tile,
    _split,
    _tile,
    _triple,
    _wide,
    variants,
)
from .logprob_lanes import _cap_slope as _cap_slope

# Blocks in a chunk: 16384 logits are 32 KiB of bf16, some 10 us of a multiprocessor's share of 3 TB/s among 8
# programs, far above the start of a program; one row of 128k vocabulary is 8 programs.
CHUNK_BLOCKS = 4


@triton.jit
def _fold(
    u, largest, ties, rest, moment, inverse_high, inverse_low, ENTROPY: tl.constexpr, WIDE: tl.constexpr
):
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


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def fold_kernel(
    logits, ids, repeats, mask, temperatures, floors, logp_out, entropy_out, stats, sums, rows: tl.int64, vocab,
    tokens: tl.int64, inner: tl.int64, outer_stride: tl.int64, stride: tl.int64, t_high, t_middle, t_low,
    cap_high, cap_middle, cap_low, MASKED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, FLOORED:
    tl.constexpr, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK:
    tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
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
            base, row, live, counts, t, softcap, floor, inverse_high, inverse_low, largest, ties, rest, moment,
            ids, repeats, logp_out, entropy_out, stats, rows, vocab, tokens, CAPPED, FLOORED, ENTROPY, WIDE,
            TOKENS,
        )  # fmt: skip
    else:
        out = sums + chunk * 4 * rows + row
        tl.store(out, largest, live)
        tl.store(out + rows, ties, live)
        tl.store(out + 2 * rows, rest, live)
        tl.store(out + 3 * rows, moment, live)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=UNALIGNED)
def finish_kernel(
    logits, ids, repeats, mask, temperatures, floors, logp_out, entropy_out, stats, sums, rows: tl.int64, vocab,
    tokens: tl.int64, inner: tl.int64, outer_stride: tl.int64, stride: tl.int64, t_high, t_middle, t_low,
    cap_high, cap_middle, cap_low, MASKED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, FLOORED:
    tl.constexpr, ENTROPY: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TOKENS:
    tl.constexpr,
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


def _repeats(ids: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
    """[rows, tokens]: the id stands further left in its row too, or an equal one was met first in sorted order."""
    ordered, order = torch.sort(ids.view(rows, tokens), dim=-1, stable=True)
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


_SMALL, _LARGE = _tile(1 << 9, 4096), _tile(1 << 17, 4096) | {"CHUNK": CHUNK_BLOCKS * 4096}
_ROWS = [_row_tile(1), _row_tile(20)]
VARIANTS = [
    *variants(fold_kernel, [_LARGE | {"TOKENS": 0}] * 2, num_warps=8),
    *variants(fold_kernel, [_LARGE | _SMALL | {"TOKENS": rows["TOKENS"]} for rows in _ROWS], num_warps=8),
    *variants(finish_kernel, [{**rows, "CHUNK": CHUNK_BLOCKS * 4096} for rows in _ROWS], num_warps=1),
]
