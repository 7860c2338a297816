"""RunningMoments: equals numpy's mean and variance, however the stream is cut, merged or stored."""

import numpy as np
import pytest
import torch

from react_fast import RunningMoments

SIZE = 7


def _stream(count=500):
    ids = torch.randint(0, SIZE - 1, (count,))  # the last id is never seen
    # A mean far from 0 against the spread: the sum of squares alone would lose half the digits.
    return torch.randn(count, dtype=torch.float64) + 1e4, ids


def _assert_equal(moments, scores, ids):
    for i in range(SIZE):
        values = scores[ids == i].numpy()
        assert int(moments.count[i]) == len(values)
        if len(values) > 1:
            np.testing.assert_allclose(float(moments.mean[i]), values.mean(), rtol=1e-13)
            np.testing.assert_allclose(float(moments.variance[i]), values.var(ddof=1), rtol=1e-9)
            error = values.std(ddof=1) / np.sqrt(len(values))
            np.testing.assert_allclose(float(moments.standard_error[i]), error, rtol=1e-9)


@pytest.mark.parametrize("parts", [1, 3, 500])
def test_equals_numpy_however_the_stream_is_cut(parts):
    scores, ids = _stream()
    moments = RunningMoments(SIZE)
    for s, i in zip(scores.chunk(parts), ids.chunk(parts), strict=True):
        moments.update(s, i)
    _assert_equal(moments, scores, ids)
    assert bool(moments.variance[SIZE - 1].isnan())


def test_merged_states_equal_one_that_saw_both():
    scores, ids = _stream()
    left, right = RunningMoments(SIZE), RunningMoments(SIZE)
    left.update(scores[:100].view(10, 10), ids[:100].view(10, 10))
    right.update(scores[100:], ids[100:].int())
    left.merge(right)
    _assert_equal(left, scores, ids)


def test_masked_scores_do_not_exist():
    scores, ids = _stream()
    mask = torch.rand(len(ids)) < 0.5
    moments = RunningMoments(SIZE)
    moments.update(torch.where(mask, scores, torch.nan), torch.where(mask, ids, -100), mask)
    _assert_equal(moments, scores[mask], ids[mask])
    moments.update(torch.empty(0), torch.empty(0, dtype=torch.int64))
    _assert_equal(moments, scores[mask], ids[mask])


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
        (torch.ones(2), torch.tensor([0, 7]), None, IndexError, r"ids must be in \[0, 7\), got 0 to 7"),
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
