"""REINFORCE with the other responses to a prompt as the baseline."""

from dataclasses import dataclass
from typing import Any

import torch

from ...ops.recipes import rloo
from ..batch import Batch
from .base import Clipped


@dataclass(frozen=True, kw_only=True)
class RLOO(Clipped):
    """A response is one action; its baseline is the mean reward of the others to the same prompt.

        r_i -= kl_coef sum_t (log p - log p_ref),    A_i = r_i - mean of the other r_j,
        loss = 1/S sum_i sum_t -min(ratio A_i, clip(ratio) A_i)

    In the first update on a sample the ratio is 1 and the gradient REINFORCE's, as in the paper.

    Args:
        ratio_min, ratio_max: bounds of a token's ratio in later updates.
        aggregation, kl_estimator, kl_gradient, kl_in_reward: see `PolicyGradient`.
    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740). TRL 1.16 clips one ratio for the whole
        response.
    """

    aggregation: str = "seq_mean_token_sum"
    kl_in_reward: bool = True

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        return rloo(self.rewards(config, batch), batch.groups)
