"""The operator behind react_fast.ops.q_loss: memory layout, registration, autograd."""

from typing import Any

import torch

from .. import _core
from ._policy_loss import _denominator_triton, _layout_cpu, _offsets, _scaled, denominator_value
from .backend import accumulation_dtype, address, register

Tensor = torch.Tensor
Maybe = torch.Tensor | None

# The tags of csrc/q_loss.h are the positions.
REGRESSIONS = ("squared", "huber", "expectile")
METRICS = (
    "tokens", "td_error/mean", "td_error/abs", "td_error/max", "prediction/mean", "target/mean", "above",
)  # fmt: skip


def _wide(x: Maybe, dtype: torch.dtype) -> Maybe:
    return None if x is None else x.to(dtype).contiguous()


def _outputs(first: Tensor, want_first: bool, want_second: bool) -> list[Tensor]:
    """loss, stats, d_first, d_second; an unwanted gradient is empty, since an operator returns no None."""
    dtype, shape = accumulation_dtype(first.dtype), first.shape
    sizes = ((), (len(METRICS),), shape if want_first else (0,), shape if want_second else (0,))
    return [first.new_empty(size, dtype=dtype) for size in sizes]


def _q_loss_cpu(
    first: Tensor, second: Maybe, targets: Tensor, mask: Tensor, weights: Maybe, cu_seqlens: Maybe,
    denominator_tensor: Maybe, denominator: float, kind: int, parameter: float, aggregation: int,
    want_first: bool, want_second: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    outputs = _outputs(first, want_first, want_second)
    loss, stats, d_first, d_second = outputs
    inputs = [_wide(x, loss.dtype) for x in (first, second, targets, weights)] + [mask.contiguous()]
    bounds, tokens, rows, row_length = _layout_cpu(first, cu_seqlens)
    pointers: Any = [address(x) for x in inputs]
    _core.q_loss(  # type: ignore[call-arg]
        *pointers, address(bounds), tokens, rows, row_length, loss.dtype == torch.float64, kind, parameter,
        aggregation, denominator_value(denominator, denominator_tensor), loss.data_ptr(), stats.data_ptr(),
        d_first.data_ptr() if want_first else 0, d_second.data_ptr() if want_second else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return tuple(outputs)


def _q_loss_triton(
    first: Tensor, second: Maybe, targets: Tensor, mask: Tensor, weights: Maybe, cu_seqlens: Maybe,
    denominator_tensor: Maybe, denominator: float, kind: int, parameter: float, aggregation: int,
    want_first: bool, want_second: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from ..kernels import q_loss as kernels
    from ..kernels.policy_loss_layout import Layout, token_weights

    outputs = _outputs(first, want_first, want_second)
    layout = Layout.of(first, mask, _offsets(first, cu_seqlens))
    number, tensor = _denominator_triton(denominator, denominator_tensor)
    kernels.q_loss(
        [None if x is None else x.contiguous() for x in (first, second, targets, weights)], layout,
        token_weights(layout, aggregation, tensor, number), kind, parameter, outputs[0], outputs[1],
        outputs[2] if want_first else None, outputs[3] if want_second else None,
    )  # fmt: skip
    return tuple(outputs)


def _q_loss_fake(first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_outputs(first, rest[-2], rest[-1]))


def _q_loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.dtype = inputs[0].dtype


def _q_loss_grad(ctx: Any, upstream: Maybe, *_: Any) -> tuple:
    grads: list[Maybe] = [None] * 13
    if upstream is not None:
        for position, saved in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[position]:
                grads[position] = _scaled(saved, upstream, ctx.dtype)
    return tuple(grads)


q_loss = register(
    "q_loss",
    "(Tensor first, Tensor? second, Tensor targets, Tensor mask, Tensor? weights, Tensor? cu_seqlens, "
    "Tensor? denominator_tensor, float denominator, int kind, float parameter, int aggregation, bool want_first, "
    "bool want_second) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_q_loss_cpu,
    triton=_q_loss_triton,
    fake=_q_loss_fake,
    setup_context=_q_loss_setup,
    backward=_q_loss_grad,
)
