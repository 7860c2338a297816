"""Supervised warm start: cross-entropy on the records' references."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...envs import Record
from ..batch import Batch
from ..rollout import Trajectory, demonstration
from ..scoring import Scores
from .base import Algorithm, Loss


@dataclass(frozen=True)
class SFT(Algorithm):
    """loss = -1/n sum_t log p(reference_t | prompt, reference_<t), over the n reference tokens of an update."""

    supervised: ClassVar[bool] = True

    def collect(self, trainer: Any, step: int) -> list[Trajectory]:
        return demonstrations(trainer.tokenizer, trainer.env.records, trainer.records_of(step))

    def advantages(self, config: Any, batch: Batch) -> torch.Tensor:
        return torch.ones_like(batch.rewards)

    def loss(self, config: Any, part: Batch, scores: Scores, denominator: torch.Tensor) -> Loss:
        tokens = part.mask.sum()
        entropy = scores.entropy.detach().sum() / tokens.clamp_min(1)
        return -scores.logprobs.sum() / denominator.clamp_min(1), {"tokens": tokens, "entropy": entropy}


def demonstrations(tokenizer: Any, records: Sequence[Record], chosen: Sequence[int]) -> list[Trajectory]:
    """The references of some records as trajectories.

    Raises: ValueError for a record without a reference.
    """
    found = []
    for i in chosen:
        reference = records[i].reference
        if reference is None:
            raise ValueError(f"records[{i}].reference must be a text for supervised training, got None")
        found.append(demonstration(tokenizer, records[i].prompt, reference, i))
    return found
