"""Attribution of one text's outcome to its tokens, by the gradient at the embedding output or another layer's."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..ops import _check
from ..ops.attribution import attribution_scores
from .policy import Policy, logprobs
from .text import Text, check_count

METHODS = ("grad_x_input", "saliency", "integrated_gradients")
TARGETS = ("response", "token")
INPUTS = ("all", "prompt")
# Tokens of the points of a path that run at once: what their forward holds for the backward stays small.
_PATH_TOKENS = 2048

Target = str | Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attribution of an outcome to the tokens of a prompt and a response.

    Attributes:
        token_ids: prompt and response, P + R. prompt_length: P.
        scores: [P + R], or [R, P + R] for target "token"; float32 (float64 for a float64 policy).
        outcome: value of the target, scalar or [R].
        gap: outcome - outcome of the baseline - sum of the scores, scalar or [R], which integrated gradients
            bring to 0 with more steps; None for the other methods.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    scores: torch.Tensor
    outcome: torch.Tensor
    gap: torch.Tensor | None = None


@dataclass(frozen=True)
class Method:
    """How a text is attributed; see CausalityTracker.attribute."""

    name: str
    layer: Any = None
    baseline: int | None = None
    steps: int = 50
    inputs: str = "all"

    def __post_init__(self) -> None:
        _check.choice("method", self.name, METHODS)
        _check.choice("inputs", self.inputs, INPUTS)
        check_count("steps", self.steps, 1)

    def place(self, policy: Policy) -> nn.Module:
        """The module at whose output the gradient is taken."""
        if self.layer is None:
            return policy.embedding
        if isinstance(self.layer, str):
            known = dict(policy.model.named_modules())
            if self.layer not in known:
                raise ValueError(
                    f"layer must be a module of the model, such as {_middle(known)!r}, got {self.layer!r}"
                )
            return known[self.layer]
        if not isinstance(self.layer, nn.Module):
            raise TypeError(f"layer must be a module or its name, got {type(self.layer).__name__}")
        return self.layer


def attribute(policy: Policy, text: Text, target: Target, method: Method) -> Attribution:
    """See CausalityTracker.attribute."""
    if not callable(target):
        _check.choice("target", target, TARGETS)
    layer = method.place(policy)
    if method.name == "integrated_gradients":
        return _integrated(policy, text, target, method, layer)
    with policy.evaluation(), policy.cut(layer) as leaves, policy.head_inputs() as heads:
        outcome = _outcomes(policy, text, target, 1)[0]
        activation = leaves[0].detach()[0]
        rows = [_score(method.name, grad[0], activation) for grad in _gradients(outcome, leaves[0], heads)]
    return Attribution(text.ids, text.prompt_length, _shaped(rows, outcome), outcome.detach())


def _score(name: str, grad: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """[T, D] x 2 -> [T]."""
    if name == "saliency":
        return attribution_scores(grad, torch.ones_like(grad), reduction="l2")
    return attribution_scores(grad, activation)


def _shaped(rows: Sequence[torch.Tensor], outcome: torch.Tensor) -> torch.Tensor:
    """The one row of a scalar outcome, or the rows [R, T] of [R] outcomes."""
    return torch.stack(list(rows)) if outcome.dim() else rows[0]


def batch_scores(
    policy: Policy, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, actions: torch.Tensor
) -> torch.Tensor:
    """See CausalityTracker.score_batch."""
    if input_ids.numel() == 0:
        return torch.zeros(input_ids.shape, device=input_ids.device)
    with policy.evaluation(), policy.cut(policy.embedding) as leaves:
        logits = policy.logits(input_ids, attention_mask)
        total = logprobs(logits[:, :-1], input_ids[:, 1:], actions[:, 1:]).sum()
        return attribution_scores(torch.autograd.grad(total, leaves[0])[0], leaves[0].detach())


# ---- integrated gradients --------------------------------------------------------------------------------------


def _integrated(policy: Policy, text: Text, target: Target, method: Method, layer: nn.Module) -> Attribution:
    """The mean gradient on the way from the baseline to the text, by Gauss-Legendre quadrature, times the way."""
    with policy.evaluation():
        ends, outcomes = _ends(policy, text, target, method, layer)
        way = ends[1] - ends[0]
        nodes, weights = np.polynomial.legendre.leggauss(method.steps)
        alphas = torch.from_numpy((1 + nodes) / 2).to(way)
        shares = torch.from_numpy(weights / 2).to(way)
        parts = -(-method.steps // max(1, _PATH_TOKENS // len(text.ids)))
        rows: list[torch.Tensor] = []
        for part, share in zip(alphas.tensor_split(parts), shares.tensor_split(parts), strict=True):
            points = ends[0] + part[:, None, None] * way
            with policy.cut(layer, points) as leaves, policy.head_inputs() as heads:
                outcome = _outcomes(policy, text, target, len(part)).sum(0)
                grads = _gradients(outcome, leaves[0], heads)
                found = [attribution_scores(torch.tensordot(share, grad, 1), way) for grad in grads]
            rows = [a + b for a, b in zip(rows, found, strict=True)] if rows else found
        scores = _shaped(rows, outcomes[1])
    gap = outcomes[1] - outcomes[0] - scores.sum(-1)
    return Attribution(text.ids, text.prompt_length, scores, outcomes[1], gap)


def _ends(
    policy: Policy, text: Text, target: Target, method: Method, layer: nn.Module
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The layer's output [T, D] for the baseline and for the text, and the outcome of each."""
    ids = torch.tensor(text.ids, device=policy.device)
    moved = torch.arange(len(ids), device=policy.device) < (
        text.prompt_length if method.inputs == "prompt" else len(ids)
    )
    with torch.no_grad():
        embedded = policy.embedding(ids)
        other = torch.zeros_like(embedded)
        if method.baseline is not None:
            other = policy.embedding(torch.full_like(ids, method.baseline))
        ends, outcomes = [], []
        for start in (torch.where(moved[:, None], other, embedded), embedded):
            with policy.cut(policy.embedding, start[None]), policy.cut(layer) as leaves:
                outcomes.append(_outcomes(policy, text, target, 1)[0].detach())
            ends.append(start if layer is policy.embedding else leaves[0].detach()[0])
    return ends, outcomes


