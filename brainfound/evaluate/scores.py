"""The scores of a task, always beside those of a trivial baseline.

A trivial baseline knows the training labels and never looks at an image: the most frequent class, the mean
of the target, everything inside the head a lesion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brainfound.evaluate.metrics import auroc, balanced_accuracy, dice, mae, pearson, r2

HEADLINE = {"classification": "auroc", "regression": "mae", "segmentation": "dice"}
"""The metric by which a task is judged."""

HIGHER_IS_BETTER = {"auroc": True, "balanced_accuracy": True, "mae": False, "r2": True, "pearson": True, "dice": True}


def classification_scores(labels: Sequence[int], probabilities: np.ndarray) -> dict[str, float]:
    """AUROC (for more than two classes the mean of one against the rest) and balanced accuracy.

    Args:
        labels: ``(n,)`` class indices.
        probabilities: ``(n, K)``.
    """
    truth = np.asarray(labels)
    if probabilities.shape[1] == 2:
        area = auroc(truth == 1, probabilities[:, 1])
    else:
        areas = [auroc(truth == k, probabilities[:, k]) for k in np.unique(truth)]
        area = float(np.mean(areas)) if areas else float("nan")
    return {"auroc": area, "balanced_accuracy": balanced_accuracy(truth, probabilities.argmax(axis=1))}


def regression_scores(target: Sequence[float], prediction: Sequence[float]) -> dict[str, float]:
    """Mean absolute error in the unit of the target, R², Pearson's r."""
    return {"mae": mae(target, prediction), "r2": r2(target, prediction), "pearson": pearson(target, prediction)}


def segmentation_scores(references: Sequence[np.ndarray], predictions: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean Dice over the cases that have the structure; several classes are averaged within a case.

    Also the share of cases without any structure in which nothing was marked.

    Args:
        references, predictions: class indices ``(S, H, W)`` per case, 0 for background.
    """
    overlaps, clean = [], []
    for reference, prediction in zip(references, predictions, strict=True):
        present = [k for k in np.unique(reference) if k != 0]
        if present:
            overlaps.append(np.mean([dice(prediction == k, reference == k) for k in present]))
        else:
            clean.append(not np.any(prediction))
    scores = {"dice": float(np.mean(overlaps)) if overlaps else float("nan")}
    if clean:
        scores["clean_negatives"] = float(np.mean(clean))
    return scores


def trivial_scores(
    task: str, train: Sequence[Any], test: Sequence[Any], heads: Sequence[np.ndarray] = ()
) -> dict[str, float]:
    """The scores of the trivial baseline.

    Args:
        task: classification, regression or segmentation.
        train: labels of the training part (unused for segmentation).
        test: labels of the test part; for segmentation the reference masks.
        heads: for segmentation, the foreground of each test case.
    """
    if task == "classification":
        num_classes = int(max([*train, *test])) + 1
        shares = np.bincount(np.asarray(train, dtype=int), minlength=num_classes) / max(len(train), 1)
        return classification_scores(test, np.tile(shares, (len(test), 1)))
    if task == "regression":
        mean = float(np.mean(train))
        error = mae(test, np.full(len(test), mean))
        return {"mae": error, "r2": r2(test, np.full(len(test), mean)), "pearson": float("nan")}
    labels = [np.where(head, max(int(reference.max()), 1), 0) for head, reference in zip(heads, test, strict=True)]
    return segmentation_scores(test, labels)
