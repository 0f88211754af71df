"""DeLong's test: the uncertainty of an AUROC, and of a difference of two on the same cases, by a formula.

Axes: m positives, n negatives.

An AUROC is a mean over pairs of a positive and a negative; each case's own mean over its pairs is its structural
component, and the variance of the components is that of the area. Cases must be independent: one per subject. With
several sessions of a subject use `bootstrap_interval` and `paired_permutation_test` with ``subjects``.

Source: E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson, "Comparing the areas under two or more correlated receiver
operating characteristic curves", Biometrics 1988; components from mid-ranks: X. Sun and W. Xu, "Fast implementation of
DeLong's algorithm", IEEE Signal Process Lett 2014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from brainfound.errors import UsageError
from brainfound.evaluate.checked_values import is_constant
from brainfound.evaluate.classification_metrics import one_against_the_rest
from brainfound.evaluate.statistics import Interval


@dataclass(frozen=True)
class DelongTest:
    """Two AUROCs on the same cases.

    Attributes:
        auroc_a, auroc_b: the two areas.
        difference: a − b.
        standard_error: of the difference.
        p: two-sided; 1 for equal rankings, ``nan`` where no variance can be computed.
    """

    auroc_a: float
    auroc_b: float
    difference: float
    standard_error: float
    p: float


def delong_interval(labels: Any, scores: Any, confidence: float = 0.95) -> Interval:
    """AUROC with its normal interval, cut to 0–1.

    Where the classes are told apart without an error the variance is 0 and so is the width: that says that there are
    few cases, not that the area is certain.

    Args:
        labels: (N,) 0 or 1.
        scores: (N,) scores of class 1, or (N, 2).
        confidence: share of the intervals that hold the true area.

    Returns:
        The interval; its ends are ``nan`` with fewer than two cases of a class.

    Raises:
        UsageError: as `auroc`, and if there are more than two classes or the confidence is no share.
    """
    if not 0 < confidence < 1:
        raise UsageError("not a share", where="confidence", got=confidence, expected="between 0 and 1")
    areas, covariance = _areas_and_covariance(labels, [scores])
    reach = float(stats.norm.ppf((1 + confidence) / 2) * np.sqrt(covariance[0, 0]))
    area = float(areas[0])
    low, high = float(np.clip(area - reach, 0, 1)), float(np.clip(area + reach, 0, 1))
    return Interval(area, low, high, confidence, num_resamples=0, num_undefined=0)


def delong_test(labels: Any, a: Any, b: Any) -> DelongTest:
    """Two-sided test of equal AUROC for two systems that scored the same cases.

    Args:
        labels: (N,) 0 or 1.
        a, b: (N,) scores of class 1, or (N, 2); the two systems need not share a scale.

    Raises:
        UsageError: as `auroc`, and if there are more than two classes.
    """
    areas, covariance = _areas_and_covariance(labels, [a, b])
    difference = float(areas[0] - areas[1])
    # The variance is one of differences, component by component; a rounding error must not make it negative.
    variance = max(float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]), 0.0)
    error = float("nan") if np.isnan(covariance).any() else float(np.sqrt(variance))
    if np.isnan(error) or error < 1e-9:
        p = 1.0 if error < 1e-9 and abs(difference) < 1e-9 else float("nan")
    else:
        p = float(2 * stats.norm.sf(abs(difference) / error))
    return DelongTest(float(areas[0]), float(areas[1]), difference, error, p)


def _areas_and_covariance(labels: Any, systems: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The areas of the systems, and their covariance matrix; nan with fewer than two cases of a class."""
    of_positives, of_negatives, areas = [], [], []
    for scores in systems:
        of_classes = one_against_the_rest(labels, scores)
        if len(of_classes) != 1:
            raise UsageError("DeLong's test is of two classes", where="scores", got=f"{len(of_classes)} classes")
        positive, values = of_classes[0]
        if is_constant(positive):
            nothing = np.full((len(systems), len(systems)), np.nan)
            return nothing[0], nothing
        m, n = int(positive.sum()), int((~positive).sum())
        among_all = stats.rankdata(values)
        # How many of the other class a case is above, a tie counting one half: its rank among all less that in its own.
        of_positives.append((among_all[positive] - stats.rankdata(values[positive])) / n)
        of_negatives.append(1 - (among_all[~positive] - stats.rankdata(values[~positive])) / m)
        areas.append(of_positives[-1].mean())
    if m < 2 or n < 2:
        return np.array(areas), np.full((len(systems), len(systems)), np.nan)
    return np.array(areas), np.atleast_2d(np.cov(of_positives)) / m + np.atleast_2d(np.cov(of_negatives)) / n
