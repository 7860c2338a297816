"""The operators behind react_fast.ops.advantage: memory layout, registration, autograd."""

from typing import Any

import torch

from .. import _core
from . import _check
from .backend import DTYPE, accumulation_dtype, address, register, resolve

Tensor = torch.Tensor
Maybe = torch.Tensor | None


def _flat(x: Maybe) -> Maybe:
    return None if x is None else x.contiguous()


def _sequences(x: Tensor, cu_seqlens: Maybe) -> tuple[Maybe, int, int]:
    """(offsets as int64, rows, row length)."""
    if cu_seqlens is None:
        return None, x.shape[0], x.shape[1]
    return _check.rising("cu_seqlens", cu_seqlens, x.shape[0], "the packed steps"), cu_seqlens.shape[0] - 1, 0


def _rows(x: Tensor, cu_seqlens: Maybe) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


# ---- gae; discounted returns are values=None, lam=1 -----------------------------------------------------------


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=accumulation_dtype(x.dtype))


def _gae_outputs(rewards: Tensor, values: Maybe) -> tuple[Tensor, Tensor]:
    nothing = rewards.new_empty(0, dtype=accumulation_dtype(rewards.dtype))
    return nothing if values is None else _like(rewards), _like(rewards)


def _gae_into(
    advantages: Maybe, returns: Tensor, want_moments: bool, rewards: Tensor, values: Maybe, last_values: Maybe,
    bootstrap_values: Maybe, terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, lams: Maybe,
    gamma: float, lam: float,
) -> list[float]:  # fmt: skip
    """Fills the results; the advantages' (count, mean, M2) if they are wanted.

    Results whose transposes are contiguous ask for the core's time-major walk, which knows `terminated` alone.
    """
    offsets, rows, length = _sequences(rewards, cu_seqlens)
    if not returns.is_contiguous():
        by_time = [
            None if x is None else x.t().contiguous() for x in (rewards, values, last_values, terminated)
        ]
        _core.gae_by_time(  # type: ignore[call-arg]
            *map(address, by_time), rows, length, DTYPE[rewards.dtype], gamma, gamma * lam, address(advantages),
            returns.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return []
    given = rewards, values, last_values, bootstrap_values, terminated, truncated, mask, lams
    kept = [_flat(x) for x in given]
    return _core.gae(  # type: ignore[call-arg]
        *map(address, kept), address(offsets), rows, length, DTYPE[rewards.dtype], gamma, lam,
        address(advantages), returns.data_ptr(), want_moments, torch.get_num_threads(),
    )  # fmt: skip


def _gae_cpu(rewards: Tensor, values: Maybe, *args: Any) -> tuple[Tensor, Tensor]:
    advantages, returns = _gae_outputs(rewards, values)
    _gae_into(None if values is None else advantages, returns, False, rewards, values, *args)
    return advantages, returns


def _gae_triton(rewards: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import advantage as kernels

    return kernels.gae(rewards, *args)


def _gae_fake(rewards: Tensor, values: Maybe, *args: Any) -> tuple[Tensor, Tensor]:
    return _gae_outputs(rewards, values)


def _gae_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    rewards, values, _, _, terminated, truncated, mask, cu_seqlens, lams, gamma, lam = inputs
    ctx.save_for_backward(terminated, truncated, mask, cu_seqlens, lams)
    ctx.gamma, ctx.lam, ctx.dtype, ctx.has_values = gamma, lam, rewards.dtype, values is not None


def _gae_grad(ctx: Any, d_advantages: Tensor, d_returns: Tensor) -> tuple:
    wanted = ctx.needs_input_grad[:4]
    found = _gae_backward(
        d_returns,
        d_advantages if ctx.has_values else None,
        *ctx.saved_tensors,
        ctx.gamma,
        ctx.lam,
        *wanted[1:],
    )
    grads = [d.to(ctx.dtype) if want else None for d, want in zip(found, wanted, strict=True)]
    return *grads, *[None] * 7


def _gae_grads(
    d_returns: Tensor, cu_seqlens: Maybe, want_values: bool, want_last: bool, want_bootstrap: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _rows(d_returns, cu_seqlens)
    return (
        torch.empty_like(d_returns, memory_format=torch.contiguous_format),
        d_returns.new_empty(d_returns.shape if want_values else (0,)),
        d_returns.new_empty(rows if want_last else 0),
        d_returns.new_empty(d_returns.shape if want_bootstrap else (0,)),
    )


def _gae_backward_cpu(
    d_returns: Tensor, d_advantages: Maybe, terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe,
    lams: Maybe, gamma: float, lam: float, want_values: bool, want_last: bool, want_bootstrap: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wanted = (want_values, want_last, want_bootstrap)
    grads = _gae_grads(d_returns, cu_seqlens, *wanted)
    offsets, rows, length = _sequences(d_returns, cu_seqlens)
    kept = [_flat(x) for x in (d_advantages, d_returns, terminated, truncated, mask, lams)]
    targets = [grads[0], *(grad if want else None for grad, want in zip(grads[1:], wanted, strict=True))]
    _core.gae_backward(  # type: ignore[call-arg]
        *map(address, kept), address(offsets), rows, length, DTYPE[d_returns.dtype], gamma, lam,
        *map(address, targets), torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _gae_backward_triton(d_returns: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import advantage as kernels

    return kernels.gae_backward(d_returns, *args)


def _gae_backward_fake(d_returns: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gae_grads(d_returns, args[4], *args[8:])


_FLAGS = (
    "Tensor? terminated, Tensor? truncated, Tensor? mask, Tensor? cu_seqlens, Tensor? lams, float gamma, "
    "float lam"
)
gae = register(
    "gae",
    "(Tensor rewards, Tensor? values, Tensor? last_values, Tensor? bootstrap_values, " + _FLAGS
    + ") -> (Tensor, Tensor)",
    cpu=_gae_cpu,
    triton=_gae_triton,
    fake=_gae_fake,
    setup_context=_gae_setup,
    backward=_gae_grad,
)  # fmt: skip
_gae_backward = register(
    "gae_backward",
    "(Tensor d_returns, Tensor? d_advantages, " + _FLAGS
    + ", bool want_values, bool want_last, bool want_bootstrap) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_gae_backward_cpu,
    triton=_gae_backward_triton,
    fake=_gae_backward_fake,
)  # fmt: skip


# ---- gae for whitening, and into memory of the caller's ---------------------------------------------------------


def _gae_moments_cpu(rewards: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    advantages, returns = _like(rewards), _like(rewards)
    return advantages, returns, _gae_out_cpu(advantages, returns, rewards, *args, True)


def _gae_moments_triton(rewards: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    advantages, returns = _like(rewards), _like(rewards)
    return advantages, returns, _gae_out_triton(advantages, returns, rewards, *args, True)


def _gae_moments_fake(rewards: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(rewards), _like(rewards), _stats_fake(rewards, True)


def _gae_moments_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    _gae_setup(ctx, inputs, output)
    ctx.mark_non_differentiable(output[2])


def _gae_moments_grad(ctx: Any, d_advantages: Tensor, d_returns: Tensor, _: Any) -> tuple:
    return _gae_grad(ctx, d_advantages, d_returns)


# (advantages, returns, the advantages' (count, mean, M2) as float64 [3], or [3, P] in parts).
gae_moments = register(
    "gae_moments",
    "(Tensor rewards, Tensor values, Tensor? last_values, Tensor? bootstrap_values, " + _FLAGS
    + ") -> (Tensor, Tensor, Tensor)",
    cpu=_gae_moments_cpu,
    triton=_gae_moments_triton,
    fake=_gae_moments_fake,
    setup_context=_gae_moments_setup,
    backward=_gae_moments_grad,
)  # fmt: skip


def _gae_out_cpu(advantages: Tensor, returns: Tensor, *args: Any) -> Tensor:
    *given, want_moments = args
    found = _gae_into(advantages, returns, want_moments, *given)
    return torch.tensor(found if want_moments else [], dtype=torch.float64, device="cpu")


def _gae_out_triton(advantages: Tensor, returns: Tensor, *args: Any) -> Tensor:
    from ..kernels import advantage as kernels
    from ..kernels import whiten

    *given, want_moments = args
    shape = whiten.parts_shape() if want_moments else (0,)
    parts = advantages.new_empty(shape, dtype=torch.float64)
    kernels.gae(*given, out=(advantages, returns), parts=parts if want_moments else None)
    return parts


def _stats_fake(x: Tensor, want_moments: bool) -> Tensor:
    shape: tuple[int, ...] = (3 * want_moments,)
    if want_moments and x.device.type != "meta" and resolve(x.device.type) == "triton":
        from ..kernels import whiten

        shape = whiten.parts_shape()
    return x.new_empty(shape, dtype=torch.float64)


def _gae_out_fake(advantages: Tensor, *args: Any) -> Tensor:
    return _stats_fake(advantages, args[-1])


gae_out = register(
    "gae_out",
    "(Tensor(a!) advantages, Tensor(b!) returns, Tensor rewards, Tensor values, Tensor? last_values, "
    "Tensor? bootstrap_values, " + _FLAGS + ", bool want_moments) -> Tensor",
    cpu=_gae_out_cpu,
    triton=_gae_out_triton,
    fake=_gae_out_fake,
)


# ---- td_lambda_returns: gae's second result alone --------------------------------------------------------------


def _td_lambda_cpu(rewards: Tensor, *args: Any) -> Tensor:
    returns = _like(rewards)
    _gae_into(None, returns, False, rewards, *args)
    return returns


def _td_lambda_triton(rewards: Tensor, *args: Any) -> Tensor:
    from ..kernels import advantage as kernels

    return kernels.gae(rewards, *args, want_advantages=False)[1]


def _td_lambda_fake(rewards: Tensor, *args: Any) -> Tensor:
    return _like(rewards)


def _td_lambda_grad(ctx: Any, d_returns: Tensor) -> tuple:
    ctx.has_values = False  # no gradient comes from advantages
    return _gae_grad(ctx, d_returns, d_returns)


td_lambda_returns = register(
    "td_lambda_returns",
    "(Tensor rewards, Tensor values, Tensor? last_values, Tensor? bootstrap_values, "
    + _FLAGS
    + ") -> Tensor",
    cpu=_td_lambda_cpu,
    triton=_td_lambda_triton,
    fake=_td_lambda_fake,
    setup_context=_gae_setup,
    backward=_td_lambda_grad,
)


# ---- y_t = b_t + a_t y_{t+1} ------------------------------------------------------------------------------------


def _scan_cpu(a: Tensor, b: Tensor, init: Maybe, cu_seqlens: Maybe) -> Tensor:
    out = torch.empty(a.shape, dtype=accumulation_dtype(a.dtype), device="cpu")
    return _scan_into(out, a, b, init, cu_seqlens)


def _scan_into(out: Tensor, a: Tensor, b: Tensor, init: Maybe, cu_seqlens: Maybe) -> Tensor:
    offsets, rows, length = _sequences(a, cu_seqlens)
    kept = [_flat(x) for x in (a, b, init)]
    _core.reverse_linear_scan(  # type: ignore[call-arg]
        *map(address, kept),
        address(offsets),
        rows,
        length,
        DTYPE[a.dtype],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def scan_out(out: Tensor, *given: Any) -> Tensor:
    """The scan in the caller's memory; on a CPU it is written there, elsewhere copied."""
    if not torch.compiler.is_compiling() and resolve(out.device.type) == "cpu":
        return _scan_into(out, *given)
    return out.copy_(reverse_linear_scan(*given))


def _scan_triton(a: Tensor, *args: Any) -> Tensor:
    from ..kernels import advantage as kernels

    return kernels.reverse_linear_scan(a, *args)


def _scan_fake(a: Tensor, *args: Any) -> Tensor:
    return a.new_empty(a.shape, dtype=accumulation_dtype(a.dtype))


def _scan_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, _, init, cu_seqlens = inputs
    ctx.save_for_backward(a, output, init, cu_seqlens)


def _scan_grad(ctx: Any, upstream: Tensor) -> tuple:
    a, y, init, cu_seqlens = ctx.saved_tensors
    d_a, d_b, d_init = _scan_backward(upstream, a, y, init, cu_seqlens)
    return d_a.to(a.dtype), d_b.to(a.dtype), None if init is None else d_init.to(a.dtype), None


def _scan_grads(upstream: Tensor, cu_seqlens: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(upstream, cu_seqlens)
    return upstream.new_empty(upstream.shape), upstream.new_empty(upstream.shape), upstream.new_empty(rows)


def _scan_backward_cpu(
    upstream: Tensor, a: Tensor, y: Tensor, init: Maybe, cu_seqlens: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _scan_grads(upstream, cu_seqlens)
    offsets, rows, length = _sequences(upstream, cu_seqlens)
    kept = [_flat(x) for x in (a, y, init, upstream)]
    _core.reverse_linear_scan_backward(  # type: ignore[call-arg]
        *map(address, kept), address(offsets), rows, length, DTYPE[a.dtype], *map(address, grads),
        torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _scan_backward_triton(upstream: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import advantage as kernels

    return kernels.reverse_linear_scan_backward(upstream, *args)


def _scan_backward_fake(
    upstream: Tensor, a: Tensor, y: Tensor, init: Maybe, cu_seqlens: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    return _scan_grads(upstream, cu_seqlens)


reverse_linear_scan = register(
    "reverse_linear_scan",
    "(Tensor a, Tensor b, Tensor? init, Tensor? cu_seqlens) -> Tensor",
    cpu=_scan_cpu,
    triton=_scan_triton,
    fake=_scan_fake,
    setup_context=_scan_setup,
    backward=_scan_grad,
)
_scan_backward = register(
    "reverse_linear_scan_backward",
    "(Tensor upstream, Tensor a, Tensor y, Tensor? init, Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor)",
    cpu=_scan_backward_cpu,
    triton=_scan_backward_triton,
    fake=_scan_backward_fake,
)
