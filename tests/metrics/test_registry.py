"""The registry of metrics: its rows are consistent, and what is derived from them is what files and tables hold."""

from __future__ import annotations

import numpy as np
import pytest

from brainfound import metrics
from brainfound.metrics.registry import METRICS, PRIMARY_METRIC, TABLE_METRICS, format_score, metric_name, task_metrics


def test_names_and_their_order_are_those_of_the_files():
    assert [metric.name for metric in task_metrics("classification")] == [
        "auroc", "auprc", "balanced_accuracy", "macro_f1", "mcc", "log_loss",
    ]  # fmt: skip
    assert [metric.name for metric in task_metrics("regression")] == ["mae", "rmse", "r2", "pearson", "spearman"]
    assert PRIMARY_METRIC == {"classification": "auroc", "regression": "mae", "segmentation": "dice"}
    assert TABLE_METRICS == {
        "classification": ("auroc", "balanced_accuracy"),
        "regression": ("mae", "r2", "pearson"),
        "segmentation": ("dice", "surface_dice", "hd95_mm", "lesion_f1", "clean_negatives"),
    }


def test_errors_and_distances_are_better_when_lower():
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {"log_loss", "mae", "rmse", "hd95_mm", "volume_error_mm3", "relative_volume_error"}
    assert {METRICS[name].better for name in lower} == {"lower"}


def test_every_task_has_one_primary_metric_that_tables_show():
    for task, primary in PRIMARY_METRIC.items():
        assert [metric.name for metric in task_metrics(task) if metric.primary] == [primary]
        assert primary in TABLE_METRICS[task]


def test_only_metrics_of_probabilities_are_tested_on_ranks():
    assert {name for name, metric in METRICS.items() if metric.order_only} == {"auroc", "auprc"}
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    labels = np.array([0, 0, 1, 1])
    for metric in METRICS.values():
        if metric.order_only:
            assert metric.needs == ("probabilities",)
            assert metric.score(labels, probabilities**3) == metric.score(labels, probabilities)


@pytest.mark.parametrize("name", METRICS)
def test_a_row_and_its_function_agree(name):
    metric = METRICS[name]
    assert getattr(metrics, metric.function.__name__) is metric.function
    assert metric.function.__name__ in metrics.__all__
    for unit in ("mm", "mm³"):
        assert (metric.unit == unit) == name.endswith("_" + unit.replace("³", "3"))
    if metric.needs[0] == "masks":
        mask = np.ones((2, 3, 4), dtype=bool)
        given = {"spacing_mm": (1.0, 1.0, 1.0), "tolerance_mm": 1.0, "empty": "one"}
        perfect = metric.function(mask, mask, **{key: given[key] for key in metric.needs[1:]}, **metric.options)
        assert np.isnan(perfect) if metric.only_clean else perfect == float(metric.higher_is_better)
    else:
        truth, answers = np.array([0, 1, 0, 1]), np.eye(2)[[0, 1, 0, 1]]
        perfect = metric.score(truth, truth if metric.task == "regression" else answers)
        assert perfect == pytest.approx(float(metric.higher_is_better))


def test_a_drop_is_positive_where_a_score_gets_worse():
    assert METRICS["mae"].drop(5.0, 7.5) == 2.5
    assert METRICS["auroc"].drop(0.75, 0.5) == 0.25


def test_scores_of_labels_and_structures_belong_to_their_metric():
    assert metric_name("dice(ventricles)") == "dice"
    assert format_score("dice(ventricles)", 0.12345) == "0.123"
    assert format_score("mae", 0.5, sign=True) == "+0.500"
    assert format_score("mae", None) == format_score("mae", float("nan")) == "–"
