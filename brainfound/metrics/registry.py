"""The registry of metrics, one row per metric, and the scores of a task that follow from it.

Scores, tables, intervals, comparisons, pages, curves and the exports of `brainfound.metrics` are derived from the rows.
To add a metric, write its function in the module of its task and add a row here. The order of the rows is the order of
the scores in files and tables.

Axes: n cases, K classes, L labels of a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from brainfound.errors import UsageError
from brainfound.metrics.classification import auprc, auroc, balanced_accuracy, log_loss, macro_f1, mcc
from brainfound.metrics.input_checks import finite_array, get_convention_score
from brainfound.metrics.regression import mae, pearson, r2, rmse, spearman
from brainfound.metrics.segmentation import (
    clean_negative,
    dice,
    hd95,
    lesion_f1,
    relative_volume_error,
    surface_dice,
    volume_error_mm3,
)

Task = Literal["classification", "regression", "segmentation"]
Input = Literal["probabilities", "classes", "values", "masks", "spacing_mm", "tolerance_mm", "empty"]


@dataclass(frozen=True)
class Metric:
    """One row of the registry."""

    name: str
    """Used in ``scores.json``, tables and columns; the score of one label or structure is ``name(label)``."""
    function: Callable[..., float]
    """Exported by `brainfound.metrics` under its own name."""
    task: Task
    needs: tuple[Input, ...]
    """First the arguments: ``probabilities`` ``(n, K)`` or the most probable ``classes`` ``(n,)``, after the labels;
    ``values`` ``(n,)``, after the target; or the ``masks`` of a case, the prediction before the reference. Then the
    keywords that the scoring of masks supplies; with ``empty``, cases without the structure are scored by convention.
    """
    higher_is_better: bool
    unit: str = ""
    """``target`` is the unit of the target, such as years; a share or a coefficient has none."""
    format: str = ".3f"
    """How tables and pages print a value."""
    in_tables: bool = False
    """Whether tables on the terminal and on pages include it; files hold all metrics."""
    primary: bool = False
    """Whether it is the headline metric of its task; one per task."""
    order_only: bool = False
    """Whether only the order of the probabilities matters. Permutation tests then exchange ranks."""
    slow: bool = False
    """Masks only: computed only where surfaces are scored, like the metrics that need ``spacing_mm``."""
    only_clean: bool = False
    """Masks only: scores just the cases without any structure."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Extra keyword arguments of the function."""

    def score(self, truth: np.ndarray, answers: np.ndarray) -> float:
        """The metric over cases: of labels and probabilities, or of target and predicted values."""
        predicted = answers.argmax(axis=1) if self.needs[0] == "classes" else answers
        return self.function(truth, predicted, **self.options)

    def drop(self, full: float, partial: float) -> float:
        """How much worse `partial` is than `full`, in the unit of the metric; negative where it is better."""
        return full - partial if self.higher_is_better else partial - full

    @property
    def better(self) -> Literal["higher", "lower"]:
        return "higher" if self.higher_is_better else "lower"


_ROWS = (
    Metric("auroc", auroc, "classification", ("probabilities",), True, in_tables=True, primary=True, order_only=True),
    Metric("auprc", auprc, "classification", ("probabilities",), True, order_only=True),
    Metric("balanced_accuracy", balanced_accuracy, "classification", ("classes",), True, in_tables=True),
    Metric("macro_f1", macro_f1, "classification", ("classes",), True),
    Metric("mcc", mcc, "classification", ("classes",), True),
    Metric("log_loss", log_loss, "classification", ("probabilities",), False),
    Metric("mae", mae, "regression", ("values",), False, unit="target", in_tables=True, primary=True),
    Metric("rmse", rmse, "regression", ("values",), False, unit="target"),
    Metric("r2", r2, "regression", ("values",), True, in_tables=True),
    Metric("pearson", pearson, "regression", ("values",), True, in_tables=True),
    Metric("spearman", spearman, "regression", ("values",), True),
    Metric("dice", dice, "segmentation", ("masks", "empty"), True, in_tables=True, primary=True),
    Metric("relative_volume_error", relative_volume_error, "segmentation", ("masks",), False),
    Metric(
        "surface_dice", surface_dice, "segmentation", ("masks", "spacing_mm", "tolerance_mm", "empty"), True,
        in_tables=True,
    ),
    Metric(
        "hd95_mm", hd95, "segmentation", ("masks", "spacing_mm"), False, unit="mm", in_tables=True,
        options={"one_empty": "diagonal"},
    ),
    Metric("lesion_f1", lesion_f1, "segmentation", ("masks", "empty"), True, in_tables=True, slow=True),
    Metric("volume_error_mm3", volume_error_mm3, "segmentation", ("masks", "spacing_mm"), False, unit="mm³"),
    Metric("clean_negatives", clean_negative, "segmentation", ("masks",), True, in_tables=True, only_clean=True),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ROWS}

PRIMARY_METRIC: dict[str, str] = {metric.task: metric.name for metric in _ROWS if metric.primary}
"""Task → its headline metric."""

TABLE_METRICS: dict[str, tuple[str, ...]] = {
    task: tuple(metric.name for metric in _ROWS if metric.task == task and metric.in_tables) for task in PRIMARY_METRIC
}
"""Task → the metrics that tables show."""


def metric_name(score: str) -> str:
    """The metric of a score or a column.

    >>> metric_name("dice(ventricles)")
    'dice'
    """
    return score.partition("(")[0]


def task_metrics(task: str) -> list[Metric]:
    return [metric for metric in _ROWS if metric.task == task]


def format_score(score: str, value: float | None, sign: bool = False) -> str:
    """A score as tables print it; an undefined one becomes a dash.

    >>> format_score("mae", 3.14159), format_score("dice(ventricles)", None)
    ('3.142', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    return format(float(value), ("+" if sign else "") + METRICS[metric_name(score)].format)


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
