"""What happens to a tile of logits between two GEMMs: folded into a few numbers a row, and turned into what the
next GEMM multiplies. The contract is csrc/linear_logprob.h's, on one device's tensors.

    x_j = scale (tile_j + bias_j)   u_j = softcap tanh(x_j / softcap), or x_j   d_j = (u_j - largest) / T
    fold     (largest, ties, rest, moment, chosen) <- tile
             weights_j = exp(d_j) du_j/dx_j, 0 for the chosen token;  weighted_j = weights_j d_j
    turn     tile_j <- d (g logp + h H) / d tile_j
    rescale  U <- factor U,  Q <- factor (Q + shift U)

Roofline, per logit of e bytes in and o bytes out: e read from memory once, since the second sweep over a row
finds it in the cache that the first filled, and o written a result: 2 ps of 3 TB/s for float32 in and bfloat16
out. The GEMM of 2 D flops beside it takes 10 ps of 800 TFLOP/s at D = 4096. An exponential takes 0.3 ps at 16 a
clock and multiprocessor, one a sweep, with a softcap two or three; the float64 instructions of a merge, some 35 a
warp, come to as much again over a block of 2048.

A row is cut into blocks, each folded on its own and merged in the vocabulary's order in float64, by one program or
by many: no bit of a row depends on the other rows, on their number, or on where the vocabulary is cut into tiles
of whole blocks. (The order of a block's sum follows from a thread's share of a load, which is the same for all
tiles whose row strides are multiples of 16.)

Options in kernels/tuned.json: 2048 columns over 8 warps are 8 a thread, two 16-byte loads in float32 and one in
bfloat16, in 40 to 60 registers, so that four to six programs share a multiprocessor. The 8 KiB that each has in
flight in float32 cover the 20 KiB that 3.3 TB/s over 132 multiprocessors take at a latency of 0.8 microseconds.
With
16 a thread the capped kernels hold half as many programs and some spill.
"""

import torch
import triton
import triton.language as tl

from . import tuned
from .aot import TARGETS, Variant
from .linear_logprob_few import fold_few
from .linear_logprob_lanes import (
    FREE,
    ROW_VECTORS,
    LogitOptions,
    arguments_of,
    chosen_logit,
    few,
    fold_block,
    launch,
    load_state,
    logits,
    merge,
    real,
    store_change,
    store_state,
    temperature_of,
    turn_chosen,
    variants_of,
    weigh_block,
)
from .logprob import _cap, _cap_slope, _difference, _inverse

Tensor = torch.Tensor
Maybe = torch.Tensor | None


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
    # No thread may write a state, or in place a chosen logit, that another has still to read.
    tl.debug_barrier()
    store_state(state, row, live, largest, ties, rest, moment, chosen, met, MOMENT)
    if WEIGHTS:
        store_change(factor, shift, row, live, before, largest, inverse)
        # From the end: what was read last is still in the nearest cache. In blocks of another shape: the compiler
        # gives loads and stores of one shape one layout, so that the weights' dtype would reorder the sums above.
        HALF: tl.constexpr = BLOCK // 2
        halves = tl.cdiv(columns, HALF)
        for k in range(halves):
            column = (halves - 1 - k) * HALF + tl.arange(0, HALF)
            x = logits(base, bias, column, columns, live, factor_x, BIASED, WIDE)
            weigh_block(
                x, largest, high, low, y, cap, column, columns, row, live, weights, weights_stride, weighted,
                weighted_stride, CAPPED, WEIGHTED,
            )  # fmt: skip


