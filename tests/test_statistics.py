"""Statistics: intervals and tests equal scipy's, and cover what they promise."""

import numpy as np
from scipy import stats

from react_fast.tracker.statistics import (
    benjamini_hochberg,
    benjamini_yekutieli,
    bootstrap_interval,
    student_interval,
    student_p_value,
)


def _moments(samples):
    count = np.full(len(samples), samples.shape[1])
    return samples.mean(1), samples.std(1, ddof=1) / np.sqrt(samples.shape[1]), count


def test_student_equals_scipy():
    samples = np.random.default_rng(0).normal(0.3, 1, (20, 7))
    low, high = student_interval(*_moments(samples))
    for i, row in enumerate(samples):
        expected = stats.ttest_1samp(row, 0)
        interval = expected.confidence_interval(0.95)
        np.testing.assert_allclose([low[i], high[i]], [interval.low, interval.high], rtol=1e-12)
        np.testing.assert_allclose(student_p_value(*_moments(samples))[i], expected.pvalue, rtol=1e-10)


def test_fewer_than_two_observations_say_nothing():
    one = np.array([1.0]), np.array([np.nan]), np.array([1])
    assert student_interval(*one) == (-np.inf, np.inf)
    assert student_p_value(*one) == 1


def test_constant_observations():
    mean, error, count = np.array([0.0, 2.0]), np.zeros(2), np.full(2, 4)
    assert student_p_value(mean, error, count).tolist() == [1.0, 0.0]
    assert student_interval(mean, error, count)[0].tolist() == [0.0, 2.0]


def test_bootstrap_is_keyed_and_covers():
    samples = np.random.default_rng(1).exponential(1.0, (400, 40))
    low, high = bootstrap_interval(samples, seed=3)
    again = bootstrap_interval(samples, seed=3)
    assert np.array_equal(low, again[0])
    assert np.array_equal(high, again[1])
    assert not np.array_equal(low, bootstrap_interval(samples, seed=4)[0])
    # 95% nominal; the percentile bootstrap of 40 skewed numbers covers a little less, and 400 rows have a
    # standard error of 1.2%.
    assert 0.88 < np.mean((low <= 1) & (high >= 1)) < 0.985


def test_benjamini_hochberg_equals_scipy():
    p_values = np.random.default_rng(2).uniform(0, 1, 200) ** 3
    expected = stats.false_discovery_control(p_values, method="bh") <= 0.05
    assert 0 < expected.sum() < 200
    assert np.array_equal(benjamini_hochberg(p_values), expected)
    assert benjamini_hochberg(np.empty(0)).shape == (0,)


def test_benjamini_yekutieli_equals_scipy():
    p_values = np.random.default_rng(2).uniform(0, 1, 200) ** 6
    expected = stats.false_discovery_control(p_values, method="by") <= 0.05
    assert 0 < expected.sum() < benjamini_hochberg(p_values).sum()
    assert np.array_equal(benjamini_yekutieli(p_values), expected)
    assert benjamini_yekutieli(np.empty(0)).shape == (0,)
