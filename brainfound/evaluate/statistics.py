"""Uncertainty of a score and of a difference, over subjects.

Subjects, not slices or sessions, are what is drawn: sessions of one subject are not independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from brainfound.errors import UsageError

Metric = Callable[..., float]


@dataclass(frozen=True)
class Interval:
    """A score with its interval.

    `num_undefined` counts the resamples on which the metric was ``nan`` (a resample of one class has no
    AUROC); they are left out, and a large share of them means that the interval says little. An interval by a
    formula (`brainfound.evaluate.delong`) has no resamples.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    num_resamples: int
    num_undefined: int

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(
    metric: Metric,
    *values: Any,
    subjects: Any = None,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of ``metric(*values)``.

    Args:
        metric: takes the arrays in the order given and returns a number: ``bootstrap_interval(np.mean, dices)``,
            ``bootstrap_interval(auroc, labels, scores)``.
        values: arrays with the cases on their first axis, all of the same length.
        subjects: (N,) the subject of each case; the cases of a subject are drawn together. By default every
            case is a subject.
        num_resamples: number of resamples.
        confidence: share of the resamples inside the interval.
        seed: seed of the drawing; the same seed gives the same interval.

    Raises:
        UsageError: if there are no cases, the lengths differ, or no resample has a defined score.

    Source: B. Efron and R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    if not 0 < confidence < 1 or num_resamples < 1:
        raise UsageError("the bootstrap cannot be run so", got=f"confidence {confidence}, {num_resamples} resamples")
    arrays = _aligned(values)
    groups = _cases_by_subject(subjects, len(arrays[0]))
    generator = np.random.default_rng(seed)
    resampled = np.empty(num_resamples)
    single = np.concatenate(groups) if len(groups) == len(arrays[0]) else None
    for i in range(num_resamples):
        drawn = generator.integers(len(groups), size=len(groups))
        cases = np.concatenate([groups[g] for g in drawn]) if single is None else single[drawn]
        resampled[i] = metric(*(array[cases] for array in arrays))
    defined = resampled[~np.isnan(resampled)]
    if defined.size == 0:
        raise UsageError("the metric is undefined on every resample", got=f"{len(groups)} subjects")
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(
        estimate=float(metric(*arrays)),
        low=float(low),
        high=float(high),
        confidence=confidence,
        num_resamples=num_resamples,
        num_undefined=num_resamples - defined.size,
    )


def paired_permutation_test(
    a: Any, b: Any, metric: Metric = np.mean, num_permutations: int = 10_000, seed: int = 0, subjects: Any = None
) -> float:
    """Two-sided p value of ``metric(a) − metric(b)`` for two systems scored on the same subjects.

    Under the null hypothesis the two systems may be exchanged within any subject. With 2^N at most
    `num_permutations` all exchanges are counted and p is exact; otherwise they are drawn, and p is
    (hits + 1) / (drawn + 1), which is never 0.

    Args:
        a: (N, …) the first system's values, one row per case: scores such as Dice, or predictions with a
            metric that knows the labels, ``lambda scores: auroc(labels, scores)``.
        b: the second system's values, in the same order.
        metric: takes such an array and returns a number.
        num_permutations: number of exchanges drawn when there are too many to count.
        seed: seed of the drawing.
        subjects: (N,) the subject of each case; the cases of a subject are exchanged together. By default every
            case is a subject.

    Returns:
        p in (0, 1]; ``nan`` when the metric is undefined for one of the systems.

    Raises:
        UsageError: if the shapes differ, there are no cases, or subjects do not fit them.

    Source: B. Phipson and G. K. Smyth, "Permutation P-values should never be zero", Stat Appl Genet Mol Biol 2010.
    """
    first, second = _aligned((a, b))
    if first.shape != second.shape:
        raise UsageError("the two systems differ in shape", got=f"{first.shape} and {second.shape}")
    observed = abs(metric(first) - metric(second))
    if np.isnan(observed):
        return float("nan")
    groups = _cases_by_subject(subjects, len(first))
    of_case = np.empty(len(first), dtype=int)
    for subject, cases in enumerate(groups):
        of_case[cases] = subject
    num_subjects = len(groups)
    exact = num_subjects < 63 and 2**num_subjects <= num_permutations
    if exact:
        exchanges = (np.array(bits) for bits in itertools.product((False, True), repeat=num_subjects))
        total = 2**num_subjects
    else:
        generator = np.random.default_rng(seed)
        exchanges = (generator.random(num_subjects) < 0.5 for _ in range(num_permutations))
        total = num_permutations
    # Differences that are equal but for the order of summation must count as equal.
    at_least = observed - 1e-12 * max(1.0, observed)
    hits = 0
    for exchange in exchanges:
        swap = exchange[of_case].reshape(-1, *[1] * (first.ndim - 1))
        difference = metric(np.where(swap, second, first)) - metric(np.where(swap, first, second))
        hits += abs(difference) >= at_least
    return hits / total if exact else (hits + 1) / (total + 1)


def holm(p_values: Any) -> np.ndarray:
    """p values adjusted for their number: those at most α after it are significant, all of them together at level α.

    The smallest is multiplied by their number M, the next by M − 1, and so on; none falls below one before it. No
    independence is assumed, and nothing is given away against Bonferroni.

    Args:
        p_values: (M,); ``nan`` stands for a test that could not be made, stays, and does not count in M.

    Returns:
        (M,) adjusted p values, at most 1, in the order given.

    Raises:
        UsageError: if they are not p values.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand J Stat 1979.
    """
    given = np.asarray(p_values, dtype=np.float64)
    if given.ndim != 1 or ((given < 0) | (given > 1)).any():
        raise UsageError("not p values", where="p_values", got=given.tolist(), expected="a list of numbers 0 to 1")
    tests = np.flatnonzero(~np.isnan(given))
    order = tests[np.argsort(given[tests], kind="stable")]
    factors = len(order) - np.arange(len(order))
    adjusted = np.full_like(given, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(given[order] * factors), 1.0)
    return adjusted


def _aligned(values: tuple[Any, ...]) -> list[np.ndarray]:
    arrays = [np.asarray(value) for value in values]
    if not arrays or any(array.ndim == 0 for array in arrays):
        raise UsageError("no cases were given", expected="arrays with one row per case")
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError("the arrays do not have the same cases", got=[len(array) for array in arrays])
    return arrays


def _cases_by_subject(subjects: Any, num_cases: int) -> list[np.ndarray]:
    if subjects is None:
        return [np.array([i]) for i in range(num_cases)]
    names = np.asarray(subjects)
    if names.shape != (num_cases,):
        raise UsageError("subjects do not fit the cases", where="subjects", got=names.shape, expected=(num_cases,))
    _, of_case = np.unique(names, return_inverse=True)
    return [np.flatnonzero(of_case == group) for group in range(of_case.max() + 1)]
