"""Per-token attribution: row-wise products of a gradient and an activation, and sums over segments."""

from typing import Any

import torch

from .. import _core, reference
from . import _check
from ._arrays import numpy_too
from .backend import DTYPE, accumulation_dtype, address, register, use_reference

REDUCTIONS = ("dot", "abs", "l2")


@numpy_too
def attribution_scores(
    grad: torch.Tensor, activation: torch.Tensor, *, reduction: str = "dot"
) -> torch.Tensor:
    """Score of every row from its gradient and its activation, p_d = grad_d * activation_d.

        dot: sum_d p_d        abs: sum_d |p_d|        l2: sqrt(sum_d p_d^2)

    `dot` at an embedding output is gradient x input: the first-order change of the outcome when the row's
    activation goes to zero. One pass; nothing of the inputs' size is written.

    Args:
        grad: [..., D] float32, bfloat16, float16 or float64. Gradient of the outcome at the activation.
        activation: [..., D], dtype and device of `grad`.
        reduction: "dot" | "abs" | "l2".
    Returns: [...] float32 (float64 for float64). Differentiable in both inputs; the slope of `abs` is 0 where
        p_d = 0 and that of `l2` is 0 where the score is 0.
    Raises: TypeError for another dtype, ValueError if shapes or devices differ or the reduction is unknown.
    Source: Shrikumar et al. 2016 (arXiv:1605.01713), gradient x input.
    """
    _check.floating("grad", grad)
    _check.tensor("activation", activation)
    _check.dtype("activation", activation, grad.dtype, "grad")
    if grad.dim() == 0:
        raise ValueError("grad must be [..., D], got a scalar")
    _check.shape("activation", activation, grad.shape, "grad")
    _check.device("activation", activation, grad.device, "grad")
    _check.choice("reduction", reduction, REDUCTIONS)
    if use_reference():
        return reference.attribution_scores(grad, activation, reduction=reduction)
    return _scores(grad, activation, REDUCTIONS.index(reduction))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., D] as [rows, D] with unit stride inside a row; a view whenever the strides allow one."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _scores_cpu(grad: torch.Tensor, activation: torch.Tensor, reduction: int) -> torch.Tensor:
    g, a = _rows(grad), _rows(activation)
    out = torch.empty(grad.shape[:-1], dtype=accumulation_dtype(grad.dtype), device="cpu")
    _core.attribution_scores(
        g.data_ptr(), a.data_ptr(), DTYPE[grad.dtype], reduction, g.shape[0], g.shape[1],
        g.stride(0), a.stride(0), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _scores_triton(grad: torch.Tensor, activation: torch.Tensor, reduction: int) -> torch.Tensor:
    from ..kernels import attribution as kernels

    return kernels.scores(_rows(grad), _rows(activation), reduction).view(grad.shape[:-1])


def _scores_fake(grad: torch.Tensor, activation: torch.Tensor, reduction: int) -> torch.Tensor:
    return grad.new_empty(grad.shape[:-1], dtype=accumulation_dtype(grad.dtype))


def _scores_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    grad, activation, ctx.reduction = inputs
    ctx.save_for_backward(grad, activation, output)


def _scores_grad(ctx: Any, upstream: torch.Tensor) -> tuple:
    wanted = ctx.needs_input_grad[:2]
    d_grad, d_activation = _scores_backward(
        *ctx.saved_tensors[:2], upstream, ctx.saved_tensors[2], ctx.reduction, *wanted
    )
    return d_grad if wanted[0] else None, d_activation if wanted[1] else None, None


def _empty_like_rows(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    """A contiguous result of x's shape; an unwanted one is empty, since an operator returns no None."""
    return x.new_empty(x.shape if wanted else (0,))


def _scores_backward_cpu(
    grad: torch.Tensor, activation: torch.Tensor, upstream: torch.Tensor, scores: torch.Tensor,
    reduction: int, want_grad: bool, want_activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    g, a = _rows(grad), _rows(activation)
    d_grad, d_activation = _empty_like_rows(grad, want_grad), _empty_like_rows(activation, want_activation)
    upstream = upstream.contiguous()
    _core.attribution_scores_backward(
        g.data_ptr(), a.data_ptr(), upstream.data_ptr(), scores.data_ptr(), DTYPE[grad.dtype], reduction,
        g.shape[0], g.shape[1], g.stride(0), a.stride(0), address(d_grad if want_grad else None),
        address(d_activation if want_activation else None), torch.get_num_threads(),
    )  # fmt: skip
    return d_grad, d_activation


def _scores_backward_triton(
    grad: torch.Tensor, activation: torch.Tensor, upstream: torch.Tensor, scores: torch.Tensor,
    reduction: int, want_grad: bool, want_activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    from ..kernels import attribution as kernels

    d_grad, d_activation = _empty_like_rows(grad, want_grad), _empty_like_rows(activation, want_activation)
    kernels.scores_backward(
        _rows(grad), _rows(activation), upstream.reshape(-1).contiguous(), scores.reshape(-1), reduction,
        d_grad if want_grad else None, d_activation if want_activation else None,
    )  # fmt: skip
    return d_grad, d_activation


def _scores_backward_fake(
    grad: torch.Tensor, activation: torch.Tensor, upstream: torch.Tensor, scores: torch.Tensor,
    reduction: int, want_grad: bool, want_activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _empty_like_rows(grad, want_grad), _empty_like_rows(activation, want_activation)


_scores = register(
    "attribution_scores",
    "(Tensor grad, Tensor activation, int reduction) -> Tensor",
    cpu=_scores_cpu,
    triton=_scores_triton,
    fake=_scores_fake,
    setup_context=_scores_setup,
    backward=_scores_grad,
)
_scores_backward = register(
    "attribution_scores_backward",
    "(Tensor grad, Tensor activation, Tensor upstream, Tensor scores, int reduction, bool want_grad, "
    "bool want_activation) -> (Tensor, Tensor)",
    cpu=_scores_backward_cpu,
    triton=_scores_backward_triton,
    fake=_scores_backward_fake,
)


# ---- segments ---------------------------------------------------------------------------------------------------


@numpy_too
def segment_sum(scores: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    """Sum of the scores of every segment: from tokens to words, spans and turns.

        out[s] = sum of scores[cu_segments[s] : cu_segments[s + 1]]

    Args:
        scores: [N] float32, bfloat16, float16 or float64.
        cu_segments: [S + 1] int32 or int64, bounds of the segments, rising from 0 to N. An empty segment gives 0.
    Returns: [S] float32 (float64 for float64), summed in float64 on the CPU. Differentiable in `scores`. A sum
        depends on its own scores alone, bitwise.
    Raises: TypeError for another dtype; ValueError for a wrong shape or device, or (on CPU, where looking at them
        waits for nothing) bounds that do not rise from 0 to N.
    """
    _check.floating("scores", scores)
    if scores.dim() != 1:
        raise ValueError(f"scores must be [N], got {list(scores.shape)}")
    _check.bounds("cu_segments", cu_segments, scores, "scores", "S + 1")
    if use_reference():
        _check.rising("cu_segments", cu_segments, len(scores), "scores")
        return reference.segment_sum(scores, cu_segments)
    return _segment_sum(scores, cu_segments)


def _segment_sum_cpu(scores: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    out = _segment_sum_fake(scores, cu_segments)
    x, offsets = scores.contiguous(), _check.rising("cu_segments", cu_segments, len(scores), "scores")
    _core.segment_sum(
        x.data_ptr(), offsets.data_ptr(), DTYPE[x.dtype], len(out), len(x), out.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    return out


def _segment_sum_triton(scores: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    from ..kernels import attribution as kernels

    return kernels.segment_sum(scores, _check.rising("cu_segments", cu_segments, len(scores), "scores"))


def _segment_sum_fake(scores: torch.Tensor, cu_segments: torch.Tensor) -> torch.Tensor:
    return scores.new_empty(cu_segments.shape[0] - 1, dtype=accumulation_dtype(scores.dtype))


def _segment_sum_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    scores, cu_segments = inputs
    ctx.save_for_backward(cu_segments)
    ctx.count, ctx.dtype = scores.shape[0], scores.dtype


def _segment_sum_grad(ctx: Any, upstream: torch.Tensor) -> tuple:
    return _segment_spread(upstream, *ctx.saved_tensors, ctx.count).to(ctx.dtype), None


def _segment_spread_cpu(upstream: torch.Tensor, cu_segments: torch.Tensor, count: int) -> torch.Tensor:
    out = upstream.new_empty(count)
    x, offsets = upstream.contiguous(), _check.rising("cu_segments", cu_segments, count, "scores")
    _core.segment_spread(
        x.data_ptr(), offsets.data_ptr(), DTYPE[x.dtype], len(x), count, out.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    return out


def _segment_spread_triton(upstream: torch.Tensor, cu_segments: torch.Tensor, count: int) -> torch.Tensor:
    from ..kernels import attribution as kernels

    return kernels.segment_spread(upstream, cu_segments, count)


def _segment_spread_fake(upstream: torch.Tensor, cu_segments: torch.Tensor, count: int) -> torch.Tensor:
    return upstream.new_empty(count)


_segment_sum = register(
    "segment_sum",
    "(Tensor scores, Tensor cu_segments) -> Tensor",
    cpu=_segment_sum_cpu,
    triton=_segment_sum_triton,
    fake=_segment_sum_fake,
    setup_context=_segment_sum_setup,
    backward=_segment_sum_grad,
)
# Every element gets its segment's number.
_segment_spread = register(
    "segment_spread",
    "(Tensor upstream, Tensor cu_segments, SymInt count) -> Tensor",
    cpu=_segment_spread_cpu,
    triton=_segment_spread_triton,
    fake=_segment_spread_fake,
)
