"""Prioritised sampling in plain loops; see react_fast.ops.sum_tree."""

from collections.abc import Sequence

import torch


class SumTree:
    """A list of priorities; every sum is computed when it is asked for."""

    def __init__(self, capacity: int) -> None:
        self.priorities = [0.0] * capacity

    @property
    def total(self) -> float:
        return sum(self.priorities)

    @property
    def least(self) -> float:
        return min((p for p in self.priorities if p > 0), default=float("inf"))

    def update(self, indices: Sequence[int], priorities: Sequence[float]) -> None:
        for i, p in zip(indices, priorities, strict=True):
            self.priorities[int(i)] = float(p)

    def find(self, mass: float) -> int:
        """The first i with p_0 + ... + p_i > mass; where rounding leaves none, the last with a priority."""
        total, last = 0.0, 0
        for i, p in enumerate(self.priorities):
            total += p
            if total > mass:
                return i
            last = i if p > 0 else last
        return last

    def sample(self, uniforms: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """One leaf from each of B strata of equal mass, and its priority."""
        share = self.total / len(uniforms)
        indices = [self.find((k + float(u)) * share) for k, u in enumerate(uniforms)]
        found = [self.priorities[i] for i in indices]
        return torch.tensor(indices), torch.tensor(found, dtype=torch.float64)
