"""Early stopping: stop when the held-out quality no longer improves, and hand back the best weights."""

import math
from typing import Any

import torch

from .state import shard_like


class EarlyStopping:
    """Args: patience: evaluations without a better value before a stop; 0: never stop, keep nothing."""

    def __init__(self, patience: int) -> None:
        self.patience, self.best, self.waited = patience, math.inf, 0
        self.weights: dict[str, torch.Tensor] | None = None

    def see(self, value: float, model: torch.nn.Module) -> None:
        """Take note of an evaluation; lower is better."""
        if not self.patience:
            return
        self.waited += 1
        if value < self.best:
            self.best, self.waited = value, 0
            self.weights = {name: p.detach().clone() for name, p in _trained(model)}

    @property
    def over(self) -> bool:
        return bool(self.patience) and self.waited >= self.patience

    def restore(self, model: torch.nn.Module) -> None:
        if self.weights is not None:
            with torch.no_grad():
                for name, p in _trained(model):
                    p.copy_(shard_like(p, self.weights[name]))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.weights = state["best"], state["waited"], state["weights"]


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
