"""What happens to a tile of logits between two GEMMs: folded into a few numbers a row, and turned into what the
next GEMM multiplies. The contract is csrc/linear_logprob.h's, on one device's tensors.

    x_j = scale (tile_j + bias_j)      u_j = softcap tanh(x_j / softcap), or x_j      d_j = (u_j - largest) / T
    fold    (largest, ties, rest, moment, chosen) <- tile;   weights_j = exp(d_j) du_j/dx_j,  weighted_j = weights_j d_j
    turn    tile_j <- d (g logp + h H) / d tile_j
    rescale U <- factor U,  Q <- factor (Q + shift U)

Roofline, per logit of e bytes in and o bytes out: e read from memory once, the second sweep over a row finds it in
the cache that the first filled, o written a result; at 3 TB/s float32 in and bfloat16 out take 2 ps, and the GEMM of
2 D flops beside it at 800 TFLOP/s takes 10 ps at D = 4096. One or two exponentials a logit, 16 a clock and
multiprocessor, take 0.3 ps each, and the merges' float64, one of a few dozen operations a warp and block, less.

A row is cut into blocks of BLOCK columns, each folded on its own and merged in the vocabulary's order in float64, by
one program or by many: no bit of a row depends on the other rows, on their number, or on where the vocabulary is cut
into tiles of whole blocks. The tiles' row strides must then be alike in being multiples of 16 or not, since a thread's
share of a load, hence the order of a block's sum, follows from that.
"""

from functools import cache
from typing import Protocol

import torch
import triton
import triton.language as tl

from . import tuned
from .aot import TARGETS, Variant
from .linear_logprob_lanes import (
    chosen_logit,
    expm1,
    fold_block,
    load_state,
    logits,
    merge,
    real,
    store_change,
    store_state,
    temperature_of,
    weigh_block,
)
from .logprob import _cap, _cap_slope, _difference, _inverse

# Doubles of a row's state: largest u, how many equal it, sum of exp(d_j) of the others, moment, chosen u.
STATE = 5
# Below this many rows the interpreter cuts them over programs, as a GPU does below two a multiprocessor.
INTERPRETED_FEW = 4
# Values that change from one tile or batch to the next; a kernel is compiled once for all of them. Row vectors may
# begin anywhere in a batch's, so their alignment says nothing either.
FREE = ("rows", "first", "blocks")
ROW_VECTORS = ("ids", "temperatures", "state", "stats", "factor", "shift")


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=ROW_VECTORS)
def fold_kernel(
    z, bias, ids, temperatures, state, factor, shift, weights, weighted, rows, columns, first, stride,
    weights_stride, weighted_stride, scale: tl.float64, temperature: tl.float64, softcap: tl.float64,
    BIASED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, MOMENT: tl.constexpr,
    WEIGHTS: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    t = temperature_of(temperatures, temperature, row, live, PER_ROW)
    inverse = 1.0 / t
    high, low = _inverse(t, WIDE)
    factor_x = real(scale, WIDE)
    cap = real(softcap, WIDE)
    base = z + row * stride
    y = tl.load(ids + row, live, -1) - first
    met = live & (y >= 0) & (y < columns)
    chosen = chosen_logit(base, bias, y, met, factor_x, BIASED, WIDE)
    if CAPPED:
        chosen = _cap(chosen, cap, WIDE)
    largest, ties, rest, moment = load_state(state, row, live)
    before = largest
    blocks = tl.cdiv(columns, BLOCK)
    for k in range(blocks):
        column = k * BLOCK + tl.arange(0, BLOCK)
        u = logits(base, bias, column, columns, live, factor_x, BIASED, WIDE)
        if CAPPED:
            u = _cap(u, cap, WIDE)
        a, b, c, e = fold_block(u, high, low, MOMENT)
        largest, ties, rest, moment = merge(largest, ties, rest, moment, a, b, c, e, inverse, MOMENT)
    store_state(state, row, live, largest, ties, rest, moment, chosen, met, MOMENT)
    if WEIGHTS:
        store_change(factor, shift, row, live, before, largest, inverse)
        # In place, no thread may write a chosen logit that another has still to read.
        tl.debug_barrier()
        # From the end: what was read last is still in the nearest cache.
        for k in range(blocks):
            column = (blocks - 1 - k) * BLOCK + tl.arange(0, BLOCK)
            x = logits(base, bias, column, columns, live, factor_x, BIASED, WIDE)
            weigh_block(
                x, largest, high, low, y, cap, column, columns, row, live, weights, weights_stride, weighted,
                weighted_stride, CAPPED, WEIGHTED,
            )  # fmt: skip


# Few rows: a program a block, then a program a row for the merge, then a program a block for the weights.
@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=ROW_VECTORS)
def part_kernel(
    z, bias, temperatures, parts, columns, blocks, stride, scale: tl.float64, temperature: tl.float64,
    softcap: tl.float64, BIASED: tl.constexpr, PER_ROW: tl.constexpr, CAPPED: tl.constexpr, MOMENT: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1).to(tl.int64)
    live = row >= 0
    block = tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    high, low = _inverse(temperature_of(temperatures, temperature, row, live, PER_ROW), WIDE)
    u = logits(z + row * stride, bias, column, columns, live, real(scale, WIDE), BIASED, WIDE)
    if CAPPED:
        u = _cap(u, real(softcap, WIDE), WIDE)
    largest, ties, rest, moment = fold_block(u, high, low, MOMENT)
    at = parts + (row * blocks + block) * 4
    tl.store(at, largest)
    tl.store(at + 1, ties)
    tl.store(at + 2, rest)
    tl.store(at + 3, moment)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=ROW_VECTORS)
