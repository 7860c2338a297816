"""The operators behind react_fast.ops.policy_loss: tags of the core, memory layout, registration, autograd."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch

from .. import _core
from . import _check
from .backend import DTYPE, accumulation_dtype, address, is_eager, register

# The tags of csrc/policy_loss.h are the positions.
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
KL_GRADIENTS = ("value", "k2", "ratio")

# The `stats` outputs, in the order of csrc/policy_loss.h.
METRICS = (
    "tokens", "clip_ratio/low", "clip_ratio/high", "clip_ratio/dual", "approx_kl/k1", "approx_kl/k3", "ratio/mean",
    "clamped", "ratio/max", "kl", "entropy", "importance/mean", "importance/ess", "importance/max",
)  # fmt: skip


class Terms(NamedTuple):
    """What a loss is made of, in the order of the operator's arguments; choices by their position above."""

    denominator: float
    objective: int
    parameters: list[float]  # of the objective, see _objectives.py
    aggregation: int
    kl_coef: float
    kl_estimator: int
    kl_gradient: int
    entropy_coef: float


class Metrics(Mapping[str, torch.Tensor]):
    """Names for the elements of the `stats` output; a metric becomes a tensor of its own when it is asked for."""

    __slots__ = ("_slots", "_stats")

    def __init__(self, slots: dict[str, int], stats: torch.Tensor) -> None:
        self._slots, self._stats = slots, stats

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stats[self._slots[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __repr__(self) -> str:
        return repr(dict(self))


def _slots(with_ref: bool, with_entropy: bool, with_importance: bool) -> dict[str, int]:
    """The elements of `stats` that a call with these inputs has."""
    absent = {"kl": not with_ref, "entropy": not with_entropy, "importance": not with_importance}
    return {name: i for i, name in enumerate(METRICS) if not absent.get(name.split("/")[0], False)}


_SLOTS = {given: _slots(*given) for given in product((False, True), repeat=3)}


def named_metrics(
    stats: torch.Tensor, ref_logprobs: Any, entropy: Any, importance: Any
) -> Mapping[str, torch.Tensor]:
    """The `stats` output by name; those of an input that is None are left out."""
    slots = _SLOTS[ref_logprobs is not None, entropy is not None, importance is not None]
    if torch.compiler.is_compiling():  # a graph returns what it knows
        return {name: stats[i] for name, i in slots.items()}
    return Metrics(slots, stats)


def per_row(advantages: torch.Tensor, logprobs: torch.Tensor) -> bool:
    """One advantage per sequence; a packed [N] is per token, even if there are N sequences."""
    return advantages.dim() == 1 and advantages.shape != logprobs.shape


def _flat(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _layout_cpu(
    x: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor | None, int, int, int]:
    """(cu_seqlens as int64, tokens, rows, row length)."""
    if x.dim() == 2:
        return None, x.numel(), x.shape[0], x.shape[1]
    if cu_seqlens is None:
        return None, x.shape[0], 1, x.shape[0]
    bounds = _offsets(x, cu_seqlens)
    assert bounds is not None
    return bounds, x.shape[0], bounds.shape[0] - 1, 0


def denominator_value(number: float, tensor: torch.Tensor | None) -> float:
    """The denominator as a number above 0, or 0 for none."""
    if tensor is None:
        return number
    return _check.number("denominator", float(tensor), low=0.0, low_open=True)


def _offsets(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor | None:
    return (
        None if cu_seqlens is None else _check.rising("cu_seqlens", cu_seqlens, len(x), "the packed tokens")
    )


def _denominator_triton(number: float, tensor: torch.Tensor | None) -> tuple[float, torch.Tensor | None]:
    """Checked on the CPU; on a device a tensor that is not above 0 makes the loss NaN."""
    if tensor is not None and tensor.device.type == "cpu":
        return denominator_value(number, tensor), None
    return number, tensor


def _scaled(saved: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Saved gradients stay wide until here: in float16, 1 / n would vanish before the loss scale reaches it. On a
    CPU, where looking costs nothing, a plain loss.backward() copies no gradient."""
    looks = saved.dtype == dtype and upstream.device.type == "cpu" and is_eager(upstream)
    # With gradients enabled somebody differentiates by `upstream`.
    if looks and not torch.is_grad_enabled() and upstream.item() == 1:
        return saved
    return (saved * upstream).to(dtype)


def _outputs(like: torch.Tensor, shapes: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    dtype = accumulation_dtype(like.dtype)
    if dtype == like.dtype:
        return [like.new_empty(shape) for shape in shapes]
    return [like.new_empty(shape, dtype=dtype) for shape in shapes]


def _shapes(logprobs: torch.Tensor, want_logprobs: bool, want_entropy: bool) -> tuple[tuple[int, ...], ...]:
    """loss, stats, d_logprobs, d_entropy; an unwanted gradient is empty, since an operator returns no None."""
    shape = tuple(logprobs.shape)
    return (), (len(METRICS),), shape if want_logprobs else (0,), shape if want_entropy else (0,)


def _policy_loss_cpu(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor | None, advantages: torch.Tensor, mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None, entropy: torch.Tensor | None, importance: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, denominator_tensor: torch.Tensor | None, denominator: float,
    objective: int, parameters: list[float], aggregation: int, kl_coef: float, kl_estimator: int,
    kl_gradient: int, entropy_coef: float, want_logprobs: bool, want_entropy: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    given = (logprobs, old_logprobs, advantages, ref_logprobs, entropy, importance, mask)
    inputs = [_flat(x) for x in given]
    bounds, tokens, rows, row_length = _layout_cpu(logprobs, cu_seqlens)
    loss, stats, d_logprobs, d_entropy = _outputs(logprobs, _shapes(logprobs, want_logprobs, want_entropy))
    pointers: Any = [address(x) for x in inputs]
    _core.policy_loss(  # type: ignore[call-arg]
        *pointers, address(bounds), tokens, rows, row_length, DTYPE[logprobs.dtype],
        per_row(advantages, logprobs), objective, parameters, aggregation,
        denominator_value(denominator, denominator_tensor), kl_coef, kl_estimator, kl_gradient, entropy_coef,
        loss.data_ptr(), stats.data_ptr(), d_logprobs.data_ptr() if want_logprobs else 0,
        d_entropy.data_ptr() if want_entropy else 0, torch.get_num_threads(),
    )  # fmt: skip
    return loss, stats, d_logprobs, d_entropy


def _policy_loss_triton(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor | None, advantages: torch.Tensor, mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None, entropy: torch.Tensor | None, importance: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, denominator_tensor: torch.Tensor | None, denominator: float,
    objective: int, parameters: list[float], aggregation: int, kl_coef: float, kl_estimator: int,
    kl_gradient: int, entropy_coef: float, want_logprobs: bool, want_entropy: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    from ..kernels import policy_loss as kernels
    from ..kernels.policy_loss_layout import Layout, token_weights

    outputs = _outputs(logprobs, _shapes(logprobs, want_logprobs, want_entropy))
    layout = Layout.of(logprobs, mask, _offsets(logprobs, cu_seqlens))
    number, tensor = _denominator_triton(denominator, denominator_tensor)
    kernels.policy_loss(
        [_flat(x) for x in (logprobs, old_logprobs, ref_logprobs, entropy, importance)], advantages, layout,
        token_weights(layout, aggregation, tensor, number), objective, parameters, kl_coef, kl_estimator,
        kl_gradient, entropy_coef, outputs[0], outputs[1], outputs[2] if want_logprobs else None,
        outputs[3] if want_entropy else None,
    )  # fmt: skip
    return tuple(outputs)


def _policy_loss_fake(logprobs: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return tuple(_outputs(logprobs, _shapes(logprobs, rest[-2], rest[-1])))


def _policy_loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, stats, d_logprobs, d_entropy = output
    ctx.mark_non_differentiable(stats, d_logprobs, d_entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_logprobs, d_entropy)
    ctx.dtype = inputs[0].dtype


def _policy_loss_grad(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> tuple:
    grads: list[torch.Tensor | None] = [None] * 19
    if upstream is not None:
        d_logprobs, d_entropy = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if needed[0]:
            grads[0] = _scaled(d_logprobs, upstream, ctx.dtype)
        if needed[5]:
            grads[5] = _scaled(d_entropy, upstream, ctx.dtype)
    return tuple(grads)


policy_loss_op = register(
    "policy_loss",
    "(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    "Tensor? entropy, Tensor? importance, Tensor? cu_seqlens, Tensor? denominator_tensor, float denominator, "
    "int objective, float[] parameters, int aggregation, float kl_coef, int kl_estimator, int kl_gradient, "
    "float entropy_coef, bool want_logprobs, bool want_entropy) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_policy_loss_cpu,
    triton=_policy_loss_triton,
    fake=_policy_loss_fake,
    setup_context=_policy_loss_setup,
    backward=_policy_loss_grad,
)


# ---- value loss --------------------------------------------------------------------------------------------


def _value_shapes(values: torch.Tensor, wanted: bool) -> tuple[tuple[int, ...], ...]:
    return (), tuple(values.shape) if wanted else (0,)


def _value_loss_cpu(
    values: torch.Tensor, old_values: torch.Tensor | None, returns: torch.Tensor, mask: torch.Tensor,
    denominator_tensor: torch.Tensor | None, denominator: float, clip: float, wanted: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    inputs = [_flat(x) for x in (values, old_values, returns, mask)]
    loss, d_values = _outputs(values, _value_shapes(values, wanted))
    pointers: Any = [address(x) for x in inputs]
    _core.value_loss(  # type: ignore[call-arg]
        *pointers, values.numel(), DTYPE[values.dtype], clip,
        denominator_value(denominator, denominator_tensor), loss.data_ptr(), d_values.data_ptr() if wanted else 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return loss, d_values


def _value_loss_triton(
    values: torch.Tensor, old_values: torch.Tensor | None, returns: torch.Tensor, mask: torch.Tensor,
    denominator_tensor: torch.Tensor | None, denominator: float, clip: float, wanted: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    from ..kernels import policy_loss as kernels
    from ..kernels.policy_loss_layout import Layout, token_weights

    loss, d_values = _outputs(values, _value_shapes(values, wanted))
    layout = Layout.of(values, mask, None)
    number, tensor = _denominator_triton(denominator, denominator_tensor)
    weights = token_weights(layout, 0, tensor, number)
    inputs = [_flat(x) for x in (values, old_values, returns)]
    kernels.value_loss(inputs, layout, weights, clip, loss, d_values if wanted else None)
    return loss, d_values


def _value_loss_fake(values: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return tuple(_outputs(values, _value_shapes(values, rest[-1])))


def _value_loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _value_loss_grad(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> tuple:
    if upstream is None or not ctx.needs_input_grad[0]:
        return (None,) * 8
    return _scaled(ctx.saved_tensors[0], upstream, ctx.dtype), *[None] * 7


value_loss_op = register(
    "value_loss",
    "(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, Tensor? denominator_tensor, "
    "float denominator, float clip, bool wanted) -> (Tensor, Tensor)",
    cpu=_value_loss_cpu,
    triton=_value_loss_triton,
    fake=_value_loss_fake,
    setup_context=_value_loss_setup,
    backward=_value_loss_grad,
)
