"""Credit that needs the environment: causal effects by intervention, and Monte-Carlo step advantages.

| credit | policy gradient | what it costs |
| --- | --- | --- |
| uniform | unbiased | nothing |
| monte_carlo | unbiased: a state's value does not hang on the action taken there | steps x samples replays |
| causal | biased by its shortcuts: choice of episodes, bisection, table | a few replays |
| attribution | biased unless the floor is 1 | a backward |

Source: Kazemnejad et al. 2024, VinePPO (arXiv:2410.01679), for states valued by playing on; Oberst & Sontag 2019
(arXiv:1905.05824) for counterfactuals under the noise that was; Mao et al. 2018 (arXiv:1807.02264): the
environment's own randomness may be held fixed in what is subtracted.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..tracker.actions import find_actions
from ..tracker.effect_table import EffectTable
from ..tracker.shapley import contributions
from ..tracker.text import Text
from .batch import Batch
from .ranks import gathered
from .replay import Count, Replay, replay
from .rollout import RolloutEngine, Trajectory, key, permutation, sampling_params, uniforms
from .rollout.truncation import choose

# Streams of random numbers, beside the trainer's own.
_ROWS, _REDRAWN, _VALUES = 5, 7, 8
_SAME = 1e-9  # rewards that lie no farther apart, relative to the largest and to 1, are equal


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

    def state_dict(self) -> dict[str, Any]:
        return {"environment_steps": self.environment_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.environment_steps = state.get("environment_steps", 0)


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


class CausalReplays(Replays):
    """do(the policy draws anew from here on), under one other noise for all of an episode's actions, the
    environment's randomness the same.

        value(k) = return with the first k actions kept and the rest redrawn
        effect_k = value(k) - value(k-1)

    Action by action the noise of the redrawing gives way to that of the episode. So effects sum to what the
    episode got above a redrawn one, an action that the redrawing would have chosen, too, has none, and the mean
    of an effect is the advantage of the action.

    Three shortcuts, each of which biases that mean: a measured step takes the trajectories whose rewards differ
    most from their group's mean, until the budget is spent. By bisection (see `contributions`) one costs about
    log2(n) replays for each of its n actions that counts; effects that cancel between two equal values are not
    seen. With `credit_by` "token" or "token_at_position" the other trajectories get what a table has learned: an
    action's effect against another action, times the probability of another (the sampler's, or where it does not
    tell the policy's); what a token does must then hardly
    hang on its context.

    The policy itself redraws (`PolicyEngine`), whatever engine plays the rollouts: other engines' draws cannot be
    named, so that two values would differ by chance, and an action get what its neighbours did.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        by = trainer.config.credit_by
        self.table = None if by == "episode" else EffectTable(by, trainer.accelerator.device)

    def play(self, trajectories: Sequence[Trajectory], batch: Batch, count: Count) -> None:
        own = torch.full(batch.mask.shape, torch.nan, dtype=torch.float64)
        if self.trainer.step % self.trainer.config.credit_every == 0:
            self._measure(trajectories, batch, count, own)
        own = own.to(batch.mask.device)
        batch.effects = torch.where(own.isnan(), self._known(batch), own)

    def state_dict(self) -> dict[str, Any]:
        table = {} if self.table is None else {"effects": self.table.moments.state_dict()}
        return super().state_dict() | {"by": self.trainer.config.credit_by} | table

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.table is None:
            return
        if state.get("by") == self.table.by:
            self.table.moments.load_state_dict(state["effects"])
        else:
            kept = state.get("by", "nothing")
            warnings.warn(
                f"the checkpoint keeps effects by {kept}, not by {self.table.by}: they start anew",
                stacklevel=2,
            )

    def _known(self, batch: Batch) -> torch.Tensor:
        """[B, T-1] effects out of the table, NaN where it has none to tell."""
        if self.table is None:
            return torch.full(batch.mask.shape, torch.nan, dtype=torch.float64, device=batch.mask.device)
        found = self.table.effects(batch.targets, (batch.mask.cumsum(1) - 1).clamp_min(0))
        logprobs = batch.sampler_logprobs.double()
        untold = batch.mask & logprobs.isnan()
        if bool((untold & (found != 0)).any()):
            scored = batch.old_logprobs
            scored = self.trainer.scores(batch).logprobs if scored is None else scored
            logprobs = torch.where(untold, scored.double(), logprobs)
        return torch.where(found == 0, 0.0, found * -torch.expm1(logprobs))

    def _measure(
        self, trajectories: Sequence[Trajectory], batch: Batch, count: Count, own: torch.Tensor
    ) -> None:
        """Fill rows of `own` [B, T-1] with the effects of all their actions, and add them to the table."""
        config, step = self.trainer.config, self.trainer.step
        left = config.credit_interventions
        for row in _by_surprise(batch, config.seed, step)[:left]:
            if left == 0:
                break
            one, ids = trajectories[row], trajectories[row].token_ids.tolist()
            redrawn = self._redrawn(batch, trajectories, row)
            units = [
                unit
                for unit in units_of(one, config.credit_actions, self.trainer.tokenizer)
                if any(redrawn[t] != ids[t] for t in unit)
            ]
            if not units:
                own[row, batch.mask[row].cpu()] = 0.0
                continue
            last_first = units[::-1]

            def value(k: int, one: Trajectory = one, units: Any = last_first, row: int = row) -> float:
                kept = turns_of(one, one.token_ids, end=units[k - 1][0])
                again = Replay(one.record, one.seed, kept, open=True, number=row)
                return play_again(self.trainer, self.trainer.policy_engine, [again], _REDRAWN, count)[0]

            found, spent = contributions(value, float(sum(one.rewards)), len(units), left)
            left -= spent
            if not np.isfinite(found).all():
                continue
            own[row, batch.mask[row].cpu()] = 0.0
            for effect, unit in zip(found, last_first, strict=True):
                own[row, torch.tensor(unit) - 1] = effect
            if self.table is not None:
                self._add(one, last_first, found, redrawn)

    def _add(self, one: Trajectory, units: list[list[int]], found: list[float], redrawn: list[int]) -> None:
        """An effect counts for its action's tokens, and turned around for the first that was drawn otherwise."""
        assert self.table is not None
        places, ids = (one.action_mask.cumsum(0) - 1).tolist(), one.token_ids.tolist()
        measured = []
        for effect, unit in zip(found, units, strict=True):
            measured += [(effect, ids[t], places[t]) for t in unit]
            other = next(t for t in unit if redrawn[t] != ids[t])
            measured.append((-effect, redrawn[other], places[other]))
        effects, tokens, positions = zip(*measured, strict=True)
        device = self.trainer.accelerator.device
        self.table.add(
            torch.tensor(effects, dtype=torch.float64, device=device),
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
        )

    @torch.no_grad()
    def _redrawn(self, batch: Batch, trajectories: Sequence[Trajectory], row: int) -> list[int]:
        """Token ids of a row with, at every action, what the policy draws there under the other noise."""
        trainer, one = self.trainer, trajectories[row]
        params = sampling_params(trainer.config, seed=key(trainer.config.seed, _REDRAWN), step=trainer.step)
        part = batch.select(torch.tensor([row]))
        was_training = trainer.model.training
        trainer.model.eval()
        with gathered(trainer.policy):
            logits = trainer.policy.logits(part)[0, :-1]
        trainer.model.train(was_training)
        ids = one.token_ids.tolist()
        for turn in range(len(one.rewards)):
            places = ((one.turn_index == turn) & one.action_mask).nonzero()[:, 0]
            if len(places):
                draws = uniforms(replace(params, turn=turn, rows=[row]), 1)[0, : len(places)]
                drawn = choose(logits[(places - 1).to(logits.device)], draws, params)[0]
                for t, token in zip(places.tolist(), drawn.tolist(), strict=True):
                    ids[t] = token
        return ids


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
        returns = np.array(play_again(self.trainer, self.trainer.engine, wanted, _VALUES, count))
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
}


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
        texts = None if actions == "token" else [tokenizer.decode([i]) for i in ids]
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


def _by_surprise(batch: Batch, seed: int, step: int) -> list[int]:
    """Rows by the distance of their reward from their group's mean, the farthest first, ties at random; those
    at the mean have no advantage to explain and are left out, and so are those of a group with a reward that is
    NaN or infinite."""
    rewards, groups = batch.rewards.double().cpu(), batch.groups.cpu()
    distance = [float((r - rewards[groups == g].mean()).abs()) for r, g in zip(rewards, groups, strict=True)]
    distance = [round(x, 9) for x in distance]
    order = permutation(len(distance), seed, _ROWS, step).tolist()
    return sorted((row for row in order if 0 < distance[row] < math.inf), key=lambda row: -distance[row])
