"""Attribution kernels: row-wise products of a gradient and an activation, and sums over segments.

    p_d = grad_d * activation_d;   dot: sum_d p_d    abs: sum_d |p_d|    l2: sqrt(sum_d p_d^2)

Roofline, per row of D elements of e bytes: 2 D e bytes read, 4 written, 2 D to 3 D flops: bandwidth-bound at
every D (H100: D = 4096 bf16 is 16 KiB, 5.5 ns of 3 TB/s a row). Backward: 2 D e read, up to 2 D e written.
Segments: e bytes read a score, 8 and 4 a segment; a program sums one segment in float64, which a score's bytes
hide, and so its sum depends on its own scores alone.
"""

import torch
import triton
import triton.language as tl

from .aot import Variant

# 2048 elements a step: 16 bytes a thread and load for bf16 at 4 warps and two loads in flight.
MAX_BLOCK = 2048
# Words and turns hold a few to some hundred tokens: one warp, eight loads in flight.
SEGMENT_BLOCK = 256


@triton.jit
def scores_kernel(
    grad, activation, out, rows, dim, grad_stride, activation_stride,
    REDUCTION: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    g_row = grad + row * grad_stride
    a_row = activation + row * activation_stride
    total = tl.zeros([ROWS], WIDE)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < dim)[None, :]
        g = tl.load(g_row[:, None] + column[None, :], inside, 0.0).to(WIDE)
        a = tl.load(a_row[:, None] + column[None, :], inside, 0.0).to(WIDE)
        p = g * a
        if REDUCTION == 1:
            p = tl.abs(p)
        if REDUCTION == 2:
            p = p * p
        total += tl.sum(p, 1)
    if REDUCTION == 2:
        total = tl.sqrt(total)
    tl.store(out + row, total, row < rows)


@triton.jit
def scores_backward_kernel(
    grad, activation, upstream, scores, d_grad, d_activation, rows, dim, grad_stride, activation_stride,
    REDUCTION: tl.constexpr, WIDE: tl.constexpr, WANT_GRAD: tl.constexpr, WANT_ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    g = tl.load((grad + row * grad_stride)[:, None] + column[None, :], inside, 0.0).to(WIDE)
    a = tl.load((activation + row * activation_stride)[:, None] + column[None, :], inside, 0.0).to(WIDE)
    u = tl.load(upstream + row, row < rows, 0.0)[:, None]
    if REDUCTION == 1:
        p = g * a
        u = tl.where(p > 0, u, tl.where(p < 0, -u, p * 0.0))
    if REDUCTION == 2:
        score = tl.load(scores + row, row < rows, 0.0)[:, None]
        u = tl.where(score > 0, u * (g * a) / tl.where(score > 0, score, 1.0), score * 0.0)
    out = (row * dim)[:, None] + column[None, :]
    if WANT_GRAD:
        tl.store(d_grad + out, (u * a).to(d_grad.dtype.element_ty), inside)
    if WANT_ACTIVATION:
        tl.store(d_activation + out, (u * g).to(d_activation.dtype.element_ty), inside)


@triton.jit
def _segment(offsets, elements):
    """(first, end) of this program's segment, cut at the ends of what there is."""
    segment = tl.program_id(0)
    size = tl.full([], elements, tl.int64)
    begin = tl.minimum(tl.maximum(tl.load(offsets + segment), 0), size)
    return begin, tl.minimum(tl.maximum(tl.load(offsets + segment + 1), begin), size)


@triton.jit
def segment_sum_kernel(scores, offsets, out, elements, BLOCK: tl.constexpr):
    begin, end = _segment(offsets, elements)
    total = tl.zeros([], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(scores + at, at < end, 0.0).to(tl.float64), 0)
    tl.store(out + tl.program_id(0), total.to(out.dtype.element_ty))


@triton.jit
def segment_spread_kernel(values, offsets, out, elements, BLOCK: tl.constexpr):
    begin, end = _segment(offsets, elements)
    value = tl.load(values + tl.program_id(0))
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out + at, tl.zeros([BLOCK], out.dtype.element_ty) + value, at < end)


