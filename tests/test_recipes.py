"""Recipes: each equals its paper's equation, computed here one response at a time."""

import itertools
import math

import numpy as np
import pytest
import torch

import react_fast as rf
from react_fast import recipes

from . import contract

# Groups of 5, 4, 1, 3 in any order, ids negative and large.
IDS = torch.tensor([3, 3, 10**9, 3, 10**9, 3, 10**9, 10**9, -7, 3, 4, 4, 4])
N = len(IDS)


def _groups(ids=IDS):
    return [(ids == i).nonzero()[:, 0].tolist() for i in ids.unique()]


def _by_group(rewards, advantage):
    """advantage(list of the group's rewards, place of the response in it) for every response."""
    out = torch.zeros(len(rewards), dtype=torch.float64)
    for members in _groups():
        group = [float(rewards[i]) for i in members]
        for place, i in enumerate(members):
            out[i] = advantage(group, place)
    return out


def _assert_equal(found, expected):
    assert found.dtype == torch.float64
    # A dozen float64 rewards of size 3 and their binomials: a few hundred roundings.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def _std(group):
    return float(np.std(group, ddof=1)) if len(group) > 1 else 0.0


def test_group_recipes(backend):
    rewards = torch.randn(N, dtype=torch.float64)
    lengths = torch.randint(1, 50, (N,))

    def mean_of(group, place):
        return group[place] - np.mean(group)

    def others(group, place):
        return 0.0 if len(group) == 1 else group[place] - np.mean(group[:place] + group[place + 1 :])

    _assert_equal(
        recipes.grpo(rewards, IDS), _by_group(rewards, lambda g, k: mean_of(g, k) / (_std(g) + 1e-4))
    )
    _assert_equal(recipes.dr_grpo(rewards, IDS), _by_group(rewards, mean_of))
    _assert_equal(recipes.rloo(rewards, IDS), _by_group(rewards, others))
    batch = float(rewards.std())
    scaled = _by_group(rewards, lambda g, k: mean_of(g, k) / (batch + 1e-4))
    _assert_equal(recipes.grpo_batch_std(rewards, IDS), scaled)
    weighted = torch.zeros(N, dtype=torch.float64)
    for members in _groups():
        baseline = (rewards[members] * lengths[members]).sum() / lengths[members].sum()
        weighted[members] = rewards[members] - baseline
    _assert_equal(recipes.opo(rewards, IDS, lengths), weighted)
    greedy = torch.randn(N, dtype=torch.float64)
    _assert_equal(recipes.remax(rewards, greedy), rewards - greedy)


def _max_at_k(k):
    def advantage(group, place):
        total = 0.0
        for chosen in itertools.combinations(range(len(group)), k):
            if place in chosen:
                rest = [group[j] for j in chosen if j != place]
                total += max(group[j] for j in chosen) - max(rest)
        return total / max(math.comb(len(group), k), 1)

    return advantage


@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("binary", [False, True])
def test_max_at_k_is_the_sum_over_subsets(backend, k, binary):
    rewards = torch.randn(N, dtype=torch.float64)
    rewards = (rewards > 0).double() if binary else rewards
    _assert_equal(recipes.max_at_k(rewards, IDS, k), _by_group(rewards, _max_at_k(k)))


def test_max_at_k_is_unbiased():
    """Its gradient estimate has the expectation d/dp of E max_k, exactly: two rewards, every sample of three."""
    p, k, n = 0.3, 2, 3
    total = 0.0
    for sample in itertools.product((0.0, 1.0), repeat=n):
        chance = math.prod(p if r else 1 - p for r in sample)
        a = recipes.max_at_k(
            torch.tensor(sample, dtype=torch.float64), torch.zeros(n, dtype=torch.int64), k
        )  # fmt: skip
        score = [1 / p if r else -1 / (1 - p) for r in sample]  # d log p(r) / dp
        total += chance * sum(float(x) * s for x, s in zip(a, score, strict=True))
    assert abs(total - k * (1 - p) ** (k - 1)) < 1e-12  # d/dp (1 - (1-p)^k); eight float64 terms


