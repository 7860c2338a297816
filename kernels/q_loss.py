"""Regression of Q or V on targets: loss, gradient and metrics of one or two heads.

    e = prediction - target        loss = sum_t w_t weight_t sum_heads L(e)
    squared: e^2 / 2      huber: e^2 / 2 up to |e| = k, k (|e| - k / 2) beyond
    expectile: tau e^2 where e <= 0, (1 - tau) e^2 where e > 0

Roofline, per token in float32, 13 bytes: prediction, target 8, mask 1, gradient 4 written, 8 more for a second
head, for some 20 flops a head: bandwidth-bound. The mask is read once more to count.

A program adds the sums of its blocks in order, and one program adds the programs' sums in order: the partition
follows from the number of tokens alone, so the result is the same in every run.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant
from .policy_loss_layout import BLOCK, Layout, TokenWeights, load_wide, programs_of, real, row_of, warps, wide

# Partial sums that the last program loads at a time.
FOLD = 64
# Slots of the sums: those of `QStat` in csrc/q_loss.h, then the loss.
TOKENS = tl.constexpr(0)
ERROR = tl.constexpr(1)
ABSOLUTE = tl.constexpr(2)
ERROR_MAX = tl.constexpr(3)
PREDICTION = tl.constexpr(4)
TARGET = tl.constexpr(5)
ABOVE = tl.constexpr(6)
LOSS = tl.constexpr(7)
SLOTS = tl.constexpr(8)


@triton.jit
def _add(sums, SLOT: tl.constexpr, x):
    return sums + tl.where(tl.arange(0, SLOTS) == SLOT, tl.sum(x, 0).to(tl.float64), 0.0)


@triton.jit
def _regress(e, parameter, KIND: tl.constexpr):
    """(L, dL/de)"""
    if KIND == 2:
        side = tl.where(e > 0.0, 1.0 - parameter, parameter)
        return side * e * e, 2.0 * side * e
    if KIND == 1:
        size = tl.abs(e)
        far = size > parameter
        bound = tl.where(e > parameter, parameter, tl.where(e < -parameter, -parameter, e))
        return tl.where(far, parameter * (size - 0.5 * parameter), 0.5 * e * e), bound
    return 0.5 * e * e, e


@triton.jit
def _head(
    sums, predictions, d_predictions, token, live, on, target, scale, weight, parameter, KIND: tl.constexpr,
    WANTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    prediction = load_wide(predictions, token, live, on, WIDE)
    e = prediction - target
    value, slope = _regress(e, parameter, KIND)
    sums = _add(sums, LOSS, tl.where(on, weight * scale * value, 0.0))
    sums = _add(sums, ERROR, e)
    sums = _add(sums, ABSOLUTE, tl.abs(e))
    sums = _add(sums, PREDICTION, prediction)
    sums = _add(sums, ABOVE, (e > 0.0).to(tl.int32))
    size = tl.abs(e)
    top = tl.max(tl.where(size > 0.0, size, 0.0), 0).to(tl.float64)
    sums = tl.where(tl.arange(0, SLOTS) == ERROR_MAX, tl.maximum(sums, top), sums)
    if WANTED:
        tl.store(d_predictions + token, tl.where(on, weight * scale * slope, 0.0), live)
    return sums


@triton.jit
def q_loss_kernel(
    first, second, targets, weights, mask, cu_seqlens, flat_weight, counts, d_first, d_second, partial, tokens,
    rows, row_length, search_steps, steps, parameter: tl.float64,
    KIND: tl.constexpr, TWIN: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr,
    ROW_WEIGHTS: tl.constexpr, WANT_FIRST: tl.constexpr, WANT_SECOND: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([SLOTS], tl.float64)
    flat = tl.load(flat_weight).to(WIDE)
    for step in range(steps):
        start = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK
        token = start + tl.arange(0, BLOCK)
        live = token < tokens
        on = live & (tl.load(mask + token, live, 0) != 0)
        weight = tl.where(on, flat, 0.0)
        if ROW_WEIGHTS:
            row = row_of(token, start, cu_seqlens, rows, row_length, search_steps, PACKED, BLOCK)
            weight = weight / tl.load(counts + row, on, 1).to(WIDE)
        target = load_wide(targets, token, live, on, WIDE)
        scale = tl.where(on, 1.0, 0.0).to(WIDE)
        if WEIGHTED:
            scale = load_wide(weights, token, live, on, WIDE)
        sums = _add(sums, TOKENS, on.to(tl.int32))
        sums = _add(sums, TARGET, target)
        p = real(parameter, WIDE)
        sums = _head(sums, first, d_first, token, live, on, target, scale, weight, p, KIND, WANT_FIRST, WIDE)
        if TWIN:
            sums = _head(
                sums, second, d_second, token, live, on, target, scale, weight, p, KIND, WANT_SECOND, WIDE
            )
    tl.store(partial + tl.program_id(0) * SLOTS + tl.arange(0, SLOTS), sums)


@triton.jit
def q_finish_kernel(partial, loss, stats, programs, HEADS: tl.constexpr, FOLD: tl.constexpr):
    """Loss and metrics from the programs' sums, in float64: one program, always in the same order."""
    slot = tl.arange(0, SLOTS)
    total = tl.zeros([SLOTS], tl.float64)
    for begin in range(0, programs, FOLD):
        program = begin + tl.arange(0, FOLD)
        x = tl.load(partial + program[:, None] * SLOTS + slot[None, :], (program < programs)[:, None], 0.0)
        total = tl.where(slot == ERROR_MAX, tl.maximum(total, tl.max(x, 0)), total + tl.sum(x, 0))
    tl.store(loss, tl.sum(tl.where(slot == LOSS, total, 0.0), 0).to(loss.dtype.element_ty))
    n = tl.sum(tl.where(slot == TOKENS, total, 0.0), 0)
    scale = tl.where(n > 0, 1.0 / tl.maximum(n, 1.0), 0.0)
    by = tl.where(slot == TARGET, scale, scale / HEADS)
    by = tl.where((slot == TOKENS) | (slot == ERROR_MAX), 1.0, by)
    tl.store(stats + slot, (total * by).to(stats.dtype.element_ty), slot < LOSS)


