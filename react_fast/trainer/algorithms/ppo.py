"""Actor and critic on one body: the policy's hidden states also say what a state is worth."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...ops import _check
from ...ops.advantage import gae
from ...ops.backend import accumulation_dtype
from ...ops.policy_loss import value_loss
from ...ops.whiten import whiten
from ...reference.objectives import Reinforce
from ..batch import Batch
from ..scoring import Scores
from .base import Clipped, Loss, PolicyGradient
from .loss_options import check_numbers, check_on_policy, check_switch


class ValueHead(nn.Module):
    """Hidden states [B, T, D] to values [B, T]; 0 before it is trained.

    It computes in the accumulation type of the model's, outside of autocast: bfloat16 has three digits.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class ActorCritic(PolicyGradient):
    """An action's advantage is what came of it beyond what its state was worth.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1},    R_t = A_t + V_t
        loss = policy + value_coef 1/2 mean_t max((V_t - R_t)^2, (clip(V_t, V_old +- value_clip) - R_t)^2)

    t counts action tokens. Behind an episode that was truncated stands the value of its last state; behind one
    that ended, 0.

    Args:
        gamma, lam: in [0, 1].
        value_coef: weight of the value loss.  value_clip: above 0, or None.
        whiten: scale the advantages of a rollout batch to mean 0 and standard deviation 1.
    """

    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.5
    value_clip: float | None = None
    whiten: bool = True
    kl_in_reward: bool = True

    def __post_init__(self) -> None:
        check_numbers(self, "gamma", "lam", low=0.0, high=1.0)
        check_numbers(self, "value_coef", low=0.0)
        if self.value_clip is not None:
            check_numbers(self, "value_clip", low=0.0, low_open=True)
        check_switch("whiten", self.whiten)
        super().__post_init__()
        _check.choice("aggregation", self.aggregation, ("token_mean",))

    def check(self, config: Any) -> None:
        super().check(config)
        if config.credit == "monte_carlo":
            raise ValueError(
                f"trainer.credit must not be 'monte_carlo' for {type(self).__name__}: its critic values states"
            )

    def remembers(self, config: Any) -> bool:
        return True

    def heads(self, model: Any) -> dict[str, nn.Module]:
        weight = model.get_output_embeddings().weight if hasattr(model, "get_output_embeddings") else None
        if weight is None:
            return {"value": nn.Identity()}  # the scorer says what such a model lacks
        return {"value": ValueHead(weight.shape[1], accumulation_dtype(weight.dtype))}

    def score(self, trainer: Any, batch: Batch) -> None:
        super().score(trainer, batch)
        batch.last_values = last_values(trainer, batch)

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        rewards, values = self.step_rewards(config, batch), batch.heads["value"]
        ends = {"last_values": batch.last_values, "mask": batch.mask}
        advantages, batch.returns = gae(rewards, values, gamma=self.gamma, lam=self.lam, **ends)
        return whiten(advantages, mask=batch.mask) if self.whiten else advantages

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        assert part.returns is not None, "credit comes before update"
        policy, metrics = super().loss(config, part, scores, denominator)
        values, old = scores.heads["value"], part.heads["value"]
        count = denominator.clamp_min(1).to(values.dtype)
        value = value_loss(values, old, part.returns, part.mask, clip=self.value_clip, denominator=count)
        tokens = part.mask.sum().clamp_min(1)
        seen = torch.where(part.mask, values.detach(), 0.0).sum() / tokens
        own = {"value/mean": seen, "value/loss": value.detach() * count / tokens}
        return policy + self.value_coef * value, {**metrics, **own}


@dataclass(frozen=True, kw_only=True)
class PPO(ActorCritic, Clipped):
    """Proximal policy optimisation: advantages from a critic, a clipped ratio, a clipped value loss.

    Args:
        ratio_min, ratio_max: bounds of the probability ratio.
        gamma, lam, value_coef, value_clip, whiten: see `ActorCritic`.
        kl_estimator, kl_gradient, kl_in_reward: see `PolicyGradient`; "token_mean" is the only aggregation.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Schulman et al. 2017 (arXiv:1707.06347); for language models with the KL in the reward: Ziegler et al.
        2019 (arXiv:1909.08593).
    """

    value_clip: float | None = 0.2


@dataclass(frozen=True, kw_only=True)
class A2C(ActorCritic):
    """Advantage actor-critic: every sample is used once, so there is no ratio and nothing to clip.

        loss = -1/n sum_t A_t log p(a_t) + value_coef 1/2 mean_t (V_t - R_t)^2

    Args:
        gamma, lam, value_coef, value_clip, whiten: see `ActorCritic`; lam 1 is the paper's return.
    Source: Mnih et al. 2016 (arXiv:1602.01783), synchronous.
    """

    lam: float = 1.0
    whiten: bool = False

    def check(self, config: Any) -> None:
        super().check(config)
        check_on_policy(self, config)

    @property
    def objective(self) -> Any:
        return Reinforce()


def last_values(trainer: Any, batch: Batch) -> torch.Tensor:
    """[B] value of the state behind every truncated row's last token; 0 for the other rows."""
    found = torch.zeros_like(batch.rewards)
    if batch.truncated is None or not bool(batch.truncated.any()):
        return found
    rows = batch.truncated.nonzero()[:, 0]
    # The state behind a row's last token is what the policy would have chosen one more token in.
    longer = batch.select(rows).with_one_more_token()
    values = trainer.scores(longer).heads["value"]
    found[rows] = values.gather(1, longer.lengths[:, None] - 2).squeeze(1).to(found.dtype)
    return found
