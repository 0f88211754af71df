"""Metrics of a predicted number: how far off, and how much of the variation is explained.

What has no defined score (R² or a correlation where nothing varies) is ``nan``. Errors are computed here and not by
scikit-learn, whose checks cost more than the sums: a permutation test asks ten thousand times. The results are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from brainfound.metrics.values import is_constant, value_pair


def mae(target: Any, prediction: Any) -> float:
    """Mean absolute error, in the unit of the target (years for age).

    Raises:
        UsageError: if the shapes differ, a value is not finite, or there is nothing to score.
    """
    expected, predicted = value_pair(target, prediction)
    return float(np.abs(expected - predicted).mean())


def rmse(target: Any, prediction: Any) -> float:
    """Root of the mean squared error, in the unit of the target; few large errors weigh more than in `mae`.

    Raises:
        UsageError: if the shapes differ, a value is not finite, or there is nothing to score.
    """
    expected, predicted = value_pair(target, prediction)
    return float(np.sqrt(np.square(expected - predicted).mean()))


def r2(target: Any, prediction: Any) -> float:
    """Coefficient of determination, 1 − Σ(t − p)² / Σ(t − mean t)²; negative when worse than the mean.

    ``nan`` when the targets do not vary (fewer than two, or all the same).

    Raises:
        UsageError: if the shapes differ, a value is not finite, or there is nothing to score.
    """
    expected, predicted = value_pair(target, prediction)
    spread = np.square(expected - expected.mean()).sum()
    if is_constant(expected) or spread == 0:  # a spread below 1e-154 is 0 when it is squared
        return float("nan")
    return float(1 - np.square(expected - predicted).sum() / spread)


def pearson(target: Any, prediction: Any) -> float:
    """Pearson's correlation coefficient; ``nan`` when either side does not vary.

    Raises:
        UsageError: if the shapes differ, a value is not finite, or there is nothing to score.
    """
    expected, predicted = value_pair(target, prediction)
    if is_constant(expected) or is_constant(predicted):
        return float("nan")
    directions = []
    for values in (expected, predicted):
        centred = values - values.mean()
        largest = np.abs(centred).max()
        if largest == 0:  # values that differ by less than their mean can be written
            return float("nan")
        # By the largest first: the square of what is below 1e-154 is 0.
        scaled = centred / largest
        directions.append(scaled / np.linalg.norm(scaled))
    return float(np.clip(directions[0] @ directions[1], -1.0, 1.0))


def spearman(target: Any, prediction: Any) -> float:
    """Spearman's rank correlation, ties sharing the mean of their ranks; ``nan`` when either side does not vary.

    Raises:
        UsageError: if the shapes differ, a value is not finite, or there is nothing to score.

    Source: C. Spearman, "The proof and measurement of association between two things", Am J Psychol 1904.
    """
    expected, predicted = value_pair(target, prediction)
    if is_constant(expected) or is_constant(predicted):
        return float("nan")
    return float(stats.spearmanr(expected, predicted).statistic)
