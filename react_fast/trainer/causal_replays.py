"""Causal credit: effects of drawing anew from an action on."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..tracker.effect_table import EffectTable
from ..tracker.shapley import contributions
from .batch import Batch
from .ranks import gathered
from .replay import Count, Replay
from .replays import REDRAWN, Replays, by_surprise, play_again, turns_of, units_of
from .rollout import Trajectory, key, sampling_params, uniforms
from .rollout.truncation import choose


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
    hang on its context. `credit_half_life` lets old effects count less, as the policy that they were measured
    against has moved.

    The policy itself redraws (`PolicyEngine`), whatever engine plays the rollouts: other engines' draws cannot be
    named, so that two values would differ by chance, and an action get what its neighbours did.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        by, half_life = trainer.config.credit_by, trainer.config.credit_half_life
        self.table = (
            None if by == "episode" else EffectTable(by, trainer.accelerator.device, half_life=half_life)
        )

    def play(self, trajectories: Sequence[Trajectory], batch: Batch, count: Count) -> None:
        own = torch.full(batch.mask.shape, torch.nan, dtype=torch.float64)
        if self.table is not None:
            self.table.advance(self.trainer.step)
        if self.trainer.step % self.trainer.config.credit_every == 0:
            self._measure(trajectories, batch, count, own)
        own = own.to(batch.mask.device)
        batch.effects = torch.where(own.isnan(), self._known(batch), own)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({} if self.table is None else {"effects": self.table.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.table is None:
            return
        kept = state.get("effects") or {}
        if kept.get("setting") == self.table.setting:
            self.table.load_state_dict(kept)
        else:
            warnings.warn(
                f"the checkpoint keeps effects by {kept.get('setting', 'nothing')}, not by {self.table.setting}:"
                " they start anew",
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
        """Fill rows of `own` [B, T-1] with the effects of all their actions, and add them to the table: an effect
        counts for its action's tokens, and turned around for the first that was drawn otherwise."""
        config, step = self.trainer.config, self.trainer.step
        left = config.credit_interventions
        for row in by_surprise(batch, config.seed, step)[:left]:
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
                return play_again(self.trainer, self.trainer.policy_engine, [again], REDRAWN, count)[0]

            found, spent = contributions(value, float(sum(one.rewards)), len(units), left)
            left -= spent
            if not np.isfinite(found).all():
                continue
            own[row, batch.mask[row].cpu()] = 0.0
            for effect, unit in zip(found, last_first, strict=True):
                own[row, torch.tensor(unit) - 1] = effect
            measured, places = [], (one.action_mask.cumsum(0) - 1).tolist()
            for effect, unit in zip(found, last_first, strict=True):
                measured += [(effect, ids[t], places[t]) for t in unit]
                other = next(t for t in unit if redrawn[t] != ids[t])
                measured.append((-effect, redrawn[other], places[other]))
            self.tell(one, last_first, found, measured)
            if self.table is not None:
                self._add(measured)

    def _add(self, measured: list[tuple[float, int, int]]) -> None:
        """Add (effect, token, position) to the table."""
        assert self.table is not None
        effects, tokens, positions = zip(*measured, strict=True)
        device = self.trainer.accelerator.device
        self.table.add(
            torch.tensor(effects, dtype=torch.float64, device=device),
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
        )

    @torch.no_grad()
    def _redrawn(self, batch: Batch, trajectories: Sequence[Trajectory], row: int) -> list[int]:
        """Token ids of a row with, at every action, what the policy draws there under the other noise; all ranks
        take the first one's, so that they measure the same and their tables stay equal."""
        trainer, one = self.trainer, trajectories[row]
        params = sampling_params(trainer.config, seed=key(trainer.config.seed, REDRAWN), step=trainer.step)
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
        return trainer.ranks.joined([ids], trainer.ranks.world)[0]
