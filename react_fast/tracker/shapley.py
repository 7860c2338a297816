"""Shapley values: an outcome divided among the actions that made it together."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .counterfactuals import replacements
from .intervention import Experiment
from .outcomes import TargetLogprob, outcomes
from .policy import Policy
from .statistics import student_interval
from .text import Span, check_count

EXACT = 10  # players up to whom all 2^n coalitions are evaluated


@dataclass(frozen=True, eq=False)
class Shapley:
    """What each of n players brings.

    Attributes:
        mean, standard_error, low, high: [n] float64; of an exact value the error is 0 and the 95% interval is the
            value.
        total: value of all players - value of none; what the means sum to.
        evaluations: distinct coalitions that were valued.
        exact: whether all 2^n were.
        spans: place (start, end) of each player in the text, if the players are actions; else none.
    """

    mean: torch.Tensor
    standard_error: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    total: float
    evaluations: int
    exact: bool
    spans: tuple[Span, ...] = ()


def shapley_values(
    value: Callable[[frozenset[int]], float], players: int, *, samples: int = 64, seed: int = 0
) -> Shapley:
    """Each player's mean marginal contribution over all orders in which the players may come.

        phi_i = sum over S without i of |S|! (n - |S| - 1)! / n!  (value(S + i) - value(S))

    Exact up to 10 players. Above, `samples` pairs of a random order and its reverse (antithetic, which cancels
    interactions of two); the pairs are independent, so their spread gives the error and Student's interval.
    The means sum to value(all) - value(none) whatever was sampled. As credit, Shapley values keep a trajectory's
    total, and not an unbiased policy gradient.

    Args:
        value: of the coalition of players 0 to n - 1 that take part, a finite number; asked once for each
            coalition.
        players: n, at least 1.
        samples: pairs of orders above 10 players, at least 2.
        seed: of the orders.
    Returns: Shapley.
    Raises: TypeError or ValueError in one line.
    Source: Shapley 1953; Castro, Gomez & Tejada 2009 for sampled orders; Mitchell et al. 2022 (arXiv:2104.12199)
        for antithetic ones.
    """
    if not callable(value):
        raise TypeError(f"value must be a function of a frozenset of players, got {type(value).__name__}")
    check_count("players", players, 1)
    check_count("samples", samples, 2)
    check_count("seed", seed, 0)
    return divided(lambda asked: [_number(value(s)) for s in asked], players, samples=samples, seed=seed)


def divided(
    values: Callable[[Sequence[frozenset[int]]], Iterable[float]], players: int, *, samples: int, seed: int
) -> Shapley:
    """`shapley_values` where `values` of all coalitions are asked for at once, each coalition once."""
    exact = players <= EXACT
    orders = np.empty((0, 2, players), dtype=int) if exact else _orders(players, samples, seed)
    prefixes = (frozenset(order[:k]) for order in orders.reshape(-1, players) for k in range(players + 1))
    asked = [_members(bits) for bits in range(2**players)] if exact else list(dict.fromkeys(prefixes))
    worth = dict(zip(asked, values(asked), strict=True))
    if exact:
        mean = _exact(np.array(list(worth.values())), players)
        error, low, high = np.zeros(players), mean, mean
    else:
        pairs = _sampled(worth, orders)
        mean, error = pairs.mean(0), pairs.std(0, ddof=1) / math.sqrt(samples)
        low, high = student_interval(mean, error, np.full(players, samples))
    total = worth[frozenset(range(players))] - worth[frozenset()]
    columns = torch.from_numpy(np.array([mean, error, low, high]))
    return Shapley(columns[0], columns[1], columns[2], columns[3], total, len(asked), exact)


def cost(players: int, samples: int) -> int:
    """Most coalitions that are valued, beside that of all players."""
    return 2**players - 1 if players <= EXACT else 2 * samples * (players - 1) + 1


def shapley(policy: Policy, text: Experiment, spans: Sequence[Span], samples: int) -> Shapley:
    """See CausalityTracker.shapley."""
    order = sorted(spans)
    if not order or any(a[1] > b[0] for a, b in pairwise(order)):
        raise ValueError(f"actions must be at least one and not overlap, got {list(spans)}")
    drawn = replacements(text.counterfactual, policy, text, spans, 1, seed=text.seed, eos_id=None)
    instead = {span: tokens[0] for span, tokens in zip(spans, drawn, strict=True)}

    def without(members: frozenset[int]) -> tuple[list[int], int]:
        ids, start = list(text.ids), text.prompt_length
        for span in sorted((s for i, s in enumerate(spans) if i not in members), reverse=True):
            ids[slice(*span)] = instead[span]
            if span[0] < text.prompt_length:
                start += len(instead[span]) - (min(span[1], text.prompt_length) - span[0])
        if not ids and isinstance(text.outcome, TargetLogprob):
            raise ValueError("actions must leave a token to continue from when all are replaced")
        return ids, start

    def values(asked: Sequence[frozenset[int]]) -> list[float]:
        return [_number(x) for x in outcomes(policy, text.outcome, [without(members) for members in asked])]

    check_count("samples", samples, 2)
    return replace(divided(values, len(spans), samples=samples, seed=text.seed), spans=tuple(spans))


def _exact(values: np.ndarray, players: int) -> np.ndarray:
    """values: [2^n], of the coalitions of `_members`."""
    codes = np.arange(2**players)
    sizes = np.array([bits.bit_count() for bits in range(2**players)])
    weights = np.array([1 / (players * math.comb(players - 1, size)) for size in range(players)])
    mean = np.empty(players)
    for i in range(players):
        without = codes[codes >> i & 1 == 0]
        mean[i] = weights[sizes[without]] @ (values[without | 1 << i] - values[without])
    return mean


def _orders(players: int, samples: int, seed: int) -> np.ndarray:
    """[samples, 2, n] orders and their reverses."""
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = [rng.permutation(players) for _ in range(samples)]
    return np.array([[order, order[::-1]] for order in drawn])


def _sampled(worth: Mapping[frozenset[int], float], orders: np.ndarray) -> np.ndarray:
    """[samples, n] mean of the marginal contributions in an order and in its reverse."""
    samples, _, players = orders.shape
    found = np.zeros((samples, players))
    for row, pair in zip(found, orders, strict=True):
        for order in pair:
            row[order] += np.diff([worth[frozenset(order[:k])] for k in range(players + 1)]) / 2
    return found


def _members(bits: int) -> frozenset[int]:
    return frozenset(i for i in range(bits.bit_length()) if bits >> i & 1)


def _number(found: Any) -> float:
    try:
        number = float(found)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the result of value must be a number, got {type(found).__name__}") from error
    if not math.isfinite(number):
        raise ValueError(f"the result of value must be finite, got {number}")
    return number


def contributions(
    value: Callable[[int], float], first: float, players: int, budget: int
) -> tuple[list[float], int]:
    """Marginal contributions of players that leave one after the other, with few evaluations where most of them
    bring nothing.

    value(k), the outcome once the first k are gone, is asked for k = n; then a stretch of players whose ends
    differ is halved, the one with the largest difference first. A stretch whose ends are equal brings nothing
    each; one that the budget leaves whole is shared evenly. So the sum is value(0) - value(n) in any case,
    and each contribution is exact where no two cancel and the budget suffices, about log2(n) for each player
    that counts. In a random order they are one sample of the Shapley values.

    Args:
        value: of k in [1, n]. first: value(0), known. players: n, at least 1. budget: most evaluations, at
            least 1.
    Returns: (n contributions, evaluations).
    Source: Castro, Gomez & Tejada 2009 for orders as samples; Dorfman 1943 for testing in groups.
    """
    known = {0: first, players: float(value(players))}
    while len(known) <= budget and (middle := next_asked(known)) is not None:
        known[middle] = float(value(middle))
    return shared(known), len(known) - 1


def next_asked(known: dict[int, float]) -> int | None:
    """The k whose value `contributions` asks for next when it knows those of 0, of n and of others; None where no
    other tells anything."""
    changes = [(start, end, _change(known, start, end)) for start, end in pairwise(sorted(known))]
    open_ = [one for one in changes if one[2] != 0 and one[1] - one[0] > 1]
    if not open_:
        return None
    start, end, _ = max(open_, key=lambda one: abs(one[2]))
    return (start + end) // 2


def shared(known: dict[int, float]) -> list[float]:
    """The n contributions as far as values are known, of 0 and of n among them."""
    found: list[float] = []
    for start, end in pairwise(sorted(known)):
        found += [_change(known, start, end) / (end - start)] * (end - start)
    return found


def _change(known: dict[int, float], start: int, end: int) -> float:
    """0 for two values that differ by rounding alone."""
    change = known[start] - known[end]
    return 0.0 if abs(change) <= 1e-9 * max(1.0, abs(known[start]), abs(known[end])) else change
