"""Importance-weight kernels: exp(log p - log b) of every token or row, bounded, and their statistics.

Roofline, per token of e bytes an element: 2 e read, mask 1, 4 written (float32: 13 bytes), 30 flops:
bandwidth-bound. Row levels read the inputs once for the rows' sums and the mask again for the weights.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant
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
FOLD = 128

# Slots of the sums.
COUNT = tl.constexpr(0)
RAW = tl.constexpr(1)
RAW_MAX = tl.constexpr(2)
APPLIED = tl.constexpr(3)
APPLIED_MAX = tl.constexpr(4)
SQUARES = tl.constexpr(5)
OUTSIDE = tl.constexpr(6)
SLOTS = tl.constexpr(8)


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
def row_log_kernel(
    logprobs, behavior, mask, cu_seqlens, row_logs, tokens, row_length,
    MEAN: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum or mean of a row's log-ratios, clamped to +-20. Blocks start at the row's beginning, so that the sum
    does not depend on where the row lies."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of(row, cu_seqlens, tokens, row_length, PACKED)
    total = tl.zeros([1], tl.float64)
    n = tl.zeros([1], tl.int64)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        live = token < end
        on = live & (tl.load(mask + token, live, 0) != 0)
        log_weight, _ = log_ratio(
            load_wide(logprobs, token, live, on, WIDE), load_wide(behavior, token, live, on, WIDE)
        )
        total += tl.sum(log_weight, 0).to(tl.float64)
        n += tl.sum(on.to(tl.int32), 0)
    if MEAN:
        total = total / tl.maximum(n, 1).to(tl.float64)
    bounded = tl.where(total < -20.0, -20.0, tl.where(total > 20.0, 20.0, total))
    tl.store(row_logs + row + tl.arange(0, 1), bounded.to(WIDE))


@triton.jit
def weights_kernel(
    logprobs, behavior, mask, cu_seqlens, row_logs, weights, partial, tokens, rows, row_length, search_steps,
    steps, low: tl.float64, high: tl.float64,
    BY_ROW: tl.constexpr, DROP: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([SLOTS], tl.float64)
    for step in range(steps):
        start = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK
        token = start + tl.arange(0, BLOCK)
        live = token < tokens
        on = live & (tl.load(mask + token, live, 0) != 0)
        if BY_ROW:
            row = row_of(token, start, cu_seqlens, rows, row_length, search_steps, PACKED, BLOCK)
            log_weight = load_wide(row_logs, row, live, on, WIDE)
        else:
            log_weight, _ = log_ratio(
                load_wide(logprobs, token, live, on, WIDE), load_wide(behavior, token, live, on, WIDE)
            )
        exp, _ = exp20(log_weight, WIDE)
        raw = tl.where(on, exp, 0.0)
        below = on & (raw < real(low, WIDE))
        above = on & (raw > real(high, WIDE))
        if DROP:
            applied = tl.where(below | above, 0.0, raw)
        else:
            applied = tl.where(below, real(low, WIDE), tl.where(above, real(high, WIDE), raw))
        tl.store(weights + token, applied, live)
        sums = _put(sums, COUNT, tl.sum(on.to(tl.int32), 0))
        sums = _put(sums, RAW, tl.sum(raw, 0))
        sums = _raise(sums, RAW_MAX, raw)
        sums = _put(sums, APPLIED, tl.sum(applied, 0))
        sums = _raise(sums, APPLIED_MAX, applied)
        sums = _put(sums, SQUARES, tl.sum(applied * applied, 0))
        sums = _put(sums, OUTSIDE, tl.sum((below | above).to(tl.int32), 0))
    tl.store(partial + tl.program_id(0) * SLOTS + tl.arange(0, SLOTS), sums)


@triton.jit
def finish_kernel(partial, stats, scale_out, programs, NORMALIZE: tl.constexpr, FOLD: tl.constexpr):
    """Statistics from the programs' sums, and the factor that makes the mean weight 1."""
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
        scale = tl.where(applied == 0.0, 0.0, n / tl.where(applied == 0.0, 1.0, applied))
        tl.store(scale_out, scale.to(scale_out.dtype.element_ty))
    effective = tl.where(squares == 0.0, 0.0, applied * applied / n / tl.where(squares == 0.0, 1.0, squares))
    kind = stats.dtype.element_ty
    tl.store(stats, (_get(total, RAW) / n).to(kind))
    tl.store(stats + 1, _get(total, RAW_MAX).to(kind))
    tl.store(stats + 2, (applied / n * scale).to(kind))
    tl.store(stats + 3, (_get(total, APPLIED_MAX) * scale).to(kind))
    tl.store(stats + 4, effective.to(kind))
    tl.store(stats + 5, (_get(total, OUTSIDE) / n).to(kind))


