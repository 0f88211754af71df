"""Metrics against independent formulas, scikit-learn and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from sklearn import metrics as sk

from brainfound.errors import UsageError
from brainfound.evaluate.metrics import auroc, balanced_accuracy, dice, mae, pearson, r2, surface_dice

_MASK_SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)
_MASK_PAIRS = _MASK_SHAPES.flatmap(lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape)))


def _brute_force_surface_dice(prediction, reference, spacing_mm, tolerance_mm):
    """Boundary by looking at every face neighbour, distances by looking at every pair."""

    def surface(mask):
        found = []
        for voxel in np.argwhere(mask):
            for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
                neighbour = voxel.copy()
                neighbour[axis] += step
                inside = 0 <= neighbour[axis] < mask.shape[axis]
                if not inside or not mask[tuple(neighbour)]:
                    found.append(voxel * np.asarray(spacing_mm))
                    break
        return np.array(found)

    p, r = surface(prediction), surface(reference)
    distances = np.linalg.norm(p[:, None] - r[None], axis=-1)
    within = (distances.min(1) <= tolerance_mm + 1e-5).sum() + (distances.min(0) <= tolerance_mm + 1e-5).sum()
    return within / (len(p) + len(r))


# Segmentation


@settings(max_examples=60, deadline=None)
@given(_MASK_PAIRS)
def test_dice_is_the_f1_score_of_the_voxels(masks):
    prediction, reference = masks
    if prediction.any() or reference.any():
        assert dice(prediction, reference) == pytest.approx(sk.f1_score(reference.ravel(), prediction.ravel()))
    else:
        assert dice(prediction, reference) == 1.0


@pytest.mark.parametrize("score", [dice, lambda p, r, **kw: surface_dice(p, r, (1, 1, 1), **kw)])
def test_empty_masks_follow_the_named_convention(score):
    empty, full = np.zeros((3, 4, 5), int), np.ones((3, 4, 5), int)
    assert score(empty, empty) == 1.0
    assert score(empty, empty, empty="one") == 1.0
    assert score(empty, empty, empty="zero") == 0.0
    assert math.isnan(score(empty, empty, empty="nan"))
    for convention in ("one", "nan", "zero"):
        assert score(empty, full, empty=convention) == 0.0
        assert score(full, empty, empty=convention) == 0.0
    with pytest.raises(UsageError, match="unknown convention"):
        score(full, full, empty="skip")


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_masks_of_any_number_type_and_tensors(dtype):
    prediction = np.array([[0, 1, 1], [0, 1, 0]], dtype)
    reference = np.array([[0, 1, 0], [1, 1, 0]], dtype)
    assert dice(prediction, reference) == pytest.approx(2 * 2 / 6)
    assert dice(torch.tensor(prediction), torch.tensor(reference)) == pytest.approx(2 * 2 / 6)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ([0, 1, 2], [0, 1, 1]),
        ([0.2, 0.9, 1.0], [0, 1, 1]),
        ([0, np.nan, 1], [0, 1, 1]),
        ([0, 1], [0, 1, 1]),
        (["a", "b", "c"], [0, 1, 1]),
    ],
)
def test_what_is_not_a_pair_of_masks_is_refused_in_one_line(prediction, reference):
    with pytest.raises(UsageError) as error:
        dice(prediction, reference)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError):
        surface_dice(prediction, reference, (1.0,))


@settings(max_examples=60, deadline=None)
@given(
    _MASK_PAIRS, st.sampled_from([0.0, 0.7, 1.0, 1.5, 3.0]), st.sampled_from([(1, 1, 1), (0.7, 0.7, 3.0), (2, 0.5, 1)])
)
def test_surface_dice_against_brute_force(masks, tolerance_mm, spacing_mm):
    prediction, reference = masks
    if prediction.any() and reference.any():
        spacing = spacing_mm[: prediction.ndim]
        expected = _brute_force_surface_dice(prediction, reference, spacing, tolerance_mm)
        assert surface_dice(prediction, reference, spacing, tolerance_mm) == pytest.approx(expected)


def test_surface_dice_of_a_shift_is_one_within_and_zero_beyond_the_tolerance():
    plate = np.zeros((12, 6, 6), bool)
    plate[2] = True  # one voxel thin, and it touches four borders
    shifted = np.roll(plate, 3, axis=0)
    assert surface_dice(plate, plate, (1, 1, 1), tolerance_mm=0) == 1.0
    assert surface_dice(plate, shifted, (1, 1, 1), tolerance_mm=3) == 1.0
    assert surface_dice(plate, shifted, (1, 1, 1), tolerance_mm=2.9) == 0.0
    # The same shift in voxels, but 0.3 mm apart; float32 spacing must not push it over the tolerance.
    assert surface_dice(plate, shifted, np.float32([0.3, 1, 1]), tolerance_mm=0.9) == 1.0
    assert surface_dice(plate, shifted, (1, 0.3, 0.3), tolerance_mm=0.9) == 0.0


def test_surface_dice_ignores_the_inside_and_sees_the_border():
    solid = np.ones((5, 5, 5), bool)
    hollow_inside = solid.copy()
    hollow_inside[2, 2, 2] = False
    # The whole cube touches the border, so its 98 outer voxels are its surface; the hole adds six.
    score = surface_dice(solid, hollow_inside, (1, 1, 1), tolerance_mm=0.5)
    assert score == pytest.approx((98 + 98) / (98 + 98 + 6))


@pytest.mark.parametrize("spacing_mm", [(1, 1), (1, 1, 1, 1), (1, 0, 1), (1, -1, 1), (1, np.nan, 1), "1x1x1"])
def test_surface_dice_refuses_a_spacing_that_does_not_fit(spacing_mm):
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(UsageError, match="spacing"):
        surface_dice(mask, mask, spacing_mm)


@pytest.mark.parametrize("tolerance_mm", [-1, np.nan, np.inf])
def test_surface_dice_refuses_a_tolerance_that_cannot_be_used(tolerance_mm):
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(UsageError, match="tolerance"):
        surface_dice(mask, mask, (1, 1, 1), tolerance_mm)


# Classification


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
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


# Regression


def test_regression_metrics_are_those_of_scikit_learn_and_scipy():
    generator = np.random.default_rng(0)
    target, prediction = generator.normal(60, 10, 50), generator.normal(60, 10, 50)
    assert mae(target, prediction) == pytest.approx(np.abs(target - prediction).mean())
    assert r2(target, prediction) == pytest.approx(sk.r2_score(target, prediction))
    assert pearson(target, prediction) == pytest.approx(stats.pearsonr(target, prediction).statistic)
    assert pearson(target, 100 - target) == pytest.approx(-1)
    assert r2(torch.tensor(target), torch.tensor(prediction)) == pytest.approx(sk.r2_score(target, prediction))


def test_regression_metrics_without_variation_are_undefined():
    assert math.isnan(pearson([1, 2, 3], [5, 5, 5]))
    assert math.isnan(pearson([1], [2]))
    assert math.isnan(r2([5, 5, 5], [5, 5, 5]))
    assert math.isnan(r2([5], [5]))
    assert r2([1, 2, 3], [2, 2, 2]) == 0.0


@pytest.mark.parametrize("metric", [mae, r2, pearson])
@pytest.mark.parametrize(
    ("target", "prediction"),
    [([1, 2], [1, 2, 3]), ([1, 2], [[1], [2]]), ([1, np.inf], [1, 2]), ([1, 2], [np.nan, 2]), ([], []), (["a"], ["b"])],
)
def test_regression_metrics_refuse_what_they_cannot_score(metric, target, prediction):
    with pytest.raises(UsageError) as error:
        metric(target, prediction)
    assert "\n" not in str(error.value)
