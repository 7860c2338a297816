"""The fold of kernels/linear_logprob.py for few rows: a program a block instead of a program a row.

    parts <- every block on its own        state <- the parts, in order        weights <- every block again

Roofline: that file's; the parts add 16 bytes a block of 2048 logits, and two launches. The merge walks a row's
parts one after the other, at a few hundred clocks each, so that it gives the bits of the one program.
"""

import torch
import triton
import triton.language as tl

from .linear_logprob_lanes import (
    FREE,
    ROW_VECTORS,
    chosen_logit,
    fold_block,
    launch,
    load_state,
    logits,
    merge,
    real,
    store_change,
    store_state,
    temperature_of,
    variants_of,
    weigh_block,
)
from .logprob import _cap, _inverse


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
    for _ in range(blocks):
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


def fold_few(arguments: dict, warps: int) -> None:
    """Launch on the arguments of fold_kernel."""
    z, BLOCK = arguments["z"], arguments["BLOCK"]
    rows, blocks = len(z), triton.cdiv(z.shape[1], BLOCK)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    parts = torch.empty(rows, blocks, 4, dtype=wide, device=z.device)
    arguments = arguments | {"parts": parts, "blocks": blocks}
    launch(part_kernel, (rows, blocks), arguments, warps)
    # One warp: a row's few scalars.
    launch(merge_kernel, (rows,), arguments, 1)
    if arguments["WEIGHTS"]:
        launch(weigh_kernel, (rows, blocks), arguments, warps)


VARIANTS = [
    *variants_of("linear_logprob.fold", part_kernel),
    *variants_of("linear_logprob.fold", merge_kernel, num_warps=1, WEIGHTS=True),
    *variants_of("linear_logprob.fold", weigh_kernel),
]
