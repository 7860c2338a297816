"""Long rows of the returns in chunks: one program a block of a row; kernels/advantage.py walks with one a row.

    tally    counting steps of a block of steps, zeros on the masked ones       (rows with a mask alone)
    list     where the counting steps stand, from the tallies before a block    (rows with a mask alone)
    summary  a block's map from the message behind it to its first step's, m -> b + a m
    gae      a block's results; its program applies the maps of the blocks behind it one after another

The blocks are the walk's and so are the operations on them, in its order: the results are the walk's to the bit.
A row's blocks are at begin // BLOCK + row and behind it, apart from every other row's, whatever the lengths are.

Roofline, per step in float32: r, V read twice, A, G written, 24 bytes where the walk moves 16; a mask is read
twice, its places written once and read twice, 14 more. Up to 8192 / BLOCK a step for the maps, from the L1 cache:
a row of a million steps has 1024, 512 to apply on average, some 4 us.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .advantage_rows import _bounds, _lam_of, _messages, _pick, _places
from .aot import Variant

# Rows that are chunked at most: a walk has one program for each, and these leave half of an H100's 132
# multiprocessors idle. Also the offsets among which a program finds its row.
ROWS = tl.constexpr(64)
# Steps of the mean row from which on rows are chunked: a walk's block costs a trip to memory, a scan and a
# barrier, 1 to 2 us by estimate, so that eight outweigh the further launch (three with a mask). The mean, since
# the longest row of a pack is known on the device alone; it is no shorter.
LONG_ROW = 8192
# Steps of a block: 8 a thread at 4 warps, so that three floats a step stay in registers, and rows of a few hundred
# tokens, the common case, take one block without an idle warp. Doubles take 8 warps: moments spill at 4.
BLOCK = 1024
WARPS = {tl.float32: 4, tl.float64: 8}
# Sizes that no kernel of the returns is specialised on: see kernels/advantage.py.
FREE = ["length", "total", "rows", "items"]


@triton.jit
def _chunk_of(slot, offsets, length, total, rows, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """(row, block in the row) of a slot; a row has more slots than blocks."""
    if not PACKED:  # row r's first slot, r length // BLOCK + r, is none behind `slot`: solved for r
        wide = tl.full([], slot, tl.int64)
        row = tl.minimum(((wide + 1) * BLOCK - 1) // (length + BLOCK), rows - 1)
        return row.to(tl.int32), (wide - row * length // BLOCK - row).to(tl.int32)
    r = tl.arange(0, ROWS).to(tl.int64)
    begin = tl.minimum(tl.maximum(tl.load(offsets + r, r < rows, 0), 0), tl.full([], total, tl.int64))
    base = begin // BLOCK + r
    row = tl.maximum(tl.sum(((base <= slot) & (r < rows)).to(tl.int32), 0) - 1, 0)
    return row, tl.maximum(slot - tl.sum(tl.where(r == row, base, 0), 0), 0).to(tl.int32)


@triton.jit
def _listed_steps(counts, row, n, MASKED: tl.constexpr):
    """(number of counting steps, the first one, how many are listed): `_counting_steps`, but with all listed."""
    count = n.to(tl.int32)
    listed = tl.full([], 0, tl.int32)
    if MASKED:
        count = tl.load(counts + row, n > 0, 0)
        listed = count
    return count, tl.full([], 0, tl.int32), listed


@triton.jit
def _masked_block(mask, offsets, length, total, rows, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """(row, block, the row's first step and length, steps, inside, counts) of this program's block of steps."""
    row, j = _chunk_of(tl.program_id(0), offsets, length, total, rows, PACKED, BLOCK)
    begin, n = _bounds(row, offsets, length, total, PACKED)
    step = j * BLOCK + tl.arange(0, BLOCK)
    inside = step < n
    return row, j, begin, n, step, inside, (tl.load(mask + begin + step, inside, 0) != 0) & inside


@triton.jit(do_not_specialize=FREE)
def tally_kernel(
    mask, offsets, tallies, returns, advantages, length, total, rows,
    ADVANTAGES: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, _, begin, _, step, inside, counts = _masked_block(mask, offsets, length, total, rows, PACKED, BLOCK)
    zero = tl.where(inside, 0.0, 0.0)
    tl.store(returns + begin + step, zero, inside & (counts == 0))
    if ADVANTAGES:
        tl.store(advantages + begin + step, zero, inside & (counts == 0))
    tl.store(tallies + tl.program_id(0), tl.sum(counts.to(tl.int32), 0))


@triton.jit(do_not_specialize=FREE)
def list_kernel(
    mask, offsets, tallies, places, counts_of_rows, length, total, rows,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, j, begin, n, step, _, counts = _masked_block(mask, offsets, length, total, rows, PACKED, BLOCK)
    i = tl.arange(0, BLOCK)
    first = tallies + begin // BLOCK + row
    seen = tl.full([], 0, tl.int32)
    for start in range(0, j, BLOCK):
        seen += tl.sum(tl.load(first + start + i, start + i < j, 0), 0)
    rank = seen + tl.cumsum(counts.to(tl.int32), 0) - 1
    tl.store(places + begin + rank, step, counts)
    if (j + 1) * BLOCK >= n:
        tl.store(counts_of_rows + row, seen + tl.sum(counts.to(tl.int32), 0), j * BLOCK < n)


@triton.jit(do_not_specialize=FREE)
def summary_kernel(
    rewards, values, bootstrap_values, terminated, truncated, places, offsets, lams, counts, gamma: tl.float64,
    lam: tl.float64, slopes, shifts, length, total, rows,
    VALUES: tl.constexpr, ENDS: tl.constexpr, CUTS: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    PER_ROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, k = _chunk_of(tl.program_id(0), offsets, length, total, rows, PACKED, BLOCK)
    begin, n = _bounds(row, offsets, length, total, PACKED)
    count, low, listed = _listed_steps(counts, row, n, MASKED)
    blocks = tl.cdiv(count, BLOCK)
    if k < blocks:
        i = tl.arange(0, BLOCK)
        rank = (blocks - 1 - k) * BLOCK + i
        inside = rank < count
        at = _places(places + begin, low, listed, rank, MASKED)
        _, _, _, _, a, b = _messages(
            rewards + begin, values + begin, bootstrap_values + begin, terminated + begin, truncated + begin, at,
            inside, tl.full([], gamma, tl.float64).to(WIDE), _lam_of(row, lams, lam, PER_ROW, WIDE),
            VALUES, ENDS, CUTS, WIDE,
        )  # fmt: skip
        tl.store(slopes + tl.program_id(0), _pick(a, i, 0))
        tl.store(shifts + tl.program_id(0), _pick(b, i, 0))


@triton.jit
def _carried(slopes, shifts, first, last, m):
    """m behind the blocks of these slots, one after another by `_after`, as a walk takes them."""
    for slot in tl.range(first, last, loop_unroll_factor=4):  # the loads of four blocks on their way at once
        slope, shift = tl.load(slopes + slot), tl.load(shifts + slot)
        m = tl.where(slope == 0.0, shift, shift + slope * m)
    return m


# ---- launchers --------------------------------------------------------------------------------------------------

Tensor = torch.Tensor


def is_long(rows: int, steps: int) -> bool:
    """Few rows, and long ones."""
    return 0 < rows <= ROWS.value and steps >= rows * LONG_ROW


def summaries(
    slots: int, rows: int, inputs: dict[str, Any], options: dict[str, Any], shared: dict[str, Any]
) -> dict[str, Tensor]:
    """Counting steps of every row [rows], slope and shift of every block [slots]; places and zeros are written.

    Args:
        slots: blocks of all rows at most.
        inputs: tensors and numbers of gae_kernel by name.
        options, shared: its flags, and what every kernel of the returns gets.
    """
    device = inputs["returns"].device
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    slopes, shifts = torch.empty((2, slots), dtype=inputs["returns"].dtype, device=device)
    places = {"rows": rows, **{k: v for k, v in shared.items() if k not in ("WIDE", "num_warps")}}

    def given(*names: str) -> dict[str, Any]:
        return {name: inputs[name] for name in names}

    if options["MASKED"]:
        tallies = torch.empty(slots, dtype=torch.int32, device=device)
        tally_kernel[(slots,)](
            **given("mask", "returns", "advantages"),
            tallies=tallies,
            ADVANTAGES=options["ADVANTAGES"],
            **places,
        )
        list_kernel[(slots,)](**given("mask", "places"), tallies=tallies, counts_of_rows=counts, **places)
    summary_kernel[(slots,)](
        **given("rewards", "values", "bootstrap_values", "terminated", "truncated", "places", "lams"),
        **given("gamma", "lam"), counts=counts, slopes=slopes, shifts=shifts, rows=rows,
        **{name: options[name] for name in ("VALUES", "ENDS", "CUTS", "MASKED", "PER_ROW")}, **shared,
    )  # fmt: skip
    return {"counts": counts, "slopes": slopes, "shifts": shifts}


# ---- what ahead-of-time compilation looks at --------------------------------------------------------------------


def gae_signature(pointer: str) -> dict[str, str]:
    """The type of every argument of gae_kernel and of the kernels here, for rewards behind this pointer."""
    wide = "*fp64" if pointer == "*fp64" else "*fp32"
    return {
        **dict.fromkeys(("rewards", "values", "last_values", "bootstrap_values"), pointer),
        **dict.fromkeys(("advantages", "returns", "slopes", "shifts"), wide),
        **dict.fromkeys(("terminated", "truncated", "mask"), "*i1"),
        **dict.fromkeys(("places", "tallies", "counts", "counts_of_rows"), "*i32"),
        **dict.fromkeys(("lams", "parts"), "*fp64"), "offsets": "*i64", "gamma": "fp64", "lam": "fp64",
        **dict.fromkeys(("length", "rows", "items"), "i32"), "total": "i64",
    }  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    for pointer, WIDE in (("*fp32", tl.float32), ("*bf16", tl.float32), ("*fp64", tl.float64)):
        signature = gae_signature(pointer)
        for every in (False, True):
            shape = {"PACKED": every, "BLOCK": BLOCK}
            steps = {"ENDS": every, "CUTS": every, "MASKED": every, "PER_ROW": every, "WIDE": WIDE, **shape}
            found.append(Variant(summary_kernel, signature, {"VALUES": every, **steps}, WARPS[WIDE]))
            if pointer != "*bf16":
                found.append(Variant(tally_kernel, signature, {"ADVANTAGES": True, **shape}))
            if pointer == "*fp32":
                found.append(Variant(list_kernel, signature, shape))
    return found


VARIANTS = _variants()
