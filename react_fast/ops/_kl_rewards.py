"""The operator behind react_fast.ops.kl_rewards."""

from typing import Any

import torch

from .. import _core
from ._policy_loss import _flat, _layout_cpu, _offsets, _outputs, per_row
from .backend import DTYPE, address, register


def _shapes(logprobs: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(logprobs.shape), (1,)


def _kl_rewards_cpu(
    rewards: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None, kl_coef: float, estimator: int, clip: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    inputs = [_flat(x) for x in (rewards, logprobs, ref_logprobs, mask)]
    bounds, tokens, rows, row_length = _layout_cpu(logprobs, cu_seqlens)
    shaped, stats = _outputs(logprobs, _shapes(logprobs))
    pointers: Any = [address(x) for x in inputs]
    _core.kl_rewards(  # type: ignore[call-arg]
        *pointers, address(bounds), tokens, rows, row_length, DTYPE[logprobs.dtype], per_row(rewards, logprobs),
        kl_coef, estimator, clip, shaped.data_ptr(), stats.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return shaped, stats


def _kl_rewards_triton(
    rewards: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None, kl_coef: float, estimator: int, clip: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    from ..kernels import kl_rewards as kernels
    from ..kernels.policy_loss_layout import Layout

    shaped, stats = _outputs(logprobs, _shapes(logprobs))
    kernels.kl_rewards(
        rewards.contiguous(), per_row(rewards, logprobs), logprobs.contiguous(), ref_logprobs.contiguous(),
        Layout.of(logprobs, mask, _offsets(logprobs, cu_seqlens)), kl_coef, estimator, clip, shaped, stats,
    )  # fmt: skip
    return shaped, stats


def _kl_rewards_fake(rewards: torch.Tensor, logprobs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(_outputs(logprobs, _shapes(logprobs)))


kl_rewards_op = register(
    "kl_rewards",
    "(Tensor rewards, Tensor logprobs, Tensor ref_logprobs, Tensor mask, Tensor? cu_seqlens, float kl_coef, "
    "int estimator, float clip) -> (Tensor, Tensor)",
    cpu=_kl_rewards_cpu,
    triton=_kl_rewards_triton,
    fake=_kl_rewards_fake,
)
