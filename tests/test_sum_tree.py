"""Prioritised sampling: the same leaves as plain loops, exact sums, frequencies in proportion, refusals."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import react_fast as rf
from react_fast import reference

# One leaf, around the fan-out of 8 and its square, several levels, no power of anything.
CAPACITIES = (1, 2, 7, 8, 9, 63, 64, 65, 100, 1000)


def _filled(capacity, seed=0, zeros=0.3):
    """(ours, plain loops) with the same priorities, some of them 0."""
    numbers = np.random.default_rng(seed)
    priorities = numbers.exponential(size=capacity) * (numbers.random(capacity) >= zeros)
    priorities[numbers.integers(capacity)] = 1.5  # one at least
    trees = rf.SumTree(capacity), reference.SumTree(capacity)
    for tree in trees:
        tree.update(np.arange(capacity), priorities)
    return trees, numbers


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_same_leaves_as_plain_loops(capacity):
    (ours, plain), numbers = _filled(capacity)
    for batch in (1, 3, 64):
        uniforms = numbers.random(batch)
        got, wanted = ours.sample(uniforms), plain.sample(uniforms)
        assert got[0].tolist() == wanted[0].tolist()
        assert got[1].tolist() == wanted[1].tolist()


def test_a_mass_on_an_edge_belongs_to_the_leaf_behind_it():
    """Priorities of whole numbers have exact sums, so that (k + 0) total / B falls on edges exactly."""
    ours, plain = rf.SumTree(20), reference.SumTree(20)
    priorities = np.array([0.0, 2, 0, 0, 1, 1, 0, 3, 0, 1] * 2)
    for tree in (ours, plain):
        tree.update(np.arange(20), priorities)
    edges = np.zeros(int(priorities.sum()))
    assert ours.sample(edges)[0].tolist() == plain.sample(edges)[0].tolist()
    assert np.bincount(ours.sample(edges)[0], minlength=20).tolist() == priorities.tolist()


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 200),
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2**20)), max_size=40), min_size=1, max_size=8
    ),
)
def test_sums_after_any_updates(capacity, batches):
    """Whole numbers add up exactly in any order: total, least and leaves are the plain loops' to the bit."""
    ours, plain = rf.SumTree(capacity), reference.SumTree(capacity)
    for batch in batches:
        indices = np.array([i % capacity for i, _ in batch], dtype=np.int64)
        priorities = np.array([p for _, p in batch], dtype=np.float64)
        for tree in (ours, plain):
            tree.update(indices, priorities)
        assert (ours.total, ours.least) == (plain.total, plain.least)
        assert ours.priorities.tolist() == plain.priorities


def test_sums_do_not_drift():
    """After many updates of numbers far apart the nodes are bitwise those of a tree that is built at once."""
    (tree, _), numbers = _filled(777)
    for _ in range(300):
        tree.update(numbers.integers(777, size=50), np.exp(numbers.uniform(-30, 30, size=50)))
    fresh = rf.SumTree(777)
    fresh.update(np.arange(777), tree.priorities.numpy())
    assert torch.equal(tree._nodes, fresh._nodes)


def test_of_an_index_twice_the_last_priority_stays():
    tree = rf.SumTree(10)
    tree.update(torch.tensor([3, 5, 3, 3]), torch.tensor([1.0, 2.0, 9.0, 4.0]))
    assert tree.priorities.tolist() == [0, 0, 0, 4, 0, 2, 0, 0, 0, 0]
    assert (tree.total, tree.least) == (6, 2)


def test_frequencies_are_in_proportion():
    """Chi-square of 40 000 draws at the 0.1% level, and what has no priority is never drawn."""
    from scipy.stats import chisquare

    (tree, _), numbers = _filled(100)
    shares = tree.priorities.numpy() / tree.total
    drawn = np.concatenate(
        [tree.sample(numbers.random(1))[0] for _ in range(8000)]
    )  # independent: one stratum
    counts = np.bincount(drawn, minlength=100)
    assert counts[shares == 0].sum() == 0
    assert chisquare(counts[shares > 0], shares[shares > 0] * len(drawn)).pvalue > 1e-3


