"""What the policy-loss and importance-weight kernels share: which tokens count, their rows and weights, the cut
of the tokens into programs, and small functions without cancellation.

Roofline: the counts read the mask once, 1 byte a token; the rest is arithmetic beside other kernels' loads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .aot import Variant

# Tokens a program holds at a time: over 4 warps 8 a thread, two 16-byte loads in float32, one in bf16; with
# all inputs and sums in flight that is what fits without spilling.
BLOCK = 1024
# Programs, hence partial sums: a full H100 (132 multiprocessors, 5 of these each) six times over, and few enough
# for one last program.
MAX_PROGRAMS = 4096
# Tokens a program of the counting kernel holds: one byte each, 16 bytes a thread and load.
COUNT_BLOCK = 2048
# Tokens of one count, where rows do not matter.
COUNT_UNIT = 8192


@triton.jit
def real(x, WIDE: tl.constexpr):
    """A float64 argument in the kernel's precision."""
    return tl.full([1], x, tl.float64).to(WIDE)


@triton.jit
def exp20(x, WIDE: tl.constexpr):
    """(exp(x), exp(x) - 1) for |x| <= 20 or NaN, without cancellation in the second."""
    if tl.float64 == WIDE:
        value = tl.exp(x)
        safe = tl.where((value == 1.0) | (value != value), 2.0, value)
        minus_one = tl.where(value == 1.0, x, (value - 1.0) * (x / tl.log(safe)))  # Kahan: the errors cancel
        return value, minus_one
    # The hardware's exponential loses log2 |x| bits; this polynomial keeps 1e-7 over the range.
    n = tl.where(x == x, tl.floor(x * 1.44269504 + 0.5), 0.0)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = 0.00138146 * r + 0.00836872
    p = p * r + 0.04166839
    p = p * r + 0.16666521
    p = p * r + 0.49999993
    q = p * (r * r) + r
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    value = (q + 1.0) * scale
    return value, tl.where(n == 0.0, q, value - 1.0)


@triton.jit
def log_ratio(logp, other):
    """log p - log q clamped to +-20, and where it was; a token the policy forbids is clamped for any q."""
    raw = tl.where(logp == float("-inf"), float("-inf"), logp - other)
    below = raw < -20.0
    above = raw > 20.0
    return tl.where(below, -20.0, tl.where(above, 20.0, raw)), below | above


@triton.jit
def kl_estimate(x, ESTIMATOR: tl.constexpr, WIDE: tl.constexpr):
    """An estimate of KL(policy || reference) from x = log p - log ref, and its derivative by x."""
    if ESTIMATOR == 0:
        k = x
        slope = x * 0.0 + 1.0
    elif ESTIMATOR == 1:
        k = 0.5 * x * x
        slope = x
    elif ESTIMATOR == 2:
        _, m = exp20(-x, WIDE)
        k = m + x
        slope = -m
    else:
        k = tl.abs(x)
        slope = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x * 0.0))
    return k, slope


