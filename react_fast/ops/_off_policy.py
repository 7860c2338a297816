"""The operators behind react_fast.ops.off_policy: memory layout and registration. Targets have no gradient."""

from typing import Any

import torch

from .. import _core
from ._advantage import _flat, _sequences
from .backend import DTYPE, accumulation_dtype, address, register

Tensor = torch.Tensor
Maybe = torch.Tensor | None


def _like(rewards: Tensor) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=accumulation_dtype(rewards.dtype))


def _vtrace_cpu(
    rewards: Tensor, values: Tensor, log_rhos: Tensor, last_values: Maybe, bootstrap_values: Maybe,
    terminated: Maybe, truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, lams: Maybe, gamma: float, lam: float,
    rho_clip: float, c_clip: float, advantage_rho_clip: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    targets, advantages = _like(rewards), _like(rewards)
    offsets, rows, length = _sequences(rewards, cu_seqlens)
    kept = [
        _flat(x)
        for x in (
            rewards, values, log_rhos, bootstrap_values, last_values, terminated, truncated, mask, lams,
        )
    ]  # fmt: skip
    _core.vtrace(  # type: ignore[call-arg]
        *map(address, kept), address(offsets), rows, length, DTYPE[rewards.dtype], gamma, lam, rho_clip, c_clip,
        advantage_rho_clip, targets.data_ptr(), advantages.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return targets, advantages


def _vtrace_triton(rewards: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import off_policy as kernels

    return kernels.vtrace(rewards, *args)


def _vtrace_fake(rewards: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _like(rewards), _like(rewards)


def _retrace_cpu(
    rewards: Tensor, q_values: Tensor, next_values: Tensor, log_rhos: Tensor, terminated: Maybe,
    truncated: Maybe, mask: Maybe, cu_seqlens: Maybe, lams: Maybe, gamma: float, lam: float,
) -> Tensor:  # fmt: skip
    targets = _like(rewards)
    offsets, rows, length = _sequences(rewards, cu_seqlens)
    kept = [_flat(x) for x in (rewards, q_values, log_rhos, next_values, terminated, truncated, mask, lams)]
    _core.retrace(  # type: ignore[call-arg]
        *map(address, kept), address(offsets), rows, length, DTYPE[rewards.dtype], gamma, lam,
        targets.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return targets


def _retrace_triton(rewards: Tensor, *args: Any) -> Tensor:
    from ..kernels import off_policy as kernels

    return kernels.retrace(rewards, *args)


def _retrace_fake(rewards: Tensor, *args: Any) -> Tensor:
    return _like(rewards)


_FLAGS = (
    "Tensor? terminated, Tensor? truncated, Tensor? mask, Tensor? cu_seqlens, Tensor? lams, float gamma, "
    "float lam"
)
vtrace = register(
    "vtrace",
    "(Tensor rewards, Tensor values, Tensor log_rhos, Tensor? last_values, Tensor? bootstrap_values, " + _FLAGS
    + ", float rho_clip, float c_clip, float advantage_rho_clip) -> (Tensor, Tensor)",
    cpu=_vtrace_cpu,
    triton=_vtrace_triton,
    fake=_vtrace_fake,
)  # fmt: skip
retrace = register(
    "retrace",
    "(Tensor rewards, Tensor q_values, Tensor next_values, Tensor log_rhos, " + _FLAGS + ") -> Tensor",
    cpu=_retrace_cpu,
    triton=_retrace_triton,
    fake=_retrace_fake,
)
