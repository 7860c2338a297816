"""Credit that needs the environment: causal effects by intervention, and Monte-Carlo step advantages.

| credit | policy gradient | what it costs |
| --- | --- | --- |
| uniform | unbiased | nothing |
| monte_carlo | unbiased: a state's value does not hang on the action taken there | steps x samples replays |
| attribution, causal | biased unless the floor is 1, for less variance | a backward; a few reward calls |

Source: Kazemnejad et al. 2024, VinePPO (arXiv:2410.01679), for monte_carlo; Foerster et al. 2018, COMA
(arXiv:1705.08926), for rewards of counterfactual actions; Mao et al. 2018 (arXiv:1807.02264): the
environment's own randomness may be held fixed in what is subtracted.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
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
from .rollout import Trajectory, key, permutation, sampling_params

# Streams of random numbers, beside the trainer's own.
_ROWS, _UNITS, _ALTERNATIVES, _VALUES, _KNOWN = 5, 6, 7, 8, 9
RECHECK = 8


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
    """do(action := another draw of the policy), the rest of the response fixed, the environment's randomness
    the same.

    A measured step takes the trajectories whose rewards differ most from their group's mean. In a random order all
    of one's actions are replaced, by bisection: see `contributions`. Those whose effect is known already
    stay, but in one trajectory in RECHECK, so that the budget goes to the others. An action's effect counts
    for its tokens, and turned around for those that stand in their place. A trajectory then gets what the
    table knows, and one that was measured its own effects, where any of them exceeds what chance would reach.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.table = EffectTable(trainer.config.credit_by, trainer.accelerator.device)

    def play(self, trajectories: Sequence[Trajectory], batch: Batch, count: Count) -> None:
        own = torch.full(batch.mask.shape, torch.nan, dtype=torch.float64)
        if self.trainer.step % self.trainer.config.credit_every == 0:
            self._measure(trajectories, batch, count, own)
        own = own.to(batch.mask.device)
        kept = self.table.shrunk(own.nan_to_num(), torch.ones_like(own))
        telling = (kept != 0).any(1, keepdim=True) & ~own.isnan()
        batch.effects = torch.where(telling, kept, self._effects(batch))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"by": self.table.by, "effects": self.table.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("by") == self.table.by:
            self.table.moments.load_state_dict(state["effects"])
        else:
            kept = state.get("by", "nothing")
            warnings.warn(
                f"the checkpoint keeps effects by {kept}, not by {self.table.by}: they start anew",
                stacklevel=2,
            )

    def _measure(
        self, trajectories: Sequence[Trajectory], batch: Batch, count: Count, own: torch.Tensor
    ) -> None:
        """Add to the table, and to `own` [B, T-1] what was found in this very trajectory."""
        config, step = self.trainer.config, self.trainer.step
        left = config.credit_interventions
        measured: list[tuple[float, int, int]] = []
        known = torch.nn.functional.pad((self._effects(batch) != 0) & batch.mask, (1, 0)).cpu()
        for row in _by_surprise(batch, config.seed, step)[:left]:
            if left == 0:
                break
            one, ids = trajectories[row], trajectories[row].token_ids.tolist()
            instead = self._alternatives(batch, row)
            fixed = set(known[row].nonzero()[:, 0].tolist())
            if key(config.seed, _KNOWN, step, row) % RECHECK == 0:
                fixed = set()
            units = [
                unit
                for unit in units_of(one, config.credit_actions, self.trainer.tokenizer)
                if any(instead[t] != ids[t] for t in unit) and fixed.isdisjoint(unit)
            ]
            if not units:
                continue
            order = [units[i] for i in permutation(len(units), config.seed, _UNITS, step, row)]

            def value(k: int, one: Trajectory = one, order: Any = order, instead: Any = instead) -> float:
                changed = one.token_ids.tolist()
                for t in (t for unit in order[:k] for t in unit):
                    changed[t] = instead[t]
                again = Replay(one.record, one.seed, turns_of(one, torch.tensor(changed)))
                return play_again(self.trainer, [again], _ALTERNATIVES, count)[0]

            found, spent = contributions(value, float(sum(one.rewards)), len(order), left)
            left -= spent
            if not np.isfinite(found).all():
                continue
            measured += _by_token(one, order, found, instead)
            for effect, unit in zip(found, order, strict=True):
                own[row, torch.tensor(unit) - 1] = effect
        if measured:
            device = batch.mask.device
            effects, tokens, positions = zip(*measured, strict=True)
            self.table.add(
                torch.tensor(effects, dtype=torch.float64, device=device),
                torch.tensor(tokens, device=device),
                torch.tensor(positions, device=device),
            )

    def _effects(self, batch: Batch) -> torch.Tensor:
        """[B, T-1]"""
        return self.table.effects(batch.targets, (batch.mask.cumsum(1) - 1).clamp_min(0))

    @torch.no_grad()
    def _alternatives(self, batch: Batch, row: int) -> list[int]:
        """Token ids of a row with, at every action, another token than the one taken, drawn from the policy. The
        end token is neither drawn nor replaced: an environment that sees texts alone would reward what stands
        behind it.
        """
        trainer = self.trainer
        part = batch.select(torch.tensor([row]))
        was_training = trainer.model.training
        trainer.model.eval()
        with gathered(trainer.policy):
            logits = trainer.policy.logits(part)[:, :-1].float() / trainer.config.temperature
        trainer.model.train(was_training)
        taken = part.targets[0]
        p = torch.softmax(logits[0], -1).double().scatter(1, taken[:, None], 0.0)
        free = part.mask[0]
        if trainer.eos_id is not None:
            p[:, trainer.eos_id] = 0.0
            free = free & (taken != trainer.eos_id)
        cumulative = p.cumsum(1)
        seed = key(trainer.config.seed, _ALTERNATIVES, trainer.step, row)
        draws = torch.from_numpy(np.random.Generator(np.random.Philox(seed)).random(len(taken)))
        total = cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, draws.to(p)[:, None] * total, right=True)[:, 0]
        # Where the policy leaves no other choice the token stays.
        drawn = torch.where(free & (total[:, 0] > 0), drawn.clamp_max(p.shape[1] - 1), taken)
        return [int(part.input_ids[0, 0]), *drawn.tolist()]


