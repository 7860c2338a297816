"""Credit that plays episodes again, as loops: one episode, one action, one dictionary of moments.

See `react_fast.trainer.credit`, whose numbers these are.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .rollout import draw

_ROWS, _REDRAWN, _VALUES, _ORDERS = 5, 7, 8, 9
_BUCKETS, _TOKENS = 65521, 1_000_003


class Causal:
    """Effects of drawing anew from an action on, kept for the episode, or by token or token and position."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        # Of every key the steps at which it was measured, and its effects.
        self.measured: dict[int, list[tuple[int, float]]] = {}

    def score(self, trajectories: Sequence[Any], batch: Sequence[Any]) -> int:
        """Give every trajectory its tokens' effects; returns the environment steps it took."""
        steps = 0
        self.own: dict[int, torch.Tensor] = {}
        if self.trainer.step % self.trainer.config.credit_every == 0:
            steps = self._measure(trajectories)
        for row, (one, scored) in enumerate(zip(trajectories, batch, strict=True)):
            scored.effects = self.own[row] if row in self.own else self._known(one, scored)
        return steps

    def _measure(self, trajectories: Sequence[Any]) -> int:
        config, step = self.trainer.config, self.trainer.step
        left, steps = config.credit_interventions, 0
        for row in _by_surprise(trajectories, config.seed, step)[:left]:
            if left == 0:
                break
            one = trajectories[row]
            ids = [int(token) for token in one.token_ids]
            redrawn = self._redrawn(one, row)
            units = [
                unit
                for unit in units_of(one, config.credit_actions, self.trainer.tokenizer)
                if any(redrawn[t] != ids[t] for t in unit)
            ][::-1]
            own = torch.full((len(ids) - 1,), math.nan, dtype=torch.float64)
            own[torch.as_tensor(one.action_mask)[1:]] = 0.0
            if not units:
                self.own[row] = own
                continue

            def value(k: int, one: Any = one, units: Any = units, row: int = row) -> float:
                nonlocal steps
                kept = turns_of(one, [int(token) for token in one.token_ids], end=units[k - 1][0])
                found, used = play_again(self.trainer, one, kept, _REDRAWN, True, row)
                steps += used
                return found

            values = {0: float(sum(one.rewards)), len(units): value(len(units))}
            found, left = _bisect(value, values, len(units), left - 1)
            if not all(math.isfinite(x) for x in found):
                continue
            for effect, unit in zip(found, units, strict=True):
                for t in unit:
                    own[t - 1] = effect
            self.own[row] = own
            if config.credit_by != "episode":
                self._remember(one, units, found, redrawn)
        return steps

    def _remember(self, one: Any, units: list[list[int]], found: list[float], redrawn: list[int]) -> None:
        ids = [int(token) for token in one.token_ids]
        for effect, unit in zip(found, units, strict=True):
            for t in unit:
                self._add(effect, ids[t], one, t)
            other = next(t for t in unit if redrawn[t] != ids[t])
            self._add(-effect, redrawn[other], one, other)

    def _add(self, effect: float, token: int, one: Any, t: int) -> None:
        key = self._key(token, sum(bool(x) for x in one.action_mask[:t]))
        self.measured.setdefault(key, []).append((self.trainer.step, effect))

    def _key(self, token: int, position: int) -> int:
        by = self.trainer.config.credit_by
        return (token if by == "token" else position * _TOKENS + token) % _BUCKETS

    def _known(self, one: Any, scored: Any) -> torch.Tensor:
        """[L - 1]: means, softly thresholded at what chance would reach, times the probability of another token;
        NaN without a table."""
        found = torch.full((len(one.token_ids),), math.nan, dtype=torch.float64)
        if self.trainer.config.credit_by == "episode":
            return found[1:]
        moments = {key: self._weighted(measured) for key, measured in self.measured.items()}
        degrees = sum(free for _, _, free, _ in moments.values())
        if degrees <= 1e-12 * sum(weight for _, weight, _, _ in moments.values()):
            degrees = 0.0
        spread = sum(squares for _, _, _, squares in moments.values()) / degrees if degrees else 0.0
        least = 1e-9 * max((abs(mean) for mean, _, _, _ in moments.values()), default=0.0)
        position = 0
        for t, token in enumerate(one.token_ids):
            if one.action_mask[t]:
                mean, weight, _, _ = moments.get(self._key(int(token), position), (0.0, 1.0, 0.0, 0.0))
                limit = math.sqrt(2 * math.log(max(len(moments), 1)) * spread / weight)
                size = abs(mean) - limit if degrees else 0.0
                effect = math.copysign(size, mean) if size > least else 0.0
                logprob = float(one.sampler_logprobs[t])
                if math.isnan(logprob):
                    logprob = float(self.trainer.logprobs(scored)[t - 1])
                found[t] = effect * (1 - math.exp(logprob))
                position += 1
        return found[1:]

    def _weighted(self, measured: list[tuple[int, float]]) -> tuple[float, float, float, float]:
        """(mean, sum of weights, degrees of freedom, sum of squared deviations) of a key's effects, the weight of
        each halved with every half-life since."""
        half_life = self.trainer.config.credit_half_life or math.inf
        weights = [0.5 ** ((self.trainer.step - step) / half_life) for step, _ in measured]
        total = sum(weights)
        if total == 0:
            return 0.0, 1.0, 0.0, 0.0
        mean = sum(w * x for w, (_, x) in zip(weights, measured, strict=True)) / total
        squares = sum(w * (x - mean) ** 2 for w, (_, x) in zip(weights, measured, strict=True))
        return mean, total, total - sum(w * w for w in weights) / total, squares

    @torch.no_grad()
    def _redrawn(self, one: Any, row: int) -> list[int]:
        """At every action what the policy draws there under the other noise."""
        trainer = self.trainer
        trainer.model.eval()
        ids = [int(token) for token in one.token_ids]
        logits, redrawn = trainer.logits(torch.tensor(ids)), list(ids)
        for turn in range(len(one.rewards)):
            places = [t for t in range(1, len(ids)) if one.action_mask[t] and one.turn_index[t] == turn]
            draws = trainer.draws(row, turn, philox_key(trainer.config.seed, _REDRAWN), 0)
            for t, u in zip(places, draws, strict=False):
                redrawn[t] = draw(logits[t - 1], u, trainer.config)[0]
        return redrawn


