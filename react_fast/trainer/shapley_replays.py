"""Shapley credit: an episode's reward divided among its few actions."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..tracker.shapley import cost, divided
from .batch import Batch
from .replay import Count, Replay
from .replays import ORDERS, REDRAWN, Replays, by_surprise, play_again, units_of
from .rollout import Trajectory, key


class ShapleyReplays(Replays):
    """Shapley values of an episode's few actions, words, lines or turns:

        value(S) = return with the actions of S alone, the others deleted, the environment's randomness the same

    They sum to what the episode got above one without any action, and two actions that need each other share what
    they bring together. The trajectories whose rewards differ most from their group's mean come first, each as
    long as its replays fit in what is left of the budget: 2^n - 1 for n actions up to 10, above them those of
    `credit_samples` pairs of orders. A row with one action has nothing to divide.
    """

    def play(self, trajectories: Sequence[Trajectory], batch: Batch, count: Count) -> None:
        config, trainer = self.trainer.config, self.trainer
        own = torch.full(batch.mask.shape, torch.nan, dtype=torch.float64)
        left, dearest = config.credit_interventions, 0
        rows = (
            by_surprise(batch, config.seed, trainer.step) if trainer.step % config.credit_every == 0 else []
        )
        for row in rows:
            one = trajectories[row]
            units = units_of(one, config.credit_actions, trainer.tokenizer)
            needed = cost(len(units), config.credit_samples)
            if len(units) < 2 or needed > left:
                dearest = max(dearest, needed)
                continue

            def values(
                asked: Sequence[frozenset[int]], row: int = row, one: Trajectory = one, units: Any = units
            ) -> list[float]:
                again = [
                    Replay(one.record, one.seed, _turns_with(one, units, members), number=row)
                    for members in asked
                    if len(members) < len(units)
                ]
                found = iter(play_again(trainer, trainer.policy_engine, again, REDRAWN, count))
                whole = float(sum(one.rewards))
                return [next(found) if len(members) < len(units) else whole for members in asked]

            left -= needed
            seed = key(config.seed, ORDERS, trainer.step, row)
            found = divided(values, len(units), samples=config.credit_samples, seed=seed).mean
            if bool(found.isfinite().all()):
                self.tell(one, units, found.tolist())
                for effect, unit in zip(found, units, strict=True):
                    own[row, torch.tensor(unit) - 1] = effect
        if rows and left == config.credit_interventions and dearest > 1:
            warnings.warn(
                f"trainer.credit_interventions {left} is too small for Shapley credit of any episode: "
                f"one needs up to {dearest:,}; raise it or choose longer credit_actions",
                stacklevel=2,
            )
        batch.effects = own.to(batch.mask.device)


def _turns_with(one: Trajectory, units: Sequence[list[int]], members: Iterable[int]) -> list[list[int]]:
    """Every turn's action with the tokens of some units alone."""
    kept = torch.zeros_like(one.action_mask)
    for i in members:
        kept[torch.tensor(units[i])] = True
    ids = one.token_ids
    return [ids[kept & (one.turn_index == turn)].tolist() for turn in range(len(one.rewards))]
