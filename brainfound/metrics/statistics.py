"""Uncertainty of scores and of differences between systems.

Bootstrap intervals and permutation tests resample subjects, not slices or sessions: sessions of one subject are not
independent. DeLong's interval and test are closed forms for AUROC, for one case per subject. `fold_t_test` compares
scores of folds.

An AUROC is a mean over pairs of a positive and a negative. The mean of a case over its pairs is its structural
component, and the variance of the components gives that of the area. Source: E. R. DeLong, D. M. DeLong and D. L.
Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating characteristic curves", Biometrics
1988; components from mid-ranks: X. Sun and W. Xu, "Fast implementation of DeLong's algorithm", IEEE Signal Process Lett
2014.

Axes: N cases, m positives, n negatives, k folds, M tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from brainfound.errors import UsageError
from brainfound.metrics.classification import one_vs_rest
from brainfound.metrics.input_checks import finite_array, is_constant

Metric = Callable[..., float]
CONFIDENCE, NUM_RESAMPLES = 0.95, 2000
"""Of every bootstrap interval, unless a caller gives others."""
_LEAST_SUBJECTS = 10


@dataclass(frozen=True)
class Interval:
    """A score with its interval.

    The ends are ``nan`` where the cases cannot give an interval. `num_undefined` counts the resamples without a score
    (a resample of one class has no AUROC), which are left out. A closed form has no resamples.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    num_resamples: int
    num_undefined: int
    num_subjects: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.estimate:.3f}"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def least_subjects(confidence: float = CONFIDENCE) -> int:
    """The least number of subjects for a bootstrap interval: 10, more only above 99.8%.

    Percentile intervals of fewer are far too narrow. The resampled means of n subjects lie between the lowest and the
    highest of them, which enclose the centre of a symmetric distribution with the probability 1 − 2^(1 − n) at most.

    Source: H. A. David and H. N. Nagaraja, "Order Statistics" (2003), section 7.1.
    """
    return max(_LEAST_SUBJECTS, math.ceil(1 - math.log2(1 - confidence) - 1e-9))


def explain_missing_interval(num_subjects: int, confidence: float = CONFIDENCE) -> str:
    """Why a defined score has no bootstrap interval, in one sentence."""
    least = least_subjects(confidence)
    if num_subjects < least:
        subjects = f"{num_subjects} subject{'' if num_subjects == 1 else 's'}"
        return f"no {100 * confidence:.3g}% interval of {subjects}: it needs {least} or more"
    return "no interval where many resamples leave the score undefined"


