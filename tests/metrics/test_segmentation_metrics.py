"""Metrics of masks against brute force: every voxel, every pair of surface voxels, every component by flood fill."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as sk

from brainfound.errors import UsageError
from brainfound.metrics.segmentation import dice, hd95, lesion_f1, relative_volume_error, surface_dice, volume_error_mm3
from tests.flood_fill import flood_fill

_MASK_SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)
_MASK_PAIRS = _MASK_SHAPES.flatmap(lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape)))


def _brute_force_distances(prediction, reference, spacing_mm):
    """Boundary by looking at every face neighbour, distances by looking at every pair; both ways."""

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
    return distances.min(1), distances.min(0)


@settings(max_examples=60, deadline=None)
@given(_MASK_PAIRS)
def test_dice_is_the_f1_score_of_the_voxels(masks):
    prediction, reference = masks
    if prediction.any() or reference.any():
        assert dice(prediction, reference) == pytest.approx(sk.f1_score(reference.ravel(), prediction.ravel()))
    else:
        assert dice(prediction, reference) == 1.0


@pytest.mark.parametrize("score", [dice, lesion_f1, lambda p, r, **kw: surface_dice(p, r, (1, 1, 1), **kw)])
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
    for metric in (surface_dice, hd95, volume_error_mm3):
        with pytest.raises(UsageError):
            metric(prediction, reference, (1.0,))
    for metric in (lesion_f1, relative_volume_error):
        with pytest.raises(UsageError):
            metric(prediction, reference)


@settings(max_examples=60, deadline=None)
@given(
    _MASK_PAIRS, st.sampled_from([0.0, 0.7, 1.0, 1.5, 3.0]), st.sampled_from([(1, 1, 1), (0.7, 0.7, 3.0), (2, 0.5, 1)])
)
def test_surface_dice_against_brute_force(masks, tolerance_mm, spacing_mm):
    prediction, reference = masks
    if prediction.any() and reference.any():
        spacing = spacing_mm[: prediction.ndim]
        distances = np.concatenate(_brute_force_distances(prediction, reference, spacing))
        expected = (distances <= tolerance_mm + 1e-5).mean()
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
@pytest.mark.parametrize("metric", [surface_dice, hd95, volume_error_mm3])
def test_a_spacing_that_does_not_fit_is_refused(metric, spacing_mm):
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(UsageError, match="spacing"):
        metric(mask, mask, spacing_mm)


@pytest.mark.parametrize("tolerance_mm", [-1, np.nan, np.inf])
def test_surface_dice_refuses_a_tolerance_that_cannot_be_used(tolerance_mm):
    mask = np.ones((3, 3, 3), bool)
    with pytest.raises(UsageError, match="tolerance"):
        surface_dice(mask, mask, (1, 1, 1), tolerance_mm)


@settings(max_examples=80, deadline=None)
@given(
    _MASK_PAIRS, st.sampled_from([95.0, 100.0, 50.0, 0.0]), st.sampled_from([(1, 1, 1), (0.7, 0.7, 3.0), (2, 0.5, 1)])
)
def test_hd95_against_brute_force(masks, percentile, spacing_mm):
    prediction, reference = masks
    if prediction.any() and reference.any():
        spacing = spacing_mm[: prediction.ndim]
        # Between ranks the percentile is interpolated: position q (n - 1) of the sorted distances.
        directions = []
        for distances in map(np.sort, _brute_force_distances(prediction, reference, spacing)):
            position = percentile / 100 * (len(distances) - 1)
            directions.append(np.interp(position, np.arange(len(distances)), distances))
        assert hd95(prediction, reference, spacing, percentile) == pytest.approx(max(directions))
        assert hd95(reference, prediction, spacing, percentile) == pytest.approx(max(directions))


def test_hd95_of_a_shift_is_the_shift_in_mm():
    plate = np.zeros((12, 6, 6), bool)
    plate[2] = True
    shifted = np.roll(plate, 3, axis=0)
    assert hd95(plate, shifted, (1.5, 1, 1)) == pytest.approx(4.5)
    assert hd95(plate, plate, (1.5, 1, 1)) == 0.0
    # One voxel in a hundred far away is among the worst 5%; the Hausdorff distance itself sees it.
    scattered = np.zeros((12, 10, 10), bool)
    scattered[2] = True
    outlier = scattered.copy()
    outlier[11, 0, 0] = True
    assert hd95(outlier, scattered, (1, 1, 1)) == 0.0
    assert hd95(outlier, scattered, (1, 1, 1), percentile=100) == pytest.approx(9)


def test_hd95_of_empty_masks_follows_the_named_convention():
    empty, full = np.zeros((3, 4, 12), bool), np.ones((3, 4, 12), bool)
    spacing_mm = (1, 1, 1)
    assert hd95(empty, empty, spacing_mm) == 0.0
    assert math.isnan(hd95(empty, empty, spacing_mm, empty="nan"))
    for prediction, reference in ((empty, full), (full, empty)):
        assert hd95(prediction, reference, spacing_mm) == math.inf
        assert hd95(prediction, reference, spacing_mm, one_empty="diagonal") == pytest.approx(13)
        assert hd95(prediction, reference, (2, 2, 2), one_empty="diagonal") == pytest.approx(26)
        assert math.isnan(hd95(prediction, reference, spacing_mm, one_empty="nan"))
    for wrong in ({"empty": "one"}, {"one_empty": "zero"}, {"percentile": 101}, {"percentile": np.nan}):
        with pytest.raises(UsageError):
            hd95(full, full, spacing_mm, **wrong)


@settings(max_examples=40, deadline=None)
@given(_MASK_PAIRS.filter(lambda masks: masks[0].any() and masks[1].any() and masks[0].ndim > 1), st.data())
def test_surface_metrics_are_those_of_monai(masks, data):
    """A package that others keep; it takes planes and volumes, and masks that are not empty."""
    pytest.importorskip("monai", reason="MONAI is not installed")
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    spacing = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.5]), min_size=masks[0].ndim, max_size=masks[0].ndim))
    tolerance = data.draw(st.sampled_from([0.3, 1.2, 2.7]))
    # A margin: at the border of an array the two may differ in what is outside.
    prediction, reference = (np.pad(mask, 1) for mask in masks)
    given_masks = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
    theirs = compute_hausdorff_distance(*given_masks, include_background=True, percentile=95, spacing=spacing)
    assert hd95(prediction, reference, spacing) == pytest.approx(theirs.item(), rel=1e-5)
    theirs = compute_surface_dice(*given_masks, [tolerance], include_background=True, spacing=spacing)
    assert surface_dice(prediction, reference, spacing, tolerance) == pytest.approx(theirs.item(), rel=1e-5)


@settings(max_examples=80, deadline=None)
@given(_MASK_PAIRS, st.sampled_from(["faces", "corners"]))
def test_lesion_f1_againstflood_fill(masks, touching):
    prediction, reference = masks
    if not prediction.any() and not reference.any():
        return
    reach = 1 if touching == "faces" else prediction.ndim
    of_prediction, of_reference = flood_fill(prediction, reach), flood_fill(reference, reach)
    found = sum(any(prediction[voxel] for voxel in lesion) for lesion in of_reference)
    false = sum(not any(reference[voxel] for voxel in lesion) for lesion in of_prediction)
    expected = found / (found + (false + len(of_reference) - found) / 2)
    assert lesion_f1(prediction, reference, touching=touching) == pytest.approx(expected)


def test_lesion_f1_by_hand():
    reference, prediction = np.zeros((2, 9, 9), int), np.zeros((2, 9, 9), int)
    reference[0, 0:4, 0:4] = 1  # large and touched at one voxel: found
    reference[0, 8, 8] = 1  # missed
    reference[1, 6, 0] = reference[1, 7, 1] = 1  # one lesion by a corner, two by faces
    prediction[0, 3, 3] = prediction[1, 6, 0] = 1
    prediction[1, 0, 8] = 1  # false
    assert lesion_f1(prediction, reference) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert lesion_f1(prediction, reference, touching="faces") == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    with pytest.raises(UsageError, match="unknown convention"):
        lesion_f1(prediction, reference, touching="edges")


def test_volume_errors():
    reference, prediction = np.zeros((4, 5, 5), bool), np.zeros((4, 5, 5), bool)
    reference.flat[:20] = True
    prediction.flat[50:65] = True
    empty = np.zeros_like(reference)
    assert volume_error_mm3(prediction, reference, (1, 2, 0.5)) == 5
    assert volume_error_mm3(prediction, reference, (3, 2, 0.5), signed=True) == -15
    assert volume_error_mm3(reference, prediction, (3, 2, 0.5), signed=True) == 15
    assert volume_error_mm3(empty, reference, (1, 1, 1)) == 20
    assert relative_volume_error(prediction, reference) == 0.25
    assert relative_volume_error(prediction, reference, signed=True) == -0.25
    assert relative_volume_error(empty, reference) == 1
    assert relative_volume_error(prediction, empty) == math.inf
    assert math.isnan(relative_volume_error(prediction, empty, reference_empty="nan"))
    assert relative_volume_error(empty, empty) == volume_error_mm3(empty, empty, (1, 1, 1)) == 0
    assert math.isnan(relative_volume_error(empty, empty, empty="nan"))
    assert math.isnan(volume_error_mm3(empty, empty, (1, 1, 1), empty="nan"))
    with pytest.raises(UsageError, match="unknown convention"):
        relative_volume_error(empty, empty, empty="one")