class MonteCarlo:
    """Value of every state between units, by playing on; a unit's advantage is the difference."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def score(self, trajectories: Sequence[Any], batch: Sequence[Any]) -> int:
        config, steps = self.trainer.config, 0
        for row, (one, scored) in enumerate(zip(trajectories, batch, strict=True)):
            units = units_of(one, config.credit_actions, self.trainer.tokenizer)
            values = []
            for unit in units:
                turns = turns_of(one, [int(token) for token in one.token_ids], end=unit[0])
                total = 0.0
                for sample in range(config.credit_samples):
                    number = row * config.credit_samples + sample
                    found, used = play_again(self.trainer, one, turns, _VALUES, True, number)
                    total, steps = total + found, steps + used
                values.append(total / config.credit_samples)
            values.append(float(sum(one.rewards)))
            advantages = torch.zeros(len(one.token_ids) - 1, dtype=scored.step_rewards.dtype)
            for i, unit in enumerate(units):
                for t in unit:
                    advantages[t - 1] = values[i + 1] - values[i]
            scored.step_advantages = advantages
        return steps


class Shapley:
    """What each action brings, meant over all orders in which an episode's actions may come, the others deleted;
    above 10 actions over pairs of a random order and its reverse."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def score(self, trajectories: Sequence[Any], batch: Sequence[Any]) -> int:
        config, step = self.trainer.config, self.trainer.step
        left, steps = config.credit_interventions, 0
        for one, scored in zip(trajectories, batch, strict=True):
            scored.effects = torch.full((len(one.token_ids) - 1,), math.nan, dtype=torch.float64)
        for row in _by_surprise(trajectories, config.seed, step) if step % config.credit_every == 0 else []:
            one, values = trajectories[row], {}
            units = units_of(one, config.credit_actions, self.trainer.tokenizer)
            n = len(units)
            needed = 2**n - 1 if n <= 10 else 2 * config.credit_samples * (n - 1) + 1
            if n < 2 or needed > left:
                continue
            left -= needed
            orders = self._orders(n, row)
            values[frozenset(range(n))] = float(sum(one.rewards))
            for members in [order[:k] for order in orders for k in range(n)]:
                if frozenset(members) not in values:
                    turns = self._turns(one, [t for i in members for t in units[i]])
                    values[frozenset(members)], used = play_again(
                        self.trainer, one, turns, _REDRAWN, number=row
                    )
                    steps += used
            if all(math.isfinite(value) for value in values.values()):
                for i, unit in enumerate(units):
                    found = 0.0
                    for order in orders:
                        before = order[: order.index(i)]
                        found += values[frozenset([*before, i])] - values[frozenset(before)]
                    for t in unit:
                        batch[row].effects[t - 1] = found / len(orders)
        return steps

    def _orders(self, n: int, row: int) -> list[list[int]]:
        if n <= 10:
            return [list(order) for order in itertools.permutations(range(n))]
        config = self.trainer.config
        seed = philox_key(config.seed, _ORDERS, self.trainer.step, row)
        rng, orders = np.random.Generator(np.random.Philox(seed)), []
        for _ in range(config.credit_samples):
            order = rng.permutation(n).tolist()
            orders += [order, order[::-1]]
        return orders

    def _turns(self, one: Any, kept: list[int]) -> list[list[int]]:
        turns: list[list[int]] = [[] for _ in one.rewards]
        for t in sorted(kept):
            turns[int(one.turn_index[t])].append(int(one.token_ids[t]))
        return turns


