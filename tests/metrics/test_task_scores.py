"""Scores and their trivial baselines, against values that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from brainfound.errors import UsageError
from brainfound.metrics.registry import (
    classification_scores,
    mean_case_scores,
    multi_label_scores,
    regression_scores,
    segmentation_case_scores,
)

LABELS = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
SHARES = np.array([[0.9, 0.2, 0.4], [0.6, 0.7, 0.1], [0.4, 0.1, 0.2], [0.2, 0.3, 0.3], [0.8, 0.6, 0.1]])


def test_two_classes():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    scores = classification_scores([0, 0, 1, 1], probabilities)
    assert scores["auroc"] == pytest.approx(3 / 4)
    assert scores["balanced_accuracy"] == pytest.approx(3 / 4)
    # Falling scores 0.8 (positive), 0.4, 0.3 (positive), 0.1: precision 1 and 2 / 3 where a positive is found.
    assert scores["auprc"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert scores["mcc"] == pytest.approx((1 * 2 - 0 * 1) / np.sqrt(1 * 2 * 2 * 3))


def test_more_classes_average_one_against_the_rest():
    probabilities = np.eye(3)[[0, 1, 2, 2]] * 0.7 + 0.1
    perfect = classification_scores([0, 1, 2, 2], probabilities)
    assert perfect.pop("log_loss") == pytest.approx(-np.log(0.8))
    assert perfect == dict.fromkeys(("auroc", "auprc", "balanced_accuracy", "macro_f1", "mcc"), 1.0)
    worse = classification_scores([0, 1, 2, 0], probabilities)
    # Class 0: its two cases against two others, one of four pairs is a tie, one ... counted by hand.
    expected = [np.mean([1, 1, 0.5, 0.5]), 1.0, np.mean([1, 1, 0.5])]
    assert worse["auroc"] == pytest.approx(np.mean(expected))
    assert worse["balanced_accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)


def test_regression():
    scores = regression_scores([1.0, 2.0, 3.0], [1.0, 2.0, 4.5])
    assert scores["mae"] == pytest.approx(0.5)
    assert scores["r2"] == pytest.approx(1 - 2.25 / 2)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 3], [1, 2, 4.5])[0, 1])
    assert scores["rmse"] == pytest.approx(np.sqrt(2.25 / 3))
    assert scores["spearman"] == pytest.approx(1)


def segmentation_scores(references, predictions):
    return mean_case_scores([segmentation_case_scores(r, p) for r, p in zip(references, predictions, strict=True)])


def test_segmentation_averages_classes_then_cases_and_counts_clean_negatives():
    reference = np.zeros((1, 4, 4), dtype=int)
    reference[0, 0] = 1
    reference[0, 1] = 2
    prediction = reference.copy()
    prediction[0, 1, :2] = 0  # class 2: 2 · 2 / (4 + 2)
    empty = np.zeros_like(reference)
    scores = segmentation_scores([reference, empty, empty], [prediction, empty, reference])
    assert scores["dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["clean_negatives"] == 0.5
    assert scores["relative_volume_error"] == pytest.approx((0 + 0.5) / 2)
    assert "clean_negatives" not in segmentation_scores([reference], [reference])
    assert np.isnan(segmentation_scores([empty], [empty])["dice"])


def test_scores_of_a_case_with_spacing():
    reference = np.zeros((2, 6, 6), dtype=int)
    reference[0, :2] = 1
    reference[1, 5, 5] = 2
    prediction = np.roll(reference, 1, axis=1)
    prediction[prediction == 2] = 0
    plain = segmentation_case_scores(reference, prediction)
    assert plain == {"dice": pytest.approx(0.5 / 2), "relative_volume_error": pytest.approx((0 + 1) / 2)}
    full = segmentation_case_scores(reference, prediction, (3.0, 2.0, 1.0))
    assert full == plain | {
        "surface_dice": pytest.approx(0.5 / 2),  # the shift is 2 mm, the tolerance 1 mm
        "hd95_mm": pytest.approx((2 + np.linalg.norm([6, 12, 6])) / 2),
        "lesion_f1": pytest.approx(1 / 2),
        "volume_error_mm3": pytest.approx((0 + 6) / 2),
    }
    empty = np.zeros_like(reference)
    assert segmentation_case_scores(empty, prediction, (3.0, 2.0, 1.0)) == {"clean_negatives": 0.0}
    assert segmentation_case_scores(empty, empty) == {"clean_negatives": 1.0}
    # A case counts only where it has a score.
    mean = mean_case_scores([plain, {"clean_negatives": 1.0}, {"dice": 1.0}])
    assert mean == {"dice": pytest.approx(0.625), "relative_volume_error": 0.5, "clean_negatives": 1.0}


@pytest.mark.parametrize(
    ("empty", "clean", "marked"), [("left_out", None, None), ("nan", None, 0.0), ("one", 1.0, 0.0), ("zero", 0.0, 0.0)]
)
def test_a_case_without_the_structure_counts_by_a_convention_that_is_named(empty, clean, marked):
    nothing = np.zeros((2, 6, 6), dtype=int)
    something = nothing.copy()
    something[0, 0, 0] = 1
    for prediction, expected in ((nothing, clean), (something, marked)):
        for spacing, names in ((None, ["dice"]), ((3.0, 2.0, 1.0), ["dice", "surface_dice", "lesion_f1"])):
            found = segmentation_case_scores(nothing, prediction, spacing, empty=empty)
            assert found.pop("clean_negatives") == float(prediction is nothing)
            assert found == ({} if expected is None else dict.fromkeys(names, expected))
    with pytest.raises(UsageError, match="unknown convention 'on'.*one"):
        segmentation_case_scores(nothing, nothing, empty="on")


def test_the_tolerance_of_surfaces_is_the_one_that_is_requested():
    reference = np.zeros((1, 9, 9), dtype=int)
    reference[0, 2:5, 2:5] = 1
    moved = np.roll(reference, 1, axis=1)
    strict, lenient = (
        segmentation_case_scores(reference, moved, (1.0, 2.0, 2.0), tolerance)["surface_dice"] for tolerance in (1, 2)
    )
    assert strict < lenient == 1.0


def test_several_labels_and_their_mean():
    scores = multi_label_scores(LABELS, SHARES, ("edema", "lesion", "bleed"))
    areas = [roc_auc_score(LABELS[:, k], SHARES[:, k]) for k in (0, 1)]
    assert [scores["auroc(edema)"], scores["auroc(lesion)"]] == pytest.approx(areas)
    assert np.isnan(scores["auroc(bleed)"]), "nobody has it"
    assert scores["auroc"] == pytest.approx(np.mean(areas))
    assert scores["balanced_accuracy(edema)"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert next(iter(scores)) == "auroc"


def test_labels_that_do_not_fit():
    with pytest.raises(UsageError, match="do not fit"):
        multi_label_scores(LABELS, SHARES[:, :2], ("a", "b", "c"))
    with pytest.raises(UsageError, match="do not fit"):
        multi_label_scores(LABELS, SHARES, ("a", "b"))
