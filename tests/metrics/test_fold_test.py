"""The t-test over folds against scipy, by hand, and on overlapping folds of data without a difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from brainfound.errors import UsageError
from brainfound.metrics.statistics import fold_t_test

A, B = [0.80, 0.78, 0.83, 0.79, 0.85], [0.76, 0.77, 0.80, 0.80, 0.79]


def test_the_plain_test_is_the_paired_t_test_of_scipy():
    ours, theirs = fold_t_test(A, B), stats.ttest_rel(A, B)
    assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    interval = theirs.confidence_interval(0.9)
    with_90 = fold_t_test(A, B, confidence=0.9)
    assert (with_90.low, with_90.high) == pytest.approx((interval.low, interval.high))
    assert ours.difference == pytest.approx(np.mean(A) - np.mean(B))
    assert ours.num_folds == 5


def test_the_corrected_test_widens_the_variance():
    differences = np.subtract(A, B)
    corrected = fold_t_test(A, B, test_to_train=1 / 4)
    t = differences.mean() / math.sqrt(differences.var(ddof=1) * (1 / 5 + 1 / 4))
    assert corrected.t == pytest.approx(t)
    assert corrected.p == pytest.approx(2 * stats.t.sf(t, 4))
    assert corrected.p > fold_t_test(A, B).p
    assert corrected.high - corrected.low > fold_t_test(A, B).high - fold_t_test(A, B).low
    assert fold_t_test(A, B, test_to_train=0).p == pytest.approx(fold_t_test(A, B).p)


def test_with_overlapping_training_parts_only_the_corrected_test_keeps_its_level():
    """Two equally bad systems on random halves of 40 subjects: how often is a difference found?"""
    generator = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(200):
        first, second = generator.normal(size=(2, 40))  # each system's error on every subject
        scores = []
        for _ in range(15):
            test = generator.permutation(40)[:20]
            scores.append((first[test].mean(), second[test].mean()))
        a, b = np.transpose(scores)
        plain.append(fold_t_test(a, b).p < 0.05)
        corrected.append(fold_t_test(a, b, test_to_train=1.0).p < 0.05)
    assert np.mean(plain) > 0.2
    assert np.mean(corrected) < 0.1


def test_what_does_not_vary_has_no_p():
    for a, b in ((A, A), ([0.5, 0.6], [0.4, 0.5]), ([0.5], [0.4])):
        found = fold_t_test(a, b)
        assert math.isnan(found.p)
        assert math.isnan(found.low)
        assert found.difference == pytest.approx(np.mean(a) - np.mean(b))


@pytest.mark.parametrize(
    ("a", "b", "settings"),
    [
        ([1, 2], [1, 2, 3], {}),
        ([], [], {}),
        ([1, np.nan], [1, 2], {}),
        (A, B, {"test_to_train": -0.1}),
        (A, B, {"confidence": 95}),
    ],
)
def test_what_cannot_be_tested_is_refused(a, b, settings):
    with pytest.raises(UsageError) as error:
        fold_t_test(a, b, **settings)
    assert "\n" not in str(error.value)