def merge_kernel(
    z, bias, ids, temperatures, state, factor, shift, parts, columns, blocks, first, stride, scale: tl.float64,
    temperature: tl.float64, softcap: tl.float64, BIASED: tl.constexpr, PER_ROW: tl.constexpr,
    CAPPED: tl.constexpr, MOMENT: tl.constexpr, WEIGHTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1).to(tl.int64)
    live = row >= 0
    inverse = 1.0 / temperature_of(temperatures, temperature, row, live, PER_ROW)
    y = tl.load(ids + row) - first
    met = (y >= 0) & (y < columns)
    chosen = chosen_logit(z + row * stride, bias, y, met, real(scale, WIDE), BIASED, WIDE)
    if CAPPED:
        chosen = _cap(chosen, real(softcap, WIDE), WIDE)
    largest, ties, rest, moment = load_state(state, row, live)
    before = largest
    at = parts + row * blocks * 4
    for k in range(blocks):
        a, b, c, e = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        largest, ties, rest, moment = merge(largest, ties, rest, moment, a, b, c, e, inverse, MOMENT)
        at += 4
    store_state(state, row, live, largest, ties, rest, moment, chosen, met, MOMENT)
    if WEIGHTS:
        store_change(factor, shift, row, live, before, largest, inverse)


@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=ROW_VECTORS)
def weigh_kernel(
    z, bias, ids, temperatures, state, weights, weighted, columns, first, stride, weights_stride, weighted_stride,
    scale: tl.float64, temperature: tl.float64, softcap: tl.float64, BIASED: tl.constexpr, PER_ROW: tl.constexpr,
    CAPPED: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1).to(tl.int64)
    live = row >= 0
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    high, low = _inverse(temperature_of(temperatures, temperature, row, live, PER_ROW), WIDE)
    x = logits(z + row * stride, bias, column, columns, live, real(scale, WIDE), BIASED, WIDE)
    weigh_block(
        x, tl.load(state + row * 5), high, low, tl.load(ids + row) - first, real(softcap, WIDE), column, columns,
        row, live, weights, weights_stride, weighted, weighted_stride, CAPPED, WEIGHTED,
    )  # fmt: skip