def bootstrap_interval(
    metric: Metric,
    *values: Any,
    subjects: Any = None,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of ``metric(*values)``, as in ``bootstrap_interval(auroc, labels, scores)``.

    The same values give the same interval, whatever the order of the cases and the names of the subjects. The ends are
    ``nan`` with fewer than `least_subjects`, or where more than 1 − confidence of the resamples have no score, more
    than lie beyond the ends.

    Args:
        values: (N, …) arrays.
        subjects: (N,) the subject of each case; its cases are drawn together. Default: one case per subject.

    Raises:
        UsageError: there are no cases, the lengths differ, or no resample has a score.

    Source: B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    if not 0 < confidence < 1 or num_resamples < 1:
        got, remedy = (
            f"confidence {confidence}, {num_resamples} resamples",
            "Give a confidence of 0.95 and 1000 resamples",
        )
        raise UsageError("invalid settings of the bootstrap", got=got, remedy=remedy)
    arrays = _aligned(values)
    owner, by_subject = _number_subjects(subjects, arrays)
    groups = np.split(by_subject, np.cumsum(np.bincount(owner))[:-1])
    generator = np.random.default_rng(seed)
    resampled = np.empty(num_resamples)
    for i in range(num_resamples):
        drawn = generator.integers(len(groups), size=len(groups))
        # With one case per subject, as is usual, skip the concatenation, which would take most of the time.
        single = len(groups) == len(owner)
        cases = by_subject[drawn] if single else np.concatenate([groups[g] for g in drawn])
        resampled[i] = metric(*(array[cases] for array in arrays))
    defined = resampled[~np.isnan(resampled)]
    if defined.size == 0:
        got, remedy = f"{len(groups)} subjects", "Give more subjects, of every class"
        raise UsageError("the metric is undefined on every resample", got=got, remedy=remedy)
    tail = (1 - confidence) / 2
    num_undefined = num_resamples - defined.size
    low, high = np.quantile(defined, [tail, 1 - tail])
    if len(groups) < least_subjects(confidence) or num_undefined > (1 - confidence) * num_resamples:
        low = high = np.nan
    ends = float(low), float(high)
    return Interval(float(metric(*arrays)), *ends, confidence, num_resamples, num_undefined, len(groups))


def paired_permutation_test(
    a: Any, b: Any, metric: Metric = np.mean, num_permutations: int = 10_000, seed: int = 0, subjects: Any = None
) -> float:
    """Two-sided p value of ``metric(a) − metric(b)`` for two systems scored on the same subjects, in (0, 1].

    Under the null hypothesis the systems are exchangeable within each subject. If there are at most `num_permutations`
    exchanges, all are enumerated and p is exact; otherwise they are drawn, and p is (hits + 1) / (drawn + 1), never 0.
    p is ``nan`` where the metric of a system is undefined.

    Args:
        a, b: (N, …) the values of the systems, one row per case: scores such as Dice, or predictions with a metric that
            holds the labels, ``lambda scores: auroc(labels, scores)``.
        subjects: (N,) the subject of each case; exchanged together. Default: one case per subject.

    Raises:
        UsageError: the shapes differ, there are no cases, or subjects do not fit them.

    Source: B. Phipson and G. K. Smyth, "Permutation P-values should never be zero", Stat Appl Genet Mol Biol 2010.
    """
    first, second = _aligned((a, b))
    if first.shape != second.shape:
        got, remedy = f"{first.shape} and {second.shape}", "Give the same cases of both, in the same order"
        raise UsageError("the two systems differ in shape", got=got, remedy=remedy)
    observed = abs(metric(first) - metric(second))
    if np.isnan(observed):
        return float("nan")
    owner, _ = _number_subjects(subjects, [first, second])
    num_subjects = int(owner.max()) + 1
    exact = num_subjects < 63 and 2**num_subjects <= num_permutations
    if exact:
        exchanges = (np.array(bits) for bits in itertools.product((False, True), repeat=num_subjects))
    else:
        generator = np.random.default_rng(seed)
        exchanges = (generator.random(num_subjects) < 0.5 for _ in range(num_permutations))
    # Differences that are equal except for the order of summation must count as equal.
    at_least = observed - 1e-12 * max(1.0, observed)
    hits = 0
    for exchange in exchanges:
        swap = exchange[owner].reshape(-1, *[1] * (first.ndim - 1))
        difference = metric(np.where(swap, second, first)) - metric(np.where(swap, first, second))
        hits += abs(difference) >= at_least
    return hits / 2**num_subjects if exact else (hits + 1) / (num_permutations + 1)


def holm(p_values: Any) -> np.ndarray:
    """Holm's correction of p values (M,) for their number; controls the family-wise error rate without independence.

    The smallest is multiplied by M, the next by M − 1, and so on; none is smaller than the one before it, and none
    above 1. A ``nan``, an undefined test, stays and is not counted in M. Raises `UsageError` for a value outside of
    0–1.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand J Stat 1979.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1 or ((given < 0) | (given > 1)).any():
        got, remedy = given.tolist(), "Give one p value of each test; NaN for an undefined one"
        raise UsageError("not p values", where="p_values", got=got, expected="a list of numbers 0 to 1", remedy=remedy)
    tests = np.flatnonzero(~np.isnan(given))
    order = tests[np.argsort(given[tests], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted = np.full_like(given, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1.0)
    return adjusted


def _aligned(values: tuple[Any, ...]) -> list[np.ndarray]:
    arrays = [np.asarray(value) for value in values]
    if not arrays or any(array.ndim == 0 for array in arrays):
        remedy = "Give one array or more"
        raise UsageError("no cases were given", expected="arrays with one row per case", remedy=remedy)
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or 0 in lengths:
        got, remedy = [len(array) for array in arrays], "Give one row per case in each array"
        raise UsageError("the arrays do not have the same cases", got=got, remedy=remedy)
    return arrays


def _bad_confidence(confidence: float) -> UsageError:
    remedy = "Give a confidence such as 0.95"
    return UsageError("not a share", where="confidence", got=confidence, expected="between 0 and 1", remedy=remedy)


def _number_subjects(subjects: Any, arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The number of the subject of each case (N,), and the cases ordered by it (N,).

    Subjects are numbered by their values, the highest first, so that neither their names nor the order of the rows
    changes a resample.
    """
    num_cases = len(arrays[0])
    names = np.arange(num_cases) if subjects is None else np.asarray(subjects)
    if names.shape != (num_cases,):
        got, expected, remedy = names.shape, (num_cases,), "Give one subject per case"
        raise UsageError("subjects do not fit the cases", where="subjects", got=got, expected=expected, remedy=remedy)
    columns = [column for array in arrays for column in array.reshape(num_cases, -1).T]
    plain = [column.astype(str) if column.dtype == object else column for column in columns]
    codes = np.stack([np.zeros(num_cases, int), *(np.unique(own, return_inverse=True)[1] for own in plain)], axis=1)
    ranks = np.unique(codes, axis=0, return_inverse=True)[1].reshape(num_cases)
    owner = np.unique(names, return_inverse=True)[1]
    by_subject = np.lexsort((ranks, owner))
    values = [tuple(own) for own in np.split(ranks[by_subject], np.cumsum(np.bincount(owner))[:-1])]
    numbers = np.empty(len(values), dtype=np.intp)
    numbers[sorted(range(len(values)), key=values.__getitem__, reverse=True)] = np.arange(len(values))
    owner = numbers[owner]
    return owner, np.lexsort((ranks, owner))


@dataclass(frozen=True)
class DelongTest:
    """Two AUROCs on the same cases, with the difference a − b and its standard error."""

    auroc_a: float
    auroc_b: float
    difference: float
    standard_error: float
    p: float
    """1 for equal rankings, ``nan`` where no variance can be computed."""


def delong_interval(labels: Any, scores: Any, confidence: float = CONFIDENCE) -> Interval:
    """AUROC with its normal interval by DeLong, clipped to 0–1; arguments as `delong_test`.

    Perfect separation has variance 0 and thus width 0: a sign of few cases, not of certainty. The ends are ``nan`` with
    fewer than two cases of a class.
    """
    if not 0 < confidence < 1:
        raise _bad_confidence(confidence)
    areas, covariance = _areas_and_covariance(labels, [scores])
    reach = float(stats.norm.ppf((1 + confidence) / 2) * np.sqrt(covariance[0, 0]))
    low, high = np.clip([areas[0] - reach, areas[0] + reach], 0, 1).tolist()
    return Interval(float(areas[0]), low, high, confidence, 0, 0, len(np.asarray(labels)))


def delong_test(labels: Any, a: Any, b: Any) -> DelongTest:
    """Two-sided test of equal AUROC for two systems that scored the same cases.

    Labels are (N,) 0 or 1; a and b (N,) scores of class 1, or (N, 2), and need not share a scale. Raises `UsageError`
    as `auroc`, or for more than two classes.
    """
    areas, covariance = _areas_and_covariance(labels, [a, b])
    difference = float(areas[0] - areas[1])
    # Rounding must not make the variance of the difference negative.
    variance = max(float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]), 0.0)
    error = float("nan") if np.isnan(covariance).any() else float(np.sqrt(variance))
    if np.isnan(error) or error < 1e-9:
        p = 1.0 if error < 1e-9 and abs(difference) < 1e-9 else float("nan")
    else:
        p = float(2 * stats.norm.sf(abs(difference) / error))
    return DelongTest(float(areas[0]), float(areas[1]), difference, error, p)