def _by_token(
    one: Trajectory, order: list[list[int]], found: list[float], instead: list[int]
) -> list[tuple[float, int, int]]:
    """(effect, token, position in the response) of every replaced token, and turned around of what stood in its
    place."""
    positions, ids = (one.action_mask.cumsum(0) - 1).tolist(), one.token_ids.tolist()
    return [
        (sign * effect, tokens[t], positions[t])
        for effect, unit in zip(found, order, strict=True)
        for t in unit
        if instead[t] != ids[t]
        for sign, tokens in ((1, ids), (-1, instead))
    ]


class MonteCarloReplays(Replays):
    """A step's advantage: mean return of the episodes that the policy plays on from behind it, less those
    from before it; the end's value is the trajectory's own return."""

    def play(self, trajectories: Sequence[Trajectory], batch: Batch, count: Count) -> None:
        config = self.trainer.config
        samples = config.credit_samples
        steps = [units_of(one, config.credit_actions, self.trainer.tokenizer) for one in trajectories]
        numbers = itertools.count()
        states = (
            (one, turns_of(one, one.token_ids, end=unit[0]))
            for one, units in zip(trajectories, steps, strict=True)
            for unit in units
        )
        wanted = (
            Replay(one.record, one.seed, turns, True, next(numbers))
            for one, turns in states
            for _ in range(samples)
        )
        returns = play_again(self.trainer, wanted, _VALUES, count)
        values = iter(np.array(returns).reshape(-1, samples).mean(1).tolist())
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


def play_again(trainer: Any, wanted: Iterable[Replay], stream: int, count: Count) -> list[float]:
    """Returns of replays, config.eval_batch of them at a time; the policy draws from a stream of its own for every
    use and step, and for every replay's number."""
    config = trainer.config
    params = sampling_params(config, seed=key(config.seed, stream), step=trainer.step)
    returns: list[float] = []
    remaining = iter(wanted)
    while part := list(itertools.islice(remaining, config.eval_batch)):
        mine, own = trainer.ranks.share(part), Count()
        with gathered(trainer.policy):
            found = replay(trainer.engine, trainer.tokenizer, trainer.env, mine, params, own)
        returns += trainer.ranks.joined(found, len(part))
        for other in trainer.ranks.joined([own], trainer.ranks.world):
            count.add(other)
    return returns


def _by_surprise(batch: Batch, seed: int, step: int) -> list[int]:
    """Rows by the distance of their reward from their group's mean, the farthest first, ties at random; those
    at the mean have no advantage to explain and are left out, and so are those of a group with a reward that is
    NaN or infinite."""
    rewards, groups = batch.rewards.double().cpu(), batch.groups.cpu()
    distance = [float((r - rewards[groups == g].mean()).abs()) for r, g in zip(rewards, groups, strict=True)]
    distance = [round(x, 9) for x in distance]
    order = permutation(len(distance), seed, _ROWS, step).tolist()
    return sorted((row for row in order if 0 < distance[row] < math.inf), key=lambda row: -distance[row])