# ---- outcomes and gradients ------------------------------------------------------------------------------------


def _outcomes(policy: Policy, text: Text, target: Target, count: int) -> torch.Tensor:
    """Value of the target in `count` rows of the text: [count], or [count, R] for "token"."""
    ids = torch.tensor([text.ids], device=policy.device).expand(count, -1)
    if callable(target):
        return torch.stack([_scalar(target(row)) for row in policy.logits(ids, torch.ones_like(ids))])
    size = len(text.ids) - text.prompt_length
    logits = policy.logits(ids, torch.ones_like(ids), keep=size + 1)[:, -size - 1 : -1]
    found = logprobs(logits, ids[:, text.prompt_length :])
    return found if target == "token" else found.sum(1)


def _scalar(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dim() != 0 or not value.requires_grad:
        raise ValueError(
            "target must return a scalar tensor that depends on the logits, got " + _describe(value)
        )
    return value


def _gradients(
    outcome: torch.Tensor, leaf: torch.Tensor, heads: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The gradient [n, T, D] of a scalar outcome, or of each of [R] of them, the log-probabilities of the last R
    tokens, in turn, from one forward.

    One backward after the other took three quarters of the time of a batch of them, and holds one gradient. The
    output layer keeps positions apart, so that one backward through it serves all rows: behind it, each row's
    gradient is that of its own position.

    Args:
        heads: inputs of the output layer; where there is not just one, every backward goes through the layer.
    """
    parts, slope = outcome.reshape(-1), None
    if outcome.dim() and len(heads) == 1:
        (slope,) = torch.autograd.grad(outcome.sum(), heads, allow_unused=True)
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        if slope is None:
            yield torch.autograd.grad(part, leaf, retain_graph=not last)[0]
        else:
            place, own = slope.shape[1] - len(parts) - 1 + i, torch.zeros_like(slope)
            own[:, place] = slope[:, place]
            yield torch.autograd.grad(heads[0], leaf, own, retain_graph=not last)[0]


def _middle(modules: dict[str, nn.Module]) -> str:
    names = [name for name in modules if name]
    return names[len(names) // 2]


def _describe(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