# d logp / d z_j = [j = y] - p_j,  d H / d z_j = -p_j (log p_j + H),  d z / d tile = du/dx scale / T: but for the
# chosen token, exp(d_j) (a + b d_j) du/dx with a = (h (log_sum - H) - g) scale / (sum T), b = -h scale / (sum T).
@triton.jit(do_not_specialize=FREE, do_not_specialize_on_alignment=ROW_VECTORS)
def turn_kernel(
    z, bias, ids, temperatures, stats, out, rows, columns, each, first, stride, out_stride, scale: tl.float64,
    temperature: tl.float64, softcap: tl.float64, BIASED: tl.constexpr, PER_ROW: tl.constexpr,
    CAPPED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = row < rows
    at = stats + row * 5
    largest, log_sum = tl.load(at, live, 0.0), tl.load(at + 1, live, 0.0)
    entropy, g, h = tl.load(at + 2, live, 0.0), tl.load(at + 3, live, 0.0), tl.load(at + 4, live, 0.0)
    # The other rows are not read and become 0.
    used = live & (log_sum != float("-inf")) & ((g != 0.0) | (h != 0.0))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    log_sum = tl.where(used, log_sum, 0.0)
    t = temperature_of(temperatures, temperature, row, live, PER_ROW)
    high, low = _inverse(t, WIDE)
    unit = tl.full([], scale, tl.float64) / t
    share = tl.exp(-log_sum) * unit
    a = ((h * (log_sum - entropy) - g) * share).to(WIDE)[:, None]
    b = (-h * share).to(WIDE)[:, None]

    factor_x = real(scale, WIDE)
    cap = real(softcap, WIDE)
    base = z + row * stride
    y = tl.load(ids + row, live, -1) - first
    x_y = chosen_logit(base, bias, y, used & (y >= 0) & (y < columns), factor_x, BIASED, WIDE)
    u_y = x_y
    if CAPPED:
        u_y = _cap(x_y, cap, WIDE)
    chosen = unit * turn_chosen((u_y.to(tl.float64) - largest) * (1.0 / t), log_sum, entropy, g, h)
    if CAPPED:
        chosen *= _cap_slope(x_y.to(tl.float64), tl.full([], softcap, tl.float64))
    reference = largest.to(WIDE)[:, None]
    # In place, no thread may write a chosen logit that another has still to read.
    tl.debug_barrier()
    begin = tl.program_id(1) * each
    for k in range(begin, tl.minimum(begin + each, tl.cdiv(columns, BLOCK))):
        column = k * BLOCK + tl.arange(0, BLOCK)
        x = logits(base, bias, column, columns, used, factor_x, BIASED, WIDE)
        u = x
        if CAPPED:
            u = _cap(x, cap, WIDE)
        d = _difference(u, reference, high[:, None], low[:, None])
        value = tl.exp(d) * (a + b * d)
        if CAPPED:
            value *= _cap_slope(x, cap)
        value = tl.where(column[None, :] == y[:, None], chosen.to(WIDE)[:, None], value)
        value = tl.where(used[:, None], value, 0.0)
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


def fold_unit(device: torch.device) -> int:
    """Columns that are folded as one: no bit depends on the cut into tiles whose widths are multiples of it."""
    return tuned.options("linear_logprob.fold", device)["BLOCK"]


def fold_tile(
    z: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, first: int, options: LogitOptions, state: Tensor,
    moment: bool, factor: Maybe = None, shift: Maybe = None, weights: Maybe = None, weighted: Maybe = None,
) -> None:  # fmt: skip
    """Fold a tile's columns into its rows' state, and write what the next GEMM multiplies.

    Args:
        z: [n, c] float, the GEMM's result; unit stride inside a row, as all [n, c] here.
        bias: [c] float or None. ids: [n] int64, chosen token counted from the vocabulary's start; one outside
            [first, first + c) stands in another tile. temperatures: [n] float64 or None.
        first: vocabulary index of column 0, a multiple of `fold_unit`.
        state: [n, 5] float64 contiguous: largest u (-inf at first), ties, rest, moment, chosen u (-inf until met).
        moment: whether the fourth is wanted; it is left alone otherwise.
        factor, shift: [n], both or neither, float32 (float64 for float64): what sums over earlier tiles must be
            multiplied by, and what their d must be raised by. With them the weights are written:
        weights: [n, c] any float dtype; None: over z. weighted: [n, c], weights times d, or None.
    """
    rows, columns = z.shape
    if rows == 0:
        return
    ROWS, BLOCK, warps = _tile("linear_logprob.fold", z, first)
    arguments = arguments_of(z, bias, ids, temperatures, first, options) | {
        "state": state, "factor": state if factor is None else factor, "shift": state if shift is None else shift,
        "MOMENT": moment, "WEIGHTS": factor is not None, "WEIGHTED": weighted is not None, "BLOCK": BLOCK,
    }  # fmt: skip
    arguments["weights"] = weights = z if weights is None else weights
    arguments["weighted"] = weighted = weights if weighted is None else weighted
    arguments |= {"weights_stride": weights.stride(0), "weighted_stride": weighted.stride(0), "ROWS": ROWS}
    if columns > BLOCK and rows < few(z.device):
        fold_few(arguments, warps)
    else:
        launch(fold_kernel, (triton.cdiv(rows, ROWS),), arguments, warps)


def turn_tile(
    z: Tensor, bias: Maybe, ids: Tensor, temperatures: Maybe, first: int, options: LogitOptions, stats: Tensor,
    out: Maybe = None,
) -> None:  # fmt: skip
    """Write the gradient of g logp + h H with respect to tile + bias.

    Args: as `fold_tile`'s, and
        stats: [n, 5] float64 contiguous: largest u, log of the sum of exp(d_j), H, g, h. Rows with g = h = 0, or
            without an allowed token (log sum -inf), become 0 and are not read.
        out: [n, c] any float dtype; None: over z.
    """
    rows, columns = z.shape
    if rows == 0 or columns == 0:
        return
    ROWS, BLOCK, warps = _tile("linear_logprob.turn", z, 0)
    out = z if out is None else out
    # A program walks its row, so that the row's float64 scalars are computed once; few rows are cut into blocks.
    blocks = triton.cdiv(columns, BLOCK)
    each = 1 if rows < few(z.device) else blocks
    arguments = arguments_of(z, bias, ids, temperatures, first, options) | {
        "stats": stats, "out": out, "out_stride": out.stride(0), "each": each, "ROWS": ROWS, "BLOCK": BLOCK
    }  # fmt: skip
    launch(turn_kernel, (triton.cdiv(rows, ROWS), triton.cdiv(blocks, each)), arguments, warps)


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
        U, U if Q is None else Q, factor, shift, dim, HAS_Q=Q is not None, BLOCK=BLOCK,
        num_warps=tuning["num_warps"],
    )  # fmt: skip


