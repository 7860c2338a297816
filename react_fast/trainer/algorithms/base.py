"""What an algorithm may say; a new one is a small class with what differs, and a line in the table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...ops.policy_loss import policy_loss
from ...reference.objectives import PPOClip
from ..batch import Batch
from ..rollout import Trajectory
from ..scoring import Scores
from .loss_options import check_loss_options

Loss = tuple[torch.Tensor, Mapping[str, torch.Tensor]]


class Algorithm:
    """The trainer asks for these in order: heads and memory once, then in every step collect, score, advantages,
    and in every update denominator and loss.

    Attributes:
        supervised: it learns from references: no rollouts, no old and no reference log-probabilities.
        together: so many neighbouring trajectories stay in one micro-batch.
    """

    supervised: ClassVar[bool] = False
    together: ClassVar[int] = 1

    def heads(self, model: Any) -> dict[str, nn.Module]:
        """Trained modules from hidden states [B, T, D] to [B, T, ...], by name."""
        return {}

    def memory(self, trainer: Any) -> Any:
        """What outlives a step beside weights (replay, target network): an object with state_dict,
        load_state_dict and after_update(), or None."""
        return None

    def engine(self, trainer: Any) -> Any:
        """What plays its episodes in training and evaluation; None: the policy."""
        return None

    def collect(self, trainer: Any, step: int) -> list[Trajectory]:
        return trainer.rollouts(step)

    def score(self, trainer: Any, batch: Batch) -> None:
        """Add to the batch what advantages and loss need of the policy as it is before the update."""

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        """[B] or [B, T-1]"""
        raise NotImplementedError

    def denominator(self, batch: Batch) -> torch.Tensor:
        """What the loss of an update is divided by, a number."""
        return batch.mask.sum()

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        """(loss of a micro-batch, metrics); the losses of an update's micro-batches are added."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """Algorithms whose loss is an objective of `policy_loss`.

    Args:
        aggregation, kl_estimator, kl_gradient: see `policy_loss`; "token_sum_norm" is not among them.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    """

    aggregation: str = "token_mean"
    kl_estimator: str = "k3"
    kl_gradient: str = "ratio"

    def __post_init__(self) -> None:
        check_loss_options(self)

    @property
    def objective(self) -> Any:
        """Of `policy_loss`."""
        return PPOClip()

    def denominator(self, batch: Batch) -> torch.Tensor:
        return batch.mask.sum() if self.aggregation == "token_mean" else batch.mask.any(1).sum()

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        assert part.advantages is not None, "credit comes before update"
        return policy_loss(
            scores.logprobs,
            part.old_logprobs,
            part.advantages,
            part.mask,
            objective=self.objective,
            aggregation=self.aggregation,
            ref_logprobs=part.ref_logprobs,
            kl_coef=config.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_gradient=self.kl_gradient,
            entropy=scores.entropy,
            entropy_coef=config.entropy_coef,
            denominator=denominator.clamp_min(1).to(scores.logprobs.dtype),
        )