@triton.jit
def row_of(
    token, start, cu_seqlens, rows, row_length, search_steps, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """The row of every token of the block that begins at `start`."""
    if PACKED:
        low = token * 0
        high = low + rows
        for _ in range(search_steps):  # cu_seqlens[low] <= token < cu_seqlens[high]
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle) <= token
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        return low
    # One 64-bit division a block; past the end of its first row 32 bits are enough.
    first = start // row_length
    left = tl.minimum((first + 1) * row_length - start, BLOCK).to(tl.int32)
    length = tl.minimum(row_length, BLOCK).to(tl.int32)
    beyond = tl.arange(0, BLOCK) - left
    return first + tl.where(beyond < 0, 0, 1 + tl.maximum(beyond, 0) // length).to(tl.int64)


@triton.jit
def load_wide(array, at, live, on, WIDE: tl.constexpr):
    """Selected by `on` after the load: a mask of single tokens in the load would forbid 16 bytes at a time."""
    return tl.where(on, tl.load(array + at, live, 0.0).to(WIDE), 0.0)


@triton.jit
def bounds_of(row, cu_seqlens, tokens, row_length, PACKED: tl.constexpr):
    """A row's first token and the one behind its last; cu_seqlens on a device is unchecked, so not trusted."""
    if PACKED:
        begin = tl.maximum(tl.load(cu_seqlens + row).to(tl.int64), 0)
        return begin, tl.minimum(tl.load(cu_seqlens + row + 1).to(tl.int64), tokens)
    return row * row_length, tl.minimum((row + 1) * row_length, tokens)


@triton.jit
def count_kernel(mask, cu_seqlens, counts, tokens, unit, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Counting tokens of every row, or of every `unit` tokens."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = bounds_of(row, cu_seqlens, tokens, unit, PACKED)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        total += (tl.load(mask + token, token < end, 0) != 0).to(tl.int32)
    tl.store(counts + row, tl.sum(total, 0).to(tl.int64))


@triton.jit
def weight_kernel(counts, weight, units, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """1 / number of tokens, or of rows that have any; 0 if there are none."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, units, BLOCK):
        at = first + tl.arange(0, BLOCK)
        n = tl.load(counts + at, at < units, 0)
        if SEQUENCES:
            n = (n > 0).to(tl.int64)
        total += n
    n = tl.sum(total, 0).to(tl.float64)
    tl.store(weight, tl.where(n > 0, 1.0 / tl.maximum(n, 1.0), 0.0))


class Layout(NamedTuple):
    """Which tokens count, and their rows: rows x row_length, or packed with cu_seqlens [rows + 1]."""

    mask: torch.Tensor
    cu_seqlens: torch.Tensor | None
    tokens: int
    rows: int
    row_length: int

    @classmethod
    def of(cls, x: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor | None) -> "Layout":
        mask = mask.contiguous()
        if cu_seqlens is not None:
            return cls(mask, cu_seqlens, x.numel(), cu_seqlens.shape[0] - 1, 1)
        rows = x.shape[0] if x.dim() == 2 else 1
        return cls(mask, None, x.numel(), rows, max(x.shape[-1], 1))

    def row_arguments(self) -> tuple[torch.Tensor, int, int, int]:
        """cu_seqlens, rows, row_length and the bisections that find one of `rows`."""
        bounds = self.mask if self.cu_seqlens is None else self.cu_seqlens
        return bounds, self.rows, self.row_length, max(self.rows - 1, 0).bit_length()

    def counts(self, by_row: bool) -> torch.Tensor:
        """Counting tokens of every row, or of every COUNT_UNIT tokens."""
        units = self.rows if by_row else triton.cdiv(self.tokens, COUNT_UNIT)
        packed = by_row and self.cu_seqlens is not None
        counts = torch.empty(units, dtype=torch.int64, device=self.mask.device)
        if units:
            count_kernel[(units,)](
                self.mask, self.cu_seqlens if packed else self.mask, counts, self.tokens,
                self.row_length if by_row else COUNT_UNIT, PACKED=packed, BLOCK=COUNT_BLOCK,
            )  # fmt: skip
        return counts


class TokenWeights(NamedTuple):
    """Weight of a counting token: `flat` ([1] float64), over the row's count where `counts` is given."""

    flat: torch.Tensor
    counts: torch.Tensor | None


def token_weights(
    layout: Layout, aggregation: int, denominator_tensor: torch.Tensor | None, denominator: float
) -> TokenWeights:
    """`aggregation` as csrc/policy_loss.h numbers it; a denominator replaces the number of tokens or rows."""
    by_row, sequences = aggregation == 1, aggregation in (1, 2)
    counted = denominator_tensor is None and denominator == 0
    counts = layout.counts(sequences) if counted or by_row else None
    flat = torch.empty(1, dtype=torch.float64, device=layout.mask.device)
    if denominator_tensor is not None:
        divisor = denominator_tensor.reshape(1).double()
        flat = torch.where(divisor > 0, 1 / divisor, float("nan"))
    elif counted and counts is not None:
        weight_kernel[(1,)](counts, flat, counts.shape[0], SEQUENCES=sequences, BLOCK=BLOCK)
    else:
        flat.fill_(1 / denominator)
    return TokenWeights(flat, counts if by_row else None)


def programs_of(tokens: int) -> tuple[int, int]:
    """(programs, blocks of each)."""
    steps = triton.cdiv(triton.cdiv(tokens, BLOCK), MAX_PROGRAMS)
    return triton.cdiv(tokens, BLOCK * max(steps, 1)), steps


def warps(dtype: torch.dtype) -> int:
    """4; a float64 takes two registers, so its block is spread over 16."""
    return 16 if dtype == torch.float64 else 4


def wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _variants() -> list[Variant]:
    signature = {"mask": "*i1", "counts": "*i64", "cu_seqlens": "*i32", "tokens": "i32", "unit": "i32"}
    totals = {"counts": "*i64", "weight": "*fp64", "units": "i32"}
    found = []
    for yes in (False, True):
        block = {"PACKED": yes, "BLOCK": COUNT_BLOCK}
        found.append(Variant(count_kernel, signature, block, divisible=("tokens", "unit")))
        found.append(Variant(weight_kernel, totals, {"SEQUENCES": yes, "BLOCK": BLOCK}))
    return found


VARIANTS = _variants()