def _areas_and_covariance(labels: Any, systems: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Areas of the systems and their covariance matrix, which is nan with fewer than two cases of a class."""
    of_positives, of_negatives, areas = [], [], []
    for scores in systems:
        of_classes = one_vs_rest(labels, scores)
        if len(of_classes) != 1:
            got, remedy = f"{len(of_classes)} classes", "Compare other metrics by bootstrap, or one class with the rest"
            raise UsageError("DeLong's test needs two classes", where="scores", got=got, remedy=remedy)
        positive, values = of_classes[0]
        if is_constant(positive):
            nothing = np.full((len(systems), len(systems)), np.nan)
            return nothing[0], nothing
        m, n = int(positive.sum()), int((~positive).sum())
        among_all = stats.rankdata(values)
        # The number of cases of the other class below a case, ties as one half: its rank among all − in its class.
        of_positives.append((among_all[positive] - stats.rankdata(values[positive])) / n)
        of_negatives.append(1 - (among_all[~positive] - stats.rankdata(values[~positive])) / m)
        areas.append(of_positives[-1].mean())
    if m < 2 or n < 2:
        return np.array(areas), np.full((len(systems), len(systems)), np.nan)
    return np.array(areas), np.atleast_2d(np.cov(of_positives)) / m + np.atleast_2d(np.cov(of_negatives)) / n


@dataclass(frozen=True)
class FoldTest:
    """The mean over folds of a − b, with its interval and t-test."""

    difference: float
    low: float
    high: float
    t: float
    p: float
    """``nan`` with a single fold, or where the difference does not vary."""
    num_folds: int


def fold_t_test(a: Any, b: Any, test_to_train: float | None = None, confidence: float = CONFIDENCE) -> FoldTest:
    """Paired two-sided t-test of the scores of two systems over folds.

    The plain test assumes independent folds. The training parts of a cross-validation overlap, so its variance is too
    small and p too optimistic. The corrected test widens the variance of the mean from s²/k to s² (1/k +
    n_test/n_train). With subjects at hand, prefer `paired_permutation_test` on pooled predictions.

    Args:
        a, b: (k,) the score of each fold, in the same order.
        test_to_train: n_test / n_train of a fold for the corrected test: 1 / (k − 1) in a k-fold cross-validation
            without a validation part. None: the plain test.

    Raises:
        UsageError: the folds differ in number, a score is not finite, or the ratio is negative.

    Source: C. Nadeau and Y. Bengio, "Inference for the generalization error", Machine Learning 2003, section 3.
    """
    first, second = finite_array(a, "a"), finite_array(b, "b")
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        got, remedy = f"{first.shape} and {second.shape}", "Give one score per fold of both, in the same order"
        raise UsageError("the systems do not have the same folds", got=got, remedy=remedy)
    if test_to_train is not None and not (np.isfinite(test_to_train) and test_to_train >= 0):
        expected, remedy = "n_test / n_train", "Give a number of at least 0, or leave it out"
        raise UsageError("not a ratio", where="test_to_train", got=test_to_train, expected=expected, remedy=remedy)
    if not 0 < confidence < 1:
        raise _bad_confidence(confidence)
    differences = first - second
    num_folds, mean = len(differences), float(differences.mean())
    spread = float(differences.std(ddof=1)) if num_folds > 1 else 0.0
    # Differences within rounding do not vary.
    if spread <= 1e-12 * max(1.0, float(np.abs(first).max()), float(np.abs(second).max())):
        undefined = float("nan")
        return FoldTest(mean, undefined, undefined, undefined, undefined, num_folds)
    error = spread * float(np.sqrt(1 / num_folds + (test_to_train or 0.0)))
    reach = float(stats.t.ppf((1 + confidence) / 2, num_folds - 1)) * error
    p = float(2 * stats.t.sf(abs(mean / error), num_folds - 1))
    return FoldTest(mean, mean - reach, mean + reach, mean / error, p, num_folds)
