"""The operators behind react_fast.ops.q_learning: memory layout, registration, autograd."""

from typing import Any

import torch

from .. import _core
from . import _logprob
from ._advantage import _flat, _rows, _sequences
from ._logprob import layout
from .backend import DTYPE, accumulation_dtype, address, register

Tensor = torch.Tensor
Maybe = torch.Tensor | None

_ABSENT = (0, [1, 0, 0])


# ---- n-step returns -----------------------------------------------------------------------------------------


def _window(x: Tensor, n: int) -> int:
    """A window as long as a row is the row, and the core's table of powers no longer. n = 1 has a path of its own,
    which a row's length must not choose."""
    return min(n, max(2, x.shape[-1]))


def _n_step_cpu(
    rewards: Tensor, values: Tensor, last_values: Maybe, bootstrap_values: Maybe, terminated: Maybe,
    truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, gamma: float, n: int, behind: bool,
) -> Tensor:  # fmt: skip
    out = rewards.new_empty(rewards.shape, dtype=accumulation_dtype(rewards.dtype))
    offsets, rows, length = _sequences(rewards, cu_seqlens)
    kept = [_flat(x) for x in (rewards, values, last_values, bootstrap_values, terminated, truncated, mask)]
    pointers: Any = [address(x) for x in kept]
    _core.n_step(  # type: ignore[call-arg]
        *pointers, address(offsets), rows, length, DTYPE[rewards.dtype], gamma,
        _window(rewards, n), behind, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _n_step_triton(rewards: Tensor, *args: Any) -> Tensor:
    from ..kernels import n_step as kernels

    return kernels.n_step(rewards, *args)


def _n_step_fake(rewards: Tensor, *args: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=accumulation_dtype(rewards.dtype))


def _n_step_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    rewards, _, last_values, bootstrap_values, *flags, gamma, n, behind = inputs
    ctx.save_for_backward(*flags)
    ctx.options = gamma, n, behind, last_values is not None, bootstrap_values is not None
    ctx.dtype = rewards.dtype


def _n_step_grad(ctx: Any, upstream: Tensor) -> tuple:
    found = _n_step_backward(upstream, *ctx.saved_tensors, *ctx.options)
    wanted = ctx.needs_input_grad[:4]
    return *(d.to(ctx.dtype) if want else None for d, want in zip(found, wanted, strict=True)), *[None] * 7


def _n_step_grads(
    upstream: Tensor, cu_seqlens: Maybe, has_last: bool, has_bootstrap: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _rows(upstream, cu_seqlens)
    return (
        upstream.new_empty(upstream.shape),
        upstream.new_empty(upstream.shape),
        upstream.new_empty(rows if has_last else 0),
        upstream.new_empty(upstream.shape if has_bootstrap else (0,)),
    )


def _n_step_backward_cpu(
    upstream: Tensor, terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, gamma: float, n: int,
    behind: bool, has_last: bool, has_bootstrap: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _n_step_grads(upstream, cu_seqlens, has_last, has_bootstrap)
    offsets, rows, length = _sequences(upstream, cu_seqlens)
    kept = [_flat(x) for x in (upstream, terminated, truncated, mask)]
    pointers: Any = [address(x) for x in kept]
    _core.n_step_backward(  # type: ignore[call-arg]
        *pointers, address(offsets), rows, length, DTYPE[upstream.dtype], gamma,
        _window(upstream, n), behind, grads[0].data_ptr(), grads[1].data_ptr(),
        address(grads[2] if has_last else None), address(grads[3] if has_bootstrap else None),
        torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _n_step_backward_triton(upstream: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import n_step as kernels

    return kernels.n_step_backward(upstream, *args)


def _n_step_backward_fake(
    upstream: Tensor, terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, gamma: float, n: int,
    behind: bool, has_last: bool, has_bootstrap: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _n_step_grads(upstream, cu_seqlens, has_last, has_bootstrap)


_FLAGS = (
    "Tensor? terminated, Tensor? truncated, Tensor? mask, Tensor? cu_seqlens, float gamma, int n, bool behind"
)

n_step = register(
    "n_step_returns",
    f"(Tensor rewards, Tensor values, Tensor? last_values, Tensor? bootstrap_values, {_FLAGS}) -> Tensor",
    cpu=_n_step_cpu,
    triton=_n_step_triton,
    fake=_n_step_fake,
    setup_context=_n_step_setup,
    backward=_n_step_grad,
)
_n_step_backward = register(
    "n_step_returns_backward",
    f"(Tensor upstream, {_FLAGS}, bool has_last, bool has_bootstrap) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_n_step_backward_cpu,
    triton=_n_step_backward_triton,
    fake=_n_step_backward_fake,
)


# ---- the best token of every row ----------------------------------------------------------------------------


def _operand(x: Maybe) -> tuple[Maybe, int, list[int]]:
    """(what keeps the memory alive, address, [inner, outer_stride, stride]) of a [..., V] tensor."""
    if x is None:
        return None, *_ABSENT
    laid, _, _, *strides = layout(x)
    return laid, laid.data_ptr(), strides


def _gathered(values: Tensor, ids: Tensor, targets: tuple[Maybe, ...]) -> Tensor:
    """The lower of the targets at the ids; where there is no id, what stands in `values`."""
    if all(t is None or t.shape[-1] == 0 for t in targets):
        return values
    at = ids.clamp_min(0).unsqueeze(-1)
    picked = [t.gather(-1, at).squeeze(-1).to(values.dtype) for t in targets if t is not None]
    found = picked[0] if len(picked) == 1 else torch.minimum(picked[0], picked[1])
    return torch.where(ids < 0, values, found)


def _best_outputs(online: Tensor) -> tuple[Tensor, Tensor]:
    rows = online.shape[:-1]
    values = online.new_empty(rows, dtype=accumulation_dtype(online.dtype))
    return values, online.new_empty(rows, dtype=torch.int64)


def _best_cpu(online: Tensor, online_other: Maybe, target: Maybe, target_other: Maybe, mask: Maybe) -> Tensor:
    values, ids = _best_outputs(online)
    (_a, pa, sa), (_b, pb, sb), m = _operand(online), _operand(online_other), _flat(mask)
    _core.best_token(
        pa, sa, pb, sb, DTYPE[online.dtype], address(m), ids.numel(), online.shape[-1], values.data_ptr(),
        ids.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return _gathered(values, ids, (target, target_other))


def _best_triton(
    online: Tensor, online_other: Maybe, target: Maybe, target_other: Maybe, mask: Maybe
) -> Tensor:
    from ..kernels import q_learning as kernels

    values, ids = _best_outputs(online)
    kernels.best_token(layout(online), None if online_other is None else layout(online_other), _flat(mask), values,
                       ids)  # fmt: skip
    return _gathered(values, ids, (target, target_other))


def _best_fake(online: Tensor, *_: Any) -> Tensor:
    return _best_outputs(online)[0]


best_values = register(
    "best_values",
    "(Tensor online, Tensor? online_other, Tensor? target, Tensor? target_other, Tensor? mask) -> Tensor",
    cpu=_best_cpu,
    triton=_best_triton,
    fake=_best_fake,
)


# ---- the expectation under a policy -------------------------------------------------------------------------


def _expected_cpu(logits: Tensor, q: Tensor, mask: Maybe, temperature: float) -> Tensor:
    out = _best_outputs(logits)[0]
    (_a, pa, sa), (_b, pb, sb), m = _operand(logits), _operand(q), _flat(mask)
    _core.expected_values(
        pa, sa, pb, sb, DTYPE[logits.dtype], address(m), out.numel(), logits.shape[-1], temperature,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _expected_triton(logits: Tensor, q: Tensor, mask: Maybe, temperature: float) -> Tensor:
    from ..kernels import q_learning as kernels

    out = _best_outputs(logits)[0]
    kernels.expected_values(layout(logits), layout(q), _flat(mask), temperature, out)
    return out


def _expected_fake(logits: Tensor, *_: Any) -> Tensor:
    return _best_outputs(logits)[0]


expected_values = register(
    "expected_values",
    "(Tensor logits, Tensor q, Tensor? mask, float temperature) -> Tensor",
    cpu=_expected_cpu,
    triton=_expected_triton,
    fake=_expected_fake,
)


# ---- the soft maximum: the statistics are those of token_logprobs without a token ----------------------------


def _soft(q: Tensor, mask: Maybe, alpha: float) -> tuple[Tensor, Tensor]:
    """(V, statistics [2, ...]: largest q, log of the sum)."""
    none = torch.empty((*q.shape[:-1], 0), dtype=torch.int64, device=q.device)
    _, _, stats = _logprob.token_logprobs(q.detach(), none, mask, None, None, alpha, 0.0, False, False)
    found = torch.where(stats[0] == float("-inf"), stats[0], torch.add(stats[0], stats[1], alpha=alpha))
    return found if mask is None else torch.where(mask, found, 0.0), stats


def _soft_fake(q: Tensor, mask: Maybe, alpha: float) -> tuple[Tensor, Tensor]:
    out = _best_outputs(q)[0]
    return out, out.new_empty((2, *out.shape))


def _soft_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, mask, ctx.alpha = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, mask, output[1])


def _soft_grad(ctx: Any, upstream: Maybe, _: None) -> tuple:
    q, mask, stats = ctx.saved_tensors
    return None if upstream is None else _soft_backward(q, mask, stats, upstream, ctx.alpha), None, None


def _soft_backward_cpu(q: Tensor, mask: Maybe, stats: Tensor, upstream: Tensor, alpha: float) -> Tensor:
    d_q = q.new_empty(q.shape)
    (_laid, pointer, strides), m, g = _operand(q), _flat(mask), upstream.contiguous()
    _core.soft_values_backward(
        pointer, strides, DTYPE[q.dtype], address(m), g.numel(), q.shape[-1], stats.data_ptr(), g.data_ptr(),
        alpha, d_q.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return d_q


def _soft_backward_triton(q: Tensor, mask: Maybe, stats: Tensor, upstream: Tensor, alpha: float) -> Tensor:
    from ..kernels import q_learning as kernels

    d_q = q.new_empty(q.shape)
    kernels.soft_values_backward(layout(q), _flat(mask), stats, upstream.contiguous(), alpha, d_q)
    return d_q


def _soft_backward_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


soft_values = register(
    "soft_values",
    "(Tensor q, Tensor? mask, float alpha) -> (Tensor, Tensor)",
    cpu=_soft,
    triton=_soft,
    fake=_soft_fake,
    setup_context=_soft_setup,
    backward=_soft_grad,
)
_soft_backward = register(
    "soft_values_backward",
    "(Tensor q, Tensor? mask, Tensor stats, Tensor upstream, float alpha) -> Tensor",
    cpu=_soft_backward_cpu,
    triton=_soft_backward_triton,
    fake=_soft_backward_fake,
)


# ---- logits guided by Q -------------------------------------------------------------------------------------


def _guide_cpu(logits: Tensor, q: Tensor, other: Maybe, values: Maybe, beta: float) -> Tensor:
    out = _guide_fake(logits)
    (_a, pa, sa), (_b, pb, sb), (_c, pc, sc), v = (
        _operand(logits),
        _operand(q),
        _operand(other),
        _wide(values),
    )
    _core.guided_logits(
        pa, sa, pb, sb, pc, sc, DTYPE[logits.dtype], logits.shape[:-1].numel(), logits.shape[-1], address(v), beta,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _guide_triton(logits: Tensor, q: Tensor, other: Maybe, values: Maybe, beta: float) -> Tensor:
    from ..kernels import q_learning as kernels

    out = _guide_fake(logits)
    second = None if other is None else layout(other)
    kernels.guided_logits(layout(logits), layout(q), second, _wide(values), beta, out)
    return out


def _guide_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=accumulation_dtype(logits.dtype))


def _wide(x: Maybe) -> Maybe:
    return None if x is None else x.to(accumulation_dtype(x.dtype)).contiguous()


guided_logits = register(
    "guided_logits",
    "(Tensor logits, Tensor q, Tensor? other, Tensor? values, float beta) -> Tensor",
    cpu=_guide_cpu,
    triton=_guide_triton,
    fake=_guide_fake,
)
