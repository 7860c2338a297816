"""A trainer's state as the tensors and the JSON of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def split(tree: Any, prefix: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take the tensors out of nested dicts, lists and tuples.

    Returns: (the tree with {"tensor": name} in place of every tensor, tensors by name). Keys that are no
        strings are kept as pairs, since JSON has string keys only.
    """
    if isinstance(tree, torch.Tensor):
        return {"tensor": prefix}, {prefix: tree.detach()}
    if isinstance(tree, Mapping):
        parts = [(key, *split(value, f"{prefix}.{key}")) for key, value in tree.items()]
        tensors = {name: tensor for _, _, found in parts for name, tensor in found.items()}
        return {"pairs": [[key, rest] for key, rest, _ in parts]}, tensors
    if isinstance(tree, (list, tuple)):
        items = [split(value, f"{prefix}.{i}") for i, value in enumerate(tree)]
        return {"items": [rest for rest, _ in items]}, {n: t for _, found in items for n, t in found.items()}
    return {"value": tree}, {}


def join(rest: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `split`; tuples come back as lists."""
    if "tensor" in rest:
        return tensors[rest["tensor"]]
    if "pairs" in rest:
        return {key: join(value, tensors) for key, value in rest["pairs"]}
    if "items" in rest:
        return [join(value, tensors) for value in rest["items"]]
    return rest["value"]


def whole(tree: Any, *, keep: bool) -> Any:
    """A tree of dicts, lists and tensors with whole tensors in place of shards, on the CPU of the ranks that
    `keep` them and empty on the others. Every rank has to ask."""
    if isinstance(tree, DTensor):
        found = tree.full_tensor()
        return found.cpu() if keep else found.new_empty(0)
    if isinstance(tree, Mapping):
        return {key: whole(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [whole(value, keep=keep) for value in tree]
    return tree


def shard_like(own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor, cut like `own` if that is a shard; every rank has to ask."""
    if not isinstance(own, DTensor) or isinstance(value, DTensor) or own.shape != value.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


def load_module_state(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load what `state_dict` and `whole` returned."""
    own = module.state_dict()
    module.load_state_dict(
        {name: shard_like(own[name], x) if name in own else x for name, x in state.items()}
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `state_dict` and `whole` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        index: {
            name: shard_like(parameters[index], x) if torch.is_tensor(x) else x for name, x in one.items()
        }
        for index, one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})
