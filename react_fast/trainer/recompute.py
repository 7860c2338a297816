"""Gradient checkpointing: memory for the layers' inner activations is traded for a second forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of the model keeps its input alone and is run again in the backward.

    transformers' own switch acts in training mode only, and reinforcement learning updates without dropout, in
    evaluation mode. Source: Chen et al. 2016 (arXiv:1604.06174).

    Raises: ValueError for a model without a list of layers.
    """
    layers = layers_of(model)
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The outermost list of modules: a transformer's layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return list(module)
    raise ValueError(
        f"trainer.gradient_checkpointing must be false for {type(model).__name__}, which has no list of layers"
    )
