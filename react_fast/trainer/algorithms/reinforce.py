"""REINFORCE with a baseline."""

from dataclasses import dataclass
from typing import Any

import torch

from ...ops import _check
from ...ops.advantage import discounted_returns
from ...ops.group_advantages import group_advantages
from ...ops.whiten import whiten
from ...reference.objectives import Reinforce
from ..batch import Batch
from .base import PolicyGradient
from .loss_options import check_switch

BASELINES = ("batch", "group", "none")


@dataclass(frozen=True, kw_only=True)
class REINFORCE(PolicyGradient):
    """An action's advantage is the discounted reward that follows it, less a baseline.

        A_t = G_t - b,    G_t = r_t + gamma G_{t+1},    loss = -1/n sum_t A_t log p(a_t)

    Args:
        gamma: discount per action token, in [0, 1].
        baseline: mean total reward of the other trajectories (leave-one-out, so it adds no bias) of the
            "batch" or of the prompt's "group"; "none".
        whiten: scale the advantages of a rollout batch to mean 0 and standard deviation 1.
        aggregation, kl_estimator, kl_gradient, kl_in_reward: see `PolicyGradient`.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Williams 1992; leave-one-out: Kool et al. 2019, Ahmadian et al. 2024 (arXiv:2402.14740).
    """

    gamma: float = 1.0
    baseline: str = "batch"
    whiten: bool = False

    def __post_init__(self) -> None:
        _check.number("gamma", self.gamma, low=0.0, high=1.0)
        _check.choice("baseline", self.baseline, BASELINES)
        check_switch("whiten", self.whiten)
        super().__post_init__()

    @property
    def objective(self) -> Any:
        return Reinforce()

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        steps, rewards = self.step_rewards(config, batch), self.rewards(config, batch)
        advantages = discounted_returns(steps, gamma=self.gamma, mask=batch.mask)
        if self.baseline != "none":
            groups = batch.groups if self.baseline == "group" else torch.zeros_like(batch.groups)
            relative = group_advantages(rewards, groups, baseline="leave_one_out", scale="none")
            level = (rewards - relative)[:, None]
            advantages = torch.where(batch.mask, advantages - level, 0.0)
        return whiten(advantages, mask=batch.mask) if self.whiten else advantages