def importance_weights(
    logprobs: torch.Tensor, behavior_logprobs: torch.Tensor, layout: Layout, level: int, mode: int,
    low: float, high: float, bound_level: int, veto: float, normalize: int, weights: torch.Tensor,
    stats: torch.Tensor,
) -> None:  # fmt: skip
    """Fill weights and stats from contiguous inputs; `level`, `mode` as csrc/policy_loss.h numbers them."""
    if bound_level != level or veto > 0 or normalize == 2:
        raise NotImplementedError("bound_level, veto and normalize='sequences' have no Triton kernel")
    stats.zero_()  # nothing is vetoed
    programs, steps = programs_of(layout.tokens)
    packed, kind = layout.cu_seqlens is not None, wide(logprobs.dtype)
    bounds, rows, row_length, search_steps = layout.row_arguments()
    row_logs = weights.new_empty(rows if level else 0)
    if level and rows:
        row_log_kernel[(rows,)](
            logprobs, behavior_logprobs, layout.mask, bounds, row_logs, layout.tokens, row_length,
            MEAN=level == 2, PACKED=packed, WIDE=kind, BLOCK=BLOCK, num_warps=warps(logprobs.dtype),
        )  # fmt: skip
    partial = torch.empty((programs, SLOTS.value), dtype=torch.float64, device=weights.device)
    if programs:
        weights_kernel[(programs,)](
            logprobs, behavior_logprobs, layout.mask, bounds, row_logs, weights, partial, layout.tokens, rows,
            row_length, search_steps, steps, low, high, BY_ROW=level != 0, DROP=mode == 1, PACKED=packed,
            WIDE=kind, BLOCK=BLOCK, num_warps=warps(logprobs.dtype),
        )  # fmt: skip
    scale = weights.new_empty(1)
    finish_kernel[(1,)](partial, stats, scale, programs, NORMALIZE=normalize > 0, FOLD=FOLD)
    if normalize:
        weights.mul_(scale)


def _variants() -> list[Variant]:
    """A token's weight and both layouts of a row's."""
    found = []
    for dtype in ("*fp32", "*bf16"):
        inputs = {
            "logprobs": dtype,
            "behavior": dtype,
            "mask": "*i1",
            "cu_seqlens": "*i32",
            "row_logs": "*fp32",
        }
        sizes = dict.fromkeys(("tokens", "rows", "row_length", "search_steps", "steps"), "i32")
        tile = {"WIDE": tl.float32, "BLOCK": BLOCK}
        outputs = {"weights": "*fp32", "partial": "*fp64", "low": "fp64", "high": "fp64"}
        for by_row, packed in ((False, False), (True, False), (True, True)):
            flags = {"BY_ROW": by_row, "DROP": packed, "PACKED": packed}
            found.append(
                Variant(
                    weights_kernel, inputs | sizes | outputs, flags | tile, divisible=("tokens", "row_length")
                )
            )
        row_sizes = {"tokens": "i32", "row_length": "i32"}
        for packed in (False, True):
            found.append(
                Variant(
                    row_log_kernel,
                    inputs | row_sizes,
                    {"MEAN": packed, "PACKED": packed} | tile,
                    divisible=("tokens", "row_length"),
                )
            )
    finish = {"partial": "*fp64", "stats": "*fp32", "scale_out": "*fp32", "programs": "i32"}
    return [*found, Variant(finish_kernel, finish, {"NORMALIZE": True, "FOLD": FOLD})]


VARIANTS = _variants()
