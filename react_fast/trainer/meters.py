"""What a training step reports: averages of the update's metrics, seconds of the phases, rewards, samples."""

import math
import operator
import time
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from ..envs import Record, RewardError
from .ranks import Ranks
from .rollout import Trajectory


def describe(trajectories: Sequence[Trajectory], supervised: bool) -> dict[str, float]:
    """Lengths of the responses and, unless `supervised`, their rewards, by TRL's names: "reward_std" is that of
    all episodes (with N - 1), "frac_reward_zero_std" the share of groups whose rewards are all the same.

    Where the environment has several reward functions, "rewards/<name>/mean" and "/std" (as in TRL of all that it
    applied to, with N - 1, 0 for a single one; no entry if it applied to none); sums of what it counted.
    """
    metrics = {"completions/mean_length": float(np.mean([int(t.action_mask.sum()) for t in trajectories]))}
    if supervised:
        return metrics
    rewards = np.array([float(sum(t.rewards)) for t in trajectories])
    groups = np.array([t.group for t in trajectories])
    alike = [bool(np.ptp(rewards[groups == g]) == 0) for g in np.unique(groups)]
    return metrics | {
        "reward": float(rewards.mean()),
        "reward_std": float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0,
        "frac_reward_zero_std": float(np.mean(alike)),
        "completions/clipped_ratio": float(np.mean([not t.finished for t in trajectories])),
        "episodes/truncated_ratio": float(np.mean([t.truncated for t in trajectories])),
        **_parts(trajectories),
        **_counts(trajectories),
    }


def logged(trajectories: Sequence[Trajectory], own: Collection[str]) -> dict[str, float]:
    """Means of what the reward functions logged.

    Raises: RewardError for a name among the trainer's `own`.
    """
    names = dict.fromkeys(name for t in trajectories for name in t.logged)
    taken = [name for name in names if name in own]
    if taken:
        raise RewardError(f"log_metric must be given a name that the trainer does not log, got {taken[0]!r}")
    return {name: float(np.mean([x for t in trajectories for x in t.logged.get(name, [])])) for name in names}


def _counts(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    names = dict.fromkeys(name for t in trajectories for name in t.counts)
    return {name: float(sum(t.counts.get(name, 0) for t in trajectories)) for name in names}


def _parts(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    metrics = {}
    for name in dict.fromkeys(name for t in trajectories for name in t.reward_parts):
        parts = [part for t in trajectories if (part := t.reward_parts.get(name)) is not None]
        if parts:
            metrics[f"rewards/{name}/mean"] = float(np.mean(parts))
            metrics[f"rewards/{name}/std"] = float(np.std(parts, ddof=1)) if len(parts) > 1 else 0.0
    return metrics


def samples(
    trajectories: Sequence[Trajectory], records: Sequence[Record], tokenizer: Any, count: int = 4
) -> list[dict[str, Any]]:
    """Prompt, response, reference, reward and what `log_extra` got of `count` trajectories at even distances."""
    rows = []
    for trajectory in trajectories[:: max(1, len(trajectories) // count)][:count]:
        record, actions = records[trajectory.record], trajectory.token_ids[trajectory.action_mask]
        response = tokenizer.decode(actions.tolist(), skip_special_tokens=True)
        row = {"prompt": record.prompt, "response": response, "reference": record.reference}
        rows.append({**trajectory.extra, **row, "reward": float(sum(trajectory.rewards))})
    return rows


class Averages:
    """Metrics over micro-batches and updates: counts and parts of the loss, which is divided by the whole update's
    count, are added, others are weighted means; on the device until the end."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Any, weight: float) -> None:
        for name, value in metrics.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            if name.endswith("tokens") or name.startswith("loss/") or name in ("clamped", "skipped_updates"):
                self.sum(name, value)
            elif name.endswith("/max"):
                self._sums[name] = max(float(value), self._sums.get(name, -math.inf))
            elif weight:
                self._sums[name] = self._sums.get(name, 0.0) + value * weight
                self._weights[name] = self._weights.get(name, 0.0) + weight

    def sum(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def joined(self, ranks: Ranks) -> "Averages":
        """Over all ranks: each adds what it saw."""
        whole = Averages()
        mine = {name: float(total) for name, total in self._sums.items()}, self._weights
        for sums, weights in ranks.joined([mine], ranks.world):
            for name, total in sums.items():
                add = max if name.endswith("/max") else operator.add
                whole._sums[name] = add(whole._sums[name], total) if name in whole._sums else total
            for name, weight in weights.items():
                whole._weights[name] = whole._weights.get(name, 0.0) + weight
        return whole

    def result(self) -> dict[str, float]:
        return {name: float(total) / self._weights.get(name, 1.0) for name, total in self._sums.items()}


class Clock:
    """Seconds of every phase of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[f"time/{name}"], self._last = now - self._last, now

    def metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Seconds of the laps and of all; response tokens of the step that were got and trained on in a second."""
        seconds = time.perf_counter() - self._start
        tokens = sum(int(t.action_mask.sum()) for t in trajectories)
        return {**self._laps, "step_time": seconds, "tokens_per_second": tokens / seconds}
