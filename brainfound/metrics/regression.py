"""Metrics of predicted numbers: errors, explained variance and correlation.

Each takes target and prediction ``(N,)`` and raises `UsageError` if their shapes differ, a value is not finite, or
there is nothing to score. The sums are computed here instead of in scikit-learn, whose input checks dominate in
permutation tests with thousands of calls. The results are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from brainfound.metrics.input_checks import is_constant, value_pair


def mae(target: Any, prediction: Any) -> float:
    """Mean absolute error, in the unit of the target (years for age)."""
    expected, predicted = value_pair(target, prediction)
    return float(np.abs(expected - predicted).mean())


def rmse(target: Any, prediction: Any) -> float:
    """Root of the mean squared error, in the unit of the target; large errors weigh more than in `mae`."""
    expected, predicted = value_pair(target, prediction)
    return float(np.sqrt(np.square(expected - predicted).mean()))


def r2(target: Any, prediction: Any) -> float:
    """Coefficient of determination, 1 − Σ(t − p)² / Σ(t − mean t)²; negative when worse than the mean.

    ``nan`` when the targets do not vary (fewer than two, or all the same).
    """
    expected, predicted = value_pair(target, prediction)
    spread = np.square(expected - expected.mean()).sum()
    if is_constant(expected) or spread == 0:  # squares of differences below 1e-154 are 0
        return float("nan")
    return float(1 - np.square(expected - predicted).sum() / spread)


def pearson(target: Any, prediction: Any) -> float:
    """Pearson's correlation coefficient; ``nan`` when either side does not vary."""
    expected, predicted = value_pair(target, prediction)
    if is_constant(expected) or is_constant(predicted):
        return float("nan")
    directions = []
    for values in (expected, predicted):
        centred = values - values.mean()
        largest = np.abs(centred).max()
        if largest == 0:  # the values differ by less than the precision of their mean
            return float("nan")
        # Scale by the largest first: squares of values below 1e-154 are 0.
        scaled = centred / largest
        directions.append(scaled / np.linalg.norm(scaled))
    return float(np.clip(directions[0] @ directions[1], -1.0, 1.0))


def spearman(target: Any, prediction: Any) -> float:
    """Spearman's rank correlation, ties sharing the mean of their ranks; ``nan`` when either side does not vary.

    Source: C. Spearman, "The proof and measurement of association between two things", Am J Psychol 1904.
    """
    expected, predicted = value_pair(target, prediction)
    if is_constant(expected) or is_constant(predicted):
        return float("nan")
    return float(stats.spearmanr(expected, predicted).statistic)
