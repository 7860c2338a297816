"""Group-relative policy optimisation."""

from dataclasses import dataclass
from typing import Any

import torch

from ...ops import _check
from ...ops.group_advantages import group_advantages
from ...reference.objectives import PPOClip
from ..batch import Batch
from .base import PolicyGradient


@dataclass(frozen=True, kw_only=True)
class GRPO(PolicyGradient):
    """A response's advantage is its reward relative to the other responses to the same prompt.

        A_i = (r_i - mean_group) / (std_group + eps),    loss: clipped ratio (PPOClip) + kl_coef KL

    Args:
        ratio_min, ratio_max: bounds of the probability ratio; 1.28 above is DAPO's clip-higher.
        baseline: "mean" | "leave_one_out" | "none".  scale: "std" | "none" (Dr. GRPO).  eps: beside the std.
        aggregation, kl_estimator, kl_gradient: see `policy_loss`; "token_sum_norm" is not among them.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Shao et al. 2024 (arXiv:2402.03300).
    """

    ratio_min: float = 0.8
    ratio_max: float = 1.2
    baseline: str = "mean"
    scale: str = "std"
    eps: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("ratio_min", "ratio_max"):
            _check.number(name, getattr(self, name), low=0.0, infinite=True)
        PPOClip(ratio_min=self.ratio_min, ratio_max=self.ratio_max)
        _check.choice("baseline", self.baseline, ("mean", "leave_one_out", "none"))
        _check.choice("scale", self.scale, ("std", "none"))
        _check.number("eps", self.eps, low=0.0, low_open=self.scale == "std")
        super().__post_init__()

    @property
    def objective(self) -> Any:
        return PPOClip(ratio_min=self.ratio_min, ratio_max=self.ratio_max)

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        return group_advantages(
            batch.rewards, batch.groups, baseline=self.baseline, scale=self.scale, eps=self.eps
        )
