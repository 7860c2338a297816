"""How a causal language model's logits follow from its last hidden states, adapters on the way included."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops._dtensor import is_dtensor

# Names under which configurations of transformers keep a factor of the logits, or a divisor.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
# Adapters of PEFT whose model does more around the forward than its layers do inside.
_AROUND = ("XLORA", "POLY")
# Largest product in the trial: any softcap shows.
_LOUD = 1000.0


class Projection(NamedTuple):
    """y = hidden @ weight.T + bias of an output layer as it is now, as tensors."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class OutputLayer:
    """logits = softcap * tanh(y / softcap), y = logit_scale * (hidden @ weight.T + bias).

    Attributes:
        body: the model without its output layer.
        linear: that layer: nn.Linear, or one with PEFT's LoRA or in PEFT's modules_to_save.
    """

    body: nn.Module
    linear: Any
    logit_scale: float
    softcap: float | None

    def hidden(self, **inputs: Any) -> torch.Tensor:
        """[B, T, D] of what the body takes: input_ids, attention_mask, ..."""
        out, weight = self.body(**inputs, use_cache=False), self.linear.weight
        return out.last_hidden_state.to(weight.device, weight.dtype)

    def projection(self, hidden: torch.Tensor) -> Projection:
        """Differentiable in hidden and in all that the layer trains.

        With LoRA, y = x W' + s B A dropout(x) is one product of [x, s A dropout(x)] and [W, B]: [V, D + r] more
        memory, and for B's gradient that of W, too.
        """
        found = projection(self.linear, hidden)
        if found is None:
            raise ValueError(f"model must keep its output layer linear, got {type(self.linear).__name__}")
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.of(self.linear(hidden))

    def of(self, y: torch.Tensor) -> torch.Tensor:
        """The logits of the layer's products."""
        y = y * self.logit_scale
        return y if self.softcap is None else self.softcap * torch.tanh(y / self.softcap)


def projection(layer: Any, hidden: torch.Tensor) -> Projection | None:
    """The product that a layer computes for these hidden states; None if it is another function."""
    if getattr(type(layer), "forward", None) is nn.Linear.forward:
        return Projection(hidden, layer.weight, layer.bias)
    if "peft" not in sys.modules:
        return None
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if type(layer) is ModulesToSaveWrapper:
        names = [] if layer.disable_adapters else layer.active_adapters
        return projection(layer.modules_to_save[names[0]] if names else layer.original_module, hidden)
    return _lora(layer, hidden) if type(layer) is LoraLinear else None


def _lora(layer: Any, hidden: torch.Tensor) -> Projection | None:
    base = projection(layer.base_layer, hidden)
    if base is None or layer.fan_in_fan_out:
        return None
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    if layer.disable_adapters or layer.merged:
        return projection(layer.base_layer, hidden)
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if any(name in layer.lora_variant for name in names):
        return None
    rows, columns, bias = [hidden], [base.weight], base.bias
    for name in names:
        a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        x = layer.lora_dropout[name](hidden.to(a.weight.dtype))
        rows.append((a(x) * scale).to(hidden.dtype))
        columns.append(b.weight.to(base.weight.dtype))
        if b.bias is not None:
            shift = (b.bias * scale).to(base.weight.dtype)
            bias = shift if bias is None else bias + shift
    return Projection(torch.cat(rows, -1), torch.cat(columns, -1), bias)


@torch.no_grad()
def output_layer(model: Any) -> OutputLayer | None:
    """How a model's logits follow from its last hidden states, or None where that is not by one linear layer,
    scaled and soft-capped as its configuration says: tried on a few tokens, with the layer's input made loud."""
    if not hasattr(model, "generate") or not passes_through(model):
        return None
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = getattr(inner, inner.base_model_prefix, None) or getattr(inner, "model", None)
    linear = inner.get_output_embeddings()
    if linear is None or body is None or body is inner:
        return None
    config = inner.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    trial = OutputLayer(body, linear, 1.0, softcap)
    with _evaluated(model):
        seen = _tried(model, trial)
    if seen is None:
        return None
    products, expected = seen
    found = (OutputLayer(body, linear, scale, softcap) for scale in _scales(config))
    return next((layer for layer in found if _same(layer.of(products), expected)), None)


def passes_through(model: Any) -> bool:
    """Whether what wraps the model, if PEFT does, hands its inputs on as they are."""
    configs = getattr(model, "peft_config", None) or {}
    return not any(
        config.is_prompt_learning
        or config.peft_type in _AROUND
        or getattr(config, "alora_invocation_tokens", None)
        for config in configs.values()
    )


def _scales(config: Any) -> list[float]:
    """What the logits may be multiplied with, likeliest first."""
    given = [getattr(config, name, None) for name in _SCALES]
    numbers = [float(x) for x in given if isinstance(x, (int, float)) and math.isfinite(x) and x != 0]
    return [*numbers, *(1 / x for x in numbers), 1.0]


def _tried(model: Any, layer: OutputLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(the layer's products as `projection` has them, the model's logits) of a few tokens, made loud."""
    factor = 1.0

    def louder(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] * factor, *args[1:])

    try:
        weight = layer.linear.weight
        ids = torch.arange(10, device=weight.device).view(2, 5) % len(weight)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][1, 3:] = 0
        hidden = layer.hidden(**inputs)
        quiet = projection(layer.linear, hidden)
        if quiet is None or quiet.hidden.shape[-1] != quiet.weight.shape[1]:
            return None
        factor = _LOUD / max(float(_product(quiet).abs().max()), 1e-30)
        products = _product(layer.projection(hidden * factor))
        handle = layer.linear.register_forward_pre_hook(louder)
        try:
            expected = model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
    except (TypeError, AttributeError):  # it takes or returns something else
        return None
    return products, expected


def _product(given: Projection) -> torch.Tensor:
    whole: list[Any] = list(given)
    return nn.functional.linear(*(x.full_tensor() if is_dtensor(x) else x for x in whole))


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    # The same products, summed in another order at most.
    rtol = 16 * torch.finfo(found.dtype).eps
    scale = float(expected.abs().max())
    return (
        expected.shape == found.shape
        and math.isfinite(scale)
        and torch.allclose(found.float(), expected.float(), rtol=rtol, atol=rtol * scale)
    )


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