# d logp / d z_j = [j = y] - p_j,  d H / d z_j = -p_j (log p_j + H),  d z / d tile = du/dx scale / T: but for the
# chosen token, exp(d_j) (a + b d_j) du/dx with a = (h (log_sum - H) - g) scale / (sum T), b = -h scale / (sum T).
@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=ROW_VECTORS)
def turn_kernel(
    z, bias, ids, temperatures, stats, out, rows, columns, first, stride, out_stride, scale: tl.float64,
    temperature: tl.float64, softcap: tl.float64, BIASED: tl.constexpr, PER_ROW: tl.constexpr,
    CAPPED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = row < rows
    at = stats + row * 5
    largest = tl.load(at, live, 0.0)
    log_sum = tl.load(at + 1, live, 0.0)
    entropy = tl.load(at + 2, live, 0.0)
    g = tl.load(at + 3, live, 0.0)
    h = tl.load(at + 4, live, 0.0)
    # The other rows are neither read nor computed: they become 0.
    used = live & (log_sum != float("-inf")) & ((g != 0.0) | (h != 0.0))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    log_sum = tl.where(used, log_sum, 0.0)
    t = temperature_of(temperatures, temperature, row, live, PER_ROW)
    high, low = _inverse(t, WIDE)
    unit = tl.full([], scale, tl.float64) / t
    share = tl.exp(-log_sum) * unit
    a = ((h * (log_sum - entropy) - g) * share).to(WIDE)
    b = (-h * share).to(WIDE)

    # The chosen token in float64, and 1 - p as -expm1(logp), which does not cancel where p is near 1.
    base = z + row * stride
    y = tl.load(ids + row, live, -1) - first
    met = used & (y >= 0) & (y < columns)
    x_y = chosen_logit(base, bias, y, met, real(scale, WIDE), BIASED, WIDE)
    u_y = x_y
    if CAPPED:
        u_y = _cap(x_y, real(softcap, WIDE), WIDE)
    logp = (u_y.to(tl.float64) - largest) / t - log_sum
    logp = tl.where(logp > 0.0, 0.0, logp)
    forbidden = u_y == float("-inf")
    h_term = tl.where(forbidden, 0.0, h * tl.exp(logp) * (tl.where(forbidden, 0.0, logp) + entropy))
    chosen = tl.where(forbidden, 0.0, (-g * expm1(logp) - h_term) * unit)
    if CAPPED:
        chosen *= _cap_slope(x_y.to(tl.float64), tl.full([], softcap, tl.float64))

    x = logits(base, bias, column, columns, used, real(scale, WIDE), BIASED, WIDE)
    u = x
    if CAPPED:
        u = _cap(x, real(softcap, WIDE), WIDE)
    d = _difference(u, largest.to(WIDE)[:, None], high[:, None], low[:, None])
    value = tl.exp(d) * (a[:, None] + b[:, None] * d)
    if CAPPED:
        value *= _cap_slope(x, real(softcap, WIDE))
    value = tl.where(column[None, :] == y[:, None], chosen.to(WIDE)[:, None], value)
    value = tl.where(used[:, None], value, 0.0)
    # In place, no thread may write a chosen logit that another has still to read.
    tl.debug_barrier()
    to = out + (row * out_stride)[:, None] + column[None, :]
    tl.store(to, value.to(out.dtype.element_ty), live[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize_on_alignment=ROW_VECTORS)
def rescale_kernel(U, Q, factor, shift, dim, HAS_Q: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.load(factor + row)
    s = tl.load(shift + row)
    moved = f != 1.0
    if HAS_Q:
        moved = moved | (s != 0.0)
    if moved:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = row * dim + column
        u = tl.load(U + at, column < dim, 0.0)
        if HAS_Q:
            q = tl.load(Q + at, column < dim, 0.0)
            tl.store(Q + at, f * (q + s * u), column < dim)
        tl.store(U + at, f * u, column < dim)


class LogitOptions(Protocol):
    """logit = scale * (tile + bias), capped where softcap is not 0, over temperature unless there is one a row."""

    @property
    def scale(self) -> float: ...
    @property
    def temperature(self) -> float: ...
    @property
    def softcap(self) -> float: ...


Tensor = torch.Tensor
Maybe = torch.Tensor | None


def fold_unit(device: torch.device) -> int:
    """Columns that are folded as one: no bit depends on the cut into tiles whose widths are multiples of it."""
    return tuned.options("linear_logprob.fold", device)["BLOCK"]


def fold_tile(
    z: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, first: int, options: LogitOptions, state: Tensor,
    moment: bool, factor: Maybe = None, shift: Maybe = None, weights: Maybe = None, weighted: Maybe = None,
) -> None:  # fmt: skip
    """Fold a tile's columns into its rows' state, and write the weights of the next GEMM.

    Args:
        z: [n, c] float, the GEMM's result; unit stride inside a row, as all tiles here.
        bias: [c] float or None. ids: [n] int64, chosen token counted from the vocabulary's start; one outside
            [first, first + c) stands in another tile. temperatures: [n] float64 or None.
        first: vocabulary index of column 0, a multiple of `fold_unit`.
        state: [n, 5] float64 contiguous: largest u (-inf at first), ties, rest, moment, chosen u (-inf until met).
        moment: whether the fourth is wanted; it is left alone otherwise.
        factor, shift: [n], both or neither, float32 or float64; what sums over earlier tiles must be multiplied by,
            and what their d must be raised by. With them the weights are written:
        weights: [n, c] any float dtype; None: over z. weighted: [n, c], weights times d, or None.
    """
    rows, columns = z.shape
    if rows == 0:
        return
    tuning = tuned.options("linear_logprob.fold", z.device)
    ROWS, BLOCK = _tile(columns, first, tuning["BLOCK"])
    out, blocks = (z if weights is None else weights), triton.cdiv(columns, BLOCK)
    other = out if weighted is None else weighted
    numbers, common = _options(options), _common(z, bias, temperatures, options)
    wanted = {"MOMENT": moment, "WEIGHTS": factor is not None}
    row_vectors = [ids, _or(temperatures, state), state, _or(factor, state), _or(shift, state)]
    out_strides, warps = (out.stride(0), other.stride(0)), tuning["num_warps"]
    if blocks == 1 or rows >= _few(z.device):
        fold_kernel[(triton.cdiv(rows, ROWS),)](
            z, _or(bias, z), *row_vectors, out, other, rows, columns, first, z.stride(0), *out_strides, *numbers,
            **common, **wanted, WEIGHTED=weighted is not None, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps,
        )  # fmt: skip
        return
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    parts = torch.empty(rows, blocks, 4, dtype=wide, device=z.device)
    part_kernel[(rows, blocks)](
        z, _or(bias, z), row_vectors[1], parts, columns, blocks, z.stride(0), *numbers, **common, MOMENT=moment,
        BLOCK=BLOCK, num_warps=warps,
    )  # fmt: skip
    merge_kernel[(rows,)](
        z, _or(bias, z), *row_vectors, parts, columns, blocks, first, z.stride(0), *numbers, **common, **wanted,
        num_warps=1,
    )  # fmt: skip
    if factor is not None:
        weigh_kernel[(rows, blocks)](
            z, _or(bias, z), *row_vectors[:3], out, other, columns, first, z.stride(0), *out_strides, *numbers,
            **common, WEIGHTED=weighted is not None, BLOCK=BLOCK, num_warps=warps,
        )  # fmt: skip


def turn_tile(
    z: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, first: int, options: LogitOptions, stats: Tensor,
    out: Maybe = None,
) -> None:  # fmt: skip
    """Write the gradient of g logp + h H with respect to tile + bias to `out` ([n, c] any float dtype; None: over z).

    Args: as `fold_tile`'s, and
        stats: [n, 5] float64 contiguous: largest u, log of the sum of exp(d_j), H, g, h. Rows with g = h = 0, or
            without an allowed token (log sum -inf), become 0 and are not read.
    """
    rows, columns = z.shape
    if rows == 0 or columns == 0:
        return
    tuning = tuned.options("linear_logprob.turn", z.device)
    ROWS, BLOCK = _tile(columns, 0, tuning["BLOCK"])
    to = z if out is None else out
    turn_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(columns, BLOCK))](
        z, _or(bias, z), ids, _or(temperatures, stats), stats, to, rows, columns, first, z.stride(0), to.stride(0),
        *_options(options), **_common(z, bias, temperatures, options), ROWS=ROWS, BLOCK=BLOCK,
        num_warps=tuning["num_warps"],
    )  # fmt: skip


def rescale(U: Tensor, Q: Maybe, factor: Tensor, shift: Tensor) -> None:
    """U <- factor U and Q <- factor (Q + shift U), in place, [n, D] contiguous, dtype of factor and shift [n].

    One pass; a row whose largest logit has not changed (factor 1, shift 0) is neither read nor written.
    """
    rows, dim = U.shape
    if rows == 0 or dim == 0:
        return
    tuning = tuned.options("linear_logprob.rescale", U.device)
    BLOCK = min(tuning["BLOCK"], triton.next_power_of_2(max(dim, 16)))
    rescale_kernel[(rows, triton.cdiv(dim, BLOCK))](
        U, _or(Q, U), factor, shift, dim, HAS_Q=Q is not None, BLOCK=BLOCK, num_warps=tuning["num_warps"]
    )


def _tile(columns: int, first: int, block: int) -> tuple[int, int]:
    """(ROWS, BLOCK): rows of a small vocabulary share a program. The last tile of a large one keeps its block, so
    that the order of its sums is that of one wide tile."""
    own = block if first else min(block, triton.next_power_of_2(max(columns, 16)))
    return block // own, own


@cache
def _few(device: torch.device) -> int:
    """Fewer rows than this leave multiprocessors idle, unless a row is cut over programs."""
    if device.type != "cuda":
        return INTERPRETED_FEW
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _or(x: Maybe, unread: Tensor) -> Tensor:
    """x; a kernel that does not read it gets some other pointer."""
    return unread if x is None else x


def _options(options: LogitOptions) -> tuple[float, float, float]:
    return options.scale, options.temperature, options.softcap


def _common(z: Tensor, bias: Maybe, temperatures: Maybe, options: LogitOptions) -> dict:
    return {
        "BIASED": bias is not None, "PER_ROW": temperatures is not None, "CAPPED": options.softcap > 0,
        "WIDE": tl.float64 if z.dtype == torch.float64 else tl.float32,
    }  # fmt: skip
