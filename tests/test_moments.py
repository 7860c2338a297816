"""RunningMoments: equals numpy's mean and variance, however the stream is cut, merged or stored."""

import numpy as np
import pytest
import torch

import react_fast as rf
from react_fast import RunningMoments, reference
from react_fast.tracker.statistics import student_interval

from . import contract

SIZE = 7


def _stream(count=500):
    ids = torch.randint(0, SIZE - 1, (count,))  # the last id is never seen
    # A mean far from 0 against the spread: the sum of squares alone would lose half the digits.
    return torch.randn(count, dtype=torch.float64) + 1e4, ids


def _assert_equal(moments, scores, ids):
    for i in range(SIZE):
        values = scores[ids == i].cpu().numpy()
        assert int(moments.count[i]) == len(values)
        if len(values) > 1:
            np.testing.assert_allclose(float(moments.mean[i]), values.mean(), rtol=1e-13)
            np.testing.assert_allclose(float(moments.variance[i]), values.var(ddof=1), rtol=1e-9)
            error = values.std(ddof=1) / np.sqrt(len(values))
            np.testing.assert_allclose(float(moments.standard_error[i]), error, rtol=1e-9)


@pytest.mark.parametrize("parts", [1, 3, 100])
def test_equals_numpy_however_the_stream_is_cut(backend, parts):
    scores, ids = _stream()
    moments = RunningMoments(SIZE)
    for s, i in zip(scores.chunk(parts), ids.chunk(parts), strict=True):
        moments.update(s, i)
    _assert_equal(moments, scores, ids)
    assert bool(moments.variance[SIZE - 1].isnan())


def test_merged_states_equal_one_that_saw_both(backend):
    scores, ids = _stream()
    left, right = RunningMoments(SIZE), RunningMoments(SIZE)
    left.update(scores[:100].view(10, 10), ids[:100].view(10, 10))
    right.update(scores[100:], ids[100:].int())
    left.merge(right)
    _assert_equal(left, scores, ids)


def test_masked_scores_do_not_exist(backend):
    scores, ids = _stream()
    mask = torch.rand(len(ids)) < 0.5
    moments = RunningMoments(SIZE)
    moments.update(torch.where(mask, scores, torch.nan), torch.where(mask, ids, -100), mask)
    _assert_equal(moments, scores[mask], ids[mask])
    moments.update(torch.empty(0), torch.empty(0, dtype=torch.int64))
    _assert_equal(moments, scores[mask], ids[mask])


DECAY = 0.9


def _aged_stream(steps=40):
    """(scores, ids, step they came at); ids 0 and 1 in every step, id 2 in the first alone, id 3 once."""
    ids = torch.cat([torch.tensor([0, 1, 1]).repeat(steps), torch.tensor([2, 2, 3])])
    when = torch.cat([torch.arange(steps).repeat_interleave(3), torch.tensor([0, 0, 5])])
    order = when.argsort(stable=True)
    return torch.randn(len(ids), dtype=torch.float64) + 3, ids[order], when[order]


def _aged(scores, ids, when, kind=RunningMoments, **options):
    moments = kind(SIZE, decay=DECAY, **options)
    for step in range(int(when.max()) + 1):
        moments.advance()
        moments.update(scores[when == step], ids[when == step])
    return moments


def _numpy_aged(scores, ids, when, last):
    """(mean, effective count, standard error) from the weights themselves, every id in turn."""
    found = []
    for i in range(SIZE):
        x, w = scores[ids == i].cpu().numpy(), DECAY ** (last - when[ids == i].cpu().numpy().astype(float))
        if len(x) < 2:
            found.append((x.sum(), float(len(x)), np.nan))
            continue
        mean = np.average(x, weights=w)
        # Reliability weights: sum w (x - mean)^2 / (sum w - sum w^2 / sum w) has the variance as its expectation.
        variance = np.sum(w * (x - mean) ** 2) / (w.sum() - np.sum(w**2) / w.sum())
        error = np.sqrt(variance * np.sum(w**2)) / w.sum()
        found.append((mean, w.sum() ** 2 / np.sum(w**2), error))
    return np.array(found).T


