"""Attribution of one text's outcome to its tokens: gradient x input at the embedding output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import _check
from ..ops.attribution import attribution_scores
from .policy import Policy, logprobs
from .text import Text

TARGETS = ("response", "token")
# Backward passes of a heat map that run at once.
_HEAT_ROWS = 32

Target = str | Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attribution of an outcome to the tokens of a prompt and a response.

    Attributes:
        token_ids: prompt and response, P + R. prompt_length: P.
        scores: [P + R], or [R, P + R] for target "token"; float32 (float64 for a float64 policy).
        outcome: value of the target, scalar or [R].
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    scores: torch.Tensor
    outcome: torch.Tensor


def attribute(policy: Policy, text: Text, target: Target) -> Attribution:
    """See CausalityTracker.attribute."""
    if not callable(target):
        _check.choice("target", target, TARGETS)
    ids = torch.tensor([text.ids], device=policy.device)
    with policy.evaluation(), policy.embedded() as leaves:
        outcome = _outcome(policy.logits(ids, torch.ones_like(ids)), ids, text.prompt_length, target)
        grads = _gradients(outcome, leaves[0])
        scores = attribution_scores(grads, leaves[0].detach()[0].expand_as(grads))
    return Attribution(text.ids, text.prompt_length, scores, outcome.detach())


def batch_scores(
    policy: Policy, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, actions: torch.Tensor
) -> torch.Tensor:
    """See CausalityTracker.score_batch."""
    if input_ids.numel() == 0:
        return torch.zeros(input_ids.shape, device=input_ids.device)
    with policy.evaluation(), policy.embedded() as leaves:
        logits = policy.logits(input_ids, attention_mask)
        total = logprobs(logits[:, :-1], input_ids[:, 1:], actions[:, 1:]).sum()
        return attribution_scores(torch.autograd.grad(total, leaves[0])[0], leaves[0].detach())


def _outcome(logits: torch.Tensor, ids: torch.Tensor, prompt_length: int, target: Target) -> torch.Tensor:
    """Value of the target: a scalar, or [R] for "token"."""
    if callable(target):
        value = target(logits[0])
        if not isinstance(value, torch.Tensor) or value.dim() != 0 or not value.requires_grad:
            raise ValueError(
                "target must return a scalar tensor that depends on the logits, got " + _describe(value)
            )
        return value
    found = logprobs(logits[:, prompt_length - 1 : -1], ids[:, prompt_length:])[0]
    return found if target == "token" else found.sum()


def _gradients(outcome: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """[T, D] for a scalar outcome, [R, T, D] for [R] of them, from one forward."""
    if outcome.dim() == 0:
        return torch.autograd.grad(outcome, leaf)[0][0]
    rows = torch.eye(len(outcome), dtype=outcome.dtype, device=outcome.device).split(_HEAT_ROWS)
    parts = [
        torch.autograd.grad(outcome, leaf, part, is_grads_batched=True, retain_graph=True)[0][:, 0]
        for part in rows
    ]
    return torch.cat(parts)


def _describe(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
