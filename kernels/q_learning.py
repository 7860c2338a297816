"""Vocabulary kernels of Q-learning: the best token, the policy's mean, the soft maximum's gradient, guidance.

    best       max_j min(q_j, other_j) and the lowest id that has it
    expected   sum_j p_j q_j,  p = softmax(logits / temperature), with a running largest logit
    soft       d_q_j = g exp((q_j - largest) / alpha - log_sum)
    guided     logits_j + beta (min(q_j, other_j) - v)

Roofline, a row of V elements of e bytes: best reads V e (131072 of bf16: 87 ns of 3 TB/s), expected 2 V e with one
exponential an element, soft reads and writes V e with one, guided reads 2 V e or 3 V e and writes 4 V: all
bandwidth-bound. Reductions take one program a row, so a row's result does not depend on the others; a batch of
fewer rows than multiprocessors leaves some idle.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant

# Two loads of 16 bytes a thread in bf16 at 8 warps, and few enough registers for two inputs in float32.
BLOCK = 4096
# Elementwise kernels: short rows should not pay for a long block.
TILE = 1024
WARPS = 8

Laid = tuple[torch.Tensor, int, int, int, int, int]
FREE = ["inner", "outer_stride", "stride"]


@triton.jit
def _base(row, inner, outer_stride, stride):
    return row // inner * outer_stride + row % inner * stride


@triton.jit
def _lower(x, y):
    """The lower of two, NaN if the first is or the second is."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def best_kernel(
    q, other, mask, values, ids, vocab, inner, outer_stride, stride, other_inner, other_outer_stride, other_stride,
    TWIN: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([], float("-inf"), WIDE)
    at = tl.full([], -1, tl.int64)
    unordered = tl.zeros([], tl.int32)
    counts = True
    if MASKED:
        counts = tl.load(mask + row) != 0
    if counts:
        base = q + _base(row, inner, outer_stride, stride)
        base_other = other + _base(row, other_inner, other_outer_stride, other_stride)
        for start in range(0, vocab, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = tl.load(base + j, j < vocab, float("-inf")).to(WIDE)
            if TWIN:
                x = _lower(x, tl.load(base_other + j, j < vocab, float("-inf")).to(WIDE))
            bad = x != x
            unordered = tl.maximum(unordered, tl.max(bad.to(tl.int32), 0))
            x = tl.where(bad, float("-inf"), x)
            top = tl.max(x, 0)
            first = tl.min(tl.where(x == top, j, vocab), 0).to(tl.int64)
            at = tl.where(top > best, first, at)
            best = tl.maximum(best, top)
        best = tl.where(unordered > 0, float("nan"), best)
        at = tl.where(unordered > 0, -1, at)
    else:
        best = tl.zeros([], WIDE)
    tl.store(values + row, best)
    tl.store(ids + row, at)


@triton.jit
def expected_kernel(
    logits, q, mask, out, vocab, temperature: tl.float64, inner, outer_stride, stride, q_inner, q_outer_stride,
    q_stride, MASKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([], float("-inf"), WIDE)
    total = tl.zeros([], WIDE)
    moment = tl.zeros([], WIDE)
    unordered = tl.zeros([], tl.int32)
    inverse = (1.0 / tl.full([], temperature, tl.float64)).to(WIDE)
    counts = True
    if MASKED:
        counts = tl.load(mask + row) != 0
    found = tl.zeros([], WIDE)
    if counts:
        base = logits + _base(row, inner, outer_stride, stride)
        base_q = q + _base(row, q_inner, q_outer_stride, q_stride)
        for start in range(0, vocab, BLOCK):
            j = start + tl.arange(0, BLOCK)
            x = tl.load(base + j, j < vocab, float("-inf")).to(WIDE)
            v = tl.load(base_q + j, j < vocab, 0.0).to(WIDE)
            unordered = tl.maximum(unordered, tl.max((x != x).to(tl.int32), 0))
            top = tl.maximum(largest, tl.max(tl.where(x != x, float("-inf"), x), 0))
            # Until an allowed token is seen any finite reference gives exp(-inf) = 0.
            reference = tl.where(top == float("-inf"), 0.0, top)
            factor = tl.where(top == largest, 1.0, tl.exp((largest - reference) * inverse))
            e = tl.exp((x - reference) * inverse)
            total = factor * total + tl.sum(e, 0)
            moment = tl.where(factor == 0.0, 0.0, factor * moment) + tl.sum(tl.where(e == 0.0, 0.0, e * v), 0)
            largest = top
        found = tl.where(largest == float("-inf"), float("-inf"), moment / tl.where(total == 0.0, 1.0, total))
        found = tl.where(unordered > 0, float("nan"), found)
    tl.store(out + row, found)


@triton.jit
def soft_backward_kernel(
    q, mask, stats, upstream, d_q, rows, vocab, alpha: tl.float64, inner, outer_stride, stride,
    MASKED: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    largest = tl.load(stats + row)
    live = tl.where(largest == float("-inf"), 0, 1)
    if MASKED:
        live = tl.where(tl.load(mask + row) != 0, live, 0)
    counts = (tl.zeros([TILE], tl.int32) + live) != 0
    inverse = (1.0 / tl.full([], alpha, tl.float64)).to(WIDE)
    x = tl.load(q + _base(row, inner, outer_stride, stride) + j, (j < vocab) & counts, float("-inf")).to(WIDE)
    d = (x - largest) * inverse - tl.load(stats + rows + row)
    found = tl.load(upstream + row) * tl.exp(tl.where(d > 0.0, 0.0, d))
    tl.store(d_q + row * vocab + j, tl.where(counts, found, 0.0).to(d_q.dtype.element_ty), j < vocab)


@triton.jit
def guided_kernel(
    logits, q, other, values, out, vocab, beta: tl.float64, inner, outer_stride, stride, q_inner, q_outer_stride,
    q_stride, other_inner, other_outer_stride, other_stride, TWIN: tl.constexpr, VALUES: tl.constexpr,
    WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = j < vocab
    x = tl.load(logits + _base(row, inner, outer_stride, stride) + j, inside, 0.0).to(WIDE)
    lowest = tl.load(q + _base(row, q_inner, q_outer_stride, q_stride) + j, inside, 0.0).to(WIDE)
    if TWIN:
        second = tl.load(other + _base(row, other_inner, other_outer_stride, other_stride) + j, inside, 0.0)
        lowest = _lower(lowest, second.to(WIDE))
    advantage = lowest
    if VALUES:
        advantage = lowest - tl.load(values + row)
    found = x + tl.full([], beta, tl.float64).to(WIDE) * advantage
    forbidden = (x == float("-inf")) | (lowest == float("-inf"))
    tl.store(out + row * vocab + j, tl.where(forbidden, float("-inf"), found), inside)


# ---- launchers: `layout` of react_fast/ops/_logprob.py describes an input of any strides -----------------------


def _wide(x: torch.Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _block(vocab: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(vocab)))


def best_token(
    q: Laid, other: Laid | None, mask: torch.Tensor | None, values: torch.Tensor, ids: torch.Tensor
) -> None:
    x, rows, vocab, *strides = q
    second = q if other is None else other
    if rows:
        best_kernel[(rows,)](
            x, second[0], x if mask is None else mask, values, ids, vocab, *strides, *second[3:],
            TWIN=other is not None, MASKED=mask is not None, WIDE=_wide(x), BLOCK=_block(vocab, BLOCK),
            num_warps=WARPS,
        )  # fmt: skip


def expected_values(
    logits: Laid, q: Laid, mask: torch.Tensor | None, temperature: float, out: torch.Tensor
) -> None:
    x, rows, vocab, *strides = logits
    if rows:
        expected_kernel[(rows,)](
            x, q[0], x if mask is None else mask, out, vocab, temperature, *strides, *q[3:],
            MASKED=mask is not None, WIDE=_wide(x), BLOCK=_block(vocab, BLOCK), num_warps=WARPS,
        )  # fmt: skip


def soft_values_backward(
    q: Laid, mask: torch.Tensor | None, stats: torch.Tensor, upstream: torch.Tensor, alpha: float,
    d_q: torch.Tensor,
) -> None:  # fmt: skip
    x, rows, vocab, *strides = q
    tile = _block(vocab, TILE)
    if rows and vocab:
        soft_backward_kernel[(rows, triton.cdiv(vocab, tile))](
            x, x if mask is None else mask, stats, upstream, d_q, rows, vocab, alpha, *strides,
            MASKED=mask is not None, WIDE=_wide(x), TILE=tile,
        )  # fmt: skip


def guided_logits(
    logits: Laid, q: Laid, other: Laid | None, values: torch.Tensor | None, beta: float, out: torch.Tensor
) -> None:
    x, rows, vocab, *strides = logits
    second = q if other is None else other
    tile = _block(vocab, TILE)
    if rows and vocab:
        guided_kernel[(rows, triton.cdiv(vocab, tile))](
            x, q[0], second[0], out if values is None else values, out, vocab, beta, *strides, *q[3:], *second[3:],
            TWIN=other is not None, VALUES=values is not None, WIDE=_wide(x), TILE=tile,
        )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    strides = dict.fromkeys(("inner", "outer_stride", "stride"), "i64")
    sizes = {"vocab": "i32", "rows": "i32", **strides}
    for first in ("q", "other"):
        sizes |= {f"{first}_{name}": "i64" for name in strides}
    numbers = dict.fromkeys(("temperature", "alpha", "beta"), "fp64")
    divisible = ("vocab", *[name for name in sizes if name.endswith("stride")])
    for dtype in ("*fp32", "*bf16", "*fp64"):
        double = dtype == "*fp64"
        wide = {"WIDE": tl.float64 if double else tl.float32}
        real = "*fp64" if double else "*fp32"
        signature = dict.fromkeys(("q", "logits", "other", "d_q"), dtype) | {"mask": "*i1", "ids": "*i64"}
        signature |= dict.fromkeys(("values", "out", "stats", "upstream"), real) | sizes | numbers
        block = {"BLOCK": BLOCK} | wide
        for twin in (False, True):
            flags = block | {"TWIN": twin, "MASKED": True}
            found.append(Variant(best_kernel, signature, flags, WARPS, divisible))
            flags = {"TWIN": twin, "VALUES": True, "TILE": TILE} | wide
            found.append(Variant(guided_kernel, signature, flags, 4, divisible))
        found.append(Variant(expected_kernel, signature, block | {"MASKED": True}, WARPS, divisible))
        flags = {"MASKED": True, "TILE": TILE} | wide
        found.append(Variant(soft_backward_kernel, signature, flags, 4, divisible))
    return found


VARIANTS = _variants()
