"""The operator behind react_fast.ops.group_advantages: memory layout, registration, autograd."""

from typing import Any

import torch

from .. import _core
from .backend import accumulation_dtype, address, register

Tensor = torch.Tensor
Maybe = torch.Tensor | None

# In the order of csrc/advantage.h; the first ones need no numbers beside the rewards.
BASELINES = ("mean", "leave_one_out", "none", "length_weighted", "given")
SCALES = ("none", "std", "batch_std")


def _wide(x: Maybe) -> Maybe:
    return None if x is None else x.double().contiguous()


def _group_cpu(
    rewards: Tensor, group_ids: Tensor, valid: Maybe, upstream: Maybe, aside: Maybe, baseline: int, scale: int,
    raw: bool, eps: float, ddof: int, min_std: float,
) -> Tensor:  # fmt: skip
    out = torch.empty(rewards.shape, dtype=torch.float64, device="cpu")
    x, ids = rewards.double().contiguous(), group_ids.long().contiguous()
    keep, g, beside = None if valid is None else valid.contiguous(), _wide(upstream), _wide(aside)
    _core.group_advantages(
        x.data_ptr(), ids.data_ptr(), address(keep), address(g), address(beside), len(x), baseline, scale, raw,
        eps, ddof, min_std, out.data_ptr(),
    )  # fmt: skip
    return out.to(accumulation_dtype(rewards.dtype))


def _group_triton(rewards: Tensor, *args: Any) -> Tensor:
    from ..kernels import group_advantages as kernels

    return kernels.group_advantages(rewards, *args)


def _group_fake(rewards: Tensor, *args: Any) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=accumulation_dtype(rewards.dtype))


def _group_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    rewards, group_ids, valid, _, aside, *ctx.options = inputs
    ctx.save_for_backward(rewards, group_ids, valid, aside)


def _group_grad(ctx: Any, upstream: Tensor) -> tuple:
    rewards, group_ids, valid, aside = ctx.saved_tensors
    op = torch.ops.react_fast.group_advantages.default
    grad = op(rewards.detach(), group_ids, valid, upstream, aside, *ctx.options)
    return grad.to(rewards.dtype), *[None] * 10


# With an upstream gradient: the gradient of the rewards. `aside`: lengths, or the given baselines.
group_advantages = register(
    "group_advantages",
    "(Tensor rewards, Tensor group_ids, Tensor? valid, Tensor? upstream, Tensor? aside, int baseline, int scale, "
    "bool raw, float eps, int ddof, float min_std) -> Tensor",
    cpu=_group_cpu,
    triton=_group_triton,
    fake=_group_fake,
    setup_context=_group_setup,
    backward=_group_grad,
)