def test_decay_equals_the_weighted_sums(backend):
    scores, ids, when = _aged_stream()
    expected = _numpy_aged(scores, ids, when, int(when.max()))
    for moments in (_aged(scores, ids, when), _aged(scores, ids, when, reference.RunningMoments)):
        found = [moments.mean, moments.effective_count, moments.standard_error]
        # Forty merges of float64 numbers of size 3.
        np.testing.assert_allclose(torch.stack(found).cpu().numpy(), expected, rtol=1e-12)


def test_decayed_intervals_cover_the_mean():
    """The effective count is what an interval may build on: 2,000 streams at once, one an id."""
    moments, expected = RunningMoments(2000, decay=DECAY), 0.5
    for _ in range(60):
        moments.advance()
        moments.update(torch.randn(2, 2000) + expected, torch.arange(2000).expand(2, -1))
    low, high = student_interval(
        moments.mean.numpy(), moments.standard_error.numpy(), moments.effective_count.numpy()
    )
    share = np.mean((low < expected) & (expected < high))
    assert abs(share - 0.95) < 0.02  # four standard errors of a share of 2,000


def test_decayed_shards_merge_to_one_pass():
    scores, ids, when = _aged_stream()
    whole, early = _aged(scores, ids, when), _aged(scores[when < 30], ids[when < 30], when[when < 30])
    # Two ranks see the same steps; a run that ended ten steps earlier is advanced by them.
    parts = [torch.arange(len(ids)) % 2 == r for r in (0, 1)]
    left, right = (_aged(scores[p], ids[p], when[p]) for p in parts)
    left.merge(right)
    early.advance(10)
    late = _aged(scores[when >= 30], ids[when >= 30], when[when >= 30])
    late.merge(early)
    for found in (left, late):
        assert found.count.tolist() == whole.count.tolist()
        for name in ("mean", "effective_count", "variance"):
            torch.testing.assert_close(
                getattr(found, name), getattr(whole, name), rtol=1e-12, atol=0, equal_nan=True
            )


