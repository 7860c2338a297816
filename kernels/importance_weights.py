"""Importance-weight kernels: exp(log p - log b) of every token or row, bounded, and their statistics.

Roofline, per token of e bytes an element: 2 e read, mask 1, 4 written (float32: 13 bytes), 30 flops:
bandwidth-bound. What needs the rows (a level, a veto, the mean over rows) reads the inputs once before.
"""

import math

import torch
import triton
import triton.language as tl

from .aot import Variant
from .objectives import within
from .policy_loss_layout import (
    BLOCK,
    Layout,
    bounds_of,
    exp20,
    load_wide,
    log_ratio,
    programs_of,
    real,
    row_of,
    warps,
    wide,
)

# Partial sums that the last program loads at a time.
FOLD = 64

# Slots of the sums.
COUNT = tl.constexpr(0)
RAW = tl.constexpr(1)
RAW_MAX = tl.constexpr(2)
APPLIED = tl.constexpr(3)
APPLIED_MAX = tl.constexpr(4)
SQUARES = tl.constexpr(5)
OUTSIDE = tl.constexpr(6)
VETOED = tl.constexpr(7)
SLOTS = tl.constexpr(8)
# A weight of its own a token, and weights divided by their mean over rows, as csrc/policy_loss.h numbers them.
TOKEN = tl.constexpr(0)
BY_SEQUENCES = tl.constexpr(2)


@triton.jit
def _put(sums, SLOT: tl.constexpr, x):
    return tl.where(tl.arange(0, SLOTS) == SLOT, sums + x.to(tl.float64), sums)


@triton.jit
def _raise(sums, SLOT: tl.constexpr, x):
    """Largest of non-negative numbers, NaN ignored."""
    top = tl.max(tl.where(x > 0.0, x, 0.0), 0).to(tl.float64)
    return tl.where(tl.arange(0, SLOTS) == SLOT, tl.maximum(sums, top), sums)


@triton.jit
def _get(total, SLOT: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SLOTS) == SLOT, total, 0.0), 0)


