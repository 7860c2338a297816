"""Running moments by id: one program an id that occurs, float64 inside.

    batch: n_b, mean_b, M2_b of the id's scores, in two passes
    n = n_a + n_b      d = mean_b - mean_a      mean = mean_a + d n_b / n      M2 = M2_a + M2_b + d^2 n_a n_b / n

Roofline: 12 bytes a score and 48 an id, through the sort's 8 a score and twice; some thousand scores: sort and
launch are the cost. After the stable sort an id's scores are adjacent and in the stream's order, so that no sum
depends on timing. Nothing waits for the device: every sorted position gets a program, and those that begin no id
stop at once.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant

# Scores read at a time: the commonest token of a batch occurs some hundred times.
BLOCK = 128


@triton.jit
def _scores_of(scores, ids, order, start, this, good, BLOCK: tl.constexpr):
    """(score, belongs to this id) of BLOCK sorted places from `start` on."""
    place = start + tl.arange(0, BLOCK)
    at = tl.load(order + place, place < good, 0)
    same = (tl.load(ids + at, place < good, 0) == this) & (place < good)
    return tl.load(scores + at, same, 0.0).to(tl.float64), same


@triton.jit
def accumulate_by_id_kernel(scores, ids, order, good_count, count, mean, m2, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64)
    good = tl.load(good_count)
    this = tl.load(ids + tl.load(order + first))
    before = tl.load(ids + tl.load(order + tl.maximum(first - 1, 0)))
    if (first < good) & ((first == 0) | (before != this)):
        members = tl.zeros([], tl.int64)
        total = tl.zeros([], tl.float64)
        start = first
        found = tl.full([], BLOCK, tl.int64)
        while found == BLOCK:
            x, same = _scores_of(scores, ids, order, start, this, good, BLOCK)
            found = tl.sum(same.to(tl.int64), 0)
            members += found
            total += tl.sum(x, 0)
            start += BLOCK
        n_b = members.to(tl.float64)
        mean_b = total / n_b
        m2_b = tl.zeros([], tl.float64)
        for start in range(first, first + members, BLOCK):
            x, same = _scores_of(scores, ids, order, start, this, good, BLOCK)
            gap = tl.where(same, x - mean_b, 0.0)
            m2_b += tl.sum(gap * gap, 0)
        n_a = tl.load(count + this)
        mean_a = tl.load(mean + this)
        n = (n_a + members).to(tl.float64)
        d = mean_b - mean_a
        tl.store(count + this, n_a + members)
        tl.store(mean + this, mean_a + d * (n_b / n))
        tl.store(m2 + this, tl.load(m2 + this) + m2_b + d * d * (n_a.to(tl.float64) * (n_b / n)))


def accumulate_by_id(
    scores: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None, count: torch.Tensor, mean: torch.Tensor,
    m2: torch.Tensor,
) -> None:  # fmt: skip
    """Add scores [...] under ids [...] to count, mean and M2 [size], in place; ids out of range are left out."""
    scores, ids = scores.reshape(-1).contiguous(), ids.reshape(-1).contiguous()
    if len(scores) == 0:
        return
    left_out = (ids < 0) | (ids >= len(count))
    if mask is not None:
        left_out = left_out | ~mask.reshape(-1)
    order = torch.where(left_out, len(count), ids).argsort(stable=True)
    accumulate_by_id_kernel[(len(scores),)](
        scores, ids, order, (~left_out).sum(), count, mean, m2, BLOCK=BLOCK, num_warps=1
    )


VARIANTS = [
    Variant(
        accumulate_by_id_kernel,
        {
            "scores": scores, "ids": ids, "order": "*i64", "good_count": "*i64", "count": "*i64",
            "mean": "*fp64", "m2": "*fp64",
        },
        {"BLOCK": BLOCK},
        num_warps=1,
    )
    for scores in ("*fp32", "*bf16", "*fp64")
    for ids in ("*i32", "*i64")
]  # fmt: skip
