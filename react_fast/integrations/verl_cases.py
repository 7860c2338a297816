"""What is compared before verl's functions are replaced: five rows, with gaps, padding and a row of nothing."""

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .cases import numbers, pulled
from .points import Case

Tensor = torch.Tensor
Cases = Callable[[torch.device], list[Case]]
_MASK = [[1] * 6, [1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 0, 0], [0] * 6, [1, 1, 1, 1, 1, 0]]
_UIDS = np.array(["b", "a", "b", "alone", "a"], dtype=object)


def _gae(device: torch.device) -> list[Case]:
    def run(gamma: float, lam: float) -> Callable[[Any], dict[str, Tensor]]:
        def run(function: Any) -> dict[str, Tensor]:
            mask = torch.tensor(_MASK, device=device)
            rewards, values = (numbers(device, *mask.shape, seed=seed) for seed in (1, 2))
            found = function(rewards, values, mask, gamma, lam)
            return dict(zip(("advantages", "returns"), found, strict=True))

        return run

    return [Case("lambda 0.8", run(0.9, 0.8)), Case("no discount", run(1.0, 1.0))]


def _estimator(*grouped: dict[str, Any]) -> Cases:
    def cases(device: torch.device) -> list[Case]:
        def run(options: dict[str, Any]) -> Callable[[Any], dict[str, Tensor]]:
            def run(function: Any) -> dict[str, Tensor]:
                mask = torch.tensor(_MASK, device=device)
                found = function(
                    token_level_rewards=numbers(device, *mask.shape), response_mask=mask, **options
                )
                return dict(zip(("advantages", "returns"), found, strict=True))

            return run

        return [Case(str(i), run(options)) for i, options in enumerate(grouped)]

    return cases


def _logprobs(device: torch.device) -> list[Case]:
    def run(dtype: torch.dtype, *shape: int) -> Callable[[Any], dict[str, Tensor]]:
        def run(function: Any) -> dict[str, Tensor]:
            logits = numbers(device, *shape, 19).to(dtype).requires_grad_()
            labels = (torch.arange(logits[..., 0].numel(), device=device) * 7 % 19).view(shape)
            return pulled({"log_probs": function(logits, labels)}, logits=logits)

        return run

    return [
        Case("two axes", run(torch.float32, 5)),
        Case("three axes", run(torch.float32, 2, 5)),
        Case("bfloat16", run(torch.bfloat16, 5), 0.02),
    ]


def _fused(device: torch.device) -> list[Case]:
    def run(dtype: torch.dtype, temperature: float, *shape: int) -> Callable[[Any], dict[str, Tensor]]:
        def run(function: Any) -> dict[str, Tensor]:
            hidden = numbers(device, *shape, 8).to(dtype).requires_grad_()
            weight = numbers(device, 19, 8).to(dtype).requires_grad_()
            labels = (torch.arange(hidden[..., 0].numel(), device=device) * 7 % 19).view(shape)
            found = function.apply(hidden, weight, labels, temperature, 3)
            return pulled(
                dict(zip(("log_probs", "entropy"), found, strict=True)), hidden=hidden, weight=weight
            )

        return run

    return [
        Case("a temperature", run(torch.float32, 0.7, 5)),
        Case("three axes", run(torch.float32, 1.0, 2, 5)),
        # Products of 8 numbers rounded to 8 bits, and probabilities of them.
        Case("bfloat16", run(torch.bfloat16, 1.0, 5), 0.05),
    ]


GAE: Cases = _gae
LOGPROBS: Cases = _logprobs
FUSED: Cases = _fused
_GROUPED = {"index": _UIDS}
ESTIMATORS: dict[str, Cases] = {
    "grpo": _estimator(_GROUPED, {**_GROUPED, "norm_adv_by_std_in_grpo": False}),
    "rloo": _estimator(_GROUPED),
    "opo": _estimator(_GROUPED),
    "reinforce_plus_plus_baseline": _estimator(_GROUPED),
    "reinforce_plus_plus": _estimator({"config": types.SimpleNamespace(gamma=0.9)}),
}
