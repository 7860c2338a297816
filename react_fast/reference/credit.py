"""Credit that plays episodes again, as loops: one episode, one action, one dictionary of moments.

See `react_fast.trainer.credit`, whose numbers these are.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .tracker import Moments

_ROWS, _UNITS, _ALTERNATIVES, _VALUES, _KNOWN = 5, 6, 7, 8, 9
_BUCKETS, _TOKENS, _RECHECK = 65521, 1_000_003, 8


class Causal:
    """Effects of do(action := another draw), kept by token, position or both."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.moments: dict[int, Moments] = {}

    def score(self, trajectories: Sequence[Any], batch: Sequence[Any]) -> int:
        """Give every trajectory its tokens' effects; returns the environment steps it took."""
        config, steps = self.trainer.config, 0
        self.own: dict[int, dict[int, float]] = {}
        if self.trainer.step % config.credit_every == 0:
            steps = self._measure(trajectories)
        for one, scored in zip(trajectories, batch, strict=True):
            scored.effects = self._effects(one)
            own = {t: self._shrunk(x, 1) for t, x in self.own.get(id(one), {}).items()}
            if any(own.values()):
                for t, x in own.items():
                    scored.effects[t - 1] = x
        return steps

    def _measure(self, trajectories: Sequence[Any]) -> int:
        config, step = self.trainer.config, self.trainer.step
        left, steps = config.credit_interventions, 0
        before = [{t + 1 for t, x in enumerate(self._effects(one)) if x != 0} for one in trajectories]
        for row in _by_surprise(trajectories, config.seed, step)[:left]:
            if left == 0:
                break
            one = trajectories[row]
            ids = [int(token) for token in one.token_ids]
            instead = self._alternatives(one, row)
            known = before[row] if philox_key(config.seed, _KNOWN, step, row) % _RECHECK else set()
            changing = [
                unit
                for unit in units_of(one, config.credit_actions, self.trainer.tokenizer)
                if any(instead[t] != ids[t] for t in unit) and known.isdisjoint(unit)
            ]
            if not changing:
                continue
            order = [changing[i] for i in _permutation(len(changing), config.seed, _UNITS, step, row)]
            values = {0: float(sum(one.rewards))}

            def value(k: int, one: Any = one, order: Any = order, instead: Any = instead) -> float:
                nonlocal steps
                tokens = [int(token) for token in one.token_ids]
                for t in (t for unit in order[:k] for t in unit):
                    tokens[t] = instead[t]
                found, used = play_again(self.trainer, one, turns_of(one, tokens), _ALTERNATIVES)
                steps += used
                return found

            values[len(order)] = value(len(order))
            found, left = _bisect(value, values, len(order), left - 1)
            if not all(math.isfinite(x) for x in found):
                continue
            self.own[id(one)] = {t: x for x, unit in zip(found, order, strict=True) for t in unit}
            for effect, unit in zip(found, order, strict=True):
                replaced = [t for t in unit if instead[t] != ids[t]]
                for t in replaced:
                    position = sum(bool(x) for x in one.action_mask[:t])
                    self._add(effect, ids[t], position)
                for t in replaced:
                    position = sum(bool(x) for x in one.action_mask[:t])
                    self._add(-effect, instead[t], position)
        return steps

    def _add(self, effect: float, token: int, position: int) -> None:
        self.moments.setdefault(self._key(token, position), Moments()).add(effect)

    def _key(self, token: int, position: int) -> int:
        by = self.trainer.config.credit_by
        code = {"token": token, "position": position}.get(by, position * _TOKENS + token)
        return code % _BUCKETS

    def _effects(self, one: Any) -> torch.Tensor:
        """[L - 1]: means, softly thresholded at what chance would reach."""
        found = torch.zeros(len(one.token_ids), dtype=torch.float64)
        least = 1e-9 * max((abs(m.mean) for m in self.moments.values()), default=0.0)
        position = 0
        for t, token in enumerate(one.token_ids):
            if one.action_mask[t]:
                m = self.moments.get(self._key(int(token), position), Moments())
                found[t] = self._shrunk(m.mean, m.count, least)
                position += 1
        return found[1:]

    def _shrunk(self, mean: float, count: int, least: float = 1e-9) -> float:
        degrees = sum(m.count - 1 for m in self.moments.values())
        if degrees == 0:
            return 0.0
        spread = sum(m.m2 for m in self.moments.values()) / degrees
        size = abs(mean) - math.sqrt(2 * math.log(len(self.moments)) * spread / max(count, 1))
        return math.copysign(size, mean) if size > least else 0.0

    @torch.no_grad()
    def _alternatives(self, one: Any, row: int) -> list[int]:
        """At every action another token than the one taken, drawn from the policy there; the end token is neither
        drawn nor replaced."""
        trainer = self.trainer
        trainer.model.eval()
        ids = [int(token) for token in one.token_ids]
        logits = trainer.logits(torch.tensor(ids))
        key = philox_key(trainer.config.seed, _ALTERNATIVES, trainer.step, row)
        draws = np.random.Generator(np.random.Philox(key)).random(len(ids) - 1)
        instead, end = list(ids), trainer.tokenizer.eos_token_id
        for t in range(1, len(ids)):
            if one.action_mask[t] and ids[t] != end:
                p = torch.softmax(logits[t - 1].float() / trainer.config.temperature, 0).double()
                p[ids[t]] = 0.0
                if end is not None:
                    p[end] = 0.0
                cumulative = p.cumsum(0)
                if cumulative[-1] > 0:
                    drawn = int(torch.searchsorted(cumulative, draws[t - 1] * cumulative[-1], right=True))
                    instead[t] = min(drawn, len(p) - 1)
        return instead


