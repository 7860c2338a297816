"""The algorithms' equations, for the trainer in plain loops: advantages of a batch, loss of one sequence."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .advantage import discounted_returns, whiten
from .group_advantages import group_advantages
from .objectives import PPOClip, Reinforce
from .policy_loss import policy_loss


def _sft_advantages(algorithm: Any, batch: list[Any]) -> list[torch.Tensor]:
    return [torch.ones(len(one.mask)) for one in batch]


def _grpo_advantages(algorithm: Any, batch: list[Any]) -> list[torch.Tensor]:
    groups = torch.tensor([one.group for one in batch])
    rewards = torch.tensor([one.reward for one in batch], dtype=batch[0].step_rewards.dtype)
    found = group_advantages(
        rewards, groups, baseline=algorithm.baseline, scale=algorithm.scale, eps=algorithm.eps
    )
    return [value.expand(len(one.mask)) for one, value in zip(batch, found, strict=True)]


def _reinforce_advantages(algorithm: Any, batch: list[Any]) -> list[torch.Tensor]:
    returns = []
    for i, one in enumerate(batch):
        found = discounted_returns(one.step_rewards[None], gamma=algorithm.gamma, mask=one.mask[None])[0]
        others = [
            other.reward
            for j, other in enumerate(batch)
            if j != i and (algorithm.baseline == "batch" or other.group == one.group)
        ]
        if algorithm.baseline != "none":
            found = found - (sum(others) / len(others) if others else one.reward)
        returns.append(torch.where(one.mask, found, 0.0))
    if not algorithm.whiten:
        return returns
    whole = whiten(torch.cat(returns), mask=torch.cat([one.mask for one in batch]))
    return list(whole.split([len(one.mask) for one in batch]))


ADVANTAGES: dict[str, Callable[[Any, list[Any]], list[torch.Tensor]]] = {
    "SFT": _sft_advantages,
    "GRPO": _grpo_advantages,
    "REINFORCE": _reinforce_advantages,
}


def _sft_loss(
    trainer: Any, one: Any, logp: torch.Tensor, entropy: torch.Tensor, denominator: int
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    return -logp.sum() / denominator, {
        "tokens": one.mask.sum(),
        "entropy": entropy.detach().sum() / max(int(one.mask.sum()), 1),
    }


def _grpo_loss(
    trainer: Any, one: Any, logp: torch.Tensor, entropy: torch.Tensor, denominator: int
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    algorithm = trainer.algorithm
    objective = PPOClip(ratio_min=algorithm.ratio_min, ratio_max=algorithm.ratio_max)
    return _policy_gradient(trainer, one, logp, entropy, denominator, objective)


def _reinforce_loss(
    trainer: Any, one: Any, logp: torch.Tensor, entropy: torch.Tensor, denominator: int
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    return _policy_gradient(trainer, one, logp, entropy, denominator, Reinforce())


def _policy_gradient(
    trainer: Any, one: Any, logp: torch.Tensor, entropy: torch.Tensor, denominator: int, objective: Any
) -> tuple[torch.Tensor, Mapping[str, Any]]:
    algorithm, config = trainer.algorithm, trainer.config

    def row(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[None]

    assert one.advantages is not None
    return policy_loss(
        logp[None],
        row(one.old_logprobs),
        one.advantages[None],
        one.mask[None],
        objective=objective,
        aggregation=algorithm.aggregation,
        ref_logprobs=row(one.ref_logprobs),
        importance=row(one.importance),
        kl_coef=config.kl_coef,
        kl_estimator=algorithm.kl_estimator,
        kl_gradient=algorithm.kl_gradient,
        entropy=entropy[None],
        entropy_coef=config.entropy_coef,
        denominator=float(denominator),
    )


LOSSES: dict[str, Callable[..., tuple[torch.Tensor, Any]]] = {
    "SFT": _sft_loss,
    "GRPO": _grpo_loss,
    "REINFORCE": _reinforce_loss,
}
