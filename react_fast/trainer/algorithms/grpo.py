"""Group-relative policy optimisation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...ops import _check
from ...ops.group_advantages import group_advantages
from ...ops.policy_loss import policy_loss
from ...reference.objectives import PPOClip
from ..batch import Batch
from ..rollout import Trajectory
from .loss_options import check_loss_options


@dataclass(frozen=True)
class GRPO:
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
    aggregation: str = "token_mean"
    kl_estimator: str = "k3"
    kl_gradient: str = "ratio"

    supervised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("ratio_min", "ratio_max"):
            _check.number(name, getattr(self, name), low=0.0, infinite=True)
        PPOClip(ratio_min=self.ratio_min, ratio_max=self.ratio_max)
        _check.choice("baseline", self.baseline, ("mean", "leave_one_out", "none"))
        _check.choice("scale", self.scale, ("std", "none"))
        _check.number("eps", self.eps, low=0.0, low_open=self.scale == "std")
        check_loss_options(self)

    def collect(self, trainer: Any, step: int) -> list[Trajectory]:
        return trainer.rollouts(step)

    def advantages(self, batch: Batch) -> torch.Tensor:
        return group_advantages(
            batch.rewards, batch.groups, baseline=self.baseline, scale=self.scale, eps=self.eps
        )

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
            objective=PPOClip(ratio_min=self.ratio_min, ratio_max=self.ratio_max),
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
