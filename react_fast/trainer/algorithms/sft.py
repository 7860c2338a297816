"""Supervised warm start: cross-entropy on the records' references."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...envs import Record
from ...envs.record import RecordError
from ..batch import Batch
from ..rollout import Trajectory, demonstration
from ..scoring import Scores
from .base import Algorithm, Loss

LEARNS = ("reference", "all")


@dataclass(frozen=True)
class SFT(Algorithm):
    """loss = -1/n sum_t log p(token_t | tokens_<t), over the n learnt tokens of an update.

    Args:
        learns: "reference": the references' tokens; "all": the prompts', too, which show a fresh model how
            texts are made. Evaluations count the references alone.
    Raises: ValueError for another value.
    """

    learns: str = "reference"

    supervised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.learns not in LEARNS:
            raise ValueError(f"learns must be 'reference' or 'all', got {self.learns!r}")

    def collect(self, trainer: Any, step: int) -> list[Trajectory]:
        found = super().collect(trainer, step)
        for one in found if self.learns == "all" else ():
            one.action_mask[1:] = True
        return found

    def demonstrate(
        self, tokenizer: Any, records: Sequence[Record], chosen: Sequence[int]
    ) -> list[Trajectory]:
        answers = [written(i, records[i].reference, "reference") for i in chosen]
        pairs = zip(chosen, answers, strict=True)
        return [demonstration(tokenizer, records[i], answer, i) for i, answer in pairs]

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        return torch.ones_like(batch.rewards)

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        tokens = part.mask.sum()
        entropy = scores.entropy.detach().sum() / tokens.clamp_min(1)
        return -scores.logprobs.sum() / denominator.clamp_min(1), {"tokens": tokens, "entropy": entropy}


def written(i: int, answer: Any, name: str) -> str:
    """The answer that supervised training needs.

    Raises: ValueError for a record without it.
    """
    if not isinstance(answer, str):
        raise RecordError(f"records[{i}].{name} must be a text for supervised training, got {answer!r}")
    return answer
