"""The scores of a task; `brainfound.metrics.registry` lists them.

Axes: n cases, K classes, L labels of a case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from brainfound.errors import UsageError
from brainfound.metrics.registry import PRIMARY_METRIC, Metric, task_metrics
from brainfound.metrics.values import finite_array, get_convention_score

EmptyCase = Literal["left_out", "nan", "one", "zero"]
"""The overlap of a case without the structure, see `segmentation_case_scores`."""


def classification_scores(labels: Sequence[int], probabilities: np.ndarray) -> dict[str, float]:
    """Score the probabilities of classes ``(n, K)`` against class indices ``(n,)``.

    AUROC and AUPRC of more than two classes are one-vs-rest means. The other metrics score the most probable class.
    """
    truth = np.asarray(labels)
    return {metric.name: metric.score(truth, probabilities) for metric in task_metrics("classification")}


def regression_scores(
    target: Sequence[float] | np.ndarray, prediction: Sequence[float] | np.ndarray
) -> dict[str, float]:
    """Score predicted numbers ``(n,)``; errors are in the unit of the target."""
    expected, predicted = np.asarray(target), np.asarray(prediction)
    return {metric.name: metric.score(expected, predicted) for metric in task_metrics("regression")}


def segmentation_case_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing_mm: Sequence[float] | None = None,
    tolerance_mm: float = 1.0,
    empty: EmptyCase = "left_out",
) -> dict[str, float]:
    """Score one segmented case: the mean over the classes that its reference has.

    A case without any structure gets ``clean_negatives``, 1 if nothing was marked and 0 otherwise, and the overlap
    metrics by the convention `empty`.

    Args:
        reference, prediction: class indices ``(S, H, W)``, 0 for background.
        spacing_mm: of the three axes. Adds surface Dice within `tolerance_mm`, HD95 (the diagonal of the array where a
            class was missed), lesion-wise F1 and the volume error in mm³, which take many times as long.
        empty: overlap where the reference lacks the structure. ``"left_out"``: no score. Otherwise 0 where something
            was marked, and where nothing was ``"one"`` (fomo-metrics' Dice), ``"zero"`` or ``"nan"`` (nnU-Net, SSL3D:
            left out of the mean).
    """
    get_convention_score(empty, dict.fromkeys(get_args(EmptyCase), 0.0), "empty")
    inputs = {"spacing_mm": spacing_mm, "tolerance_mm": tolerance_mm, "empty": empty}

    def score(metric: Metric, predicted: np.ndarray, expected: np.ndarray, names: Sequence[str]) -> float:
        keywords = {name: inputs[name] for name in names if name in metric.needs}
        return metric.function(predicted, expected, **keywords, **metric.options)

    metrics = task_metrics("segmentation")
    if spacing_mm is None:
        metrics = [metric for metric in metrics if not metric.slow and "spacing_mm" not in metric.needs]
    present = [k for k in np.unique(reference) if k != 0]
    if not present:
        nothing = np.zeros(np.shape(reference), dtype=bool)
        scored = [m for m in metrics if m.only_clean or ("empty" in m.needs and empty != "left_out")]
        found = {metric.name: score(metric, prediction != 0, nothing, list(inputs)) for metric in scored}
        return {name: value for name, value in found.items() if not np.isnan(value)}
    masks = [(prediction == k, reference == k) for k in present]
    return {
        metric.name: float(np.mean([score(metric, *pair, ("spacing_mm", "tolerance_mm")) for pair in masks]))
        for metric in metrics
        if not metric.only_clean
    }


def mean_case_scores(cases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each score over the segmented cases that have it; the primary score is ``nan`` if none does."""
    primary = PRIMARY_METRIC["segmentation"]
    names = [primary, *dict.fromkeys(name for case in cases for name in case if name != primary)]
    found = {name: [case[name] for case in cases if name in case] for name in names}
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def multi_label_scores(labels: Any, probabilities: Any, names: Sequence[str]) -> dict[str, float]:
    """Classification scores as the mean over labels and for each label: ``auroc``, ``auroc(edema)``, ….

    A label whose score is undefined (only one class among the cases) has ``nan`` and is left out of the mean.

    Args:
        labels: ``(n, L)`` 0 or 1.
        probabilities: ``(n, L)`` of each label being 1; above 0.5 the prediction is 1.
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
        values = np.array([own[metric] for own in of_label.values()])
        scores[metric] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    return scores | {f"{metric}({name})": value for name, own in of_label.items() for metric, value in own.items()}
