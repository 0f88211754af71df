"""Scores of several labels per case."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from brainfound.errors import UsageError
from brainfound.metrics.scores import multi_label_scores, trivial_multi_label_scores

LABELS = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
SHARES = np.array([[0.9, 0.2, 0.4], [0.6, 0.7, 0.1], [0.4, 0.1, 0.2], [0.2, 0.3, 0.3], [0.8, 0.6, 0.1]])


def test_each_label_and_their_mean():
    scores = multi_label_scores(LABELS, SHARES, ("edema", "lesion", "bleed"))
    areas = [roc_auc_score(LABELS[:, k], SHARES[:, k]) for k in (0, 1)]
    assert [scores["auroc(edema)"], scores["auroc(lesion)"]] == pytest.approx(areas)
    assert np.isnan(scores["auroc(bleed)"]), "nobody has it"
    assert scores["auroc"] == pytest.approx(np.mean(areas))
    assert scores["balanced_accuracy(edema)"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert next(iter(scores)) == "auroc"


def test_the_baseline_knows_no_image():
    scores = trivial_multi_label_scores(LABELS.mean(axis=0), LABELS, ("edema", "lesion", "bleed"))
    assert scores["auroc"] == 0.5
    assert scores["balanced_accuracy(edema)"] == 0.5
    assert np.isnan(scores["auroc(bleed)"])


def test_shapes_that_do_not_fit():
    with pytest.raises(UsageError, match="do not fit"):
        multi_label_scores(LABELS, SHARES[:, :2], ("a", "b", "c"))
    with pytest.raises(UsageError, match="do not fit"):
        multi_label_scores(LABELS, SHARES, ("a", "b"))
