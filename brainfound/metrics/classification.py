"""Metrics of predicted classes and of class scores.

Each raises `UsageError` if the lengths differ, a value is invalid, or there is nothing to score; an undefined score,
such as AUROC of a single class, is ``nan``. The counting is done here instead of in scikit-learn, whose input checks
dominate in permutation tests with thousands of calls. The results are equal except where a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from brainfound.errors import UsageError
from brainfound.metrics.input_checks import finite_array, is_constant, label_pair

# 1 − 0.9 is not exact: a tenth of 20 negatives must be 2, not 1.9999999999999996.
_COUNT_SLACK = 1e-9


def auroc(labels: Any, scores: Any) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative; a tie counts one half.

    Args:
        labels: (N,) 0 or 1; with K > 2 classes, 0 … K−1.
        scores: (N,) scores of class 1, larger is more positive; or (N, K). K = 2 uses the second column, K > 2 takes
            the one-vs-rest mean over the classes that occur.

    Source: J. A. Hanley and B. J. McNeil, Radiology 1982.
    """
    return _mean_over_classes(_binary_auroc, labels, scores)


def auprc(labels: Any, scores: Any) -> float:
    """Average precision, the area under the precision-recall curve as a sum of steps; arguments as in `auroc`.

    Σ (Rᵢ − Rᵢ₋₁) Pᵢ over falling thresholds, without interpolation, which is optimistic. Scores without information
    reach the share of positives, not one half: report that share with the result. A single class gives ``nan``, where
    scikit-learn gives 0 or 1.

    Source: J. Davis and M. Goadrich, "The relationship between precision-recall and ROC curves", ICML 2006.
    """
    return _mean_over_classes(_binary_auprc, labels, scores)


def log_loss(labels: Any, probabilities: Any) -> float:
    """Mean negative log probability of the true class, in nats: 0 for certain and right, ln K for a guess.

    Args:
        labels: (N,) 0 … K−1.
        probabilities: (N, K), at least the smallest step of float32 in the logarithm, so that one certain error counts
            no more than about 16.

    A proper scoring rule: no other answers than the true probabilities have a smaller expectation.
    """
    truth, shares = np.asarray(labels), finite_array(probabilities, "probabilities")
    if shares.ndim != 2 or truth.shape != shares.shape[:1] or not truth.size:
        got = f"{truth.shape} and {shares.shape}"
        raise UsageError("labels and probabilities do not fit", got=got, expected="(N,) and (N, K)")
    if not np.isin(truth, np.arange(shares.shape[1])).all():
        raise UsageError("not a class", where="labels", got=np.unique(truth)[:8].tolist(), expected="0 … K−1")
    of_truth = np.take_along_axis(shares, truth.astype(int)[:, None], axis=1)
    return float(-np.log(np.clip(of_truth, np.finfo(np.float32).eps, 1.0)).mean())


def sensitivity_at_specificity(labels: Any, scores: Any, specificity: float = 0.9) -> float:
    """The highest sensitivity of any threshold with at least this specificity, without interpolation.

    The threshold is chosen on the cases that it is scored on, so the value is optimistic on few cases. Two classes
    only: scores are (N,) or (N, 2).
    """
    if not 0 <= specificity <= 1:
        raise UsageError("not a share", where="specificity", got=specificity, expected="0 to 1")
    of_classes = one_vs_rest(labels, scores)
    if len(of_classes) != 1:
        raise UsageError("sensitivity needs two classes", where="scores", got=f"{len(of_classes)} classes")
    positive, scores = of_classes[0]
    if is_constant(positive):
        return float("nan")
    negatives = np.sort(scores[~positive])[::-1]
    num_allowed = int((1 - specificity) * len(negatives) + _COUNT_SLACK)
    if num_allowed >= len(negatives):
        return 1.0
    # No more than the allowed number of negatives score above this one.
    return float((scores[positive] > negatives[num_allowed]).mean())


def balanced_accuracy(labels: Any, predictions: Any) -> float:
    """Mean recall over the classes that occur in `labels`; both (N,), numbers or text."""
    confusion, _ = _confusion(labels, predictions)
    sizes = confusion.sum(axis=1)
    return float((confusion.diagonal()[sizes > 0] / sizes[sizes > 0]).mean())