class MonteCarlo:
    """Value of every state between units, by playing on; a unit's advantage is the difference."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def score(self, trajectories: Sequence[Any], batch: Sequence[Any]) -> int:
        config, steps, number = self.trainer.config, 0, 0
        for one, scored in zip(trajectories, batch, strict=True):
            units = units_of(one, config.credit_actions, self.trainer.tokenizer)
            values = []
            for unit in units:
                turns = turns_of(one, [int(token) for token in one.token_ids], end=unit[0])
                total = 0.0
                for _ in range(config.credit_samples):
                    found, used = play_again(self.trainer, one, turns, _VALUES, True, number)
                    total, steps, number = total + found, steps + used, number + 1
                values.append(total / config.credit_samples)
            values.append(float(sum(one.rewards)))
            advantages = torch.zeros(len(one.token_ids) - 1, dtype=scored.step_rewards.dtype)
            for i, unit in enumerate(units):
                for t in unit:
                    advantages[t - 1] = values[i + 1] - values[i]
            scored.step_advantages = advantages
        return steps


CREDITS = {"causal": Causal, "monte_carlo": MonteCarlo}


def play_again(
    trainer: Any, one: Any, turns: list[list[int]], stream: int, open: bool = False, number: int = 0
) -> tuple[float, int]:
    """(return, environment steps) of an episode with these actions; the policy acts where they run out, and
    goes on with the last of them if it is `open`."""
    env = trainer.env.clone()
    state, _ = env.reset(seed=one.seed, options={"index": one.record})
    ids, total, turn, over = trainer.opening(state, one.record), 0.0, 0, False
    seed = philox_key(trainer.config.seed, stream)
    while not over:
        action = list(turns[turn]) if turn < len(turns) else []
        room = trainer.config.max_new_tokens - len(action)
        free = turn >= len(turns) or (open and turn == len(turns) - 1)
        if free and room and action[-1:] != [trainer.tokenizer.eos_token_id]:
            action += trainer.act(ids + action, number, turn, seed=seed)[:room]
        text = trainer.tokenizer.decode(action, skip_special_tokens=True)
        seen = state + text
        state, reward, terminated, truncated, _ = env.step(text)
        total, turn, over = total + float(reward), turn + 1, terminated or truncated
        ids += action + ([] if over else trainer.encode(state[len(seen) :], False))
    return total, turn


def units_of(one: Any, actions: str, tokenizer: Any) -> list[list[int]]:
    """Places of the tokens of every unit: a token, a word, a line, or a turn's whole action."""
    units: list[list[int]] = []
    before = ""
    for t, token in enumerate(one.token_ids):
        if not one.action_mask[t]:
            continue
        text = tokenizer.decode([int(token)])
        previous = units[-1][-1] if units else None
        starts = previous is None or one.turn_index[previous] != one.turn_index[t] or actions == "token"
        starts |= actions == "word" and text[:1].isspace()
        starts |= actions == "line" and re.search(r"\n[^\n]", before + text[:1]) is not None
        if starts:
            units.append([])
        units[-1].append(t)
        before = text
    return units


def turns_of(one: Any, tokens: list[int], end: int | None = None) -> list[list[int]]:
    """Every turn's action; with `end`, up to the turn of that token, whose action stops before it."""
    last = len(one.rewards) - 1 if end is None else int(one.turn_index[end])
    turns: list[list[int]] = [[] for _ in range(last + 1)]
    for t, token in enumerate(tokens[:end]):
        if one.action_mask[t] and one.turn_index[t] <= last:
            turns[int(one.turn_index[t])].append(token)
    return turns


def _bisect(value: Any, known: dict[int, float], count: int, left: int) -> tuple[list[float], int]:
    """What each unit brings, halving the stretch with the largest difference first; and the budget left."""
    found, stretches = [0.0] * count, [(0, count)]
    while stretches:
        start, end = max(stretches, key=lambda s: abs(known[s[0]] - known[s[1]]))
        stretches.remove((start, end))
        change = known[start] - known[end]
        if abs(change) <= 1e-9 * max(1.0, abs(known[start]), abs(known[end])):
            continue
        if end - start == 1 or left <= 0:
            for k in range(start, end):
                found[k] = change / (end - start)
            continue
        middle = (start + end) // 2
        known[middle] = value(middle)
        left -= 1
        stretches += [(start, middle), (middle, end)]
    return found, left


def _by_surprise(trajectories: Sequence[Any], seed: int, step: int) -> list[int]:
    """Rows by the distance of their reward from their group's mean, the farthest first, ties at random; those
    at the mean are left out, and those of a group with a reward that is NaN or infinite."""
    distance = []
    for one in trajectories:
        group = [float(sum(other.rewards)) for other in trajectories if other.group == one.group]
        distance.append(round(abs(float(sum(one.rewards)) - sum(group) / len(group)), 9))
    order = _permutation(len(distance), seed, _ROWS, step)
    return sorted((row for row in order if 0 < distance[row] < math.inf), key=lambda row: -distance[row])


def _permutation(count: int, *keys: int) -> list[int]:
    return np.random.Generator(np.random.Philox(philox_key(*keys))).permutation(count).tolist()


def philox_key(*numbers: int) -> int:
    state = np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)
    return int(state[0] >> 1)
