"""The two-sided t-test over the folds of a cross-validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from brainfound.errors import UsageError
from brainfound.evaluate.checked_values import finite_array


@dataclass(frozen=True)
class FoldTest:
    """Two systems over the same folds.

    Attributes:
        difference: mean over folds of a − b.
        low, high: its interval.
        t: the statistic, with ``num_folds − 1`` degrees of freedom.
        p: two-sided; ``nan`` where the difference is the same in all folds, and with a single fold.
        num_folds: number of folds.
    """

    difference: float
    low: float
    high: float
    t: float
    p: float
    num_folds: int


def fold_t_test(a: Any, b: Any, test_to_train: float | None = None, confidence: float = 0.95) -> FoldTest:
    """Paired two-sided t-test of two systems' scores over folds.

    The plain test, which papers report, takes the folds for independent. They are not: any two training parts of a
    k-fold cross-validation share all but 2/k of their subjects, so scores of folds differ less than those of new data
    would, the variance is too small, and p is too optimistic. The corrected test widens the variance of the mean from
    s²/k to s² (1/k + n_test/n_train). Neither can mend that folds are few: with subjects at hand,
    `paired_permutation_test` on their pooled predictions says more.

    Args:
        a, b: (k,) the score of each fold, in the same order.
        test_to_train: n_test / n_train of a fold for the corrected test: 1 / (k − 1) in a k-fold cross-validation
            without a validation part. None for the plain test.
        confidence: share of the intervals that hold the true difference.

    Raises:
        UsageError: if the scores are not of the same folds or not finite, or the ratio is negative.

    Source: C. Nadeau and Y. Bengio, "Inference for the generalization error", Machine Learning 2003, section 3.
    """
    first, second = finite_array(a, "a"), finite_array(b, "b")
    if first.ndim != 1 or first.shape != second.shape or first.size == 0:
        raise UsageError("the systems do not have the same folds", got=f"{first.shape} and {second.shape}")
    if test_to_train is not None and not (np.isfinite(test_to_train) and test_to_train >= 0):
        raise UsageError("not a ratio", where="test_to_train", got=test_to_train, expected="n_test / n_train")
    if not 0 < confidence < 1:
        raise UsageError("not a share", where="confidence", got=confidence, expected="between 0 and 1")
    differences = first - second
    num_folds, mean = len(differences), float(differences.mean())
    spread = float(differences.std(ddof=1)) if num_folds > 1 else 0.0
    # Scores that are the same but for the last digit do not vary.
    if spread <= 1e-12 * max(1.0, float(np.abs(first).max()), float(np.abs(second).max())):
        undefined = float("nan")
        return FoldTest(mean, undefined, undefined, undefined, undefined, num_folds)
    error = spread * float(np.sqrt(1 / num_folds + (test_to_train or 0.0)))
    reach = float(stats.t.ppf((1 + confidence) / 2, num_folds - 1)) * error
    t = mean / error
    p = float(2 * stats.t.sf(abs(t), num_folds - 1))
    return FoldTest(mean, mean - reach, mean + reach, t, p, num_folds)
