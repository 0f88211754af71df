"""From any grid to the stack and back: axis orders, oblique and sheared grids, sizes, and files of one session."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.reading.header_geometry import axis_codes
from brainfound.data.reading.scan import Scan, load_scan, read_header
from brainfound.errors import ScanError
from tests.data.stacks import build_stack

ORDERS = [
    "".join(axes) for permuted in itertools.permutations(["LR", "AP", "IS"]) for axes in itertools.product(*permuted)
]
T1 = Preprocessing(contrasts=("T1w",))


def in_order(data: np.ndarray, affine: np.ndarray, axes: str) -> nib.Nifti1Image:
    """The same volume stored in another axis order; nothing but permuted and flipped."""
    image = nib.Nifti1Image(data, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    return image.as_reoriented(turn)


def saved(image: nib.spatialimages.SpatialImage, path: Path, labels: bool = False) -> Scan:
    nib.save(image, path)
    return load_scan(path, labels=labels)


def bright_centre_mm(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Centre of the bright ball in world coordinates."""
    index = np.argwhere(volume).mean(axis=0)
    return affine[:3, :3] @ index + affine[:3, 3]


def test_there_are_48_orders():
    assert len(set(ORDERS)) == 48


@pytest.mark.parametrize("spacing", [(3, 3, 3), (2, 2.5, 4), (4, 4, None)])
def test_any_of_48_axis_orders_gives_the_same_stack_and_comes_back(head, centred, tmp_path, spacing):
    shape = (40, 49, 36)
    affine = centred(shape, np.eye(3) * 3)
    recipe = Preprocessing(contrasts=("T1w",), spacing_mm=spacing, size=(56, 48))
    image, labels = head.image(shape, affine), head.lesion(shape, affine)
    expected = build_stack(
        recipe,
        {"T1w": saved(in_order(image, affine, "RAS"), tmp_path / "r.nii")},
        saved(in_order(labels, affine, "RAS"), tmp_path / "l.nii", labels=True),
    )
    home = expected.to_native(expected.mask)
    assert expected.mask.any()
    for axes in ORDERS:
        stored = in_order(image, affine, axes)
        scan = saved(stored, tmp_path / "a.nii")
        stack = build_stack(
            recipe, {"T1w": scan}, saved(in_order(labels, affine, axes), tmp_path / "m.nii", labels=True)
        )
        assert axis_codes(scan.header.affine) == axes
        np.testing.assert_array_equal(stack.pixels, expected.pixels)
        np.testing.assert_array_equal(stack.mask, expected.mask)
        np.testing.assert_array_equal(stack.affine, expected.affine)
        back = stack.to_native(stack.mask)
        assert back.shape == stored.shape
        np.testing.assert_array_equal(back.affine, stored.affine)
        canonical = nib.as_closest_canonical(back)
        # Half a voxel between grids is a tie, which goes by the stored direction of an axis.
        same = np.mean(np.asarray(canonical.dataobj) == np.asarray(home.dataobj))
        assert same == 1 if spacing == (3, 3, 3) else same > 0.999


angles = st.tuples(*[st.floats(-180, 180)] * 3)
spacings = st.tuples(*[st.floats(2.0, 4.0)] * 3)
shears = st.tuples(*[st.floats(-0.25, 0.25)] * 3)


def linear_of(angle, spacing, shear) -> np.ndarray:
    sheared = np.array([[1, shear[0], shear[1]], [0, 1, shear[2]], [0, 0, 1]])
    return Rotation.from_euler("xyz", angle, degrees=True).as_matrix() @ sheared @ np.diag(spacing)


