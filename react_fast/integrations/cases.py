"""What the cases of several integrations are made of: numbers, gradients, a process group of one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

Tensor = torch.Tensor


@contextmanager
def alone() -> Iterator[Any]:
    """A group of one; torch.distributed is afterwards what it was, initialised or not."""
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    if dist.is_initialized():
        group: Any = dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def in_group(run: Callable[[Any, Any], dict[str, Tensor]]) -> Callable[[Any], dict[str, Tensor]]:
    """A case's run(function) of one that wants (function, group)."""

    def alone_with(function: Any) -> dict[str, Tensor]:
        with alone() as group:
            return run(function, group)

    return alone_with


def numbers(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """Random numbers that leave torch's own generators alone."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(device)


def pulled(found: dict[str, Tensor], **inputs: Tensor) -> dict[str, Tensor]:
    """The results, and what each that has a gradient pulls on the inputs with."""
    results = {name: x.detach() for name, x in found.items()}
    for name, x in found.items():
        if x.requires_grad:
            upstream = torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x).to(x.dtype)
            gradients = torch.autograd.grad(x, list(inputs.values()), upstream, retain_graph=True)
            results |= {f"d {name} / d {of}": g for of, g in zip(inputs, gradients, strict=True)}
    return results
