"""A trainer's state as the tensors and the JSON of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch


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
