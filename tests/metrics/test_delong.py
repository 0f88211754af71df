"""DeLong's variance against its definition case by case, against the bootstrap, and in simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from brainfound.errors import UsageError
from brainfound.metrics import auroc
from brainfound.metrics.statistics import bootstrap_interval, delong_interval, delong_test


def _components(labels, scores):
    """V10 of each positive and V01 of each negative, pair by pair."""
    pairs = (scores[labels][:, None] > scores[~labels]) + 0.5 * (scores[labels][:, None] == scores[~labels])
    return pairs.mean(axis=1), pairs.mean(axis=0)


def _direct(labels, a, b):
    """Area of a and b and the variance of their difference, equation by equation of the paper."""
    (a10, a01), (b10, b01) = _components(labels, a), _components(labels, b)
    m, n = len(a10), len(a01)

    def covariance(x, y):
        return ((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1)

    s_aa, s_bb, s_ab = (
        covariance(x10, y10) / m + covariance(x01, y01) / n
        for x10, x01, y10, y01 in ((a10, a01, a10, a01), (b10, b01, b10, b01), (a10, a01, b10, b01))
    )
    return a10.mean(), b10.mean(), s_aa, s_aa + s_bb - 2 * s_ab


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3), st.integers(-3, 3)), min_size=4, max_size=30))
def test_areas_and_variances_are_those_of_the_definition(cases):
    labels = np.array([c[0] for c in cases])
    a, b = (np.array([c[i] for c in cases], float) for i in (1, 2))
    if labels.sum() < 2 or (~labels).sum() < 2:
        return
    area_a, area_b, variance, variance_of_difference = _direct(labels, a, b)
    found = delong_test(labels, a, b)
    assert (found.auroc_a, found.auroc_b) == pytest.approx((area_a, area_b))
    assert found.auroc_a == pytest.approx(auroc(labels, a))
    assert found.standard_error == pytest.approx(math.sqrt(max(variance_of_difference, 0)), abs=1e-7)
    if found.standard_error > 1e-6:
        assert found.p == pytest.approx(2 * stats.norm.sf(abs(area_a - area_b) / found.standard_error))
    interval = delong_interval(labels, a)
    reach = 1.959963984540054 * math.sqrt(variance)
    assert interval.low == pytest.approx(max(area_a - reach, 0), abs=1e-7)
    assert interval.high == pytest.approx(min(area_a + reach, 1), abs=1e-7)


def _study(seed, num=300, gain=0.5):
    generator = np.random.default_rng(seed)
    labels = np.arange(num) % 3 == 0
    shared = generator.normal(size=num) + labels
    return labels, shared + gain * labels + generator.normal(0, 0.7, num), shared + generator.normal(0, 0.7, num)


def test_interval_and_standard_error_are_close_to_the_bootstrap():
    labels, a, b = _study(0)
    ours, theirs = delong_interval(labels, a), bootstrap_interval(auroc, labels, a)
    assert ours.estimate == pytest.approx(theirs.estimate)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    drawn = bootstrap_interval(lambda y, x, z: auroc(y, x) - auroc(y, z), labels, a, b)
    assert 2 * 1.96 * delong_test(labels, a, b).standard_error == pytest.approx(drawn.high - drawn.low, rel=0.1)


def test_p_is_uniform_when_nothing_differs_and_small_when_much_does():
    same = np.array([delong_test(*_study(seed, num=90, gain=0)).p for seed in range(300)])
    assert 0.02 < (same < 0.05).mean() < 0.09
    assert 0.42 < (same < 0.5).mean() < 0.58
    assert delong_test(*_study(1, gain=1.5)).p < 1e-3


def test_scales_do_not_matter_and_two_columns_mean_the_second():
    labels, a, b = _study(3)
    found = delong_test(labels, a, b)
    assert delong_test(labels, np.exp(a), 5 * b - 3) == found
    columns = np.stack([-a, a], axis=1)
    assert delong_test(labels, columns, b) == found
    assert delong_test(labels, b, a).difference == pytest.approx(-found.difference)
    assert delong_test(labels, b, a).p == pytest.approx(found.p)


def test_what_has_no_variance():
    labels = [0, 0, 1, 1]
    perfect = delong_interval(labels, [1, 2, 3, 4])
    assert (perfect.low, perfect.estimate, perfect.high) == (1, 1, 1)
    assert delong_test(labels, [1, 2, 3, 4], [10, 20, 30, 40]).p == 1.0
    assert math.isnan(delong_test(labels, [1, 2, 3, 4], [4, 3, 2, 1]).p)
    one_positive = delong_test([0, 0, 1], [1, 3, 2], [3, 1, 2])
    assert one_positive.auroc_a == 0.5
    assert math.isnan(one_positive.p)
    assert math.isnan(delong_interval([0, 0, 1], [1, 3, 2]).low)
    one_class = delong_test([1, 1], [1, 2], [2, 1])
    assert math.isnan(one_class.auroc_a)
    assert math.isnan(one_class.p)


def test_what_is_not_two_classes_is_refused():
    with pytest.raises(UsageError, match="two classes"):
        delong_test([0, 1, 2], np.eye(3), np.eye(3))
    with pytest.raises(UsageError):
        delong_test([0, 1], [0.1, 0.2], [0.1, np.nan])
    with pytest.raises(UsageError):
        delong_test([0, 1], [0.1, 0.2], [0.1, 0.2, 0.3])
    with pytest.raises(UsageError, match="confidence"):
        delong_interval([0, 1], [0.1, 0.2], confidence=95)