def add_effects(batch: Sequence[Any], floor: float) -> None:
    """A_t + (1 - floor) w (e_t - mean e), w = min(n, mean A^2 / mean e^2), with the effects e in the unit of A,
    the means of e over the n actions of a row, of e^2 over those of all rows, whose effect is known."""
    known: list[list[tuple[int, float]]] = []  # place and effect
    squares: list[float] = []
    size = 0.0
    for one in batch:
        peers = [other for other in batch if other.group == one.group]
        mean = sum(other.reward for other in peers) / len(peers)
        spread = sum((other.reward - mean) ** 2 for other in peers)
        square = sum(float((other.advantages**2).sum()) / max(1, int(other.mask.sum())) for other in peers)
        rounding = 1e-9 * max(1.0, *(abs(other.reward) for other in peers))
        ratio = math.sqrt(square / spread) if math.sqrt(spread) > rounding else 0.0
        row = [
            (t, float(effect) * ratio)
            for t, effect in enumerate(one.effects)
            if one.mask[t] and not math.isnan(effect)
        ]
        squares += [float(a) ** 2 for a, m in zip(one.advantages, one.mask, strict=True) if m]
        size += sum(effect**2 for _, effect in row)
        known.append(row)
    for one, row in zip(batch, known, strict=True):
        mean = sum(effect for _, effect in row) / len(row) if row else 0.0
        ratio = (sum(squares) / len(squares)) / (size / sum(map(len, known))) if size > 0 else 0.0
        weight = min(len(row), ratio)
        advantages = one.advantages.clone()
        for t, effect in row:
            advantages[t] += (1 - floor) * weight * (effect - mean)
        one.advantages = advantages


CREDITS = {"causal": Causal, "monte_carlo": MonteCarlo, "shapley": Shapley}


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
            action += trainer.act(ids + action, number, turn, seed=seed, skip=len(action))[:room]
        text = trainer.tokenizer.decode(action, skip_special_tokens=True)
        seen = state + text
        state, reward, terminated, truncated, _ = env.step(text)
        total, turn, over = total + float(reward), turn + 1, terminated or truncated
        ids += action + ([] if over else trainer.encode(state[len(seen) :], False))
    return total, turn


def units_of(one: Any, actions: str, tokenizer: Any) -> list[list[int]]:
    """Places of the tokens of every unit: a token, a word, a sentence, a line, a reasoning step (a paragraph, or a
    line where no line is blank), or a turn's whole action."""
    units: list[list[int]] = []
    for turn in range(len(one.rewards)):
        places = [t for t in range(len(one.token_ids)) if one.action_mask[t] and one.turn_index[t] == turn]
        texts = _texts(tokenizer, [int(one.token_ids[t]) for t in places])
        cuts, last, start = _cuts("".join(texts), actions), -1, 0
        for t, text in zip(places, texts, strict=True):
            starts = t == places[0] or actions == "token" or (actions == "word" and text[:1].isspace())
            if starts or any(last < place <= start for place in cuts):
                units.append([])
            units[-1].append(t)
            last, start = start, start + len(text)
    return units


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text before it; a character belongs to the last of its tokens."""
    texts, known = [], ""
    for n in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:n])
        if n < len(ids):
            whole = whole.rstrip("\ufffd")
        texts.append(whole[len(known) :])
        known = whole
    return texts


def _cuts(text: str, actions: str) -> list[int]:
    """Where the next sentence, line or step begins."""
    paragraph, lines = r"\n[^\S\n]*\n\s*", r"\n+"
    patterns = {
        "sentence": r"[.!?][\"')\]]*\s+|[。！？]|\n+",
        "line": lines,
        "step": paragraph if re.search(paragraph, text.strip()) else lines,
    }
    return [found.end() for found in re.finditer(patterns[actions], text)] if actions in patterns else []


def turns_of(one: Any, tokens: list[int], end: int | None = None) -> list[list[int]]:
    """Every turn's action; with `end`, up to the turn of that token, whose action stops before it."""
    last = len(one.rewards) - 1 if end is None else int(one.turn_index[end])
    turns: list[list[int]] = [[] for _ in range(last + 1)]
    for t, token in enumerate(tokens[:end]):
        if one.action_mask[t] and one.turn_index[t] <= last:
            turns[int(one.turn_index[t])].append(token)
    return turns


def _bisect(value: Any, known: dict[int, float], count: int, left: int) -> tuple[list[float], int]:
    """What each unit brings, halving the stretch with the largest difference first, of equal ones that of the
    units that go first; and the budget left."""
    found, stretches = [0.0] * count, [(0, count)]
    while stretches:
        start, end = max(sorted(stretches), key=lambda s: abs(known[s[0]] - known[s[1]]))
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
