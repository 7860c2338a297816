"""Policy-loss kernels: objective, KL, entropy and importance of every token, gradient, sums and metrics.

    loss = sum_t w_t (importance_t L_t + kl_coef K_t - entropy_coef H_t)

Roofline, per token of e bytes an element: logprobs, old_logprobs, advantages 3 e read, mask 1, gradient 4
written (float32: 17 bytes, 5.7 ns a thousand tokens of 3 TB/s), plus e for each of ref_logprobs, entropy,
importance, for 60 to 100 flops and up to 15 block sums: bandwidth-bound. The mask is read once more to count.

A program adds the sums of its blocks in order, and one program adds the programs' sums in order: the partition
follows from the number of tokens alone, so the result is the same in every run. Nothing waits for the device.
"""

import math

import torch
import triton
import triton.language as tl

from .aot import Variant
from .objectives import (
    CISPO,
    CLIP_COV,
    GMPO,
    GSPO,
    GSPO_TOKEN,
    KL_COV,
    REINFORCE,
    VESPO,
    row_surrogate,
    token_surrogate,
)
from .policy_loss_layout import (
    BLOCK,
    Layout,
    TokenWeights,
    exp20,
    kl_estimate,
    load_wide,
    log_ratio,
    programs_of,
    real,
    row_of,
    warps,
    wide,
)
from .selection import selection
from .sequence_objectives import row_states

# Partial sums that the last program loads at a time.
FOLD = 64
# Steps in which a float64 block is taken: whole, with every input, it does not fit the registers of its 16 warps.
DOUBLE_STEPS = 2
# Slots of the sums: those of `Stat` in csrc/policy_loss.h, the squares in place of the effective sample size.
TOKENS = tl.constexpr(0)
CLIP_LOW = tl.constexpr(1)
CLIP_HIGH = tl.constexpr(2)
CLIP_DUAL = tl.constexpr(3)
APPROX_K1 = tl.constexpr(4)
APPROX_K3 = tl.constexpr(5)
RATIO = tl.constexpr(6)
CLAMPED = tl.constexpr(7)
RATIO_MAX = tl.constexpr(8)
KL = tl.constexpr(9)
ENTROPY = tl.constexpr(10)
IMPORTANCE = tl.constexpr(11)
SQUARES = tl.constexpr(12)
IMPORTANCE_MAX = tl.constexpr(13)
LOSS = tl.constexpr(14)
SLOTS = tl.constexpr(16)


@triton.jit
def add(sums, SLOT: tl.constexpr, x):
    return sums + tl.where(tl.arange(0, SLOTS) == SLOT, tl.sum(x, 0).to(tl.float64), 0.0)


@triton.jit
def count(sums, SLOT: tl.constexpr, flag):
    return add(sums, SLOT, flag.to(tl.int32))


@triton.jit
def raise_to(sums, SLOT: tl.constexpr, x):
    """Largest of non-negative numbers, NaN ignored."""
    top = tl.max(tl.where(x > 0.0, x, 0.0), 0).to(tl.float64)
    return tl.where(tl.arange(0, SLOTS) == SLOT, tl.maximum(sums, top), sums)


@triton.jit
def _penalty(
    logp, ref, ratio, live_ratio, ESTIMATOR: tl.constexpr, GRADIENT: tl.constexpr, WIDE: tl.constexpr
):
    """KL(policy || reference): (estimate, what enters the loss, its d / d log p)."""
    x, clamped = log_ratio(logp, ref)
    k, slope = kl_estimate(x, ESTIMATOR, WIDE)
    if GRADIENT == 1:
        slope = x
    slope = tl.where(clamped, 0.0, slope)
    value = k
    if GRADIENT == 2:
        value = ratio * k
        slope = live_ratio * k + ratio * slope
    return k, value, slope


@triton.jit
def _moved(sums, x, clamped, minus_one, ratio, on):
    """How far the policy has moved: `ratio` is the row's where the objective has one of the row."""
    counted = tl.where(on, ratio, 0.0)
    sums = count(sums, TOKENS, on)
    sums = count(sums, CLAMPED, clamped)
    sums = add(sums, APPROX_K1, -x)
    sums = add(sums, APPROX_K3, minus_one - x)
    sums = add(sums, RATIO, counted)
    return raise_to(sums, RATIO_MAX, counted)


