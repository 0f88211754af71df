"""Scores of several yes-or-no labels per case: each label's own, and their mean.

Axes: n cases, L labels.

The scores of a task, always beside those of a trivial baseline.

A trivial baseline knows the training labels and never looks at an image: the most frequent class, the mean
of the target, everything inside the head a lesion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from brainfound.errors import UsageError
from brainfound.metrics.classification import auprc, auroc, balanced_accuracy, macro_f1, mcc
from brainfound.metrics.regression import mae, pearson, r2, rmse, spearman
from brainfound.metrics.segmentation import dice, hd95, lesion_f1, relative_volume_error, surface_dice, volume_error_mm3
from brainfound.metrics.values import finite_array, get_convention_score

PRIMARY_METRIC = {"classification": "auroc", "regression": "mae", "segmentation": "dice"}
"""The metric by which a task is judged."""

TABLE_METRICS = {
    "classification": ("auroc", "balanced_accuracy"),
    "regression": ("mae", "r2", "pearson"),
    "segmentation": ("dice", "surface_dice", "hd95_mm", "lesion_f1", "clean_negatives"),
}
"""The metrics that a table on a terminal has room for; files and JSON hold all of them."""

HIGHER_IS_BETTER = {
    "auroc": True,
    "auprc": True,
    "balanced_accuracy": True,
    "macro_f1": True,
    "mcc": True,
    "mae": False,
    "rmse": False,
    "r2": True,
    "pearson": True,
    "spearman": True,
    "dice": True,
    "surface_dice": True,
    "hd95_mm": False,
    "lesion_f1": True,
    "volume_error_mm3": False,
    "relative_volume_error": False,
    "clean_negatives": True,
}

EmptyCase = Literal["left_out", "nan", "one", "zero"]
"""What the overlap of a case without the structure is, see `segmentation_case_scores`."""

Score = Callable[[np.ndarray, np.ndarray], float]


def _on_predicted_class(metric: Score) -> Score:
    return lambda labels, probabilities: metric(labels, probabilities.argmax(axis=1))


METRICS: Mapping[str, Mapping[str, Score]] = {
    "classification": {
        "auroc": auroc,
        "auprc": auprc,
        "balanced_accuracy": _on_predicted_class(balanced_accuracy),
        "macro_f1": _on_predicted_class(macro_f1),
        "mcc": _on_predicted_class(mcc),
    },
    "regression": {"mae": mae, "rmse": rmse, "r2": r2, "pearson": pearson, "spearman": spearman},
}
"""Metrics over all cases: of labels (n,) and probabilities (n, K), or of target (n,) and prediction (n,)."""


def classification_scores(labels: Sequence[int], probabilities: np.ndarray) -> dict[str, float]:
    """AUROC and AUPRC (for more than two classes the mean of one against the rest); of the likeliest class the
    balanced accuracy, the F1 averaged over classes, and Matthews' correlation.

    Args:
        labels: ``(n,)`` class indices.
        probabilities: ``(n, K)``.
    """
    truth = np.asarray(labels)
    return {name: metric(truth, probabilities) for name, metric in METRICS["classification"].items()}


def regression_scores(
    target: Sequence[float] | np.ndarray, prediction: Sequence[float] | np.ndarray
) -> dict[str, float]:
    """Mean absolute and root mean squared error in the unit of the target, R², Pearson's and Spearman's correlation."""
    expected, predicted = np.asarray(target), np.asarray(prediction)
    return {name: metric(expected, predicted) for name, metric in METRICS["regression"].items()}


def segmentation_case_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    tolerance_mm: float = 1.0,
    empty: EmptyCase = "left_out",
) -> dict[str, float]:
    """The scores of one case, averaged over the classes that it has.

    A case without any structure has ``clean_negatives``: 1 when nothing was marked, else 0; and by the convention of
    ``empty`` the other scores or none.

    Args:
        reference, prediction: class indices ``(S, H, W)``, 0 for background.
        spacing_mm: of the three axes. With it also surface Dice within `tolerance_mm`, HD95 (the diagonal of the array
            where a class was missed), lesion-wise F1 and the volume error in mm³; they take many times as long.
        empty: what overlap with a structure that is not there is: ``"left_out"``, it has none, and only
            ``clean_negatives`` tells; otherwise 0 where something was marked, and where nothing was ``"one"``
            (fomo-metrics' Dice), ``"zero"`` or ``"nan"`` (nnU-Net, SSL3D: left out of the mean).
    """
    get_convention_score(empty, dict.fromkeys(get_args(EmptyCase), 0.0), "empty")
    present = [k for k in np.unique(reference) if k != 0]
    if not present:
        clean = {"clean_negatives": float(not np.any(prediction))}
        if empty == "left_out":
            return clean
        masks = (np.asarray(prediction) != 0, np.zeros(np.shape(reference), dtype=bool))
        found = {"dice": dice(*masks, empty=empty)}
        if spacing_mm is not None:
            found["surface_dice"] = surface_dice(*masks, spacing_mm, tolerance_mm, empty=empty)
            found["lesion_f1"] = lesion_f1(*masks, empty=empty)
        return {name: value for name, value in found.items() if not np.isnan(value)} | clean
    of_classes: dict[str, list[float]] = {}
    for k in present:
        masks = (prediction == k, reference == k)
        found = {"dice": dice(*masks), "relative_volume_error": relative_volume_error(*masks)}
        if spacing_mm is not None:
            found |= {
                "surface_dice": surface_dice(*masks, spacing_mm, tolerance_mm),
                "hd95_mm": hd95(*masks, spacing_mm, one_empty="diagonal"),
                "lesion_f1": lesion_f1(*masks),
                "volume_error_mm3": volume_error_mm3(*masks, spacing_mm),
            }
        for name, value in found.items():
            of_classes.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in of_classes.items()}


def segmentation_scores(references: Sequence[np.ndarray], predictions: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean Dice and mean relative volume error over the cases that have the structure; several classes are averaged
    within a case.

    Also the share of cases without any structure in which nothing was marked.

    Args:
        references, predictions: class indices ``(S, H, W)`` per case, 0 for background.
    """
    return mean_case_scores([segmentation_case_scores(r, p) for r, p in zip(references, predictions, strict=True)])


def mean_case_scores(cases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each score's mean over the cases of a segmentation that have it; Dice is ``nan`` if none has."""
    names = ["dice", *dict.fromkeys(name for case in cases for name in case if name != "dice")]
    found = {name: [case[name] for case in cases if name in case] for name in names}
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def trivial_scores(task: str, answer: float | Sequence[float], test: Sequence[Any]) -> dict[str, float]:
    """The scores of a baseline that answers alike about every case.

    Args:
        task: classification or regression.
        answer: each class's share in the training part, or the mean of its values.
        test: class indices or values of the cases.
    """
    if task == "classification":
        return classification_scores(test, np.tile(np.asarray(answer, dtype=float), (len(test), 1)))
    return regression_scores(test, np.full(len(test), answer, dtype=float))


def multi_label_scores(labels: Any, probabilities: Any, names: Sequence[str]) -> dict[str, float]:
    """The scores of a classification, as the mean over labels and of each label: ``auroc``, ``auroc(edema)``, ….

    Args:
        labels: ``(n, L)`` 0 or 1.
        probabilities: ``(n, L)`` of each label being 1; an answer is yes above 0.5.
        names: ``(L,)``.

    Returns:
        A label whose score is undefined (only one class among the cases) has ``nan`` and is left out of the mean.

    Raises:
        UsageError: if the shapes do not fit.
    """
    truth, shares = finite_array(labels, "labels"), finite_array(probabilities, "probabilities")
    if truth.ndim != 2 or truth.shape != shares.shape or truth.shape[1] != len(names) or not truth.size:
        got = f"{truth.shape}, {shares.shape} and {len(names)} names"
        raise UsageError("labels and probabilities do not fit", got=got, expected="(n, L), (n, L) and L")
    if not np.isin(truth, (0, 1)).all():
        raise UsageError("labels must be 0 or 1", where="labels", got=np.unique(truth)[:8].tolist())
    of_label = {
        name: classification_scores(truth[:, k].astype(int).tolist(), np.stack([1 - shares[:, k], shares[:, k]], 1))
        for k, name in enumerate(names)
    }
    scores: dict[str, float] = {}
    for metric in of_label[names[0]]:
        values = np.array([of_label[name][metric] for name in names])
        scores[metric] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    for name, own in of_label.items():
        scores |= {f"{metric}({name})": value for metric, value in own.items()}
    return scores


def trivial_multi_label_scores(shares: Any, test: Any, names: Sequence[str]) -> dict[str, float]:
    """The scores of a baseline that gives every case ``(n, L)`` each label's share in the training part ``(L,)``."""
    return multi_label_scores(test, np.tile(np.asarray(shares, dtype=float), (len(test), 1)), names)