def f1(labels: Any, predictions: Any, positive: Any = 1) -> float:
    """F1 of one class, 2 TP / (2 TP + FP + FN): the harmonic mean of its precision and its sensitivity.

    Labels and predictions are (N,), numbers or text; ``nan`` when the class neither occurs nor is predicted.
    """
    expected, predicted = (values == positive for values in label_pair(labels, predictions))
    num_named = int(expected.sum()) + int(predicted.sum())
    if num_named == 0:
        return float("nan")
    return 2 * int((expected & predicted).sum()) / num_named


def macro_f1(labels: Any, predictions: Any) -> float:
    """Mean of `f1` over all classes that occur or are predicted, each counting the same."""
    confusion, _ = _confusion(labels, predictions)
    return float((2 * confusion.diagonal() / (confusion.sum(axis=0) + confusion.sum(axis=1))).mean())


def mcc(labels: Any, predictions: Any) -> float:
    """Matthews' correlation coefficient, for K classes Gorodkin's R_K; 1 is perfect, 0 is chance.

    0 for constant predictions, as in scikit-learn; ``nan`` for constant labels, where scikit-learn gives 0.

    Source: J. Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.
    """
    confusion, num_cases = _confusion(labels, predictions)
    occur, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    spread_labels = num_cases**2 - int(occur @ occur)
    spread_predictions = num_cases**2 - int(predicted @ predicted)
    if spread_labels == 0:
        return float("nan")
    if spread_predictions == 0:
        return 0.0
    covariance = num_cases * int(confusion.trace()) - int(occur @ predicted)
    return covariance / float(np.sqrt(float(spread_labels) * float(spread_predictions)))


def _confusion(labels: Any, predictions: Any) -> tuple[np.ndarray, int]:
    """Counts (K, K) of true by predicted class, over the classes that occur in either; and the number of cases."""
    expected, predicted = label_pair(labels, predictions)
    classes, index = np.unique(np.concatenate([expected, predicted]), return_inverse=True)
    cells = index[: len(expected)] * len(classes) + index[len(expected) :]
    counts = np.bincount(cells, minlength=len(classes) ** 2)
    return counts.reshape(len(classes), len(classes)), len(expected)


def one_vs_rest(labels: Any, scores: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positive cases and scores: of class 1 only if there are two classes, else of each; arguments as in `auroc`."""
    scores = finite_array(scores, "scores")
    if scores.ndim not in (1, 2):
        raise UsageError("scores have too many axes", where="scores", got=scores.shape, expected="(N,) or (N, K)")
    labels = finite_array(labels, "labels")
    num_classes = 2 if scores.ndim == 1 else scores.shape[1]
    if labels.ndim != 1 or len(labels) != len(scores) or len(labels) == 0:
        got = f"{labels.shape} and {scores.shape}"
        raise UsageError("labels and scores do not fit", got=got, expected="(N,) and (N,)")
    if not np.isin(labels, np.arange(num_classes)).all():
        known = f"whole numbers 0 to {num_classes - 1}"
        raise UsageError("unknown class label", where="labels", got=np.unique(labels)[:8].tolist(), expected=known)
    if scores.ndim == 1:
        return [(labels == 1, scores)]
    return [(labels == k, scores[:, k]) for k in ((1,) if num_classes == 2 else range(num_classes))]


def _mean_over_classes(metric: Callable[[np.ndarray, np.ndarray], float], labels: Any, scores: Any) -> float:
    defined = [metric(positive, own) for positive, own in one_vs_rest(labels, scores) if not is_constant(positive)]
    return float(np.mean(defined)) if defined else float("nan")


def _binary_auroc(positive: np.ndarray, scores: np.ndarray) -> float:
    # The rank form of the Mann-Whitney statistic: mid-ranks give a tie one half.
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    rank_sum = stats.rankdata(scores)[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def _binary_auprc(positive: np.ndarray, scores: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    falling = scores[order]
    # Equal scores share a threshold: the last position of each run of equal scores.
    thresholds = np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(falling) - 1)
    num_found = positive[order].cumsum()[thresholds]
    precision = num_found / (thresholds + 1)
    return float((np.diff(num_found, prepend=0) * precision).sum() / num_found[-1])