@triton.jit
def policy_loss_kernel(
    logprobs, old_logprobs, advantages, ref_logprobs, entropy, importance, mask, cu_seqlens, flat_weight,
    counts, states, selected, d_logprobs, d_entropy, partial, tokens, rows, row_length, search_steps, steps,
    row_stride, token_stride, p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64, kl_coef: tl.float64,
    entropy_coef: tl.float64,
    OBJECTIVE: tl.constexpr, ESTIMATOR: tl.constexpr, GRADIENT: tl.constexpr, OLD: tl.constexpr,
    REF: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, PACKED: tl.constexpr,
    ROW_ADVANTAGES: tl.constexpr, ROW_WEIGHTS: tl.constexpr, WANT_LOGPROBS: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BY_ROW: tl.constexpr = OBJECTIVE >= GSPO
    SELECTS: tl.constexpr = (OBJECTIVE == KL_COV) | (OBJECTIVE == CLIP_COV)
    sums = tl.zeros([SLOTS], tl.float64)
    weight = tl.load(flat_weight).to(WIDE)
    for step in range(steps):
        start = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK
        token = start + tl.arange(0, BLOCK)
        live = token < tokens
        on = live & (tl.load(mask + token, live, 0) != 0)
        at = token * token_stride
        w = weight
        if ROW_ADVANTAGES or ROW_WEIGHTS or BY_ROW:
            row = row_of(token, start, cu_seqlens, rows, row_length, search_steps, PACKED, BLOCK)
            if ROW_ADVANTAGES:
                at += row * row_stride
            if ROW_WEIGHTS:
                w = weight / tl.load(counts + row, on, 1).to(WIDE)
        logp = load_wide(logprobs, token, live, on, WIDE)
        old = logp
        if OLD:
            old = load_wide(old_logprobs, token, live, on, WIDE)
        x, clamped = log_ratio(logp, old)
        ratio, minus_one = exp20(x, WIDE)
        moved = ratio
        if BY_ROW:
            row_ratio = load_wide(states, row, live, on, WIDE)
            if OBJECTIVE != GMPO:
                moved = row_ratio
        sums = _moved(sums, x, clamped, minus_one, moved, on)
        live_ratio = tl.where(clamped, 0.0, ratio)
        A = load_wide(advantages, at, live, on, WIDE)
        q0, q1, q2, q3 = real(p0, WIDE), real(p1, WIDE), real(p2, WIDE), real(p3, WIDE)
        if BY_ROW:
            a = load_wide(states + rows, row, live, on, WIDE)
            b = load_wide(states + 2 * rows, row, live, on, WIDE)
            value, slope, low, high, dual = row_surrogate(
                logp, A, x, clamped, row_ratio, a, b, q0, q1, q2, q3, OBJECTIVE, WIDE
            )
        else:
            chosen = on
            if SELECTS:
                chosen = on & (tl.load(selected + token, live, 0) != 0)
            value, slope, low, high, dual = token_surrogate(
                logp, old, A, x, clamped, ratio, live_ratio, chosen, q0, q1, q2, q3, OBJECTIVE, WIDE
            )
        if OBJECTIVE != REINFORCE:
            sums = count(sums, CLIP_LOW, low)
            sums = count(sums, CLIP_HIGH, high)
            sums = count(sums, CLIP_DUAL, dual)
        if HAS_IMPORTANCE:
            v = load_wide(importance, token, live, on, WIDE)
            if OBJECTIVE != VESPO:  # the row has used it
                value = v * value
            if (OBJECTIVE < GSPO) | (OBJECTIVE == GSPO_TOKEN):
                slope = v * slope
            sums = add(sums, IMPORTANCE, v)
            sums = add(sums, SQUARES, v * v)
            sums = raise_to(sums, IMPORTANCE_MAX, v)
        if REF:
            ref = load_wide(ref_logprobs, token, live, on, WIDE)
            k, k_value, k_slope = _penalty(logp, ref, ratio, live_ratio, ESTIMATOR, GRADIENT, WIDE)
            value += real(kl_coef, WIDE) * k_value
            slope += real(kl_coef, WIDE) * k_slope
            sums = add(sums, KL, k)
        if HAS_ENTROPY:
            H = load_wide(entropy, token, live, on, WIDE)
            value -= real(entropy_coef, WIDE) * H
            sums = add(sums, ENTROPY, H)
        sums = add(sums, LOSS, tl.where(on, w * value, 0.0))
        if WANT_LOGPROBS:
            tl.store(d_logprobs + token, tl.where(on, w * slope, 0.0), live)
        if WANT_ENTROPY:
            tl.store(d_entropy + token, tl.where(on, -real(entropy_coef, WIDE) * w, 0.0), live)
    tl.store(partial + tl.program_id(0) * SLOTS + tl.arange(0, SLOTS), sums)


@triton.jit
def value_loss_kernel(
    values, old_values, returns, mask, flat_weight, d_values, partial, tokens, steps, clip: tl.float64,
    CLIP: tl.constexpr, WANTED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([SLOTS], tl.float64)
    weight = tl.load(flat_weight).to(WIDE)
    for step in range(steps):
        token = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        live = token < tokens
        on = live & (tl.load(mask + token, live, 0) != 0)
        v = load_wide(values, token, live, on, WIDE)
        target = load_wide(returns, token, live, on, WIDE)
        error = v - target
        slope = error
        if CLIP:
            c = real(clip, WIDE)
            old = load_wide(old_values, token, live, on, WIDE)
            clipped = tl.where(v < old - c, old - c, tl.where(v > old + c, old + c, v)) - target
            held = tl.abs(clipped) > tl.abs(error)
            error = tl.where(held, clipped, error)
            slope = tl.where(held, 0.0, slope)
        sums = add(sums, LOSS, 0.5 * weight * error * error)
        if WANTED:
            tl.store(d_values + token, tl.where(on, weight * slope, 0.0), live)
    tl.store(partial + tl.program_id(0) * SLOTS + tl.arange(0, SLOTS), sums)


@triton.jit
def finish_kernel(partial, loss, stats, programs, STATS: tl.constexpr, FOLD: tl.constexpr):
    """Loss and metrics from the programs' sums, in float64: one program, always in the same order."""
    slot = tl.arange(0, SLOTS)
    largest = (slot == RATIO_MAX) | (slot == IMPORTANCE_MAX)
    total = tl.zeros([SLOTS], tl.float64)
    for first in range(0, programs, FOLD):
        program = first + tl.arange(0, FOLD)
        x = tl.load(partial + program[:, None] * SLOTS + slot[None, :], (program < programs)[:, None], 0.0)
        total = tl.where(largest, tl.maximum(total, tl.max(x, 0)), total + tl.sum(x, 0))
    tl.store(loss, tl.sum(tl.where(slot == LOSS, total, 0.0), 0).to(loss.dtype.element_ty))
    if STATS:
        n = tl.sum(tl.where(slot == TOKENS, total, 0.0), 0)
        importance = tl.sum(tl.where(slot == IMPORTANCE, total, 0.0), 0)
        squares = tl.sum(tl.where(slot == SQUARES, total, 0.0), 0)
        scale = tl.where(n > 0, 1.0 / tl.maximum(n, 1.0), 0.0)
        effective = tl.where(
            squares == 0.0, 0.0, importance * importance * scale / tl.where(squares == 0.0, 1.0, squares)
        )
        absolute = largest | (slot == TOKENS) | (slot == CLAMPED)
        mean = tl.where(absolute, total, total * scale)
        tl.store(
            stats + slot, tl.where(slot == SQUARES, effective, mean).to(stats.dtype.element_ty), slot < LOSS
        )


def partials(layout: Layout, programs: int) -> torch.Tensor:
    return torch.empty((programs, SLOTS.value), dtype=torch.float64, device=layout.mask.device)


def policy_loss(
    inputs: list[torch.Tensor | None], advantages: torch.Tensor, layout: Layout, weights: TokenWeights,
    objective: int, parameters: list[float], kl_coef: float, kl_estimator: int, kl_gradient: int,
    entropy_coef: float, loss: torch.Tensor, stats: torch.Tensor, d_logprobs: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fill loss, stats and the gradients (None: not wanted).

    `inputs`: logprobs, old_logprobs, ref_logprobs, entropy, importance, contiguous or None. `advantages`: one
    per token or one per row, any strides.
    """
    logprobs, old, ref, entropy, importance = inputs
    assert logprobs is not None
    row_stride, token_stride = 0, advantages.stride(-1)
    if advantages.dim() < logprobs.dim() or advantages.shape != logprobs.shape:
        row_stride, token_stride = token_stride, 0
    elif advantages.dim() == 2:  # at row * stride(0) + (token - row * row_length) * stride(1)
        row_stride = advantages.stride(0) - layout.row_length * token_stride
    if objective == GMPO.value:
        parameters = [math.log(bound) for bound in parameters[:2]] + [0.0, 0.0]
    states = selected = None
    if objective >= GSPO.value:
        strides = row_stride, token_stride
        states = row_states(logprobs, old, advantages, strides, importance, layout, objective, parameters)
    elif objective in (KL_COV.value, CLIP_COV.value):
        selected = selection(
            logprobs, old, advantages, (row_stride, token_stride), layout, objective, parameters
        )
    programs, steps = programs_of(layout.tokens)
    parts = DOUBLE_STEPS if logprobs.dtype == torch.float64 else 1
    partial = partials(layout, programs)

    def given(x: torch.Tensor | None) -> torch.Tensor:
        return logprobs if x is None else x

    if programs:
        policy_loss_kernel[(programs,)](
            logprobs, given(old), advantages, given(ref), given(entropy), given(importance), layout.mask,
            layout.row_arguments()[0], weights.flat, given(weights.counts), given(states), given(selected),
            given(d_logprobs), given(d_entropy), partial, layout.tokens, *layout.row_arguments()[1:],
            steps * parts, row_stride, token_stride, *parameters[:4], kl_coef, entropy_coef,
            OBJECTIVE=objective, ESTIMATOR=kl_estimator, GRADIENT=kl_gradient,
            OLD=old is not None, REF=ref is not None, HAS_ENTROPY=entropy is not None,
            HAS_IMPORTANCE=importance is not None, PACKED=layout.cu_seqlens is not None,
            ROW_ADVANTAGES=row_stride != 0, ROW_WEIGHTS=weights.counts is not None,
            WANT_LOGPROBS=d_logprobs is not None, WANT_ENTROPY=d_entropy is not None,
            WIDE=wide(logprobs.dtype), BLOCK=BLOCK // parts, num_warps=warps(logprobs.dtype),
        )  # fmt: skip
    finish_kernel[(1,)](partial, loss, stats, programs, STATS=True, FOLD=FOLD)


def value_loss(
    inputs: list[torch.Tensor | None], layout: Layout, weights: TokenWeights, clip: float, loss: torch.Tensor,
    d_values: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fill loss and d_values (None: not wanted) from values, old_values (None: not clipped) and returns."""
    values, old, returns = inputs
    assert values is not None
    programs, steps = programs_of(layout.tokens)
    partial = partials(layout, programs)
    if programs:
        value_loss_kernel[(programs,)](
            values, values if old is None else old, returns, layout.mask, weights.flat,
            values if d_values is None else d_values, partial, layout.tokens, steps, clip,
            CLIP=old is not None, WANTED=d_values is not None, WIDE=wide(values.dtype), BLOCK=BLOCK,
            num_warps=warps(values.dtype),
        )  # fmt: skip
    finish_kernel[(1,)](partial, loss, loss, programs, STATS=False, FOLD=FOLD)


def _variants() -> list[Variant]:
    """Every objective with every input; the first two also alone, PPOClip in both layouts and every dtype."""
    sizes = ("tokens", "rows", "row_length", "search_steps", "steps", "row_stride", "token_stride")
    numbers = ("p0", "p1", "p2", "p3", "kl_coef", "entropy_coef")
    names = ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy", "importance")
    layout = {
        "mask": "*i1",
        "selected": "*i1",
        "cu_seqlens": "*i32",
        "flat_weight": "*fp64",
        "counts": "*i64",
    }
    choices = ("REF", "HAS_ENTROPY", "HAS_IMPORTANCE", "ROW_ADVANTAGES", "ROW_WEIGHTS", "WANT_ENTROPY")
    even = ("tokens", "row_length")
    found = []
    for dtype, real_dtype in (("*fp32", "*fp32"), ("*bf16", "*fp32"), ("*fp64", "*fp64")):
        double = dtype == "*fp64"
        tile = {"WIDE": tl.float64 if double else tl.float32, "BLOCK": BLOCK}
        num_warps = warps(torch.float64 if double else torch.float32)
        outputs = dict.fromkeys(("states", "d_logprobs", "d_entropy", "d_values"), real_dtype)
        signature = dict.fromkeys(names, dtype) | layout | outputs | {"partial": "*fp64"}
        signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(numbers, "fp64")
        cases = [(1, True, False), (1, True, True)]
        if dtype == "*fp32":
            cases += [(0, False, False), (1, False, False)]
            cases += [(objective, True, False) for objective in range(CISPO.value, VESPO.value + 1)]
        for objective, full, packed in cases:
            flags = {"OBJECTIVE": objective, "ESTIMATOR": 2, "GRADIENT": 2, "OLD": objective != 0}
            flags |= dict.fromkeys(choices, full) | {"PACKED": packed, "WANT_LOGPROBS": True}
            flags |= tile | {"BLOCK": BLOCK // DOUBLE_STEPS if double else BLOCK}
            flags |= {} if full else {"token_stride": 1}
            found.append(Variant(policy_loss_kernel, signature, flags, num_warps, even))
        value = dict.fromkeys(("values", "old_values", "returns"), dtype) | layout | outputs
        value |= {"tokens": "i32", "steps": "i32", "clip": "fp64", "partial": "*fp64"}
        flags = {"CLIP": True, "WANTED": True} | tile
        found.append(Variant(value_loss_kernel, value, flags, num_warps, even))
    finish = {"partial": "*fp64", "loss": "*fp32", "stats": "*fp32", "programs": "i32"}
    return [*found, Variant(finish_kernel, finish, {"STATS": True, "FOLD": FOLD})]


VARIANTS = _variants()
