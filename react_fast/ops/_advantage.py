"""The operators behind react_fast.ops.advantage: memory layout, registration, autograd."""

from typing import Any

import torch

from .. import _core
from . import _check
from .backend import DTYPE, accumulation_dtype, address, register

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
    advantages: Maybe, rewards: Tensor, values: Maybe, last_values: Maybe, bootstrap_values: Maybe,
    terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, lams: Maybe, gamma: float, lam: float,
) -> Tensor:  # fmt: skip
    """The returns; the advantages go where they are wanted."""
    returns = _like(rewards)
    offsets, rows, length = _sequences(rewards, cu_seqlens)
    kept = [
        _flat(x) for x in (rewards, values, last_values, bootstrap_values, terminated, truncated, mask, lams)
    ]
    _core.gae(  # type: ignore[call-arg]
        *map(address, kept), address(offsets), rows, length, DTYPE[rewards.dtype], gamma, lam,
        address(advantages), returns.data_ptr(), False, torch.get_num_threads(),
    )  # fmt: skip
    return returns


def _gae_cpu(rewards: Tensor, values: Maybe, *args: Any) -> tuple[Tensor, Tensor]:
    advantages = (
        rewards.new_empty(0, dtype=accumulation_dtype(rewards.dtype)) if values is None else _like(rewards)
    )
    return advantages, _gae_into(None if values is None else advantages, rewards, values, *args)


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


# ---- td_lambda_returns: gae's second result alone --------------------------------------------------------------


def _td_lambda_cpu(rewards: Tensor, *args: Any) -> Tensor:
    return _gae_into(None, rewards, *args)


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
    out = torch.empty(a.shape, dtype=accumulation_dtype(a.dtype))
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


# ---- moments and whitening ------------------------------------------------------------------------------------


def _moments_cpu(x: Tensor, mask: Maybe) -> Tensor:
    kept, counts = x.contiguous(), _flat(mask)
    found = _core.moments(
        kept.data_ptr(), address(counts), DTYPE[x.dtype], x.numel(), torch.get_num_threads()
    )
    return torch.tensor(found, dtype=torch.float64)


def _moments_triton(x: Tensor, mask: Maybe) -> Tensor:
    from ..kernels import whiten as kernels

    return kernels.moments(x, mask)


def _moments_fake(x: Tensor, mask: Maybe) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


# (count, mean, M2) as one float64 [3].
moments = register(
    "moments",
    "(Tensor x, Tensor? mask) -> Tensor",
    cpu=_moments_cpu,
    triton=_moments_triton,
    fake=_moments_fake,
)


def _scale(stats: list[float], eps: float, ddof: int) -> tuple[float, float]:
    """(1 / sqrt(variance + eps), n - ddof); (1, 0) for fewer than two or no spread: centred only."""
    count, _, m2 = stats
    freedom = count - ddof
    if count < 2 or freedom <= 0 or m2 / freedom + eps == 0:
        return 1.0, 0.0
    return (m2 / freedom + eps) ** -0.5, freedom


def _whiten_cpu(
    x: Tensor, mask: Maybe, stats: Tensor, shift_mean: bool, eps: float, ddof: int, fixed: bool
) -> Tensor:
    out = torch.empty(x.shape, dtype=accumulation_dtype(x.dtype))
    kept, counts = x.contiguous(), _flat(mask)
    given = stats.tolist()
    scale, _ = _scale(given, eps, ddof)
    mean = given[1]
    _core.whiten(
        kept.data_ptr(), address(counts), DTYPE[x.dtype], x.numel(), mean, scale, 0.0 if shift_mean else mean,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _whiten_triton(x: Tensor, *args: Any) -> Tensor:
    from ..kernels import whiten as kernels

    return kernels.whiten(x, *args)


def _whiten_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=accumulation_dtype(x.dtype))


def _whiten_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, mask, stats, *ctx.options = inputs
    ctx.save_for_backward(x, mask, stats)


def _whiten_grad(ctx: Any, upstream: Tensor) -> tuple:
    x, mask, stats = ctx.saved_tensors
    grad = _whiten_backward(upstream, x, mask, stats, *ctx.options)
    return grad.to(x.dtype), *[None] * 6


def _whiten_backward_cpu(
    upstream: Tensor,
    x: Tensor,
    mask: Maybe,
    stats: Tensor,
    shift_mean: bool,
    eps: float,
    ddof: int,
    fixed: bool,
) -> Tensor:
    out = torch.empty(x.shape, dtype=accumulation_dtype(x.dtype))
    kept, counts, g = x.contiguous(), _flat(mask), upstream.contiguous()
    common = (kept.data_ptr(), address(counts), g.data_ptr(), DTYPE[x.dtype], x.numel())
    count, mean, _ = given = stats.tolist()
    scale, freedom = _scale(given, eps, ddof)
    constant = linear = 0.0
    if not fixed and count:
        plain, weighted = _core.whiten_sums(*common, mean, torch.get_num_threads())
        constant = (-scale if shift_mean else 1.0 - scale) * plain / count
        linear = -(scale**3) * weighted / freedom if freedom else 0.0
    _core.whiten_backward(*common, mean, scale, constant, linear, out.data_ptr(), torch.get_num_threads())
    return out


def _whiten_backward_triton(upstream: Tensor, *args: Any) -> Tensor:
    from ..kernels import whiten as kernels

    return kernels.whiten_backward(upstream, *args)


def _whiten_backward_fake(upstream: Tensor, x: Tensor, *args: Any) -> Tensor:
    return _whiten_fake(x)


# `stats` is the result of `moments`: of x itself, or `fixed`, from elsewhere, and then without a gradient.
_WHITEN = "Tensor? mask, Tensor stats, bool shift_mean, float eps, int ddof, bool fixed) -> Tensor"
whiten = register(
    "whiten",
    "(Tensor x, " + _WHITEN,
    cpu=_whiten_cpu,
    triton=_whiten_triton,
    fake=_whiten_fake,
    setup_context=_whiten_setup,
    backward=_whiten_grad,
)
_whiten_backward = register(
    "whiten_backward",
    "(Tensor upstream, Tensor x, " + _WHITEN,
    cpu=_whiten_backward_cpu,
    triton=_whiten_backward_triton,
    fake=_whiten_backward_fake,
)
