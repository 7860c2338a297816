"""REINFORCE++: no critic and no group; the whole batch is the baseline."""

from dataclasses import dataclass
from typing import Any

import torch

from ...ops.recipes import reinforce_pp, reinforce_pp_baseline
from ..batch import Batch
from .base import Clipped
from .loss_options import check_numbers


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(Clipped):
    """Returns with the KL of every token in its reward, whitened over the whole rollout batch; PPO's clip.

        r_t -= kl_coef (log p_t - log p_ref,t),    G_t = r_t + gamma G_{t+1},    A = (G - mean) / std

    Args:
        gamma: discount per action token, in [0, 1].
        ratio_min, ratio_max: bounds of the probability ratio.
        aggregation, kl_estimator, kl_gradient, kl_in_reward: see `PolicyGradient`.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Hu 2025 (arXiv:2501.03262).
    """

    gamma: float = 1.0
    kl_in_reward: bool = True

    def __post_init__(self) -> None:
        check_numbers(self, "gamma", low=0.0, high=1.0)
        super().__post_init__()

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        return reinforce_pp(self.step_rewards(config, batch), gamma=self.gamma, mask=batch.mask)


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlusBaseline(Clipped):
    """Reward less the group's mean for every token of a response, whitened over the batch; KL (k2) in the loss.

    Source: Hu 2025 (arXiv:2501.03262), the variant for several responses to a prompt.
    """

    kl_estimator: str = "k2"
    kl_gradient: str = "value"

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        return reinforce_pp_baseline(self.rewards(config, batch), batch.groups, batch.mask)
