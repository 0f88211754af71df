"""Intervals and tests against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from brainfound.errors import UsageError
from brainfound.metrics import auroc, mae
from brainfound.metrics.statistics import (
    bootstrap_interval,
    explain_missing_interval,
    holm,
    least_subjects,
    paired_permutation_test,
)


def test_percentile_interval_is_close_to_that_of_scipy():
    values = np.random.default_rng(0).normal(0.7, 0.2, 80)
    ours = bootstrap_interval(np.mean, values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    # Two independent drawings: the ends agree to a small part of the standard error (0.022).
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    assert ours.num_resamples == 2000
    assert ours.num_undefined == 0
    assert bootstrap_interval(np.mean, values) == ours
    assert bootstrap_interval(np.mean, values, seed=1) != ours
    assert bootstrap_interval(np.mean, values, confidence=0.5).low > ours.low


def test_several_arrays_are_drawn_together():
    target = np.arange(50.0)
    interval = bootstrap_interval(mae, target, target + 3, num_resamples=50)
    assert (interval.low, interval.estimate, interval.high) == (3, 3, 3)
    assert str(interval) == "3.000 [3.000, 3.000]"


def test_cases_of_a_subject_are_drawn_together():
    # Ten subjects, twenty identical cases each: the interval must be that of ten values, not of two hundred.
    of_subject = np.random.default_rng(0).normal(size=10)
    values, subjects = np.repeat(of_subject, 20), np.repeat([f"sub-{i}" for i in range(10)], 20)
    grouped = bootstrap_interval(np.mean, values, subjects=subjects, num_resamples=500)
    alone = bootstrap_interval(np.mean, values, num_resamples=500)
    expected = bootstrap_interval(np.mean, of_subject, num_resamples=500)
    assert (grouped.low, grouped.high) == pytest.approx((expected.low, expected.high))
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_names_and_order_change_no_resample():
    generator = np.random.default_rng(3)
    truth, answers = np.arange(24) % 2, generator.normal(size=(24, 2))
    subjects = np.repeat(np.arange(12), 2)
    metric = lambda t, a: auroc(t, a[:, 1])  # noqa: E731
    first = bootstrap_interval(metric, truth, answers, subjects=subjects, num_resamples=200)
    for k in range(3):
        order, names = generator.permutation(24), generator.permutation(12)
        named = [f"p{names[subject]}" for subject in subjects[order]]
        again = bootstrap_interval(metric, truth[order], answers[order], subjects=named, num_resamples=200)
        assert (again.low, again.high) == pytest.approx((first.low, first.high), rel=1e-12), k
    a, b = generator.normal(size=(2, 24))
    p = paired_permutation_test(a, b, num_permutations=200, subjects=subjects)
    assert paired_permutation_test(a[order], b[order], num_permutations=200, subjects=named) == p


@pytest.mark.parametrize(("confidence", "least"), [(0.5, 10), (0.95, 10), (0.998, 10), (0.999, 11)])
def test_too_few_subjects_have_no_interval(confidence, least):
    assert least_subjects(confidence) == least
    values = np.linspace(0.2, 0.9, least)
    assert bootstrap_interval(np.mean, values, confidence=confidence).low > 0
    few = bootstrap_interval(
        np.mean, np.repeat(values[1:], 3), subjects=np.repeat(np.arange(1, least), 3), confidence=confidence
    )
    assert few.estimate == pytest.approx(values[1:].mean())
    assert np.isnan([few.low, few.high]).all()
    assert str(few) == f"{few.estimate:.3f}"
    # The lowest and the highest of n values enclose the median with this probability.
    assert confidence <= 1 - 2.0 ** (1 - least)


def test_a_score_that_many_resamples_lack_has_no_interval():
    scores = np.linspace(0, 1, 30)
    for num_positive, is_defined in ((1, False), (2, False), (4, True), (6, True)):
        labels = np.isin(np.arange(30), np.linspace(0, 29, num_positive).round())
        interval = bootstrap_interval(auroc, labels.astype(int), scores, num_resamples=300)
        assert np.isnan(interval.low) != is_defined
        assert np.isfinite(interval.estimate)
        # 4 of 30 are missing from one resample in 73: fewer than 1 in 20 may be.
        assert interval.num_undefined > 0 or num_positive == 6


def test_why_a_score_has_no_interval_is_one_sentence():
    assert explain_missing_interval(1) == "no 95% interval of 1 subject: it needs 10 or more"
    assert explain_missing_interval(5) == "no 95% interval of 5 subjects: it needs 10 or more"
    assert explain_missing_interval(10, 0.999) == "no 99.9% interval of 10 subjects: it needs 11 or more"
    assert "many resamples" in explain_missing_interval(10)


def test_undefined_resamples_are_counted():
    interval = bootstrap_interval(auroc, [0, 0, 1, 1], [0.1, 0.4, 0.3, 0.9], num_resamples=400)
    # A resample of four cases has one class with chance 2 · (1/2)^4 = 1/8.
    assert 20 < interval.num_undefined < 90
    assert interval.estimate == pytest.approx(0.75)
    with pytest.raises(UsageError, match="undefined"):
        bootstrap_interval(auroc, [1, 1], [0.1, 0.2], num_resamples=5)


@pytest.mark.parametrize("num_subjects", [8, 40])
def test_permutation_test_is_that_of_scipy(num_subjects):
    generator = np.random.default_rng(1)
    a = generator.normal(0.6, 0.1, num_subjects)
    b = a + generator.normal(0.03, 0.08, num_subjects)
    theirs = stats.permutation_test(
        (a, b), lambda x, y: np.mean(x) - np.mean(y), permutation_type="samples", n_resamples=4000, rng=2
    )
    ours = paired_permutation_test(a, b, num_permutations=4000)
    assert ours == paired_permutation_test(a, b, num_permutations=4000, seed=0)
    exact = num_subjects == 8
    assert ours == pytest.approx(theirs.pvalue, abs=1e-12 if exact else 0.03)


def test_permutation_test_with_a_metric_of_predictions():
    generator = np.random.default_rng(0)
    labels = np.arange(30) % 2
    good, bad = labels + generator.normal(0, 0.3, 30), generator.normal(size=30)
    p = paired_permutation_test(good, bad, lambda scores: auroc(labels, scores), num_permutations=500)
    assert p < 0.02
    assert paired_permutation_test(good, good, lambda scores: auroc(labels, scores), num_permutations=50) == 1.0
    # Drawn permutations never give 0, however large the difference.
    assert paired_permutation_test(np.ones(50), np.zeros(50), num_permutations=99) == pytest.approx(1 / 100)
    assert paired_permutation_test(np.ones((3, 2)), np.zeros((3, 2))) == pytest.approx(2 / 8)
    assert math.isnan(paired_permutation_test([np.nan, 1], [0, 1]))


def test_cases_of_a_subject_are_exchanged_together():
    # Three subjects with four identical cases each: 2 of 2^3 exchanges are as extreme, not 2 of 2^12.
    a, b = np.ones(12), np.zeros(12)
    subjects = np.repeat(["x", "y", "z"], 4)
    assert paired_permutation_test(a, b, subjects=subjects) == pytest.approx(2 / 8)
    assert paired_permutation_test(a, b) == pytest.approx(2 / 2**12)
    # Exchanging a subject exchanges the sum of its cases, wherever they stand.
    generator = np.random.default_rng(0)
    a, subjects = generator.normal(0.3, 1, 30), generator.permutation(np.repeat(list("abcdef"), 5))
    sums = np.array([a[subjects == name].sum() for name in "abcdef"])
    expected = paired_permutation_test(sums, np.zeros(6))
    assert 2 / 2**6 < expected < 1
    assert paired_permutation_test(a, np.zeros(30), subjects=subjects) == pytest.approx(expected)
    with pytest.raises(UsageError, match="subjects"):
        paired_permutation_test(a, np.zeros(30), subjects=["x"])


def test_holm_of_a_worked_example():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; the last may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.03]) == pytest.approx([0.03])
    assert len(holm([])) == 0
    # A test that could not be made does not count.
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)


def test_holm_rejects_what_the_steps_of_the_paper_reject():
    generator = np.random.default_rng(0)
    for _ in range(50):
        p = generator.uniform(0, 0.1, 6)
        rejected = np.zeros(6, bool)
        for step, index in enumerate(np.argsort(p)):
            if p[index] > 0.05 / (6 - step):
                break
            rejected[index] = True
        assert ((holm(p) <= 0.05) == rejected).all()


@pytest.mark.parametrize(
    "compute",
    [
        lambda: bootstrap_interval(np.mean, []),
        lambda: bootstrap_interval(np.mean),
        lambda: bootstrap_interval(mae, [1, 2], [1, 2, 3]),
        lambda: bootstrap_interval(np.mean, [1, 2], subjects=["a"]),
        lambda: bootstrap_interval(np.mean, [1, 2], confidence=95),
        lambda: bootstrap_interval(auroc, [1, 1], [0.1, 0.2], num_resamples=5),
        lambda: paired_permutation_test([1, 2], [1, 2, 3]),
        lambda: paired_permutation_test(np.ones((2, 1)), np.ones(2)),
        *(lambda p_values=values: holm(p_values) for values in ([0.1, 1.2], [-0.1], [[0.1]])),
    ],
)
def test_what_cannot_be_tested_is_refused_with_a_remedy(compute):
    with pytest.raises(UsageError) as refused:
        compute()
    assert refused.value.remedy
    assert "\n" not in str(refused.value)