def head_on(head, centred, linear, bright: float = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The head with a bright lesion, its label map, and the affine, on a grid that contains all of it."""
    # The head's half axes lie within a ball of 62 mm; a sheared grid reaches it where its inverse rows say.
    half = 62 * np.linalg.norm(np.linalg.inv(linear), axis=1)
    shape = tuple(int(n) for n in 2 * np.ceil(half) + 3)
    affine = centred(shape, linear)
    image, lesion = head.image(shape, affine), head.lesion(shape, affine)
    image[lesion > 0] = bright
    return image, lesion, affine


@settings(max_examples=25, deadline=None)
@given(angles, spacings, shears)
def test_a_landmark_keeps_its_place_on_any_oblique_or_sheared_grid(
    head, centred, tmp_path_factory, angle, spacing, shear
):
    folder = tmp_path_factory.mktemp("oblique")
    linear = linear_of(angle, spacing, shear)
    image, lesion, affine = head_on(head, centred, linear)
    scan = saved(nib.Nifti1Image(image, affine), folder / "a.nii")
    mask = saved(nib.Nifti1Image(lesion, affine), folder / "m.nii", labels=True)
    half_voxel_mm = max(np.linalg.norm(linear, axis=0)) / 2
    truth = bright_centre_mm(lesion, affine)
    stack = build_stack(Preprocessing(contrasts=("T1w",), spacing_mm=(2, 2, 2), size=(96, 96)), {"T1w": scan}, mask)
    for volume in (stack.pixels[:, 0] > 220, stack.mask):
        assert np.linalg.norm(bright_centre_mm(volume, stack.affine) - truth) < half_voxel_mm
    back = stack.to_native(stack.mask)
    assert np.linalg.norm(bright_centre_mm(np.asarray(back.dataobj), back.affine) - truth) < half_voxel_mm
    np.testing.assert_allclose(back.affine, affine, atol=1e-4)
    assert back.shape == image.shape


@settings(max_examples=15, deadline=None)
@given(angles, spacings, shears)
def test_scans_of_a_session_meet_on_the_reference_grid(head, centred, tmp_path_factory, angle, spacing, shear):
    folder = tmp_path_factory.mktemp("session")
    image, _, affine = head_on(head, centred, np.eye(3) * 2.5)
    other, lesion, other_affine = head_on(head, centred, linear_of(angle, spacing, shear))
    scans = {
        "T1w": saved(nib.Nifti1Image(image, affine), folder / "a.nii"),
        "FLAIR": saved(nib.Nifti1Image(other, other_affine), folder / "b.nii"),
    }
    mask = saved(nib.Nifti1Image(lesion, other_affine), folder / "m.nii", labels=True)
    recipe = Preprocessing(contrasts=("T1w", "FLAIR"), spacing_mm=(2, 2, 2), size=(96, 96))
    stack = build_stack(recipe, scans, mask)
    places = [
        bright_centre_mm(v, stack.affine) for v in (stack.pixels[:, 0] > 220, stack.pixels[:, 1] > 220, stack.mask)
    ]
    for place in places:
        assert np.linalg.norm(place - head.lesion_centre_mm) < 2.0


def test_formats_mix_in_a_session(head, centred, tmp_path):
    image, _, affine = head_on(head, centred, np.diag([-2.5, 2.5, 3]))
    scans = {
        "T1w": saved(nib.Nifti1Image(image, affine), tmp_path / "a.nii.gz"),
        "T2w": saved(nib.MGHImage(image, affine), tmp_path / "b.mgz"),
        "FLAIR": saved(nib.Nifti2Image(image.astype(">i2"), affine), tmp_path / "c.nii"),
    }
    stack = build_stack(Preprocessing(spacing_mm=(2.5, 2.5, 3)), scans)
    assert stack.present.all()
    np.testing.assert_array_equal(stack.pixels[:, 1], stack.pixels[:, 0])
    assert np.abs(stack.pixels[:, 2].astype(int) - stack.pixels[:, 0]).max() <= 2


def test_scans_that_do_not_overlap_are_refused(head, centred, tmp_path):
    image, lesion, affine = head_on(head, centred, np.eye(3) * 3)
    far = affine.copy()
    far[2, 3] += 300
    near = saved(nib.Nifti1Image(image, affine), tmp_path / "a.nii")
    away = saved(nib.Nifti1Image(image, far), tmp_path / "b.nii")
    recipe = Preprocessing(contrasts=("T1w", "FLAIR"))
    with pytest.raises(ScanError, match="does not overlap.*0% of its foreground"):
        build_stack(recipe, {"T1w": near, "FLAIR": away})
    with pytest.raises(ScanError, match="does not overlap"):
        build_stack(recipe, {"T1w": near}, saved(nib.Nifti1Image(lesion, far), tmp_path / "m.nii", labels=True))


def test_thick_native_slices_are_kept_voxel_by_voxel(head, centred, tmp_path):
    """1 × 1 × 6 mm with z kept: each slice of the stack is an acquired slice, and nothing is interpolated."""
    shape = (110, 130, 17)
    affine = centred(shape, np.diag([1.0, 1.0, 6.0]))
    image = head.image(shape, affine)
    scan = saved(in_order(image, affine, "LAI"), tmp_path / "a.nii.gz")
    stack = build_stack(Preprocessing(contrasts=("T1w",), spacing_mm=(1, 1, None)), {"T1w": scan})
    assert stack.spacing_mm[0] == pytest.approx(6)
    inside = image > 0
    assert len(stack.pixels) == np.count_nonzero(inside.any(axis=(0, 1)))
    low, high = np.percentile(image[inside], (0.5, 99.5))
    expected = np.rint(np.clip((image - low) * 255 / (high - low), 0, 255)) * inside
    back = stack.to_native(stack.pixels[:, 0].astype(np.float32), order=1)
    found = np.asarray(nib.as_closest_canonical(back).dataobj)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("shape", [(40, 48, 10), (48, 10, 40), (5, 4, 3), (2, 2, 2)])
def test_tiny_volumes_go_the_whole_way(head, centred, tmp_path, shape):
    affine = centred(shape, np.diag(np.minimum(np.array([120, 140, 100]) / shape, 40)))
    image = head.image(shape, affine) + np.arange(np.prod(shape)).reshape(shape)
    scan = saved(nib.Nifti1Image(image.astype(np.float32), affine), tmp_path / "a.nii.gz")
    stack = build_stack(Preprocessing(contrasts=("T1w",), spacing_mm=(2, 2, 2)), {"T1w": scan})
    assert stack.pixels.any()
    assert stack.to_native(np.ones(stack.grid, np.uint8)).shape == shape
    kept = build_stack(Preprocessing(contrasts=("T1w",), spacing_mm=(None, None, None)), {"T1w": scan})
    np.testing.assert_allclose(kept.spacing_mm[::-1], scan.spacing_mm)


def huge(path: Path, centred) -> Path:
    """512³ voxels of one byte; holes in the file take no space on the disk."""
    header = nib.Nifti1Header()
    header.set_data_shape((512, 512, 512))
    header.set_data_dtype(np.uint8)
    header.set_sform(centred((512, 512, 512), np.eye(3) * 0.5), code=1)
    header["vox_offset"] = 352
    with path.open("wb") as file:
        file.write(header.binaryblock)
        slab = np.full((512, 200), 90, np.uint8)
        slab[:, ::2] = 180
        for z in range(100, 400):
            file.seek(352 + (z * 512 + 150) * 512)
            file.write(slab.tobytes(order="F"))
        file.truncate(352 + 512**3)
    return path


def test_a_huge_volume_is_plausible_and_its_header_is_read_alone(tmp_path, centred):
    header = read_header(huge(tmp_path / "a.nii", centred))
    assert header.shape == (512, 512, 512)
    assert header.spacing_mm == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_a_huge_volume_goes_the_whole_way(tmp_path, centred):
    scan = load_scan(huge(tmp_path / "a.nii", centred))
    stack = build_stack(T1, {"T1w": scan})
    assert stack.pixels.shape[2:] == (224, 224)
    assert stack.pixels.any()
    assert stack.to_native(stack.pixels[:, 0]).shape == (512, 512, 512)
