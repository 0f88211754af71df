"""The registry of metrics: one row per metric.

Scores, tables, intervals, comparisons, pages, curves and the exports of `brainfound.metrics` are derived from the rows.
To add a metric, write its function in the module of its task and add a row here.

The order of the rows is the order of the scores in files and tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from brainfound.metrics.classification import auprc, auroc, balanced_accuracy, macro_f1, mcc
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