def q_loss(
    inputs: list[torch.Tensor | None], layout: Layout, weights: TokenWeights, kind: int, parameter: float,
    loss: torch.Tensor, stats: torch.Tensor, d_first: torch.Tensor | None, d_second: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fill loss, stats, gradients (None: not wanted); `inputs`: both heads, targets, weights, contiguous."""
    first, second, targets, token_weights = inputs
    assert first is not None
    programs, steps = programs_of(layout.tokens)
    partial = torch.empty((programs, SLOTS.value), dtype=torch.float64, device=layout.mask.device)

    def given(x: torch.Tensor | None) -> torch.Tensor:
        return first if x is None else x

    if programs:
        q_loss_kernel[(programs,)](
            first, given(second), targets, given(token_weights), layout.mask, layout.row_arguments()[0],
            weights.flat, given(weights.counts), given(d_first), given(d_second), partial, layout.tokens,
            *layout.row_arguments()[1:], steps, parameter,
            KIND=kind, TWIN=second is not None, WEIGHTED=token_weights is not None,
            PACKED=layout.cu_seqlens is not None, ROW_WEIGHTS=weights.counts is not None,
            WANT_FIRST=d_first is not None, WANT_SECOND=d_second is not None, WIDE=wide(first.dtype),
            BLOCK=BLOCK, num_warps=warps(first.dtype),
        )  # fmt: skip
    q_finish_kernel[(1,)](partial, loss, stats, programs, HEADS=1 if second is None else 2, FOLD=FOLD)


def _variants() -> list[Variant]:
    found = []
    for dtype, result in (("*fp32", "*fp32"), ("*bf16", "*fp32"), ("*fp64", "*fp64")):
        double = dtype == "*fp64"
        signature = dict.fromkeys(("first", "second"), dtype) | dict.fromkeys(("targets", "weights"), result)
        signature |= {"mask": "*i1", "cu_seqlens": "*i32", "flat_weight": "*fp64", "counts": "*i64"}
        signature |= {"d_first": result, "d_second": result, "partial": "*fp64", "parameter": "fp64"}
        signature |= dict.fromkeys(("tokens", "rows", "row_length", "search_steps", "steps"), "i32")
        tile = {"WIDE": tl.float64 if double else tl.float32, "BLOCK": BLOCK}
        for kind, full in ((0, False), (1, True), (2, False)):
            flags = dict.fromkeys(("TWIN", "WEIGHTED", "PACKED", "ROW_WEIGHTS", "WANT_SECOND"), full)
            flags |= tile | {"KIND": kind, "WANT_FIRST": True}
            num_warps = warps(torch.float64 if double else torch.float32)
            found.append(Variant(q_loss_kernel, signature, flags, num_warps, ("tokens", "row_length")))
    finish = {"partial": "*fp64", "loss": "*fp32", "stats": "*fp32", "programs": "i32"}
    return [*found, Variant(q_finish_kernel, finish, {"HEADS": 2, "FOLD": FOLD})]


VARIANTS = _variants()
