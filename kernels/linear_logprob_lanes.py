"""What the kernels of kernels/linear_logprob.py share: a row's logits from a tile, one block folded or weighed,
two folds merged; their arguments, and what the ahead-of-time build compiles.

Roofline: that file's; these functions are compiled into its kernels.
"""

from functools import cache
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from . import tuned
from .aot import TARGETS, Variant
from .logprob import _cap, _cap_slope, _difference

# Values that change from tile to tile or batch to batch; a kernel is compiled once for all of them. Vectors over
# rows begin anywhere in a batch's, so that their alignment says nothing either.
FREE = ("rows", "first", "blocks", "each")
ROW_VECTORS = ("ids", "temperatures", "state", "stats", "factor", "shift")
# Below this many rows the interpreter cuts them over programs, as a GPU does below two a multiprocessor.
INTERPRETED_FEW = 4


class LogitOptions(Protocol):
    """logit = scale * (tile + bias), capped unless softcap is 0, over temperature unless there is one a row."""

    @property
    def scale(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def softcap(self) -> float: ...


@triton.jit
def real(x, WIDE: tl.constexpr):
    """A float64 argument in the kernel's precision."""
    return tl.full([], x, tl.float64).to(WIDE)


@triton.jit
def temperature_of(temperatures, temperature, row, live, PER_ROW: tl.constexpr):
    """float64 [ROWS]."""
    if PER_ROW:
        return tl.load(temperatures + row, live, 1.0)
    return tl.zeros([row.shape[0]], tl.float64) + tl.full([], temperature, tl.float64)


@triton.jit
def logits(base, bias, column, columns, live, scale, BIASED: tl.constexpr, WIDE: tl.constexpr):
    """x [ROWS, BLOCK]; -inf, which adds nothing, outside the tile."""
    inside = live[:, None] & (column < columns)[None, :]
    x = tl.load(base[:, None] + column[None, :], inside, 0.0).to(WIDE)
    if BIASED:
        x += tl.load(bias + column, column < columns, 0.0).to(WIDE)[None, :]
    return tl.where(inside, x * scale, float("-inf"))


@triton.jit
def chosen_logit(base, bias, y, met, scale, BIASED: tl.constexpr, WIDE: tl.constexpr):
    """x of the chosen token [ROWS], where it is `met` in this tile."""
    x = tl.load(base + y, met, 0.0).to(WIDE)
    if BIASED:
        x += tl.load(bias + y, met, 0.0).to(WIDE)
    return x * scale


@triton.jit
def fold_block(u, high, low, MOMENT: tl.constexpr):
    """(largest, ties, rest, moment) of one block, each [ROWS]. Ties with the largest are counted apart: what a
    confident row adds to them would vanish beside 1. NaN is never the largest, and makes the rest NaN."""
    top = tl.max(tl.where(u == u, u, float("-inf")), 1)
    # Without an allowed token any finite reference gives exp(-inf) = 0.
    reference = tl.where(top == float("-inf"), 0.0, top)[:, None]
    d = _difference(u, reference, high[:, None], low[:, None])
    tie = u == reference
    e = tl.where(tie, 0.0, tl.exp(d))
    ties = tl.sum(tie.to(u.dtype), 1)
    rest = tl.sum(e, 1)
    moment = rest
    if MOMENT:
        moment = tl.sum(e * d, 1)
    return top, ties, rest, moment


@triton.jit
def merge(largest, ties, rest, moment, top, more_ties, more_rest, more_moment, inverse, MOMENT: tl.constexpr):
    """A fold and the next block's, in terms of the larger largest; float64 [ROWS]."""
    top = top.to(tl.float64)
    above = top > largest
    same = top == largest
    high = tl.where(above, top, largest)
    low = tl.where(above, largest, top)
    gap = (low - high) * inverse
    delta = tl.where(same | (low == float("-inf")), 0.0, tl.where(gap < -800.0, -800.0, gap))
    factor = tl.exp(delta)
    more_ties = more_ties.to(tl.float64)
    more_rest = more_rest.to(tl.float64)
    high_ties = tl.where(above, more_ties, ties)
    low_ties = tl.where(above, ties, more_ties)
    below = tl.where(same, 0.0, low_ties) + tl.where(above, rest, more_rest)
    if MOMENT:
        more_moment = more_moment.to(tl.float64)
        lower = tl.where(above, moment, more_moment) + delta * below
        moment = tl.where(above, more_moment, moment) + factor * lower
    ties = high_ties + tl.where(same, low_ties, 0.0)
    rest = tl.where(above, more_rest, rest) + factor * below
    return high, ties, rest, moment


@triton.jit
def load_state(state, row, live):
    at = state + row * 5
    return (
        tl.load(at, live, 0.0),
        tl.load(at + 1, live, 0.0),
        tl.load(at + 2, live, 0.0),
        tl.load(at + 3, live, 0.0),
    )


@triton.jit
def store_state(state, row, live, largest, ties, rest, moment, chosen, met, MOMENT: tl.constexpr):
    at = state + row * 5
    tl.store(at, largest, live)
    tl.store(at + 1, ties, live)
    tl.store(at + 2, rest, live)
    if MOMENT:
        tl.store(at + 3, moment, live)
    tl.store(at + 4, chosen.to(tl.float64), met)


@triton.jit
def store_change(factor, shift, row, live, before, now, inverse):
    """What earlier sums are multiplied by, and what their d is raised by: 0 where there was nothing before."""
    gap = (before - now) * inverse
    none = (before == float("-inf")) | (before == now)
    raised = tl.where(none, 0.0, tl.where(gap < -800.0, -800.0, gap))
    tl.store(factor + row, tl.exp(raised).to(factor.dtype.element_ty), live)
    tl.store(shift + row, raised.to(shift.dtype.element_ty), live)


@triton.jit
def weigh_block(
    x, largest, high, low, y, softcap, column, columns, row, live, weights, weights_stride, weighted,
    weighted_stride, CAPPED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write exp(d) du/dx, 0 for the chosen token, and the same times d."""
    u = x
    if CAPPED:
        u = _cap(x, softcap, x.dtype)
    reference = tl.where(largest == float("-inf"), 0.0, largest).to(x.dtype)
    d = _difference(u, reference[:, None], high[:, None], low[:, None])
    w = tl.exp(d)
    if CAPPED:
        w *= _cap_slope(x, softcap)
    w = tl.where(column[None, :] == y[:, None], 0.0, w)
    inside = live[:, None] & (column < columns)[None, :]
    out = weights + (row * weights_stride)[:, None] + column[None, :]
    tl.store(out, w.to(weights.dtype.element_ty), inside)
    if WEIGHTED:
        out = weighted + (row * weighted_stride)[:, None] + column[None, :]
        tl.store(out, (w * d).to(weighted.dtype.element_ty), inside)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0; near 0 the errors of e and log(e) cancel (Kahan)."""
    e = tl.exp(x)
    near = (e > 0.5) & (e != 1.0)
    return tl.where(near, (e - 1.0) * (x / tl.log(tl.where(near, e, 2.0))), tl.where(e == 1.0, x, e - 1.0))


@triton.jit
def turn_chosen(d, log_sum, entropy, g, h):
    """d (g logp + h H) / d z of the chosen token in float64; 1 - p = -expm1(logp) does not cancel near p = 1."""
    logp = d - log_sum
    logp = tl.where(logp > 0.0, 0.0, logp)
    forbidden = logp == float("-inf")
    inner = tl.where(forbidden, 0.0, tl.exp(logp) * (tl.where(forbidden, 0.0, logp) + entropy))
    return tl.where(forbidden, 0.0, -g * expm1(logp) - h * inner)


@cache
def few(device: torch.device) -> int:
    """Fewer rows than this leave multiprocessors idle, unless a row is cut over programs."""
    if device.type != "cuda":
        return INTERPRETED_FEW
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def arguments_of(
    z: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, temperatures: torch.Tensor | None, first: int,
    options: LogitOptions,
) -> dict[str, Any]:  # fmt: skip
    """By name, what every kernel over a tile takes; one that is None is never read and gets some other pointer."""
    return {
        "z": z, "bias": z if bias is None else bias, "ids": ids,
        "temperatures": ids if temperatures is None else temperatures,
        "rows": z.shape[0], "columns": z.shape[1], "stride": z.stride(0), "first": first,
        "scale": options.scale, "temperature": options.temperature, "softcap": options.softcap,
        "BIASED": bias is not None, "PER_ROW": temperatures is not None, "CAPPED": options.softcap > 0,
        "WIDE": tl.float64 if z.dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int) -> None:
    """A kernel takes those arguments that it names."""
    kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, num_warps=num_warps)


# What the kernels over a tile may name beside its own dtypes; EVEN as where every load is of 16 bytes.
POINTERS = {"ids": "*i64", "temperatures": "*fp64", "state": "*fp64", "stats": "*fp64"}
REALS = ("scale", "temperature", "softcap")
EVEN = ("columns", "stride", "weights_stride", "weighted_stride", "out_stride")
# (tile, result): the GEMM's float32 accumulators for a bfloat16 or a float32 GEMM, and tiles in place.
DTYPES = (("*fp32", "*bf16"), ("*bf16", "*bf16"), ("*fp32", "*fp32"), ("*fp64", "*fp64"))


def variants_of(name: str, kernel: Any, num_warps: int | None = None, **constants: Any) -> list[Variant]:
    """A kernel as it is launched on full blocks with every device's options, plain and with everything on."""
    return [
        _variant(name, kernel, num_warps, capability, *dtypes, full, constants)
        for capability in TARGETS
        for dtypes in DTYPES
        for full in (False, True)
    ]


def _variant(
    name: str, kernel: Any, num_warps: int | None, capability: int, tile: str, result: str, full: bool,
    constants: dict[str, Any],
) -> Variant:  # fmt: skip
    tuning = tuned.of_capability(name, capability)
    double = tile == "*fp64"
    signature = POINTERS | dict.fromkeys((*FREE, *EVEN), "i32") | dict.fromkeys(REALS, "fp64")
    signature |= dict.fromkeys(("z", "bias"), tile)
    signature |= dict.fromkeys(("weights", "weighted", "out"), result)
    signature |= dict.fromkeys(("factor", "shift", "parts"), "*fp64" if double else "*fp32")
    flags = dict.fromkeys(("BIASED", "PER_ROW", "CAPPED", "MOMENT", "WEIGHTED"), full)
    shape = {
        "WIDE": tl.float64 if double else tl.float32,
        "ROWS": 1,
        "BLOCK": tuning["BLOCK"] // (2 if double else 1),
    }
    return Variant(
        kernel,
        {k: v for k, v in signature.items() if k in kernel.arg_names},
        {k: v for k, v in (flags | shape | constants).items() if k in kernel.arg_names},
        num_warps=num_warps or tuning["num_warps"],
        divisible=tuple(n for n in EVEN if n in kernel.arg_names),
        targets=(capability,),
    )


VARIANTS: list[Variant] = []
