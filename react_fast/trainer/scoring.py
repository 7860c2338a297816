"""The policy as training scores it: log-probabilities, entropies and heads of a batch in one forward."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ops.linear_logprob import linear_token_logprobs
from ..ops.logprob import token_logprobs
from .batch import Batch
from .output_layer import OutputLayer, output_layer
from .packing import can_pack, packed_hidden

Head = Mapping[str, nn.Module]


@dataclass
class Scores:
    """What one forward says about a batch; column t of a tensor belongs to token t + 1.

    Attributes:
        logprobs, entropy: [B, T-1], 0 where the mask is false.
        heads: outputs [B, T-1, ...] of the algorithm's heads, by name.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    heads: dict[str, torch.Tensor]


class Scorer(nn.Module):
    """A policy and an algorithm's heads as one module, so that whatever wraps modules (DDP, FSDP2, autocast) wraps
    one forward.

    Logits [B, T, V] do not exist where they follow from the last hidden states by one linear layer, which is
    tried on a few tokens; elsewhere they are computed.

    Args:
        model: Hugging Face causal LM, or any module with `model(ids [B, T]) -> logits [B, T, V]`.
        heads: modules from hidden states [B, T, D] to [B, T, ...], by name; they need such a linear layer.
        packed: let several sequences share a row in a forward, where `packs` says that this model can.
    Raises: ValueError for heads on a model whose hidden states are not known.
    """

    def __init__(self, model: Any, heads: Head | None = None, *, packed: bool = False) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleDict(dict(heads or {}))
        self.hugging_face = hasattr(model, "generate")
        self._output = (output_layer(model),)  # in a tuple: its modules are the model's and no new ones
        self.packed = packed and self.packs
        if self.heads and self.output is None:
            raise ValueError(
                "model must be a Hugging Face causal LM with one linear output layer for an algorithm with heads "
                f"({', '.join(self.heads)}), got {type(model).__name__}"
            )

    @property
    def output(self) -> OutputLayer | None:
        return self._output[0]

    def forward(self, batch: Batch, temperature: float) -> dict[str, torch.Tensor]:
        """Log-probabilities, entropies and the heads' outputs, which are named "heads.NAME"."""
        options: dict[str, Any] = {"mask": batch.mask, "temperature": temperature, "return_entropy": True}
        output, floor = self.output, batch.logit_floor
        if output is None:
            logits = self.logits(batch)[:, :-1]
            logprobs, entropy = token_logprobs(logits, batch.targets, logit_floor=floor, **options)
            return {"logprobs": logprobs, "entropy": entropy}
        hidden = self._hidden(output, batch)[:, :-1]
        if floor is not None:  # what a truncated sampler kept is told by the logits
            logits = output.logits(hidden)
            logprobs, entropy = token_logprobs(logits, batch.targets, logit_floor=floor, **options)
        else:
            given = output.projection(hidden)
            logprobs, entropy = linear_token_logprobs(
                given.hidden,
                given.weight,
                batch.targets,
                bias=given.bias,
                logit_scale=output.logit_scale,
                softcap=output.softcap,
                **options,
            )
        heads = {f"heads.{name}": head(hidden) for name, head in self.heads.items()}
        return {"logprobs": logprobs, "entropy": entropy, **heads}

    @property
    def packs(self) -> bool:
        """Whether sequences of this model may share a row: its output layer is known, and it was tried."""
        output = self.output
        if output is None:
            return False
        return can_pack(self.model, output.body, self._embedding, one_row=self._one_row)

    @property
    def _embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def _one_row(self) -> bool:
        """transformers' flash attention tells sequences apart in a batch of one row only."""
        return "flash" in (self.model.config._attn_implementation or "")

    def _hidden(self, output: OutputLayer, batch: Batch) -> torch.Tensor:
        ids, mask = batch.input_ids, batch.attention_mask
        if not self.packed:
            return output.hidden(input_ids=ids, attention_mask=mask)
        hidden = packed_hidden(output.body, self._embedding, ids, mask, one_row=self._one_row)
        return hidden.to(output.linear.weight.dtype)

    def logits(self, batch: Batch) -> torch.Tensor:
        """[B, T, V]"""
        if self.hugging_face:
            mask = batch.attention_mask
            return self.model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
        return self.model(batch.input_ids)


def scores(found: Mapping[str, torch.Tensor]) -> Scores:
    """What a `Scorer`'s forward returned, whatever wraps it."""
    heads = {name.removeprefix("heads."): x for name, x in found.items() if name.startswith("heads.")}
    return Scores(found["logprobs"], found["entropy"], heads)


class StartingAdapters(nn.Module):
    """A policy with adapters (PEFT) as it is now, for good: its weights below them do not move, so that a copy of
    the adapters is enough, and none is needed while they do nothing.

    Attributes:
        values: the adapters' parameters; empty: adapters off.
    """

    def __init__(self, policy: Scorer) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: its weights are not this module's
        self.values = nn.ParameterList()
        if not _does_nothing(policy.model):
            self._keep(_trained(policy.model))

    def train(self, mode: bool = True) -> "StartingAdapters":
        self._policy[0].train(mode)
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        self._keep(_trained(self._policy[0].model) if state_dict else [])
        return super().load_state_dict(state_dict, *args, **options)

    def forward(self, batch: Batch, temperature: float) -> dict[str, torch.Tensor]:
        (policy,) = self._policy
        if not len(self.values):
            with policy.model.disable_adapter():
                return policy(batch, temperature)
        trained = _trained(policy.model)
        now = [p.detach().clone() for p in trained]
        _copy(trained, self.values)
        try:
            return policy(batch, temperature)
        finally:
            _copy(trained, now)

    def _keep(self, values: Sequence[torch.Tensor]) -> None:
        self.values = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in values)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _does_nothing(model: nn.Module) -> bool:
    """Whether all that is trained is the matrices A and B of adapters with B = 0."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return all("lora_A" in name or ("lora_B" in name and not bool(p.any())) for name, p in trained)


@torch.no_grad()
def _copy(into: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    for p, value in zip(into, values, strict=True):
        p.copy_(value)


def policy_of(model: Any, heads: Head, notice: Callable[[str], None], *, packed: bool) -> Scorer:
    """The scorer of a policy; what is to be packed and cannot be is padded, with a line."""
    policy = Scorer(model, heads, packed=packed)
    if packed and not policy.packed:
        name = type(model).__name__
        notice(f"trainer.padding packed is not possible with {name} and its attention: padded instead")
    return policy


def reference_policy(policy: Scorer) -> nn.Module:
    """The policy as it is now, for good: a frozen copy, of its adapters alone where it has some."""
    if hasattr(policy.model, "disable_adapter"):
        return StartingAdapters(policy).eval()
    return Scorer(copy.deepcopy(policy.model), packed=policy.packed).eval().requires_grad_(False)
