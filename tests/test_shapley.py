"""Shapley values: closed forms, brute force over all orders, and the known causes."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from react_fast.envs.slot_models import Writer
from react_fast.envs.slots import ground_truth
from react_fast.tracker import CausalityTracker, Deletion, Replacement, TargetLogprob, shapley_values
from react_fast.tracker.shapley import contributions


def _table(players: int, seed: int = 0) -> dict[frozenset[int], float]:
    """A game without any structure."""
    values = np.random.default_rng(seed).normal(size=2**players)
    return {
        frozenset(i for i in range(players) if bits >> i & 1): float(values[bits])
        for bits in range(2**players)
    }


@pytest.mark.parametrize("players", [1, 2, 5])
def test_exact_values_are_the_mean_over_all_orders(players):
    game = _table(players)
    expected = np.zeros(players)
    for order in permutations(range(players)):
        for k, i in enumerate(order):
            expected[i] += game[frozenset(order[: k + 1])] - game[frozenset(order[:k])]
    found = shapley_values(game.__getitem__, players)
    assert found.exact
    assert found.evaluations == 2**players
    np.testing.assert_allclose(found.mean, expected / math.factorial(players), rtol=1e-12, atol=1e-12)
    assert float(found.mean.sum()) == pytest.approx(found.total, abs=1e-12)
    assert torch.equal(found.low, found.mean)
    assert float(found.standard_error.sum()) == 0


@pytest.mark.parametrize("players", [4, 10, 14])
def test_closed_forms(players):
    """Additive: everyone's own worth. Symmetric: equal shares. Glove market: one left glove, n - 1 right ones."""
    worth = np.arange(players) - 2.5
    additive = shapley_values(lambda s: sum(worth[i] for i in s), players, samples=4)
    np.testing.assert_allclose(additive.mean, worth, atol=1e-12)
    symmetric = shapley_values(lambda s: float(len(s)) ** 2, players, samples=400)
    assert (symmetric.mean - players).abs().max() <= 4 * symmetric.standard_error.max() + 1e-9
    gloves = shapley_values(lambda s: float(0 in s and len(s) > 1), players, samples=400)
    expected = np.full(players, 1 / (players * (players - 1)))
    expected[0] = 1 - 1 / players
    error = np.maximum(gloves.standard_error.numpy(), 1e-12)
    assert (np.abs(gloves.mean.numpy() - expected) <= 5 * error).all()


def test_sampled_values_are_efficient_and_their_intervals_hold_the_truth():
    """11 players are sampled; 2048 values are still few enough for the exact formula. 220 intervals of 95%."""
    game = _table(11, seed=1)
    sizes = [math.factorial(k) * math.factorial(10 - k) / math.factorial(11) for k in range(11)]
    truth = np.array(
        [sum(sizes[len(s)] * (game[s | {i}] - game[s]) for s in game if i not in s) for i in range(11)]
    )
    inside = []
    for seed in range(20):
        found = shapley_values(game.__getitem__, 11, samples=20, seed=seed)
        assert not found.exact
        assert float(found.mean.sum()) == pytest.approx(found.total, abs=1e-9)
        inside.append((found.low.numpy() <= truth) & (truth <= found.high.numpy()))
    assert 0.90 < np.mean(inside) < 0.99  # three standard errors of 220 shares are 4.4%


def test_a_quadratic_game_needs_one_pair_of_orders():
    """Antithetic orders cancel interactions of two exactly."""
    rng = np.random.default_rng(3)
    pairs = rng.normal(size=(12, 12))
    pairs = pairs + pairs.T
    np.fill_diagonal(pairs, 0)
    found = shapley_values(lambda s: float(pairs[np.ix_(sorted(s), sorted(s))].sum() / 2), 12, samples=2)
    np.testing.assert_allclose(found.mean, pairs.sum(1) / 2, atol=1e-9)


def test_the_causes_of_a_ground_truth_share_the_reward():
    """Its reward is linear, so each slot's share is its weight where it is on."""
    truth = ground_truth(8, causes=2, mediated=1, confounded=2)
    text = "".join(truth.characters[2 * i + 1] for i in range(8))
    tracker = CausalityTracker(Writer(truth), interventions=Replacement(truth.neutral_id))
    actions = [(i, i + 1) for i in range(1, 9)]
    found = tracker.shapley(
        truth.encode("!"),
        truth.encode(text),
        lambda ids: truth.reward(truth.decode(ids), 1),
        actions=actions,
    )
    np.testing.assert_allclose(found.mean, truth.weights, atol=1e-12)
    assert found.spans == tuple(actions)
    with pytest.raises(ValueError, match="actions must be at least one and not overlap"):
        tracker.shapley(truth.encode("!"), truth.encode(text), len, actions=[(1, 3), (2, 4)])
    with pytest.raises(ValueError, match="outcome must be a function of response ids or a TargetLogprob"):
        tracker.shapley(truth.encode("!"), truth.encode(text), "logprob")


def test_a_target_needs_a_token_to_continue_from():
    truth = ground_truth(2, causes=1, mediated=0, confounded=0)
    tracker = CausalityTracker(Writer(truth), interventions=Deletion())
    outcome = TargetLogprob(truth.encode(truth.characters[1]))
    prompt, response = truth.encode("!!"), truth.encode(truth.characters[0])
    with pytest.raises(ValueError, match="actions must leave a token to continue from when all are replaced"):
        tracker.shapley(prompt, response, outcome, actions=[(0, 1), (1, 2), (2, 3)])


@pytest.mark.parametrize("causes", [(), (5,), (0, 31), (3, 4, 20)])
def test_bisection_finds_the_few_that_count(causes):
    asked = []

    def value(k: int) -> float:
        asked.append(k)
        return float(sum(k <= cause for cause in causes))

    found, spent = contributions(value, float(len(causes)), 32, 40)
    assert found == [float(k in causes) for k in range(32)]
    assert spent == len(asked) == len(set(asked)) <= 1 + 5 * len(causes)


def test_a_short_budget_still_divides_everything():
    found, spent = contributions(lambda k: 0.0 if k > 6 else 1.0, 1.0, 16, 3)
    assert spent == 3
    assert sum(found) == pytest.approx(1.0)
    assert found == [0.0] * 4 + [0.25] * 4 + [0.0] * 8


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: shapley_values(3, 2),
            TypeError,
            "value must be a function of a frozenset of players, got int",
        ),
        (lambda: shapley_values(len, 0), ValueError, "players must be at least 1, got 0"),
        (lambda: shapley_values(len, 2, samples=1), ValueError, "samples must be at least 2, got 1"),
        (lambda: shapley_values(len, 2, seed=-1), ValueError, "seed must be at least 0, got -1"),
        (
            lambda: shapley_values(lambda s: "x", 2),
            TypeError,
            "the result of value must be a number, got str",
        ),
        (lambda: shapley_values(lambda s: math.nan, 2), ValueError, "value must be finite, got nan"),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
