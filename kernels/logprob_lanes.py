"""What the log-prob kernels share: the cap, differences to the largest logit, rows and their chosen tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from .aot import Variant

# Tokens of a row taken at a time, and row-token pairs in a program of the kernels that work once a row: one warp,
# since they wait for scattered reads and want many programs.
MAX_TOKENS = 16
ROW_BLOCK = 32
# Runtime integers that change with the batch: 64 bits wide and without a variant for 1 or for multiples of 16, so
# that no number of rows or sequence length compiles anything.
FREE = ("rows", "tokens", "inner", "outer_stride", "stride")
FREE_OUT = (*FREE, "out_inner", "out_outer_stride", "out_stride")
# Arrays with a number for each row or token: a slice may begin anywhere, and wide loads would gain nothing.
UNALIGNED = ("ids", "repeats", "mask", "temperatures", "floors", "d_logp", "d_entropy")


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
def _row_base(row, inner, outer_stride, stride, ALIGNED: tl.constexpr):
    """Where rows begin; ALIGNED: at multiples of 16 elements, which allows 16-byte loads."""
    base = (row // inner) * outer_stride + (row % inner) * stride
    return tl.multiple_of(base, 16) if ALIGNED else base


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation: what rounding lost is put back as in _log1p (Kahan)."""
    e = tl.exp(x)
    same, gone = e == 1.0, e == 0.0
    slope = x / tl.log(tl.where(same | gone, 0.5, e))
    return tl.where(same, x, tl.where(gone, -1.0, (e - 1.0) * slope))


@triton.jit
def _chosen(base, ids, row, k, tokens, counts, vocab):
    """Ids [ROWS, TOKENS] of tokens k, where they may be read, and their logits (+inf elsewhere)."""
    inside = counts[:, None] & (k < tokens)[None, :]
    y = tl.load(ids + (row * tokens)[:, None] + k[None, :], inside, 0).to(tl.int64)
    valid = inside & (y >= 0) & (y < vocab)
    return y, valid, tl.load(base[:, None] + y, valid, float("inf"))


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _split(x: float) -> tuple[float, float, float]:
    """Three float32 numbers whose sum is the float64 one: Triton passes Python floats as float32."""
    high = float(np.float32(x))
    middle = float(np.float32(x - high))
    return high, middle, float(np.float32(x - high - middle))


def _tile(vocab: int, most: int) -> dict[str, int]:
    """Several rows of a small vocabulary share a program. By vocabulary alone, so that a row's result does not
    depend on the batch."""
    block = min(most, triton.next_power_of_2(max(vocab, 16)))
    return {"ROWS": most // block, "BLOCK": block}


def _row_tile(tokens: int) -> dict[str, int]:
    """For kernels that work once a row."""
    found = min(MAX_TOKENS, triton.next_power_of_2(max(tokens, 1)))
    return {"ROWS": ROW_BLOCK // found, "TOKENS": found}


def _aligned(*strides: int) -> bool:
    return all(stride % 16 == 0 for stride in strides)


def signature(dtype: str) -> dict[str, str]:
    """Types of every argument that a kernel may have, by name, for logits of one dtype ("*bf16")."""
    scalars = dict.fromkeys(FREE_OUT, "i64") | {"vocab": "i32"}
    scalars |= dict.fromkeys(("t_high", "t_middle", "t_low", "cap_high", "cap_middle", "cap_low"), "fp32")
    names = "temperatures floors logp_out entropy_out entropy_in stats sums d_logp d_entropy slopes gradients"
    pointers = {"ids": "*i64", "mask": "*i1", "repeats": "*i1"} | dict.fromkeys(names.split(), "*fp32")
    return pointers | scalars | {"logits": dtype, "d_logits": dtype}


def variants(kernel: Any, tiles: Sequence[Mapping[str, int]], num_warps: int) -> list[Variant]:
    """A kernel in float32 and bfloat16, plain in the first tile and with everything on in the second."""
    found = []
    for dtype in ("*fp32", "*bf16"):
        for full, tile in zip((False, True), tiles, strict=True):
            switches = ("MASKED", "PER_ROW", "CAPPED", "FLOORED", "ENTROPY", "HAS_ENTROPY")
            known = dict.fromkeys(switches, full) | {"HAS_LOGP": True, "ALIGNED": True, "WIDE": tl.float32}
            known |= tile
            types = {n: t for n, t in signature(dtype).items() if n in kernel.arg_names}
            constants = {n: known[n] for n in kernel.arg_names if n in known}
            found.append(Variant(kernel, types, constants, num_warps=num_warps, divisible=("vocab",)))
    return found


VARIANTS: list[Variant] = []
