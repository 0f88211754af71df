"""Metrics of classes against scikit-learn, and against counting where it says nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from brainfound.errors import UsageError
from brainfound.metrics.classification import (
    auprc,
    auroc,
    balanced_accuracy,
    f1,
    log_loss,
    macro_f1,
    mcc,
    sensitivity_at_specificity,
)

_CASES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_auroc_counts_ties_as_one_half(cases):
    labels, scores = np.array([c[0] for c in cases]), np.array([c[1] for c in cases], float)
    if labels.all() or not labels.any():
        assert math.isnan(auroc(labels, scores))
    else:
        pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
        assert auroc(labels, scores) == pytest.approx(np.mean(pairs))
        assert auroc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores))


def test_auroc_of_columns():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 60)
    probabilities = generator.dirichlet(np.ones(3), 60)
    expected = sk.roc_auc_score(labels, probabilities, multi_class="ovr")
    assert auroc(labels, probabilities) == pytest.approx(expected)
    assert auroc(torch.tensor(labels), torch.tensor(probabilities, requires_grad=True)) == pytest.approx(expected)
    two = labels.clip(0, 1)
    assert auroc(two, probabilities[:, :2]) == pytest.approx(sk.roc_auc_score(two, probabilities[:, 1]))
    # A class that does not occur is left out of the mean, not scored as chance.
    without_last = auroc(two, probabilities)
    expected = np.mean([sk.roc_auc_score(two == k, probabilities[:, k]) for k in (0, 1)])
    assert without_last == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "scores"),
    [([0, 1], [0.1, 0.2, 0.3]), ([0, 2], [0.1, 0.2]), ([0, 1], [0.1, np.nan]), ([], []), ([[0], [1]], [[0.1], [0.2]])],
)
def test_auroc_refuses_what_it_cannot_score(labels, scores):
    with pytest.raises(UsageError):
        auroc(labels, scores)


def test_log_loss_is_that_of_scikit_learn_but_for_certain_errors():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 40), rng.dirichlet(np.ones(3), 40)
    assert log_loss(labels, probabilities) == pytest.approx(sk.log_loss(labels, probabilities, labels=[0, 1, 2]))
    assert log_loss([0, 1], np.full((2, 2), 0.5)) == pytest.approx(math.log(2))
    assert log_loss([0], [[0.0, 1.0]]) == pytest.approx(15.94, abs=0.01)


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [([0, 1], [[0.5, 0.5]]), ([0], [0.5]), ([2], [[0.5, 0.5]]), ([0], [[np.nan, 1]]), ([], np.zeros((0, 2)))],
)
def test_log_loss_refuses_what_it_cannot_score(labels, probabilities):
    with pytest.raises(UsageError):
        log_loss(labels, probabilities)


@settings(max_examples=60, deadline=None)
@given(_CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_balanced_accuracy_is_that_of_scikit_learn(cases):
    labels, predictions = np.array(cases).T
    assert balanced_accuracy(labels, predictions) == pytest.approx(sk.balanced_accuracy_score(labels, predictions))


def test_balanced_accuracy_of_text_labels():
    assert balanced_accuracy(["AD", "AD", "CN"], ["AD", "CN", "CN"]) == pytest.approx((0.5 + 1) / 2)
    with pytest.raises(UsageError):
        balanced_accuracy([0, 1, np.nan], [0, 1, 1])
    with pytest.raises(UsageError):
        balanced_accuracy([0, 1], [[0.1, 0.9], [0.3, 0.7]])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30))
def test_auprc_is_the_average_precision_of_scikit_learn(cases):
    labels, scores = np.array([c[0] for c in cases]), np.array([c[1] for c in cases], float)
    if labels.all() or not labels.any():
        assert math.isnan(auprc(labels, scores))
    else:
        assert auprc(labels, scores) == pytest.approx(sk.average_precision_score(labels, scores))
        # Scores without information reach the share of positives.
        assert auprc(labels, np.zeros(len(labels))) == pytest.approx(labels.mean())


def test_auprc_of_columns():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 60)
    probabilities = generator.dirichlet(np.ones(3), 60)
    expected = sk.average_precision_score(np.eye(3)[labels], probabilities)
    assert auprc(labels, probabilities) == pytest.approx(expected)
    two = labels.clip(0, 1)
    assert auprc(two, probabilities[:, :2]) == pytest.approx(sk.average_precision_score(two, probabilities[:, 1]))
    with pytest.raises(UsageError):
        auprc([0, 1], [0.1, np.nan])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 1.0]),
)
def test_sensitivity_is_the_best_of_all_thresholds_that_are_specific_enough(cases, specificity):
    labels, scores = np.array([c[0] for c in cases]), np.array([c[1] for c in cases], float)
    found = sensitivity_at_specificity(labels, scores, specificity)
    if labels.all() or not labels.any():
        assert math.isnan(found)
        return
    allowed = [
        (scores[labels] >= threshold).mean()
        for threshold in (*scores, np.inf)
        if (scores[~labels] < threshold).mean() >= specificity - 1e-9
    ]
    assert found == pytest.approx(max(allowed))
    false_positive, sensitivity, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    assert found == pytest.approx(sensitivity[1 - false_positive >= specificity - 1e-9].max())


def test_sensitivity_at_specificity_counts_negatives_exactly():
    # Ten negatives at specificity 0.9: one may be called positive, though 1 - 0.9 is a little less than a tenth.
    labels = np.array([0] * 10 + [1] * 4)
    scores = np.array([*range(10), 8.5, 9.5, 7.5, 10])
    assert sensitivity_at_specificity(labels, scores, 0.9) == 0.75
    assert sensitivity_at_specificity(labels, np.stack([-scores, scores], 1), 0.9) == 0.75
    assert sensitivity_at_specificity(labels, scores, 1.0) == 0.5
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(UsageError, match="specificity"):
            sensitivity_at_specificity(labels, scores, wrong)
    with pytest.raises(UsageError, match="two classes"):
        sensitivity_at_specificity([0, 1, 2], np.eye(3))


@settings(max_examples=100, deadline=None)
@given(_CASES)
@pytest.mark.filterwarnings("ignore")
def test_f1_and_mcc_are_those_of_scikit_learn(cases):
    labels, predictions = np.array(cases).T
    assert macro_f1(labels, predictions) == pytest.approx(sk.f1_score(labels, predictions, average="macro"))
    theirs = sk.f1_score(labels == 2, predictions == 2, zero_division=np.nan)
    assert f1(labels, predictions, positive=2) == pytest.approx(theirs, nan_ok=True)
    if len(set(labels)) == 1:
        assert math.isnan(mcc(labels, predictions))
    else:
        assert mcc(labels, predictions) == pytest.approx(sk.matthews_corrcoef(labels, predictions))


def test_f1_and_mcc_by_hand():
    labels, predictions = ["AD", "AD", "CN", "CN", "CN"], ["AD", "CN", "CN", "CN", "AD"]
    assert f1(labels, predictions, positive="AD") == pytest.approx(2 / 4)
    assert macro_f1(labels, predictions) == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert mcc(labels, predictions) == pytest.approx((1 * 2 - 1 * 1) / math.sqrt(2 * 2 * 3 * 3))
    assert mcc([0, 1, 1], [1, 1, 1]) == 0.0
    assert f1([0, 1, 1], [1, 1, 1]) == pytest.approx(0.8)
    assert f1(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1])) == pytest.approx(0.8)


@pytest.mark.parametrize("metric", [balanced_accuracy, f1, macro_f1, mcc])
@pytest.mark.parametrize(
    ("labels", "predictions"),
    [([0, 1], [0, 1, 1]), ([], []), ([0, np.nan], [0, 1]), ([[0], [1]], [[0], [1]]), (["0", "1"], [0, 1])],
)
def test_metrics_of_classes_refuse_what_they_cannot_score(metric, labels, predictions):
    with pytest.raises(UsageError) as error:
        metric(labels, predictions)
    assert "\n" not in str(error.value)