@triton.jit
def row_kernel(
    logprobs, behavior, mask, cu_seqlens, row_logs, firsts, tokens, rows, row_length,
    PACKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """row_logs [3, rows]: sum and mean of a row's log-ratios, clamped to +-20, and the smallest; firsts [rows]:
    its first counting token, or -1. Blocks start at the row's beginning, so that the sum does not depend on where
    the row lies."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of(row, cu_seqlens, tokens, row_length, PACKED)
    total = tl.zeros([1], tl.float64)
    least = tl.full([1], float("inf"), WIDE)
    n = tl.zeros([1], tl.int64)
    found = tl.zeros([1], tl.int64) + end
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        live = token < end
        on = live & (tl.load(mask + token, live, 0) != 0)
        x, _ = log_ratio(
            load_wide(logprobs, token, live, on, WIDE), load_wide(behavior, token, live, on, WIDE)
        )
        total += tl.sum(x, 0).to(tl.float64)
        least = tl.minimum(least, tl.min(tl.where(on & (x == x), x, float("inf")), 0))
        n += tl.sum(on.to(tl.int32), 0)
        found = tl.minimum(found, tl.min(tl.where(on, token, end), 0))
    one = tl.arange(0, 1)
    most = tl.full([1], 20.0, tl.float64)
    tl.store(row_logs + row + one, within(total, -most, most).to(WIDE))
    tl.store(
        row_logs + rows + row + one, within(total / tl.maximum(n, 1).to(tl.float64), -most, most).to(WIDE)
    )
    tl.store(row_logs + 2 * rows + row + one, least)
    tl.store(firsts + row + one, tl.where(n > 0, found, -1))


@triton.jit
def weights_kernel(
    logprobs, behavior, mask, cu_seqlens, row_logs, weights, partial, tokens, rows, row_length, search_steps,
    steps, low: tl.float64, high: tl.float64, log_veto: tl.float64,
    LEVEL: tl.constexpr, BOUND: tl.constexpr, VETO: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight is that of LEVEL; the bounds hold the one of BOUND."""
    sums = tl.zeros([SLOTS], tl.float64)
    for step in range(steps):
        start = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK
        token = start + tl.arange(0, BLOCK)
        live = token < tokens
        on = live & (tl.load(mask + token, live, 0) != 0)
        if LEVEL != TOKEN or BOUND != TOKEN or VETO:
            row = row_of(token, start, cu_seqlens, rows, row_length, search_steps, PACKED, BLOCK)
        if LEVEL == TOKEN or BOUND == TOKEN:
            own, _ = log_ratio(
                load_wide(logprobs, token, live, on, WIDE), load_wide(behavior, token, live, on, WIDE)
            )
        x = own if LEVEL == TOKEN else load_wide(row_logs + (LEVEL - 1) * rows, row, live, on, WIDE)
        weight, _ = exp20(x, WIDE)
        raw = tl.where(on, weight, 0.0)
        held = weight
        if BOUND != LEVEL:
            y = own if BOUND == TOKEN else load_wide(row_logs + (BOUND - 1) * rows, row, live, on, WIDE)
            held, _ = exp20(y, WIDE)
        outside = on & ((held < real(low, WIDE)) | (held > real(high, WIDE)))
        kept = (
            tl.where(outside, 0.0, raw)
            if DROP
            else tl.where(on, within(raw, real(low, WIDE), real(high, WIDE)), 0.0)
        )
        sums = _put(sums, OUTSIDE, tl.sum(outside.to(tl.int32), 0))
        if VETO:
            vetoed = on & (load_wide(row_logs + 2 * rows, row, live, on, WIDE) < real(log_veto, WIDE))
            kept = tl.where(vetoed, 0.0, kept)
            sums = _put(sums, VETOED, tl.sum(vetoed.to(tl.int32), 0))
        tl.store(weights + token, kept, live)
        sums = _put(sums, COUNT, tl.sum(on.to(tl.int32), 0))
        sums = _put(sums, RAW, tl.sum(raw, 0))
        sums = _raise(sums, RAW_MAX, raw)
        sums = _put(sums, APPLIED, tl.sum(kept, 0))
        sums = _raise(sums, APPLIED_MAX, kept)
        sums = _put(sums, SQUARES, tl.sum(kept * kept, 0))
    tl.store(partial + tl.program_id(0) * SLOTS + tl.arange(0, SLOTS), sums)


@triton.jit
def finish_kernel(
    partial, weights, firsts, stats, scale_out, programs, rows, NORMALIZE: tl.constexpr, FOLD: tl.constexpr
):
    """Statistics from the programs' sums, and the factor that makes the mean weight of tokens or rows 1."""
    slot = tl.arange(0, SLOTS)
    largest = (slot == RAW_MAX) | (slot == APPLIED_MAX)
    total = tl.zeros([SLOTS], tl.float64)
    for first in range(0, programs, FOLD):
        program = first + tl.arange(0, FOLD)
        x = tl.load(partial + program[:, None] * SLOTS + slot[None, :], (program < programs)[:, None], 0.0)
        total = tl.where(largest, tl.maximum(total, tl.max(x, 0)), total + tl.sum(x, 0))
    n = tl.maximum(_get(total, COUNT), 1.0)  # nothing counts: every sum is 0 too
    applied = _get(total, APPLIED)
    squares = _get(total, SQUARES)
    scale = 1.0
    if NORMALIZE:
        number = n
        total_weight = applied
        if NORMALIZE == BY_SEQUENCES:
            number = tl.zeros([], tl.float64)
            total_weight = tl.zeros([], tl.float64)
            for start in range(0, rows, FOLD):
                row = start + tl.arange(0, FOLD)
                at = tl.load(firsts + row, row < rows, -1)
                number += tl.sum((at >= 0).to(tl.float64), 0)
                total_weight += tl.sum(tl.load(weights + at, at >= 0, 0.0).to(tl.float64), 0)
        scale = tl.where(total_weight == 0.0, 0.0, number / tl.where(total_weight == 0.0, 1.0, total_weight))
        tl.store(scale_out, scale.to(scale_out.dtype.element_ty))
    effective = tl.where(squares == 0.0, 0.0, applied * applied / n / tl.where(squares == 0.0, 1.0, squares))
    kind = stats.dtype.element_ty
    tl.store(stats, (_get(total, RAW) / n).to(kind))
    tl.store(stats + 1, _get(total, RAW_MAX).to(kind))
    tl.store(stats + 2, (applied / n * scale).to(kind))
    tl.store(stats + 3, (_get(total, APPLIED_MAX) * scale).to(kind))
    tl.store(stats + 4, effective.to(kind))
    tl.store(stats + 5, (_get(total, OUTSIDE) / n).to(kind))
    tl.store(stats + 6, (_get(total, VETOED) / n).to(kind))


def importance_weights(
    logprobs: torch.Tensor, behavior_logprobs: torch.Tensor, layout: Layout, level: int, mode: int,
    low: float, high: float, bound_level: int, veto: float, normalize: int, weights: torch.Tensor,
    stats: torch.Tensor,
) -> None:  # fmt: skip
    """Fill weights and stats from contiguous inputs; choices as csrc/policy_loss.h numbers them; veto 0: none."""
    programs, steps = programs_of(layout.tokens)
    packed, kind = layout.cu_seqlens is not None, wide(logprobs.dtype)
    bounds, rows, row_length, search_steps = layout.row_arguments()
    row_logs = weights.new_empty(3, rows)
    firsts = torch.empty(rows, dtype=torch.int64, device=weights.device)
    if rows and (level or bound_level or veto or normalize == BY_SEQUENCES.value):
        row_kernel[(rows,)](
            logprobs, behavior_logprobs, layout.mask, bounds, row_logs, firsts, layout.tokens, rows, row_length,
            PACKED=packed, WIDE=kind, BLOCK=BLOCK, num_warps=warps(logprobs.dtype),
        )  # fmt: skip
    partial = torch.empty((programs, SLOTS.value), dtype=torch.float64, device=weights.device)
    if programs:
        weights_kernel[(programs,)](
            logprobs, behavior_logprobs, layout.mask, bounds, row_logs, weights, partial, layout.tokens, rows,
            row_length, search_steps, steps, low, high, math.log(veto) if veto else -math.inf, LEVEL=level,
            BOUND=bound_level, VETO=veto > 0, DROP=mode == 1, PACKED=packed, WIDE=kind, BLOCK=BLOCK,
            num_warps=warps(logprobs.dtype),
        )  # fmt: skip
    scale = weights.new_empty(1)
    finish_kernel[(1,)](
        partial, weights, firsts, stats, scale, programs, rows, NORMALIZE=normalize, FOLD=FOLD
    )
    if normalize:
        weights.mul_(scale)


def _variants() -> list[Variant]:
    """A token's weight, and those that need the rows in both layouts."""
    found = []
    sizes = dict.fromkeys(("tokens", "rows", "row_length", "search_steps", "steps"), "i32")
    numbers = dict.fromkeys(("low", "high", "log_veto"), "fp64")
    arrays = {"mask": "*i1", "cu_seqlens": "*i32", "row_logs": "*fp32", "firsts": "*i64", "weights": "*fp32"}
    even = ("tokens", "row_length")
    for dtype in ("*fp32", "*bf16"):
        signature = {"logprobs": dtype, "behavior": dtype} | arrays | sizes | numbers | {"partial": "*fp64"}
        tile = {"WIDE": tl.float32, "BLOCK": BLOCK}
        for level, bound, veto, packed in ((0, 0, False, False), (1, 1, False, False), (0, 2, True, True)):
            flags = {"LEVEL": level, "BOUND": bound, "VETO": veto, "DROP": packed, "PACKED": packed}
            found.append(Variant(weights_kernel, signature, flags | tile, divisible=even))
        found.extend(
            Variant(row_kernel, signature, {"PACKED": packed} | tile, divisible=even)
            for packed in (False, True)
        )
    finish = {"partial": "*fp64", "stats": "*fp32", "scale_out": "*fp32", "programs": "i32"} | arrays | sizes
    return [
        *found,
        *(
            Variant(finish_kernel, finish, {"NORMALIZE": how, "FOLD": FOLD})
            for how in (0, BY_SEQUENCES.value)
        ),
    ]


VARIANTS = _variants()
