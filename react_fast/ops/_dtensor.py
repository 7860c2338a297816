"""Parameters whose elements lie on other ranks: gathered before a kernel; every other wrapped tensor is refused.

A wrapper has no storage of its own, so its data_ptr leads nowhere. And all collectives happen here, once before
and once behind the tiles: a rank with fewer rows, or none, has fewer tiles, and the others would wait for it.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def plain(name: str, value: Any, advice: str = "pass its to_local() or full_tensor()") -> Any:
    """`value`, once it is no wrapper around other tensors; an asynchronous collective's result is waited for.

    Raises: TypeError for a DTensor, a quantised or any other wrapper.
    """
    if type(value) in _PLAIN:
        return value
    if type(value).__name__ == "AsyncCollectiveTensor":
        return value.clone()
    if not is_traceable_wrapper_subclass(value):
        return value
    advice = f"; {advice}" if is_dtensor(value) else ""
    raise TypeError(f"{name} must be a plain tensor, got {type(value).__name__}{advice}")


def gathered(name: str, value: Any, dtype: torch.dtype | None = None, tp_group: Any = None) -> Any:
    """The whole of a parameter that is a DTensor; another value only passes through `plain`.

    Every rank of the DTensor's mesh calls it, and the gradient comes back as fully_shard would reduce it: the mean
    over the mesh, whose ranks hold different rows (where they hold the same, the mean is what each of them has),
    in float32 or better, placed as the parameter is. One gather here and one reduction in the backward for each
    axis of the mesh; no reduction for a frozen parameter.

    Args:
        value: [V, D] or [V], a DTensor sharded or replicated over any mesh, evenly or not, or a plain tensor.
        dtype: what a DTensor is cast to before it travels.
        tp_group: with a group the value is this rank's part and stays so; a DTensor is refused.
    Raises: TypeError as `plain`; ValueError for a DTensor that is a pending sum, or a parameter whose elements its
        engine has put away.
    """
    if tp_group is None and is_dtensor(value):
        if any(placement.is_partial() for placement in value.placements):
            raise ValueError(f"{name} must be sharded or replicated, got placements {value.placements}")
        value = _Gather.apply(value, dtype)
    value = plain(name, value, advice=f"with tp_group pass {name}.to_local()")
    if isinstance(value, torch.Tensor) and tuple(value.shape) == (0,):
        raise ValueError(
            f"{name} must hold its elements, got [0]: gather it around the call, as with "
            "deepspeed.zero.GatheredParameters or FullyShardedDataParallel.summon_full_params"
        )
    return value


def is_dtensor(value: Any) -> bool:
    return type(value) not in _PLAIN and hasattr(value, "full_tensor")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Any, dtype: torch.dtype | None) -> torch.Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = value.device_mesh, value.placements, value.dtype
        # On a mesh of one rank the whole is the shard itself, which must not become part of the graph.
        return value.to(dtype or value.dtype).full_tensor().detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        wide = torch.promote_types(grads[0].dtype, torch.float32)
        sums = [Partial()] * ctx.mesh.ndim
        total = DTensor.from_local(grads[0].to(wide).contiguous(), ctx.mesh, sums, run_check=False)
        mean = total.redistribute(placements=ctx.placements) / ctx.mesh.size()
        return mean.to(ctx.dtype), None
