"""REINFORCE with a baseline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...ops import _check
from ...ops.advantage import discounted_returns
from ...ops.group_advantages import group_advantages
from ...ops.policy_loss import policy_loss
from ...ops.whiten import whiten
from ...reference.objectives import Reinforce
from ..batch import Batch
from ..rollout import Trajectory
from .loss_options import check_loss_options, check_switch

BASELINES = ("batch", "group", "none")


@dataclass(frozen=True)
class REINFORCE:
    """An action's advantage is the discounted reward that follows it, less a baseline.

        A_t = G_t - b,    G_t = r_t + gamma G_{t+1},    loss = -1/n sum_t A_t log p(a_t)

    Args:
        gamma: discount per action token, in [0, 1].
        baseline: mean total reward of the other trajectories (leave-one-out, so it adds no bias) of the
            "batch" or of the prompt's "group"; "none".
        whiten: scale the advantages of a rollout batch to mean 0 and standard deviation 1.
        aggregation, kl_estimator, kl_gradient: see `policy_loss`; "token_sum_norm" is not among them.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Williams 1992; leave-one-out: Kool et al. 2019, Ahmadian et al. 2024 (arXiv:2402.14740).
    """

    gamma: float = 1.0
    baseline: str = "batch"
    whiten: bool = False
    aggregation: str = "token_mean"
    kl_estimator: str = "k3"
    kl_gradient: str = "ratio"

    supervised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check.number("gamma", self.gamma, low=0.0, high=1.0)
        _check.choice("baseline", self.baseline, BASELINES)
        check_switch("whiten", self.whiten)
        check_loss_options(self)

    def collect(self, trainer: Any, step: int) -> list[Trajectory]:
        return trainer.rollouts(step)

    def advantages(self, batch: Batch) -> torch.Tensor:
        advantages = discounted_returns(batch.step_rewards, gamma=self.gamma, mask=batch.mask)
        if self.baseline != "none":
            groups = batch.groups if self.baseline == "group" else torch.zeros_like(batch.groups)
            relative = group_advantages(batch.rewards, groups, baseline="leave_one_out", scale="none")
            level = (batch.rewards - relative)[:, None]
            advantages = torch.where(batch.mask, advantages - level, 0.0)
        return whiten(advantages, mask=batch.mask) if self.whiten else advantages

    def denominator(self, batch: Batch) -> torch.Tensor:
        return batch.mask.sum() if self.aggregation == "token_mean" else batch.mask.any(1).sum()

    def loss(
        self,
        config: Any,
        part: Batch,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
        denominator: torch.Tensor,
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        assert part.advantages is not None, "credit comes before update"
        return policy_loss(
            logprobs,
            part.old_logprobs,
            part.advantages,
            part.mask,
            objective=Reinforce(),
            aggregation=self.aggregation,
            ref_logprobs=part.ref_logprobs,
            importance=part.importance,
            kl_coef=config.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_gradient=self.kl_gradient,
            entropy=entropy,
            entropy_coef=config.entropy_coef,
            denominator=denominator.clamp_min(1).to(logprobs.dtype),
        )
