"""Objectives whose tokens share a ratio of their row: what a row says to its tokens.

    GSPO, GSPO-token, LUSPO   s = exp(mean x)             a: slope of every live token, b: scale of the loss
    GMPO                      g = exp(mean of x held)     a: slope of every live token
    VESPO                     W = exp(sum x + log v)      a: phi(W) for A >= 0, b: for A < 0

with x = log p - log p_old in +-20 and v the importance weight. One program walks a row from its own begin, so that
other rows and padding change nothing.

Roofline: the sweep reads what the pass over the tokens reads, 17 bytes a token in float32 with importance weights;
GSPO and LUSPO read part of it again, from the second-level cache for rows up to its size.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant
from .objectives import GMPO, GSPO, LUSPO, VESPO, clip, within
from .policy_loss_layout import BLOCK, Layout, bounds_of, exp20, load_wide, log_ratio, real, warps, wide

# exp20 of float64 takes a device library call; rows are summed and finished in float64.
DOUBLE = tl.constexpr(tl.float64)


@triton.jit
def _exp(x):
    value, _ = exp20(x, DOUBLE)
    return value


@triton.jit
def _phi(log_w, k, lam):
    """W^k exp(lam (1 - W))."""
    _, minus_one = exp20(log_w, DOUBLE)
    return tl.exp(k * log_w - lam * minus_one)


@triton.jit
def row_state_kernel(
    logprobs, old_logprobs, advantages, importance, mask, cu_seqlens, states, tokens, rows, row_length,
    row_stride, token_stride, p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64,
    OBJECTIVE: tl.constexpr, OLD: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, PACKED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill states [3, rows]: the ratio, a, b."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of(row, cu_seqlens, tokens, row_length, PACKED)
    total = tl.zeros([1], tl.float64)
    gain = tl.zeros([1], tl.float64)
    n = tl.zeros([1], tl.int64)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        live = token < end
        on = live & (tl.load(mask + token, live, 0) != 0)
        n += tl.sum(on.to(tl.int32), 0)
        logp = load_wide(logprobs, token, live, on, WIDE)
        old = logp
        if OLD:
            old = load_wide(old_logprobs, token, live, on, WIDE)
        x, _ = log_ratio(logp, old)
        if OBJECTIVE == GMPO:
            A = load_wide(advantages, row * row_stride + token * token_stride, live, on, WIDE)
            x = tl.where(x > real(p1, WIDE), tl.where(A > 0.0, real(p1, WIDE), x), x)
            x = tl.where(x < real(p0, WIDE), tl.where(A < 0.0, real(p0, WIDE), x), x)
            x = tl.where(A == 0.0, 0.0, x)
            if HAS_IMPORTANCE:
                A = A * load_wide(importance, token, live, on, WIDE)
            gain += tl.sum(A, 0).to(tl.float64)
        if (OBJECTIVE == VESPO) & HAS_IMPORTANCE:
            v = load_wide(importance, token, live, on, WIDE)
            v = within(v, real(1e-8, WIDE), real(485165195.4097903, WIDE))
            x += tl.where(on, tl.log(v), 0.0)
        total += tl.sum(x, 0).to(tl.float64)
    per_token = 1.0 / tl.maximum(n, 1).to(tl.float64)
    a = tl.zeros([1], tl.float64)
    b = tl.full([1], 1.0, tl.float64)
    if OBJECTIVE == VESPO:
        log_w = within(total, -18.420680743952367, 20.0)
        ratio = _exp(log_w)
        a = _phi(log_w, p0, p1)
        b = _phi(log_w, p2, p3)
    else:
        ratio = _exp(total * per_token)
        if OBJECTIVE == GMPO:
            a = -ratio * per_token * gain
        if OBJECTIVE == LUSPO:
            b = n.to(tl.float64)
        if (OBJECTIVE == GSPO) | (OBJECTIVE == LUSPO):
            one = real(1.0, WIDE)
            for first in range(begin, end, BLOCK):
                token = first + tl.arange(0, BLOCK)
                live = token < end
                on = live & (tl.load(mask + token, live, 0) != 0)
                A = load_wide(advantages, row * row_stride + token * token_stride, live, on, WIDE)
                _, slope, _, _, _ = clip(
                    A, ratio.to(WIDE), one, real(p0, WIDE), real(p1, WIDE), real(p2, WIDE), real(p3, WIDE)
                )
                if HAS_IMPORTANCE:
                    slope *= load_wide(importance, token, live, on, WIDE)
                gain += tl.sum(slope, 0).to(tl.float64)
            a = b * ratio * per_token * gain
    one_row = tl.arange(0, 1)
    tl.store(states + row + one_row, ratio.to(WIDE))
    tl.store(states + rows + row + one_row, a.to(WIDE))
    tl.store(states + 2 * rows + row + one_row, b.to(WIDE))


def row_states(
    logprobs: torch.Tensor, old: torch.Tensor | None, advantages: torch.Tensor, strides: tuple[int, int],
    importance: torch.Tensor | None, layout: Layout, objective: int, parameters: list[float],
) -> torch.Tensor:  # fmt: skip
    """[3, rows] in the accumulation dtype; `parameters` as the kernels take them."""
    double = logprobs.dtype == torch.float64
    states = torch.empty(
        (3, layout.rows), dtype=torch.float64 if double else torch.float32, device=logprobs.device
    )
    if layout.rows:
        row_state_kernel[(layout.rows,)](
            logprobs, logprobs if old is None else old, advantages,
            logprobs if importance is None else importance, layout.mask, layout.row_arguments()[0], states,
            layout.tokens, layout.rows, layout.row_length, *strides, *parameters[:4],
            OBJECTIVE=objective, OLD=old is not None, HAS_IMPORTANCE=importance is not None,
            PACKED=layout.cu_seqlens is not None, WIDE=wide(logprobs.dtype), BLOCK=BLOCK,
            num_warps=warps(logprobs.dtype),
        )  # fmt: skip
    return states


def _variants() -> list[Variant]:
    """Every objective of rows in both layouts, and one in float64."""
    found = []
    names = ("logprobs", "old_logprobs", "advantages", "importance")
    sizes = ("tokens", "rows", "row_length", "row_stride", "token_stride")
    for dtype, objective in [("*fp32", o) for o in range(GSPO.value, VESPO.value + 1)] + [
        ("*fp64", GSPO.value)
    ]:
        double = dtype == "*fp64"
        signature = dict.fromkeys(names, dtype) | {"mask": "*i1", "cu_seqlens": "*i32"}
        signature |= {"states": "*fp64" if double else "*fp32"} | dict.fromkeys(sizes, "i32")
        signature |= dict.fromkeys(("p0", "p1", "p2", "p3"), "fp64")
        for packed in (False, True):
            flags = {"OBJECTIVE": objective, "OLD": True, "HAS_IMPORTANCE": packed, "PACKED": packed}
            flags |= {"WIDE": tl.float64 if double else tl.float32, "BLOCK": BLOCK, "token_stride": 1}
            num_warps = warps(torch.float64 if double else torch.float32)
            found.append(Variant(row_state_kernel, signature, flags, num_warps, ("tokens", "row_length")))
    return found


VARIANTS = _variants()
