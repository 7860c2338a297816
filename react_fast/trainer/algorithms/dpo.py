"""Direct preference optimisation: the better of two answers becomes likelier than the worse one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...envs import Record
from ...ops import _check
from ..batch import Batch
from ..rollout import Trajectory, demonstration
from ..scoring import Scores
from .base import Algorithm, Loss
from .loss_options import check_numbers
from .sft import written


def sigmoid(h: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the share of labels that may be wrong.

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy
        preferences".
    """
    return -(1 - smoothing) * F.logsigmoid(beta * h) - smoothing * F.logsigmoid(-beta * h)


def ipo(h: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """(h - 1 / (2 beta))^2: pulls the margin to a number instead of to infinity.

    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17, h over whole answers; TRL divides each answer's part by
        its length.
    """
    return (h - 1 / (2 * beta)) ** 2


def hinge(h: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """max(0, 1 - beta h). Source: Zhao et al. 2023, SLiC (arXiv:2305.10425), with the reference policy."""
    return (1 - beta * h).clamp_min(0)


# Each maps h [pairs], the log-odds by which the policy prefers the chosen answer more than the reference does.
PREFERENCE_LOSSES: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
}


@dataclass(frozen=True, kw_only=True)
class Preferences(Algorithm):
    """Neighbouring trajectories are pairs, the better answer first; a pair of equal rewards does not count.

    h = sum_t (log p - log p_ref)(chosen) - sum_t (log p - log p_ref)(rejected),
    loss = mean over pairs of the preference loss of h
    """

    together: ClassVar[int] = 2

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, "beta", low=0.0, low_open=True)
        _check.choice("loss_type", self.loss_type, tuple(PREFERENCE_LOSSES))
        check_numbers(self, "label_smoothing", low=0.0, high=0.5)
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing must be 0 with loss_type {self.loss_type!r}, got {self.label_smoothing:g}"
            )

    def compares(self, config: Any) -> bool:
        return True

    def remembers(self, config: Any) -> bool:
        return False

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        """1 for the better answer of a pair, -1 for the worse, 0 for equals."""
        better, worse = batch.rewards[0::2], batch.rewards[1::2]
        sign = (better - worse).sign()
        return torch.stack([sign, -sign], 1).flatten()

    def denominator(self, config: Any, batch: Batch) -> torch.Tensor:
        return self.weight(batch)

    def weight(self, part: Batch) -> torch.Tensor:
        return _counting(part).sum()

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        assert part.ref_logprobs is not None, "score comes before update"
        counting = _counting(part)
        pairs = counting.sum().clamp_min(1)

        def mean(x: torch.Tensor) -> torch.Tensor:
            return torch.where(counting, x.detach(), 0.0).sum() / pairs

        logps = scores.logprobs.sum(1)
        moved = logps - part.ref_logprobs.sum(1)
        h = moved[0::2] - moved[1::2]
        losses = PREFERENCE_LOSSES[self.loss_type](h, self.beta, self.label_smoothing)
        loss = torch.where(counting, losses, 0.0).sum() / denominator.clamp_min(1)
        tokens = part.mask.sum(1)
        entropy = scores.entropy.detach().sum(1)
        return loss, {
            "rewards/chosen": mean(self.beta * moved[0::2]),
            "rewards/rejected": mean(self.beta * moved[1::2]),
            "rewards/margins": mean(self.beta * h),
            "rewards/accuracies": mean((h > 0).to(h.dtype)),
            "logps/chosen": mean(logps[0::2]),
            "logps/rejected": mean(logps[1::2]),
            "entropy": mean(_pairwise_sum(entropy) / _pairwise_sum(tokens).clamp_min(1)),
            "tokens": tokens.sum(),
        }


def _counting(part: Batch) -> torch.Tensor:
    """[pairs]: those with a better answer, and with an action in both."""
    assert part.advantages is not None, "credit comes before update"
    acted = part.mask.any(1)
    return (part.advantages[0::2] != 0) & acted[0::2] & acted[1::2]


def _pairwise_sum(x: torch.Tensor) -> torch.Tensor:
    return x[0::2] + x[1::2]


@dataclass(frozen=True, kw_only=True)
class DPO(Preferences):
    """From written pairs: a record's reference is the chosen answer, its metadata "rejected" the other.

        loss = -log sigmoid(beta (log p/p_ref (chosen) - log p/p_ref (rejected)))

    A language model is its own reward model: beta log p/p_ref is the reward that the pairs say. Metrics have TRL's
    names.

    Args:
        beta: above 0; how closely the policy stays to the reference, which is the policy at the start.
        loss_type: "sigmoid" | "ipo" (arXiv:2310.12036) | "hinge" (arXiv:2305.10425).
        label_smoothing: share of wrong labels, in [0, 0.5]; of "sigmoid" only.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Rafailov et al. 2023 (arXiv:2305.18290).
    """

    supervised: ClassVar[bool] = True

    def demonstrate(
        self, tokenizer: Any, records: Sequence[Record], chosen: Sequence[int]
    ) -> list[Trajectory]:
        found = []
        for i in chosen:
            one = records[i]
            better = written(i, one.reference, "reference")
            worse = written(i, one.metadata.get("rejected"), "metadata['rejected']")
            for answer, reward in ((better, 1.0), (worse, 0.0)):
                found.append(replace(demonstration(tokenizer, one, answer, i), rewards=[reward]))
        return found


@dataclass(frozen=True, kw_only=True)
class OnlineDPO(Preferences):
    """From the policy's own answers: of every prompt's group the best and the worst are a pair.

    Args:
        beta, loss_type, label_smoothing: see `DPO`.
    Raises: ValueError or TypeError for an option out of range, when it is made.
    Source: Guo et al. 2024 (arXiv:2402.04792), with the environment's reward as the judge.
    """

    def check(self, config: Any) -> None:
        super().check(config)
        if config.group_size < 2:
            raise ValueError(
                f"trainer.group_size must be at least 2 for OnlineDPO, which compares, got {config.group_size}"
            )
        if config.credit != "uniform":
            raise ValueError(
                f"trainer.credit must be 'uniform' for OnlineDPO: a preference is of whole answers, "
                f"got {config.credit!r}"
            )

    def select(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The first of the best and the last of the worst of every group."""
        chosen = []
        for _, members in groupby(trajectories, key=lambda one: one.group):
            ranked = sorted(members, key=lambda one: -sum(one.rewards))
            chosen += [ranked[0], ranked[-1]]
        return chosen