def test_what_decayed_to_nothing_gives_way_to_what_comes():
    moments = RunningMoments(2, decay=0.5)
    moments.update(torch.tensor([1.0, 3.0, 1.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    moments.advance(5000)  # 0.5^5000 is 0 in float64
    moments.update(torch.tensor([5.0, 5.0]), torch.tensor([1, 1]))
    assert moments.mean.tolist() == [2.0, 5.0]
    assert moments.effective_count.tolist() == [2.0, 2.0]
    assert moments.variance.tolist() == [2.0, 0.0]


def test_decayed_state_comes_back_bitwise():
    scores, ids, when = _aged_stream()
    moments, again = _aged(scores, ids, when), RunningMoments(SIZE, decay=DECAY)
    again.load_state_dict(moments.state_dict())
    for one in (moments, again):
        one.advance()
        one.update(scores, ids)
    for name, value in moments.state_dict().items():
        contract.assert_bitwise(again.state_dict()[name], value)
    with pytest.raises(ValueError, match=r"state must hold count, mean, m2 like these moments, got .*weight"):
        RunningMoments(SIZE).load_state_dict(moments.state_dict())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: RunningMoments(SIZE, decay=0.0), r"decay must be a number in \(0, 1\], got 0.0"),
        (lambda m: RunningMoments(SIZE, decay=1.5), "got 1.5"),
        (lambda m: m.advance(-1), "steps must be a whole number, got -1"),
        (lambda m: m.merge(RunningMoments(SIZE)), "other must have decay 0.9 like these moments, got 1"),
    ],
)
def test_bad_decay_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call(RunningMoments(SIZE, decay=DECAY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_equals_reference(backend, dtype, integer):
    scores, ids = torch.randn(30, 3).to(dtype), torch.randint(0, SIZE, (30, 3), dtype=integer)
    mask = torch.rand(30, 3) > 0.3
    moments, loops = RunningMoments(SIZE), reference.RunningMoments(SIZE)
    with rf.use_backend("reference"):
        dispatched = RunningMoments(SIZE)
        dispatched.update(scores, ids, mask)
    for part in (slice(0, 7), slice(7, 30)):
        moments.update(scores[part], ids[part], mask[part])
        loops.update(scores[part], ids[part], mask[part])
    for found in (moments, dispatched):
        assert found.count.tolist() == loops.count.tolist()
        # Ninety float64 numbers of size 1, in two orders.
        torch.testing.assert_close(found.mean, loops.mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(found.variance, loops.variance, rtol=1e-13, atol=0, equal_nan=True)
    other = reference.RunningMoments(SIZE)
    other.update(scores, ids)
    loops.merge(other)
    again = RunningMoments(SIZE)
    again.update(scores, ids)
    moments.merge(again)
    torch.testing.assert_close(moments.mean, loops.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(moments.standard_error, loops.standard_error, rtol=1e-13, atol=0)


def test_any_strides_and_many_of_one_id(backend):
    scores, ids = torch.randn(700, 2), torch.zeros(2, 700, dtype=torch.int64).T
    mask = (torch.rand(2, 700) > 0.5).T
    moments, dense = RunningMoments(1), RunningMoments(1)
    moments.update(scores, ids, mask)
    dense.update(scores.contiguous(), ids.contiguous(), mask.contiguous())
    assert moments.state_dict() == dense.state_dict()
    kept = scores[mask].double()
    torch.testing.assert_close(moments.mean[0], kept.mean(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moments.variance[0], kept.var(), rtol=1e-12, atol=0)


def test_far_from_zero(backend):
    """Mean 1e8, spread 1: the sum of squares has no digit of the variance left, the distances to the mean do."""
    scores, ids = torch.randn(400, dtype=torch.float64) + 1e8, torch.arange(400) % 2
    moments = RunningMoments(2)
    for part in range(0, 400, 80):
        moments.update(scores[part : part + 80], ids[part : part + 80])
    for i in (0, 1):
        expected = (scores[ids == i] - 1e8).var()
        # Distances carry 1e8 * 2^-53 = 1e-8 of rounding each, 200 of them.
        torch.testing.assert_close(moments.variance[i], expected, rtol=1e-6, atol=0)


def test_every_run_gives_the_same_bits(backend):
    scores, ids = torch.randn(300), torch.randint(0, 9, (300,))
    states = []
    for threads in (1, 2, 4, 4):
        torch.set_num_threads(threads)
        moments = RunningMoments(9)
        moments.update(scores, ids)
        moments.update(scores.flip(0), ids.flip(0))
        states.append(moments.state_dict())
    for state in states[1:]:
        for name, value in state.items():
            contract.assert_bitwise(value, states[0][name])


def test_state_of_another_dtype_or_size_is_refused():
    moments = RunningMoments(SIZE)
    state = moments.state_dict()
    with pytest.raises(TypeError, match="mean must be float64 like these moments, got float32"):
        moments.load_state_dict({**state, "mean": state["mean"].float()})
    with pytest.raises(TypeError, match="count must be int64 like these moments, got int32"):
        moments.load_state_dict({**state, "count": state["count"].int()})
    with pytest.raises(ValueError, match=r"m2 must be \[7\] like these moments, got \[3\]"):
        moments.load_state_dict({**state, "m2": state["m2"][:3]})


def test_nan_stays_at_its_id(backend):
    scores, ids = torch.randn(50), torch.arange(50) % 5
    clean, dirty = RunningMoments(5), RunningMoments(5)
    clean.update(scores, ids)
    scores[13] = float("nan")
    dirty.update(scores, ids)
    assert dirty.mean.isnan().tolist() == [False, False, False, True, False]
    for i in (0, 1, 2, 4):
        assert dirty.mean[i] == clean.mean[i]
        assert dirty.variance[i] == clean.variance[i]


def test_refused_update_changes_nothing():
    moments = RunningMoments(SIZE)
    moments.update(torch.ones(3), torch.tensor([0, 1, 1]))
    before = moments.state_dict()
    for wrong in (-1, SIZE, 2**40):
        with pytest.raises(
            IndexError, match=rf"ids must be in \[0, {SIZE}\) where mask is true, got {wrong}"
        ):
            moments.update(torch.ones(3), torch.tensor([0, 2, wrong]))
    for name, value in moments.state_dict().items():
        contract.assert_bitwise(value, before[name])


def test_kernel_leaves_out_ids_it_may_not_look_at(monkeypatch):
    """Checking would wait for a GPU: such a score is left out, unless REACT_FAST_CHECKED asks to look."""
    with rf.use_backend("triton"):
        moments = RunningMoments(3)
        moments.update(torch.ones(4), torch.tensor([0, -1, 3, 2]))
        assert moments.count.tolist() == [1, 0, 1]
        monkeypatch.setenv("REACT_FAST_CHECKED", "1")
        with pytest.raises(IndexError, match="got -1"):
            moments.update(torch.ones(4), torch.tensor([0, -1, 3, 2]))
        moments.update(torch.ones(4), torch.tensor([0, -1, 3, 2]), torch.tensor([1, 0, 0, 1]))
    assert moments.count.tolist() == [2, 0, 2]


def test_opcheck_and_compile(backend):
    state = (torch.zeros(4, dtype=torch.int64), *(torch.zeros(4, dtype=torch.float64) for _ in range(2)))
    scores, ids = torch.randn(9), torch.randint(0, 4, (9,))
    contract.assert_opcheck("accumulate_by_id", scores, ids, torch.rand(9) > 0.5, *state)
    eager, compiled = RunningMoments(4), RunningMoments(4)
    eager.update(scores, ids)
    torch.compile(compiled.update, fullgraph=True, backend="aot_eager")(scores, ids)
    for name, value in compiled.state_dict().items():
        contract.assert_bitwise(value, eager.state_dict()[name])


def test_numpy_is_taken():
    scores, ids = np.random.default_rng(0).normal(size=40), np.arange(40) % SIZE
    moments, expected = RunningMoments(SIZE), RunningMoments(SIZE)
    moments.update(scores, ids, mask=ids != 2)
    expected.update(torch.from_numpy(scores), torch.from_numpy(ids), torch.from_numpy(ids != 2))
    assert moments.count.tolist() == expected.count.tolist()
    assert moments.mean.tolist() == expected.mean.tolist()


def test_state_is_a_copy():
    scores, ids = _stream()
    moments, other = RunningMoments(SIZE), RunningMoments(SIZE)
    moments.update(scores, ids)
    other.load_state_dict(moments.state_dict())
    moments.update(scores, ids)
    _assert_equal(other, scores, ids)


@pytest.mark.parametrize(
    ("scores", "ids", "mask", "error", "text"),
    [
        (torch.ones(2).int(), torch.ones(2).long(), None, TypeError, "scores must be float32"),
        (torch.ones(2), torch.ones(2), None, TypeError, "ids must be int64 or int32"),
        (torch.ones(2), torch.ones(3).long(), None, ValueError, r"ids must be \[2\] like scores, got \[3\]"),
        (
            torch.ones(2),
            torch.tensor([0, 7]),
            None,
            IndexError,
            "where mask is true, got 7",
        ),
        (
            torch.ones(2),
            torch.ones(2).long(),
            torch.ones(3).bool(),
            ValueError,
            r"mask must be \[2\] like scores",
        ),
        (torch.ones(2, device="meta"), torch.ones(2).long(), None, ValueError, "scores must be on cpu"),
    ],
)
def test_bad_input_is_refused(scores, ids, mask, error, text):
    with pytest.raises(error, match=text):
        RunningMoments(SIZE).update(scores, ids, mask)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="size must be a whole number of ids, got -1"):
        RunningMoments(-1)
    with pytest.raises(ValueError, match=r"other must be \[7\] like these moments, got \[6\]"):
        RunningMoments(SIZE).merge(RunningMoments(SIZE - 1))