def _tile(kernel: str, z: Tensor, first: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, warps): rows of a small vocabulary share a program. The last tile of a large one keeps its
    block, so that the order of its sums is that of one wide tile. A float64 takes two registers: half as many."""
    tuning = tuned.options(kernel, z.device)
    most = tuning["BLOCK"] // (2 if z.dtype == torch.float64 else 1)
    block = most if first else min(most, triton.next_power_of_2(max(z.shape[1], 16)))
    return most // block, block, tuning["num_warps"]


def _rescale_variants(capability: int) -> list[Variant]:
    tuning = tuned.of_capability("linear_logprob.rescale", capability)
    signature = dict.fromkeys(("U", "Q", "factor", "shift"), "*fp32") | {"dim": "i32"}
    return [
        Variant(
            rescale_kernel,
            signature,
            {"HAS_Q": HAS_Q, "BLOCK": tuning["BLOCK"]},
            num_warps=tuning["num_warps"],
            divisible=("dim",),
            targets=(capability,),
        )
        for HAS_Q in (False, True)
    ]


VARIANTS = [
    *variants_of("linear_logprob.fold", fold_kernel, WEIGHTS=True),
    *variants_of("linear_logprob.fold", fold_kernel, WEIGHTS=False, WEIGHTED=False),
    *variants_of("linear_logprob.turn", turn_kernel),
    *(variant for capability in TARGETS for variant in _rescale_variants(capability)),
]
