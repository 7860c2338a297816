"""What credit that plays episodes again shares: the count of environment steps, units, the order of episodes."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..tracker.actions import find_actions
from ..tracker.text import Text, token_texts
from .batch import Batch
from .ranks import gathered
from .replay import Count, Replay, replay
from .rollout import RolloutEngine, Trajectory, key, permutation, sampling_params

# Streams of random numbers, beside the trainer's own.
_ROWS, REDRAWN, VALUES, ORDERS = 5, 7, 8, 9


class Replays:
    """Uniform credit, which plays nothing again, and what the others share.

    Attributes:
        environment_steps: of training, those of rollouts and of replays.
        metrics: of the last step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.environment_steps = 0
        self.metrics: dict[str, float] = {}

    def score(self, trajectories: Sequence[Trajectory], batch: Batch) -> None:
        """Add to the batch what credit needs."""
        count = Count()
        self.play(trajectories, batch, count)
        self.environment_steps += sum(len(one.rewards) for one in trajectories) + count.environment_steps
        self.metrics = {
            "environment_steps": float(self.environment_steps),
            "credit/environment_steps": float(count.environment_steps),
            "credit/generated_tokens": float(count.tokens),
        }

    def play(self, trajectories: Sequence[Trajectory], batch: Batch, count: Count) -> None:
        return None

    def tell(
        self,
        one: Trajectory,
        units: list[list[int]],
        effects: list[float],
        measured: list[tuple[float, int, int]] | None = None,
    ) -> None:
        """Show the tracker what an episode's units did to its return; once, as all ranks measure the same.

        Args:
            measured: (effect, token, position among the actions) of what counts by token; None: the effect of a
                unit for each of its tokens.
        """
        trainer = self.trainer
        if trainer.tracker is None or not trainer.ranks.first:
            return
        ids, places = one.token_ids.tolist(), (one.action_mask.cumsum(0) - 1).tolist()
        trainer.tracker.add_return_effects(
            effects,
            [[ids[t] for t in unit] for unit in units],
            [places[unit[0]] for unit in units],
            measured
            or [(e, ids[t], places[t]) for e, unit in zip(effects, units, strict=True) for t in unit],
            unit=trainer.config.credit_actions,
            step=trainer.step,
            group=None if trainer.updater.groups is None else int(trainer.updater.groups[one.record]),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"environment_steps": self.environment_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.environment_steps = state.get("environment_steps", 0)


def units_of(one: Trajectory, actions: str, tokenizer: Any) -> list[list[int]]:
    """Places of the tokens of every unit, in order; a unit lies within one turn's action."""
    units = []
    chosen = one.action_mask.nonzero()[:, 0].tolist()
    for _, group in itertools.groupby(chosen, key=lambda t: int(one.turn_index[t])):
        run = list(group)
        if actions == "turn":
            units.append(run)
            continue
        ids = one.token_ids[run].tolist()
        texts = None if actions == "token" else token_texts(tokenizer, ids)
        units += [run[start:end] for start, end in find_actions(actions, Text(tuple(ids), 0), texts, None)]
    return units


def turns_of(one: Trajectory, ids: torch.Tensor, end: int | None = None) -> list[list[int]]:
    """Every turn's action out of token ids; with `end`, up to the turn of that token, whose action stops
    before it.
    """
    last = len(one.rewards) - 1 if end is None else int(one.turn_index[end])
    here = one.action_mask.clone()
    if end is not None:
        here[end:] = False
    return [ids[here & (one.turn_index == turn)].tolist() for turn in range(last + 1)]


def play_again(
    trainer: Any, engine: RolloutEngine, wanted: Iterable[Replay], stream: int, count: Count
) -> list[float]:
    """Returns of replays, config.eval_batch of them at a time; the policy draws from streams of their own for
    every use and step, one for each of the replays' numbers."""
    config = trainer.config
    params = sampling_params(config, seed=key(config.seed, stream), step=trainer.step)
    returns: list[float] = []
    remaining = iter(wanted)
    while part := list(itertools.islice(remaining, config.eval_batch)):
        mine, own = trainer.ranks.share(part), Count()
        with gathered(trainer.policy):
            found = replay(engine, trainer.tokenizer, trainer.env, mine, params, own)
        returns += trainer.ranks.joined(found, len(part))
        for other in trainer.ranks.joined([own], trainer.ranks.world):
            count.add(other)
    return returns


def by_surprise(batch: Batch, seed: int, step: int) -> list[int]:
    """Rows by the distance of their reward from their group's mean, the farthest first, ties at random; those
    at the mean have no advantage to explain and are left out, and so are those of a group with a reward that is
    NaN or infinite."""
    rewards, groups = batch.rewards.double().cpu(), batch.groups.cpu()
    distance = [float((r - rewards[groups == g].mean()).abs()) for r, g in zip(rewards, groups, strict=True)]
    distance = [round(x, 9) for x in distance]
    order = permutation(len(distance), seed, _ROWS, step).tolist()
    return sorted((row for row in order if 0 < distance[row] < math.inf), key=lambda row: -distance[row])