def _tile(dim: int) -> tuple[int, int]:
    """(ROWS, BLOCK): several short rows share a program so that it always holds about MAX_BLOCK elements."""
    block = min(MAX_BLOCK, triton.next_power_of_2(max(dim, 16)))
    return MAX_BLOCK // block, block


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def scores(grad: torch.Tensor, activation: torch.Tensor, reduction: int) -> torch.Tensor:
    """[rows, dim] x2 (unit stride inside a row) -> [rows]."""
    rows, dim = grad.shape
    out = grad.new_empty(rows, dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32)
    if rows == 0:
        return out
    ROWS, BLOCK = _tile(dim)
    scores_kernel[(triton.cdiv(rows, ROWS),)](
        grad, activation, out, rows, dim, grad.stride(0), activation.stride(0),
        REDUCTION=reduction, WIDE=_wide(grad.dtype), ROWS=ROWS, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def scores_backward(
    grad: torch.Tensor, activation: torch.Tensor, upstream: torch.Tensor, scores: torch.Tensor,
    reduction: int, d_grad: torch.Tensor | None, d_activation: torch.Tensor | None,
) -> None:  # fmt: skip
    """Fill d_grad and d_activation ([rows, dim] contiguous; None: not wanted)."""
    rows, dim = grad.shape
    if rows == 0 or dim == 0:
        return
    ROWS, BLOCK = _tile(dim)
    scores_backward_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(dim, BLOCK))](
        grad, activation, upstream, scores, grad if d_grad is None else d_grad,
        grad if d_activation is None else d_activation, rows, dim, grad.stride(0), activation.stride(0),
        REDUCTION=reduction, WIDE=_wide(grad.dtype), WANT_GRAD=d_grad is not None,
        WANT_ACTIVATION=d_activation is not None, ROWS=ROWS, BLOCK=BLOCK,
    )  # fmt: skip


def _segments(cu_segments: torch.Tensor) -> tuple[int, torch.Tensor]:
    return len(cu_segments) - 1, cu_segments.long().contiguous()


def segment_sum(scores: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    """[N] -> [S]."""
    segments, offsets = _segments(cu_segments)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    out = torch.empty(segments, dtype=dtype, device=scores.device)
    if segments:
        segment_sum_kernel[(segments,)](
            scores.contiguous(), offsets, out, len(scores), BLOCK=SEGMENT_BLOCK, num_warps=1
        )
    return out


def segment_spread(values: torch.Tensor, cu_segments: torch.Tensor, count: int) -> torch.Tensor:
    """[S] -> [N]."""
    segments, offsets = _segments(cu_segments)
    out = values.new_empty(count)
    if segments and count:
        segment_spread_kernel[(segments,)](
            values.contiguous(), offsets, out, count, BLOCK=SEGMENT_BLOCK, num_warps=1
        )
    return out


def _variants() -> list[Variant]:
    found = []
    segments = {"offsets": "*i64", "out": "*fp32", "elements": "i32"}
    for pointer in ("*fp32", "*bf16"):
        sums = {"scores": pointer, **segments}
        found.append(Variant(segment_sum_kernel, sums, {"BLOCK": SEGMENT_BLOCK}, num_warps=1))
    spread = {"values": "*fp32", **segments}
    found.append(Variant(segment_spread_kernel, spread, {"BLOCK": SEGMENT_BLOCK}, num_warps=1))
    for pointer in ("*fp32", "*bf16"):
        inputs = {"grad": pointer, "activation": pointer}
        sizes = {"rows": "i32", "dim": "i32", "grad_stride": "i32", "activation_stride": "i32"}
        even = ("dim", "grad_stride", "activation_stride")
        for dim in (128, 4096):
            ROWS, BLOCK = _tile(dim)
            shape = {"WIDE": tl.float32, "ROWS": ROWS, "BLOCK": BLOCK}
            forward = {**inputs, "out": "*fp32", **sizes}
            found += [
                Variant(scores_kernel, forward, {"REDUCTION": kind, **shape}, divisible=even)
                for kind in range(3)
            ]
            backward = {
                **inputs, "upstream": "*fp32", "scores": "*fp32", "d_grad": pointer, "d_activation": pointer,
                **sizes,
            }  # fmt: skip
            both = {"WANT_GRAD": True, "WANT_ACTIVATION": True}
            found += [
                Variant(
                    scores_backward_kernel, backward, {"REDUCTION": kind, **both, **shape}, divisible=even
                )
                for kind in range(3)
            ]
    return found


VARIANTS = _variants()
