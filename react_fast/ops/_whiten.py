"""The operators behind moments and whiten: memory layout, registration, autograd."""

from typing import Any

import torch

from .. import _core
from .backend import DTYPE, accumulation_dtype, address, register

Tensor = torch.Tensor
Maybe = torch.Tensor | None


def _flat(x: Maybe) -> Maybe:
    return None if x is None else x.contiguous()


def _moments_cpu(x: Tensor, mask: Maybe) -> Tensor:
    kept, counts = x.contiguous(), _flat(mask)
    found = _core.moments(
        kept.data_ptr(), address(counts), DTYPE[x.dtype], x.numel(), torch.get_num_threads()
    )
    return torch.tensor(found, dtype=torch.float64, device="cpu")


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


def _merge_parts_cpu(stats: Tensor) -> Tensor:
    return stats.clone()


def _merge_parts_triton(stats: Tensor) -> Tensor:
    from ..kernels import whiten as kernels

    return kernels.merge(stats) if stats.dim() == 2 else stats.clone()


# `stats` is [3], or from a Triton scan [3, P], (count, mean, M2) of P parts; this makes the former of the latter.
merge_parts = register(
    "merge_parts",
    "(Tensor stats) -> Tensor",
    cpu=_merge_parts_cpu,
    triton=_merge_parts_triton,
    fake=lambda stats: stats.new_empty(3),
)


def _scale(stats: list[float], eps: float, ddof: int) -> tuple[float, float]:
    """(1 / sqrt(variance + eps), n - ddof); (1, 0) for fewer than two or no spread: centred only."""
    count, _, m2 = stats
    freedom = count - ddof
    if count < 2 or freedom <= 0 or m2 / freedom + eps == 0:
        return 1.0, 0.0
    return (m2 / freedom + eps) ** -0.5, freedom


def _whiten_cpu(
    x: Tensor,
    mask: Maybe,
    stats: Tensor,
    shift_mean: bool,
    eps: float,
    ddof: int,
    fixed: bool,
    out: Maybe = None,
) -> Tensor:
    out = torch.empty(x.shape, dtype=accumulation_dtype(x.dtype), device="cpu") if out is None else out
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
    out = torch.empty(x.shape, dtype=accumulation_dtype(x.dtype), device="cpu")
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


# ---- in place: contiguous float32 or float64, no gradient -------------------------------------------------------


def _whiten_in_place_cpu(x: Tensor, mask: Maybe, stats: Tensor, eps: float, ddof: int) -> None:
    _whiten_cpu(x, mask, stats, True, eps, ddof, True, out=x)


def _whiten_in_place_triton(x: Tensor, mask: Maybe, stats: Tensor, eps: float, ddof: int) -> None:
    from ..kernels import whiten as kernels

    kernels.whiten(x, mask, stats, True, eps, ddof, True, out=x)


whiten_in_place = register(
    "whiten_in_place",
    "(Tensor(a!) x, Tensor? mask, Tensor stats, float eps, int ddof) -> ()",
    cpu=_whiten_in_place_cpu,
    triton=_whiten_in_place_triton,
    fake=lambda *_: None,
)
