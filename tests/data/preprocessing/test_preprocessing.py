"""Geometry and intensities of the stack, and the way back."""

from __future__ import annotations

import re

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainfound.data.preprocessing.grids import shift
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack_builder import StackBuilder, two_percentiles
from brainfound.data.reading.scan import Scan, load_scan
from brainfound.errors import ModelError, RecipeError, ScanError, UsageError
from brainfound.recipes import validate
from tests.data.stacks import build_stack


def as_scan(data: np.ndarray, affine: np.ndarray, axes: str = "RAS") -> Scan:
    """A scan as `load_scan` would give it, for an image stored in the given axis order."""
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    stored = image.as_reoriented(turn)
    canonical = nib.as_closest_canonical(stored)
    return Scan(
        np.asarray(canonical.dataobj), canonical.affine, tuple(map(int, stored.shape)), np.asarray(stored.affine)
    )


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


CASES = {
    "1 mm RAS": ((1, 1, 1), (0, 0, 0), "RAS"),
    "flipped LPI": ((1, 1, 1), (0, 0, 0), "LPI"),
    "permuted PSR": ((1.2, 1.0, 1.1), (0, 0, 0), "PSR"),
    "anisotropic 1×1×6 oblique": ((1, 1, 6), (25, 0, 0), "RPI"),
    "oblique ASL": ((0.9, 0.9, 1.2), (18, -12, 9), "ASL"),
    "coarse": ((2, 2, 2), (5, 5, -5), "SAR"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mask_comes_back_to_its_own_grid(head, centred, case):
    spacing, angles, axes = CASES[case]
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    shape = tuple(int(np.ceil(extent / s)) for extent, s in zip((120, 140, 110), spacing, strict=True))
    affine = centred(shape, turn @ np.diag(spacing))
    scan = as_scan(head.image(shape, affine), affine, axes)
    lesion = as_scan(head.lesion(shape, affine), affine, axes)
    stack = build_stack(Preprocessing(contrasts=("T1w",)), {"T1w": scan}, lesion)
    back = stack.to_native(stack.mask)
    assert back.shape == scan.native_shape
    np.testing.assert_array_equal(back.affine, scan.native_affine)
    canonical = np.asarray(nib.as_closest_canonical(back).dataobj) > 0
    assert dice(canonical, lesion.data > 0) >= 0.98


def test_rows_columns_and_slices_run_as_documented(centred):
    """Row 0 anterior, column 0 left, slices inferior → superior, whatever the storage."""
    shape, affine = (41, 41, 41), centred((41, 41, 41), np.eye(3) * 2)
    data = np.zeros(shape)
    data[3:38, 3:38, 3:38] = 10
    data[3:9, 18:23, 18:23] = 100  # left
    data[18:23, 32:38, 18:23] = 60  # anterior
    data[18:23, 18:23, 32:38] = 30  # superior
    for axes in ("RAS", "LPS", "PIR"):
        recipe = Preprocessing(contrasts=("T1w",), spacing_mm=(2, 2, 2), size=(40, 40), percentiles=(0, 100))
        pixels = build_stack(recipe, {"T1w": as_scan(data, affine, axes)}).pixels[:, 0].astype(float)
        s, r, c = (
            np.argwhere(np.abs(pixels - value) < 3).mean(0)
            for value in ((30 - 10) / 90 * 255, (60 - 10) / 90 * 255, 255)
        )
        assert s[0] > len(pixels) * 0.75
        assert r[1] < 10
        assert c[2] < 10


def test_stack_affine_and_positions_are_in_millimetres(head, centred):
    shape = (40, 48, 36)
    affine = centred(shape, np.eye(3) * 3)
    recipe = Preprocessing(contrasts=("T1w",), spacing_mm=(1.5, 1.5, 2))
    stack = build_stack(recipe, {"T1w": as_scan(head.image(shape, affine), affine)})
    np.testing.assert_allclose(stack.spacing_mm, (2, 1.5, 1.5))
    assert np.diff(stack.positions_mm) == pytest.approx(2.0)
    assert stack.positions_mm.mean() == pytest.approx(0, abs=1e-4)
    s, r, c = np.argwhere(stack.pixels[:, 0] > 0).mean(0)
    centre_mm = (stack.affine @ [s, r, c, 1])[:3]
    np.testing.assert_allclose(centre_mm, 0, atol=1.5)


def test_absent_contrast_is_zero_and_marked(head, centred):
    shape = (40, 48, 36)
    affine = centred(shape, np.eye(3) * 3)
    stack = build_stack(Preprocessing(contrasts=("T1w", "T2w")), {"T2w": as_scan(head.image(shape, affine), affine)})
    assert stack.present.tolist() == [False, True]
    assert not stack.pixels[:, 0].any()
    assert stack.pixels[:, 1].any()


def cropped(scan: Scan, margin: int, shift_mm: float = 0.0) -> Scan:
    """A label map cut to a box around its labels, perhaps put elsewhere."""
    box = [(line.min() - margin, line.max() + 1 + margin) for line in np.nonzero(scan.data)]
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [first for first, _ in box] + [0, 0, shift_mm]
    data = scan.data[tuple(slice(*ends) for ends in box)]
    return Scan(data, affine, data.shape, affine)


@pytest.mark.parametrize("margin", [0, 2])
def test_a_mask_that_is_cropped_around_its_labels_is_the_whole_mask(head, centred, margin):
    shape = (60, 72, 56)
    affine = centred(shape, np.eye(3) * 2)
    scan, lesion = (as_scan(one(shape, affine), affine) for one in (head.image, head.lesion))
    whole = build_stack(Preprocessing(contrasts=("T1w",)), {"T1w": scan}, lesion)
    builder = StackBuilder(Preprocessing(contrasts=("T1w",)), "T1w", scan)
    builder.add_mask(cropped(lesion, margin))
    np.testing.assert_array_equal(builder.build().mask, whole.mask)
    assert whole.mask.any()
    (note,) = builder.quality[0].notes
    assert re.fullmatch(r"the mask covers \d+% of the foreground; what lies outside .* background", note)


def moved(scan: Scan, *shift_mm: float) -> Scan:
    affine = scan.affine.copy()
    affine[:3, 3] += shift_mm
    return Scan(scan.data, affine, scan.native_shape, affine)


def test_a_whole_mask_whose_labels_lie_outside_of_the_head_is_refused(head, centred):
    shape = (60, 72, 56)
    affine = centred(shape, np.eye(3) * 2)
    scan, lesion = (as_scan(one(shape, affine), affine) for one in (head.image, head.lesion))
    builder = StackBuilder(Preprocessing(contrasts=("T1w",)), "T1w", scan)
    with pytest.raises(
        ScanError, match="the labels of the mask lie outside of the head .*0% of the labels in it; a grid"
    ):
        builder.add_mask(moved(lesion, 28, 28, 28))
    head_shape = as_scan((scan.data > 0).astype(np.float32), affine)
    with pytest.raises(ScanError, match="outside of the head"):
        builder.add_mask(moved(head_shape, 30, 0, 0))
    lost = np.diag([0.4, 0.4, 0.4, 1.0])  # without its voxel size and origin, in the middle of the head
    with pytest.raises(ScanError, match="does not overlap .*100% of the labels in it; a grid like that of a scan"):
        builder.add_mask(as_scan(lesion.data, lost))
    assert builder.quality[0].notes == ()
    builder.add_mask(moved(lesion, 0, -9, 0))
    assert builder.quality[0].notes[0] == (
        "the mask has the voxel grid of a scan, 9.0 mm away: if it was drawn on it, its affine is wrong"
    )


def test_masks_that_are_where_they_belong_are_not_refused(head, centred):
    shape = (60, 72, 56)
    affine = centred(shape, np.eye(3) * 2)
    scan, lesion = (as_scan(one(shape, affine), affine) for one in (head.image, head.lesion))
    tissues = np.where(scan.data > 0, 2, 6).astype(np.float32)  # with a code for the air
    border = ndimage.binary_dilation(scan.data > 0) & ~(scan.data > 0)  # just outside of a stripped brain
    empty = np.zeros_like(scan.data)
    for data in (tissues, border.astype(np.float32), empty, lesion.data):
        builder = StackBuilder(Preprocessing(contrasts=("T1w",)), "T1w", scan)
        builder.add_mask(as_scan(data, affine))
        assert builder.quality[0].notes == ()
    # The reference scan is a slab, and the mask was drawn on a whole head.
    slab = Scan(scan.data[:, :, 24:36], affine @ shift([0, 0, 24]), (60, 72, 12), affine @ shift([0, 0, 24]))
    StackBuilder(Preprocessing(contrasts=("T1w",)), "T1w", slab).add_mask(as_scan((scan.data > 0) * 1.0, affine))


def test_a_cropped_mask_whose_labels_are_elsewhere_or_none_is_refused(head, centred):
    shape = (60, 72, 56)
    affine = centred(shape, np.eye(3) * 2)
    scan, lesion = (as_scan(one(shape, affine), affine) for one in (head.image, head.lesion))
    builder = StackBuilder(Preprocessing(contrasts=("T1w",)), "T1w", scan)
    with pytest.raises(
        ScanError, match="the mask does not overlap .*0% of its foreground covered, and 0% of the labels"
    ):
        builder.add_mask(cropped(lesion, 0, shift_mm=400))
    # In the field of view, and mostly in the air beside the head.
    with pytest.raises(ScanError, match=r"the mask does not overlap"):
        builder.add_mask(cropped(lesion, 0, shift_mm=55))
    small = cropped(lesion, 0)
    with pytest.raises(ScanError, match="and no label"):
        builder.add_mask(Scan(np.zeros_like(small.data), small.affine, small.data.shape, small.affine))
    assert builder.build().mask is None
    assert builder.quality[0].notes == ()


def test_a_mask_of_part_of_the_head_is_noted_and_one_of_all_of_it_is_not(head, centred):
    shape = (60, 72, 56)
    affine = centred(shape, np.eye(3) * 2)
    scan, lesion = (as_scan(one(shape, affine), affine) for one in (head.image, head.lesion))
    upper = affine.copy()
    upper[:3, 3] += affine[:3, :3] @ [0, 0, 20]
    data = lesion.data[:, :, 20:]
    for mask, noted in ((lesion, False), (Scan(data, upper, data.shape, upper), True)):
        builder = StackBuilder(Preprocessing(contrasts=("T1w",)), "T1w", scan)
        builder.add_mask(mask)
        assert bool(builder.quality[0].notes) == noted


def test_a_session_is_built_without_a_scan_elsewhere_in_space(head, centred):
    shape = (40, 48, 36)
    near, far = centred(shape, np.eye(3) * 3), centred(shape, np.eye(3) * 3)
    far[:3, 3] += 400
    scans = {"T1w": as_scan(head.image(shape, near), near), "T2w": as_scan(head.image(shape, near), far)}
    builder = StackBuilder(Preprocessing(contrasts=("T1w", "T2w")), "T1w", scans["T1w"])
    with pytest.raises(ScanError, match="does not overlap"):
        builder.add("T2w", scans["T2w"])
    assert builder.build().present.tolist() == [True, False]


def test_intensities_follow_the_foreground_percentiles(head, centred):
    shape = (60, 70, 56)
    affine = centred(shape, np.eye(3) * 2)
    image = head.image(shape, affine)
    recipe = Preprocessing(contrasts=("T1w",), spacing_mm=(2, 2, 2))
    pixels = build_stack(recipe, {"T1w": as_scan(image, affine)}).pixels
    rescaled = build_stack(recipe, {"T1w": as_scan(image * 37, affine)}).pixels
    np.testing.assert_array_equal(pixels, rescaled)
    low, high = np.percentile(image[image > 0], (0.5, 99.5))
    expected = np.clip((image - low) / (high - low), 0, 1) * 255
    inside = pixels[pixels > 0]
    assert abs(np.median(inside) - np.median(expected[image > low])) < 4
    assert pixels.max() == 255


def test_negative_rims_and_air_noise_are_not_foreground_of_the_box(head, centred):
    shape = (80, 90, 76)
    affine = centred(shape, np.eye(3) * 2)
    recipe = Preprocessing(contrasts=("T1w",), spacing_mm=(2, 2, 2))
    clean = build_stack(recipe, {"T1w": as_scan(head.image(shape, affine), affine)})
    noisy = build_stack(recipe, {"T1w": as_scan(head.image(shape, affine, noise=4.0), affine)})
    assert abs(len(noisy.pixels) - len(clean.pixels)) <= 6
    corner = noisy.pixels[:, 0, :20, :20]
    assert not corner.any()


@settings(max_examples=15, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(1.0, 3.0)] * 3),
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    axes=st.sampled_from(["RAS", "LPS", "PSR", "SLA", "IRP"]),
)
def test_round_trip_property(spacing, angles, axes):
    """Any grid of 1 mm or coarser: a 15-mm ball survives the way there and back."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    shape = tuple(int(np.ceil(70 / s)) for s in spacing)
    linear = turn @ np.diag(spacing)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, -linear @ ((np.array(shape) - 1) / 2)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    mm = index @ linear.T + affine[:3, 3]
    image = np.where((mm**2).sum(-1) < 30**2, 100 + mm[..., 0], 0)
    ball = ((mm - 3) ** 2).sum(-1) < 15**2
    stack = build_stack(
        Preprocessing(contrasts=("T1w",), size=(96, 96)),
        {"T1w": as_scan(image, affine, axes)},
        as_scan(ball, affine, axes),
    )
    back = nib.as_closest_canonical(stack.to_native(stack.mask))
    reference = as_scan(ball, affine, axes).data > 0
    assert dice(np.asarray(back.dataobj) > 0, reference) >= 0.98


def test_to_native_refuses_another_grid(head, centred):
    shape = (40, 48, 36)
    affine = centred(shape, np.eye(3) * 3)
    stack = build_stack(Preprocessing(contrasts=("T1w",)), {"T1w": as_scan(head.image(shape, affine), affine)})
    with pytest.raises(UsageError, match="not on the stack's grid"):
        stack.to_native(np.zeros((3, 4, 5)))


def test_saved_and_loaded_settings_are_equal(tmp_path):
    recipe = Preprocessing(contrasts=("flair", "t1gd"), spacing_mm=(1, 1, None), size=(112, 128))
    assert recipe.contrasts == ("FLAIR", "T1ce")
    recipe.save(tmp_path)
    assert Preprocessing.load(tmp_path) == recipe
    (tmp_path / "preprocessing.json").unlink()
    with pytest.raises(ModelError, match="an empty folder, not a model"):
        Preprocessing.load(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("spaccing_mm=[1,1,1]", "Did you mean spacing_mm"),
        ("contrasts=[T9w]", "T9w"),
        ("percentiles=[99,1]", "rise"),
        ("ranges={T2: [0, 90], flair: [0, 5], t2w: [1, 80]}", "ranges holds T2w twice, as T2 and t2w"),
    ],
)
def test_settings_refuse_what_they_do_not_know(override, message):
    with pytest.raises(RecipeError, match=message):
        validate(Preprocessing, {}, [override])


def test_real_scans_on_three_grids(real_data):
    recipe = Preprocessing()
    folder = real_data / "ms_raw" / "patient01"
    names = {"T1w": "T1W", "T2w": "T2W", "FLAIR": "FLAIR"}
    scans = {contrast: load_scan(folder / f"study1_{name}.nii.gz") for contrast, name in names.items()}
    stack = build_stack(recipe, scans)
    assert stack.present.all()
    mask = (stack.pixels[:, 0] > 60).astype(np.uint8)
    back = stack.to_native(mask)
    assert back.shape == scans["T1w"].native_shape
    # The three contrasts show the same head.
    assert dice(stack.pixels[:, 0] > 20, stack.pixels[:, 1] > 20) > 0.8


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32) | st.integers(0, 5).map(float), min_size=1, max_size=60),
    st.tuples(st.floats(0, 100), st.floats(0, 100)).map(sorted).map(tuple),
)
def test_two_percentiles_are_those_of_numpy(values, percentiles):
    array = np.array(values, dtype=np.float32)
    expected = np.percentile(array.astype(np.float64), percentiles)
    np.testing.assert_allclose(two_percentiles(array, percentiles), expected, rtol=1e-6, atol=1e-3)
