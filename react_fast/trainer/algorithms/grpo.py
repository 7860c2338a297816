"""Group-relative policy optimisation and its recipes; they differ in objective, scale and what they leave out."""

from dataclasses import dataclass
from math import exp
from typing import Any

import torch

from ...ops import _check
from ...ops.group_advantages import group_advantages
from ...reference import objectives
from ..batch import Batch
from .base import Clipped, PolicyGradient
from .loss_options import check_numbers


@dataclass(frozen=True, kw_only=True)
class GroupRelative(PolicyGradient):
    """A response's advantage is its reward relative to the other responses to the same prompt.

        A_i = (r_i - mean_group) / (std_group + eps)

    Args:
        baseline: "mean" | "leave_one_out" | "none".
        scale: "std" of the group | "batch_std" (arXiv:2508.08221) | "none".  eps: beside the std.
    """

    baseline: str = "mean"
    scale: str = "std"
    eps: float = 1e-4

    def __post_init__(self) -> None:
        _check.choice("baseline", self.baseline, ("mean", "leave_one_out", "none"))
        _check.choice("scale", self.scale, ("std", "batch_std", "none"))
        _check.number("eps", self.eps, low=0.0, low_open=self.scale != "none")
        super().__post_init__()

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        rewards = self.rewards(config, batch)
        return group_advantages(rewards, batch.groups, baseline=self.baseline, scale=self.scale, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class GRPO(GroupRelative, Clipped):
    """Group-relative advantages, PPO's clipped ratio.

        A_i = (r_i - mean_group) / (std_group + eps),    loss: clipped ratio (PPOClip) + kl_coef KL

    Args:
        ratio_min, ratio_max: bounds of the probability ratio.
        baseline: "mean" | "leave_one_out" | "none".
        scale: "std" of the group | "batch_std" (arXiv:2508.08221) | "none".  eps: beside the std.
        aggregation, kl_estimator, kl_gradient, kl_in_reward: see `PolicyGradient`.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Shao et al. 2024 (arXiv:2402.03300). The paper's loss is a mean of sequence means
        ("seq_mean_token_mean"); "token_mean" weighs long answers as DAPO does.
    """


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """GRPO with clip-higher, a loss per token, no groups of equal reward and a soft limit of length.

        r_i += min(0, (longest - buffer - l_i) / buffer)    for a response of l_i tokens, not below -1

    A group of equal rewards has no advantage; here it does not count in the loss's denominator either.

    Args:
        ratio_max: 1.28, above which a token's probability does not rise further.
        overlong_buffer: last tokens of trainer.max_new_tokens in which the penalty grows from 0 to 1; 0: none.
    Source: Yu et al. 2025 (arXiv:2503.14476), eq. 8 to 13. Instead of sampling until every group differs, the
        batch gets smaller.
    """

    ratio_max: float = 1.28
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.overlong_buffer, int) or isinstance(self.overlong_buffer, bool):
            raise TypeError(f"overlong_buffer must be a whole number, got {self.overlong_buffer!r}")
        _check.number("overlong_buffer", self.overlong_buffer, low=0)
        super().__post_init__()

    def check(self, config: Any) -> None:
        super().check(config)
        if self.overlong_buffer > config.max_new_tokens:
            raise ValueError(
                f"overlong_buffer must be at most trainer.max_new_tokens, {config.max_new_tokens}, "
                f"got {self.overlong_buffer}"
            )

    def rewards(self, config: Any, batch: Batch) -> torch.Tensor:
        rewards = super().rewards(config, batch)
        if not self.overlong_buffer:
            return rewards
        over = batch.mask.sum(1) - (config.max_new_tokens - self.overlong_buffer)
        return rewards - (over / self.overlong_buffer).clamp(0, 1).to(rewards.dtype)

    def score(self, trainer: Any, batch: Batch) -> None:
        super().score(trainer, batch)
        relative = group_advantages(self.rewards(trainer.config, batch), batch.groups, scale="none")
        telling = torch.isin(batch.groups, batch.groups[relative != 0])
        batch.mask = batch.mask & telling[:, None]


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO without its two biases: no division by the group's std, none by a response's length.

        A_i = r_i - mean_group,    loss = sum over tokens / (sequences x trainer.max_new_tokens)

    Source: Liu et al. 2025 (arXiv:2503.20783), section 3.2.
    """

    scale: str = "none"
    aggregation: str = "token_sum_norm"


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """GRPO with one ratio for the whole response, the geometric mean of its tokens'.

    Source: Zheng et al. 2025 (arXiv:2507.18071), eq. 5 to 7; see `react_fast.GSPO`, its objective.
    """

    ratio_min: float = 1 - 3e-4
    ratio_max: float = 1 + 4e-4
    aggregation: str = "seq_mean_token_mean"

    @property
    def objective(self) -> Any:
        return objectives.GSPO(ratio_min=self.ratio_min, ratio_max=self.ratio_max)


@dataclass(frozen=True, kw_only=True)
class CISPO(GRPO):
    """GRPO whose ratio is a bounded weight without gradient, so that every token keeps one.

    Source: MiniMax-M1 2025 (arXiv:2506.13585), eq. 4; see `react_fast.CISPO`, its objective.
    """

    ratio_min: float = 0.0
    ratio_max: float = 5.0

    @property
    def objective(self) -> Any:
        return objectives.CISPO(ratio_min=self.ratio_min, ratio_max=self.ratio_max)


@dataclass(frozen=True, kw_only=True)
class GMPO(GRPO):
    """GRPO with the geometric mean of a response's clipped ratios, which outliers move less.

    Source: Zhao et al. 2025 (arXiv:2507.20673), eq. 5; see `react_fast.GMPO`, its objective.
    """

    ratio_min: float = exp(-0.4)
    ratio_max: float = exp(0.4)
    aggregation: str = "seq_mean_token_mean"

    @property
    def objective(self) -> Any:
        return objectives.GMPO(ratio_min=self.ratio_min, ratio_max=self.ratio_max)


@dataclass(frozen=True, kw_only=True)
class SAPO(GroupRelative):
    """Group-relative advantages, a smooth gate on the ratio instead of a clip.

    Args:
        tau_pos, tau_neg: how fast the gate closes where the advantage is positive, negative.
    Source: Gao et al. 2025 (arXiv:2511.20347), eq. 5; see `react_fast.SAPO`, its objective.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    aggregation: str = "seq_mean_token_mean"

    def __post_init__(self) -> None:
        check_numbers(self, "tau_pos", "tau_neg", low=0.0, low_open=True)
        super().__post_init__()

    @property
    def objective(self) -> Any:
        return objectives.SAPO(tau_pos=self.tau_pos, tau_neg=self.tau_neg)
