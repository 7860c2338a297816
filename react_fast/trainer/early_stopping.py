"""Early stopping: stop when the held-out quality no longer improves, and hand back the best weights."""

import math
from collections.abc import Mapping
from typing import Any, cast

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
        """Take a state; without patience its weights are of no more use."""
        kept = state["best"], state["waited"], state["weights"]
        if self.patience:
            self.best, self.waited, self.weights = kept


class BestStep:
    """The step with the best evaluation.

    Args: metric: such as "eval/reward", or "-eval/loss" where the lowest is best; None: no step is.
    """

    def __init__(self, metric: str | None) -> None:
        self._sign, self._name = (-1, metric[1:]) if metric and metric.startswith("-") else (1, metric)
        self._metric, self.step, self._value = metric, cast(int | None, None), -math.inf

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation; NaN is never the best."""
        if self._name is None:
            return
        value = self._sign * metrics[self._name]
        if value > self._value:
            self.step, self._value = step, value

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self._metric, "step": self.step, "value": self._value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the best step of a state; that of another metric is none."""
        if state["metric"] == self._metric:
            self.step, self._value = state["step"], state["value"]


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
