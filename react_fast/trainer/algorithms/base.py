"""What an algorithm may say; a new one is a small class with what differs, and a line in the table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...envs import Record, TextEnv
from ...ops.kl_rewards import kl_rewards
from ...ops.policy_loss import policy_loss
from ...reference.objectives import PPOClip
from ..batch import Batch
from ..evaluation import held_out_loss, held_out_reward
from ..rollout import Trajectory
from ..scoring import Scores
from .loss_options import check_loss_options, check_numbers, check_switch

Loss = tuple[torch.Tensor, Mapping[str, torch.Tensor]]


class Algorithm:
    """The trainer asks for these in order: check, heads and memory once, then in every step collect, select,
    score, advantages, and in every update denominator and loss.

    Attributes:
        supervised: it learns from references: no rollouts, no old log-probabilities, temperature 1.
        together: so many neighbouring trajectories stay in one micro-batch.
        copies: so many whole policies are in its memory.
    """

    supervised: ClassVar[bool] = False
    together: ClassVar[int] = 1
    copies: ClassVar[int] = 0

    def check(self, config: Any) -> None:
        """Raises: ValueError for settings of the trainer with which it would not be what it is."""
        if self.supervised and config.credit != "uniform":
            raise ValueError(
                f"trainer.credit must be 'uniform' for {type(self).__name__}, which has no rollouts, "
                f"got {config.credit!r}"
            )
        metric = (config.best_by or "").removeprefix("-")
        if metric and metric not in self.held_out_metrics:
            known = ", ".join(self.held_out_metrics)
            raise ValueError(f"trainer.best_by must be a metric of evaluations ({known}), got {metric!r}")

    def heads(self, model: Any) -> dict[str, nn.Module]:
        """Trained modules from hidden states [B, T, D] to [B, T, ...], by name."""
        return {}

    def memory(self, trainer: Any) -> Any:
        """What outlives a step beside weights (replay, target network), or None: an object with state_dict,
        load_state_dict, after_update() and replay(a step's trajectories) -> those that are trained on."""
        return None

    def engine(self, trainer: Any) -> Any:
        """What plays its episodes in training and evaluation; None: the policy."""
        return None

    def compares(self, config: Any) -> bool:
        """Whether it needs log-probabilities under the policy as it was at the start."""
        return bool(config.kl_coef) and not self.supervised

    def remembers(self, config: Any) -> bool:
        """Whether it needs log-probabilities and heads of the policy as it was before a step's updates."""
        return config.updates_per_step > 1 and not self.supervised

    def collect(self, trainer: Any, step: int) -> list[Trajectory]:
        if self.supervised:
            return self.demonstrate(trainer.tokenizer, trainer.env.records, trainer.records_of(step))
        return trainer.rollouts(step)

    def demonstrate(
        self, tokenizer: Any, records: Sequence[Record], chosen: Sequence[int]
    ) -> list[Trajectory]:
        """What a supervised algorithm learns from some records.

        Raises: ValueError for a record that lacks it.
        """
        raise NotImplementedError

    def select(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Those of a step that are trained on."""
        return list(trajectories)

    def score(self, trainer: Any, batch: Batch) -> None:
        """Add to the batch what advantages and loss need of the policy as it is before the update."""

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        """[B] or [B, T-1]"""
        raise NotImplementedError

    def denominator(self, config: Any, batch: Batch) -> torch.Tensor:
        """What the loss of an update is divided by, a number."""
        return batch.mask.sum()

    def weight(self, part: Batch) -> torch.Tensor:
        """How many things the metrics of a micro-batch are means over."""
        return part.mask.sum()

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        """(loss of a micro-batch, metrics); the losses of an update's micro-batches are added."""
        raise NotImplementedError

    @property
    def held_out_metrics(self) -> tuple[str, ...]:
        """Names of what `held_out` measures."""
        return ("eval/loss",) if self.supervised else ("eval/reward",)

    def held_out(self, trainer: Any, env: TextEnv) -> tuple[dict[str, float], float]:
        """(metrics on held-out records while it trains, the number that should get smaller)."""
        if self.held_out_metrics == ("eval/loss",):
            loss = held_out_loss(trainer, env)
            return {"eval/loss": loss}, loss
        reward = held_out_reward(trainer, env, greedy=True)
        return {"eval/reward": reward}, -reward


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """Algorithms whose loss is an objective of `policy_loss`.

    Args:
        aggregation, kl_estimator, kl_gradient: see `policy_loss`; "token_sum_norm" divides by the number of
            sequences times trainer.max_new_tokens.
        kl_in_reward: pay trainer.kl_coef times the KL estimate k1 in every action's reward, not in the loss.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    """

    aggregation: str = "token_mean"
    kl_estimator: str = "k3"
    kl_gradient: str = "ratio"
    kl_in_reward: bool = False

    def __post_init__(self) -> None:
        check_loss_options(self)
        check_switch("kl_in_reward", self.kl_in_reward)

    @property
    def objective(self) -> Any:
        """Of `policy_loss`."""
        return PPOClip()

    def score(self, trainer: Any, batch: Batch) -> None:
        if self.kl_in_reward and batch.ref_logprobs is not None and batch.old_logprobs is None:
            batch.old_logprobs = trainer.scores(batch).logprobs

    def step_rewards(self, config: Any, batch: Batch) -> torch.Tensor:
        """[B, T-1] reward of every action, less its share of the KL if that is paid in rewards."""
        if not self.kl_in_reward or batch.ref_logprobs is None or batch.old_logprobs is None:
            return batch.step_rewards
        pair = batch.old_logprobs, batch.ref_logprobs
        return kl_rewards(batch.step_rewards, *pair, batch.mask, kl_coef=config.kl_coef)[0]

    def rewards(self, config: Any, batch: Batch) -> torch.Tensor:
        """[B] of whole responses, likewise."""
        return batch.rewards + (self.step_rewards(config, batch) - batch.step_rewards).sum(1)

    def denominator(self, config: Any, batch: Batch) -> torch.Tensor:
        if self.aggregation == "token_mean":
            return batch.mask.sum()
        longest = config.max_new_tokens if self.aggregation == "token_sum_norm" else 1
        return batch.mask.any(1).sum() * longest

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
            importance=part.importance,
            kl_coef=0.0 if self.kl_in_reward else config.kl_coef,
            kl_estimator=self.kl_estimator,
            kl_gradient=self.kl_gradient,
            entropy=scores.entropy,
            entropy_coef=config.entropy_coef,
            denominator=denominator.clamp_min(1).to(scores.logprobs.dtype),
        )


@dataclass(frozen=True, kw_only=True)
class Clipped(PolicyGradient):
    """Policy gradients whose probability ratio is clipped as PPO does it.

    Args:
        ratio_min, ratio_max: bounds of the ratio, absolute: PPO's epsilon 0.2 is (0.8, 1.2).
    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7.
    """

    ratio_min: float = 0.8
    ratio_max: float = 1.2

    def __post_init__(self) -> None:
        check_numbers(self, "ratio_min", "ratio_max", low=0.0, infinite=True)
        super().__post_init__()

    @property
    def objective(self) -> Any:
        return PPOClip(ratio_min=self.ratio_min, ratio_max=self.ratio_max)