def test_strata_hold_every_leaf_near_its_share():
    """Of B strata a leaf with share s lies in at most s B + 2, and fills at least s B - 2."""
    (tree, _), numbers = _filled(100)
    expected = tree.priorities.numpy() / tree.total * 512
    counts = np.bincount(tree.sample(numbers.random(512))[0], minlength=100)
    assert np.all(np.abs(counts - expected) <= 2)


def test_the_largest_uniform_stays_on_a_leaf_with_priority():
    for seed in range(50):
        (tree, _), _ = _filled(97, seed, zeros=0.9)
        _, found = tree.sample(np.full(7, np.nextafter(1.0, 0.0)))
        assert np.all(found > 0)


def test_numpy_and_tensors():
    (tree, _), numbers = _filled(50)
    uniforms = numbers.random(8)
    indices, found = tree.sample(torch.from_numpy(uniforms))
    assert (indices.dtype, found.dtype) == (torch.int64, torch.float64)
    assert tree.sample(uniforms)[0].tolist() == indices.tolist()
    tree.update(
        np.arange(6, dtype=np.int32)[::-2], np.ones(6, dtype=np.float32)[::2]
    )  # strides, narrow dtypes
    assert tree.priorities[[1, 3, 5]].tolist() == [1, 1, 1]
    tree.update(torch.tensor([], dtype=torch.int64), torch.tensor([]))


def test_copies_and_pickles_draw_the_same():
    (tree, _), _ = _filled(300)
    for twin in (copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert torch.equal(twin._nodes, tree._nodes)
        twin.update(np.array([0]), np.array([5.0]))
        assert twin.total != tree.total


@pytest.mark.parametrize(
    ("error", "indices", "priorities"),
    [
        (r"indices must be in \[0, 9\), got 9 at 1", [0, 9], [1.0, 1.0]),
        (r"indices must be in \[0, 9\), got -1 at 0", [-1, 0], [1.0, 1.0]),
        ("priorities must be finite, >= 0 and sum to a float64, got -0.5 at 1", [0, 1], [1.0, -0.5]),
        ("got nan at 0", [0, 1], [float("nan"), 1.0]),
        ("got inf at 1", [0, 1], [1.0, float("inf")]),
        (r"got 1e\+308 at 0", [0, 1], [1e308, 1.0]),  # nine of them have no sum
        (r"priorities must be \[2\] like indices, got \[1\]", [0, 1], [1.0]),
        (r"indices must be \[B\], got \[1, 2\]", [[0, 1]], [[1.0, 1.0]]),
    ],
)
def test_update_refuses_and_changes_nothing(error, indices, priorities):
    tree = rf.SumTree(9)
    tree.update(np.array([4]), np.array([2.0]))
    before = tree._nodes.clone()
    with pytest.raises(ValueError, match=error):
        tree.update(np.array(indices), np.array(priorities))
    assert torch.equal(tree._nodes, before)


def test_other_refusals():
    tree = rf.SumTree(9)
    with pytest.raises(ValueError, match="the tree is empty: every priority is 0"):
        tree.sample(np.array([0.5]))
    tree.update(np.array([4]), np.array([2.0]))
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"uniforms must be in \[0, 1\), got .* at 1"):
            tree.sample(np.array([0.5, wrong]))
    with pytest.raises(TypeError, match="indices must be int64 or int32, got float64"):
        tree.update(np.array([1.0]), np.array([1.0]))
    with pytest.raises(TypeError, match="priorities must be float32"):
        tree.update(np.array([1]), np.array([1]))
    with pytest.raises(TypeError, match=r"indices must be a .*Tensor, got list"):
        tree.update([1], np.array([1.0]))
    with pytest.raises(ValueError, match="uniforms must be on cpu like the tree, got meta"):
        tree.sample(torch.zeros(3, device="meta"))
    for wrong, error in ((0, ValueError), (2**63, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="capacity"):
            rf.SumTree(wrong)