def test_best_of_n(backend):
    rewards = torch.randn(N, dtype=torch.float64)

    def advantage(group, place):
        rest = group[:place] + group[place + 1 :]
        return max(0.0, group[place] - max(rest)) if rest else 0.0

    _assert_equal(recipes.best_of_n(rewards, IDS), _by_group(rewards, advantage))
    _assert_equal(recipes.best_of_n(torch.ones(N).double(), IDS), torch.zeros(N, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_is_the_mean_over_subsets(backend, k):
    """The normalised reward of a random set of k that holds the response (arXiv:2508.10751)."""
    rewards = (torch.randn(N, dtype=torch.float64) > 0.2).double()

    def advantage(group, place):
        sets = [max(group[j] for j in c) for c in itertools.combinations(range(len(group)), k)]
        own = [
            max(group[j] for j in c) for c in itertools.combinations(range(len(group)), k) if place in c
        ]  # fmt: skip
        if not sets or np.std(sets) < 1e-12:
            return 0.0
        return (np.mean(own) - np.mean(sets)) / np.std(sets)

    _assert_equal(recipes.pass_at_k(rewards, IDS, k), _by_group(rewards, advantage))


@pytest.mark.parametrize("reward", [0.1, 1000.1, 1e5])
def test_equal_rewards_mean_nothing(backend, reward):
    rewards, ids = torch.full((8,), reward), torch.zeros(8, dtype=torch.int64)
    for found in (
        recipes.grpo(rewards, ids),
        recipes.grpo_batch_std(rewards, ids),
        recipes.dr_grpo(rewards, ids),
        recipes.rloo(rewards, ids),
        recipes.opo(rewards, ids, torch.arange(1, 9)),
        recipes.max_at_k(rewards, ids, 3),
        recipes.best_of_n(rewards, ids),
        recipes.pass_at_k(rewards, ids, 3),
        recipes.gdpo(rewards[:, None].expand(8, 2), ids),
        recipes.reinforce_pp_baseline(rewards, ids, torch.ones(8, 4, dtype=torch.bool)),
    ):
        assert bool((found == 0).all())


def test_left_out_members(backend):
    """NaN rewards and false members: the rest gets what it would get without them."""
    rewards = torch.randn(N, dtype=torch.float64)
    rewards[3] = float("nan")
    valid = torch.ones(N, dtype=torch.bool)
    valid[7] = False
    kept = valid & ~rewards.isnan()
    lengths = torch.randint(1, 50, (N,))
    for recipe in (
        lambda r, i, n, v: recipes.grpo(r, i, valid=v),
        lambda r, i, n, v: recipes.grpo_batch_std(r, i, valid=v),
        lambda r, i, n, v: recipes.opo(r, i, n, valid=v),
        lambda r, i, n, v: recipes.max_at_k(r, i, 2, valid=v),
        lambda r, i, n, v: recipes.best_of_n(r, i, valid=v),
        lambda r, i, n, v: recipes.pass_at_k(r, i, 2, valid=v),
    ):
        found = recipe(rewards, IDS, lengths, valid)
        torch.testing.assert_close(
            found[kept], recipe(rewards[kept], IDS[kept], lengths[kept], None), rtol=1e-12, atol=1e-12
        )  # fmt: skip
        assert bool((found[~kept] == 0).all())


def test_reinforce_pp(backend):
    rewards, mask = torch.randn(3, 20, dtype=torch.float64), torch.rand(3, 20) > 0.3
    found = recipes.reinforce_pp(rewards, gamma=0.9, mask=mask)
    returns = rf.discounted_returns(rewards, gamma=0.9, mask=mask)[mask]
    expected = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    torch.testing.assert_close(found[mask], expected, rtol=1e-12, atol=1e-12)
    assert bool((found[~mask] == 0).all())


def test_reinforce_pp_baseline_weighs_by_tokens(backend):
    rewards, mask = torch.randn(N, dtype=torch.float64), torch.rand(N, 6) > 0.4
    found = recipes.reinforce_pp_baseline(rewards, IDS, mask)
    tokens = recipes.dr_grpo(rewards, IDS)[:, None].expand(N, 6)[mask]
    torch.testing.assert_close(found[mask], (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt())
    cu_seqlens = torch.arange(0, 6 * N + 1, 6)
    packed = recipes.reinforce_pp_baseline(rewards, IDS, mask.reshape(-1), cu_seqlens=cu_seqlens)
    contract.assert_bitwise(packed.view(N, 6), found)


def test_gdpo(backend):
    rewards = torch.randn(N, 3, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.01])
    weights = [1.0, 0.5, 2.0]
    total = sum(w * recipes.grpo(rewards[:, k], IDS) for k, w in enumerate(weights))
    expected = (total - total.mean()) / (total.var() + 1e-8).sqrt()
    _assert_equal(recipes.gdpo(rewards, IDS, weights=weights), expected)


def test_vapo_and_its_lam(backend):
    lengths = torch.tensor([1, 20, 40, 1000])
    lam = recipes.length_adaptive_lam(lengths)
    torch.testing.assert_close(lam, torch.tensor([0.0, 0.0, 0.5, 0.98], dtype=torch.float64))
    # The weights' sum, 1 / (1 - lam), is alpha times the length once that exceeds 1.
    torch.testing.assert_close(1 / (1 - lam[2:]), 0.05 * lengths[2:].double())
    rewards, values = torch.randn(2, 50, dtype=torch.float64), torch.randn(2, 50, dtype=torch.float64)
    mask = torch.rand(2, 50) > 0.2
    advantages, returns = recipes.vapo(rewards, values, mask=mask, gamma=0.9)
    own = recipes.length_adaptive_lam(mask.sum(1))
    contract.assert_bitwise(advantages, rf.gae(rewards, values, gamma=0.9, lam=own, mask=mask)[0])
    torch.testing.assert_close(returns, rf.discounted_returns(rewards, gamma=0.9, mask=mask))
    cu_seqlens, flat = torch.tensor([0, 50, 100]), mask.reshape(-1)
    packed = recipes.vapo(
        rewards.reshape(-1), values.reshape(-1), mask=flat, gamma=0.9, cu_seqlens=cu_seqlens
    )  # fmt: skip
    contract.assert_bitwise(packed[0].view(2, 50), advantages)


@pytest.mark.parametrize("equal_turns", [False, True])
def test_turn_gae(backend, equal_turns):
    """Tokens inherit their turn's advantage; a longer turn or tool reply discounts nothing."""
    rewards, values = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    turns = torch.tensor([[-1, 0, 0, -1, 1, 2, 2, 2, -1], [-1, -1, 0, 1, 1, 1, 1, -1, -1]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    tokens, per_turn, returns = recipes.turn_gae(
        rewards, values, turns, gamma=0.9, lam=0.8, mask=mask, equal_turns=equal_turns
    )
    expected = rf.gae(rewards, values, gamma=0.9, lam=0.8, mask=mask)
    contract.assert_bitwise(per_turn, expected[0])
    contract.assert_bitwise(returns, expected[1])
    for row, turn in itertools.product(range(2), range(3)):
        own = turns[row] == turn
        share = per_turn[row, turn] / (int(own.sum()) or 1) if equal_turns else per_turn[row, turn]
        assert bool((tokens[row][own] == share).all())
    assert bool((tokens[turns < 0] == 0).all())
    flat = torch.where(turns < 0, turns, turns + 3 * torch.arange(2)[:, None]).reshape(-1)
    packed = recipes.turn_gae(
        rewards.reshape(-1), values.reshape(-1), flat, gamma=0.9, lam=0.8, mask=mask.reshape(-1),
        cu_seqlens=torch.tensor([0, 3, 6]), equal_turns=equal_turns,
    )  # fmt: skip
    contract.assert_bitwise(packed[0].view(2, -1), tokens)


def test_empty(backend):
    nothing, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for found in (
        recipes.max_at_k(nothing, ids, 2),
        recipes.best_of_n(nothing, ids),
        recipes.opo(nothing, ids, ids),
    ):
        assert found.shape == (0,)
    found = recipes.turn_gae(torch.empty(2, 0), torch.empty(2, 0), torch.full((2, 4), -1), gamma=1.0, lam=1.0)
    assert found[0].tolist() == [[0.0] * 4] * 2


def test_numpy_in_numpy_out():
    rewards, ids = torch.randn(N).numpy(), IDS.numpy()
    for recipe in (recipes.grpo, recipes.rloo, recipes.best_of_n, lambda r, i: recipes.max_at_k(r, i, 2)):
        found = recipe(rewards, ids)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, recipe(torch.from_numpy(rewards), IDS).numpy())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: recipes.max_at_k(torch.ones(3), torch.ones(3).long(), 1),
            "k must be a whole number of at least 2",
        ),
        (lambda: recipes.pass_at_k(torch.ones(3), torch.ones(3).long(), 0), "k must be a whole number"),
        (lambda: recipes.best_of_n(torch.ones(3, 1), torch.ones(3).long()), r"rewards must be \[N\]"),
        (lambda: recipes.gdpo(torch.ones(3), torch.ones(3).long()), r"rewards must be \[N, K\]"),
        (
            lambda: recipes.gdpo(torch.ones(3, 2), torch.ones(3).long(), weights=[1.0]),
            r"weights must be \[2\] like a row of rewards, got \[1\]",
        ),
        (lambda: recipes.length_adaptive_lam(torch.ones(3).long(), alpha=0.0), "alpha must be in"),
        (
            lambda: recipes.turn_gae(
                torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[2]]), gamma=1.0, lam=1.0
            ),
            "turns must be below 2, got 2",
        ),
        (
            lambda: recipes.reinforce_pp_baseline(
                torch.ones(3), torch.ones(3).long(), torch.ones(2, 2).bool()
            ),
            r"mask must be \[3, T\] like rewards, got \[2, 2\]",
        ),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
