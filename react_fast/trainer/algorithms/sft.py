"""Supervised warm start: cross-entropy on the records' references."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..batch import Batch
from ..rollout import Trajectory, demonstration


@dataclass(frozen=True)
class SFT:
    """loss = -1/n sum_t log p(reference_t | prompt, reference_<t), over the n reference tokens of an update."""

    supervised: ClassVar[bool] = True

    def collect(self, trainer: Any, step: int) -> list[Trajectory]:
        return demonstrations(trainer, trainer.records_of(step))

    def advantages(self, batch: Batch) -> torch.Tensor:
        return torch.ones_like(batch.rewards)

    def denominator(self, batch: Batch) -> torch.Tensor:
        return batch.mask.sum()

    def loss(
        self,
        config: Any,
        part: Batch,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
        denominator: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        tokens = part.mask.sum()
        mean_entropy = entropy.detach().sum() / tokens.clamp_min(1)
        return -logprobs.sum() / denominator.clamp_min(1), {"tokens": tokens, "entropy": mean_entropy}


def demonstrations(trainer: Any, chosen: list[int]) -> list[Trajectory]:
    """The references of some records as trajectories.

    Raises: ValueError for a record without a reference.
    """
    records = trainer.env.records
    for i in chosen:
        if records[i].reference is None:
            raise ValueError(f"records[{i}].reference must be a text for supervised training, got None")
    return [demonstration(trainer.tokenizer, records[i].prompt, records[i].reference, i) for i in chosen]
