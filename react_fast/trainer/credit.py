"""Credit that needs the environment: causal effects by intervention, and Monte-Carlo step advantages.

| credit | policy gradient | what it costs |
| --- | --- | --- |
| uniform | unbiased | nothing |
| monte_carlo | unbiased: a state's value does not hang on the action taken there | steps x samples replays |
| causal | biased by its shortcuts: choice of episodes, bisection, table | a few replays |
| shapley | biased: what an action brings to texts the policy would not write | 2^n replays |
| attribution | biased unless the floor is 1 | a backward |

Source: Kazemnejad et al. 2024, VinePPO (arXiv:2410.01679), for states valued by playing on; Oberst & Sontag 2019
(arXiv:1905.05824) for counterfactuals under the noise that was; Mao et al. 2018 (arXiv:1807.02264): the
environment's own randomness may be held fixed in what is subtracted.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .batch import Batch
from .causal_replays import CausalReplays
from .ranks import gathered
from .replay import Count, Replay
from .replays import VALUES, Replays, play_again, turns_of, units_of
from .rollout import Trajectory
from .shapley_replays import ShapleyReplays

_SAME = 1e-9  # rewards that lie no farther apart, relative to the largest and to 1, are equal


class Attributions(Replays):
    """The tracker's attribution of every trajectory's log-probability to its tokens; nothing is played again."""

    def play(self, trajectories: Sequence[Trajectory], batch: Batch, count: Count) -> None:
        actions = torch.nn.functional.pad(batch.mask, (1, 0))
        parts = []
        mine = self.trainer.ranks.even_share(len(batch))
        with gathered(self.trainer.policy):
            for rows in mine.split(self.trainer.config.micro_batch or len(batch)):
                inputs = batch.input_ids[rows], batch.attention_mask[rows], actions[rows]
                parts.append(self.trainer.tracker.score_batch(*inputs)[:, 1:])
        batch.attribution = self.trainer.ranks.rows(torch.cat(parts), len(batch))


class MonteCarloReplays(Replays):
    """A step's advantage: mean return of the episodes that the policy plays on from behind it, less those
    from before it, under the same noise; the end's value is the trajectory's own return."""

    def play(self, trajectories: Sequence[Trajectory], batch: Batch, count: Count) -> None:
        config = self.trainer.config
        samples = config.credit_samples
        steps = [units_of(one, config.credit_actions, self.trainer.tokenizer) for one in trajectories]
        places = [(row, unit[0]) for row, units in enumerate(steps) for unit in units]

        def turns(place: tuple[int, int]) -> list[list[int]]:
            return turns_of(trajectories[place[0]], trajectories[place[0]].token_ids, end=place[1])

        # Those that have as many tokens left to draw are generated together.
        order = sorted(range(len(places)), key=lambda i: len(turns(places[i])[-1]))
        wanted = (
            Replay(one.record, one.seed, kept, True, row * samples + sample)
            for row, one, kept in (
                (places[i][0], trajectories[places[i][0]], turns(places[i])) for i in order
            )
            for sample in range(samples)
        )
        returns = np.array(play_again(self.trainer, self.trainer.engine, wanted, VALUES, count))
        found = np.empty(len(places))
        found[order] = returns.reshape(-1, samples).mean(1)
        values = iter(found.tolist())
        advantages = torch.zeros(batch.mask.shape, dtype=batch.rewards.dtype)
        for row, (one, units) in enumerate(zip(trajectories, steps, strict=True)):
            worth = [next(values) for _ in units] + [float(sum(one.rewards))]
            for unit, before, after in zip(units, worth, worth[1:], strict=False):
                advantages[row, torch.tensor(unit) - 1] = after - before
        batch.step_advantages = advantages.to(batch.mask.device)


REPLAYS = {
    "uniform": Replays,
    "attribution": Attributions,
    "causal": CausalReplays,
    "monte_carlo": MonteCarloReplays,
    "shapley": ShapleyReplays,
}


def in_advantages(batch: Batch) -> torch.Tensor:
    """[B, T-1] the batch's effects in the unit of its advantages."""
    assert batch.effects is not None
    assert batch.advantages is not None
    count = batch.mask.sum(1).clamp_min(1)
    level = batch.advantages.double()
    level = level[:, None] if level.dim() == 1 else level
    squares = torch.where(batch.mask, level.square(), 0.0).sum(1) / count
    return batch.effects * advantage_per_reward(squares, batch.rewards, batch.groups)[:, None]


def advantage_per_reward(squares: torch.Tensor, rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """[B] float64: ratio of a group's root mean square advantage to that of its rewards' distances from their
    mean, 0 where the rewards are equal.

    Args:
        squares: [B] float64, of the rows' advantages. rewards: [B]. groups: [B], equal within a group.
    """
    ratio = torch.zeros_like(squares)
    for group in groups.unique():
        rows, within = groups == group, rewards[groups == group].double()
        spread = (within - within.mean()).square().sum()
        rounding = _SAME * within.abs().max().clamp_min(1.0)
        ratio[rows] = torch.where(spread.sqrt() > rounding, (squares[rows].sum() / spread).sqrt(), 0.0)
    return ratio
