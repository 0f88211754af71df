"""The field of view below the top of the head: one rule in prepare and predict, and an exact way back."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from brainfound.data.cohort import Cohort
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack_builder import StackBuilder, cut_below
from brainfound.data.reading.scan import load_scan
from brainfound.data.store.prepare import prepare
from brainfound.inference.predictor import Predictor
from brainfound.models import BrainFoundModel

KEPT_MM = 60.0
"""Of the synthetic head, which is 84 mm high."""


def short(**fields) -> Preprocessing:
    return Preprocessing(contrasts=("T1w",), spacing_mm=(3, 3, 3), size=(48, 48), field_of_view_mm=KEPT_MM, **fields)


def whole(preprocessing: Preprocessing) -> Preprocessing:
    return preprocessing.model_copy(update={"field_of_view_mm": None})


@pytest.mark.parametrize("axes", ["RAS", "LPI", "PSR"])
def test_the_top_is_kept_in_any_order_of_axes(head, centred, tmp_path, axes):
    affine = centred((40, 48, 36), np.eye(3) * 3.0)
    image = nib.Nifti1Image(head.image((40, 48, 36), affine), affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), tmp_path / "T1w.nii.gz")
    scan = load_scan(tmp_path / "T1w.nii.gz")
    full, cut = (StackBuilder(p, "T1w", scan) for p in (whole(short()), short()))
    assert (full.quality[0].cut_mm, cut.quality[0].cut_mm) == (0.0, (full.grid[0] - 20) * 3.0)
    assert cut.grid[0] == 20, "60 mm in slices of 3 mm"
    np.testing.assert_allclose(cut.build().affine, full.build().affine @ _slices_up(full.grid[0] - 20))
    same_scale = {"ranges": {"T1w": (0, 200)}}
    full, cut = (StackBuilder(p, "T1w", scan).build() for p in (whole(short(**same_scale)), short(**same_scale)))
    np.testing.assert_array_equal(cut.pixels, full.pixels[-20:])


def _slices_up(count: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 3] = count
    return matrix


def test_intensities_are_those_of_the_part_that_is_kept(head, centred, tmp_path):
    affine = centred((40, 48, 36), np.eye(3) * 3.0)
    data = head.image((40, 48, 36), affine)
    data[:, :, :9] *= 20  # a bright neck
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "T1w.nii.gz")
    scan = load_scan(tmp_path / "T1w.nii.gz")
    full, cut = (StackBuilder(p, "T1w", scan).quality[0] for p in (whole(short()), short()))
    assert cut.intensity_high < 250 < full.intensity_high
    assert cut.foreground_ml == full.foreground_ml, "the head keeps its volume in the table"


def test_a_scan_that_is_shorter_is_untouched(head, centred, tmp_path):
    affine = centred((40, 48, 36), np.eye(3) * 3.0)
    nib.save(nib.Nifti1Image(head.image((40, 48, 36), affine), affine), tmp_path / "T1w.nii.gz")
    scan = load_scan(tmp_path / "T1w.nii.gz")
    rule = short().model_copy(update={"field_of_view_mm": 170.0})
    full, cut = (StackBuilder(p, "T1w", scan) for p in (whole(rule), rule))
    np.testing.assert_array_equal(cut.build().pixels, full.build().pixels)
    np.testing.assert_array_equal(cut.affine, full.affine)
    assert cut.quality == full.quality
    inside = np.ones((4, 4, 10), dtype=bool)
    assert cut_below(inside, 20.0, 2.0) == (pytest.approx(inside), 0.0)
    assert cut_below(inside, 18.0, 2.0)[1] == 2.0


@pytest.mark.parametrize("angles", [(0, 0, 0), (18, -12, 9)])
def test_a_mask_comes_back_exactly_and_the_cut_part_is_background(head, centred, angles, tmp_path):
    linear = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * 3.0
    shape = (48, 56, 48)
    affine = centred(shape, linear)
    labels = (head.image(shape, affine) > 0).astype(np.uint8)
    low = np.argwhere(labels)[:, 2].min()
    labels[:, :, : low + 2] *= 7  # a structure that is lost, with whole slices below the field of view
    for name, data in (("T1w", head.image(shape, affine)), ("mask", labels)):
        nib.save(nib.Nifti1Image(data, affine), tmp_path / f"{name}.nii.gz")
    builder = StackBuilder(short(), "T1w", load_scan(tmp_path / "T1w.nii.gz"))
    builder.add_mask(load_scan(tmp_path / "mask.nii.gz", labels=True))
    stack = builder.build()
    back = np.asarray(stack.to_native(stack.mask).dataobj)
    first = low + round(builder.cut_mm / 3)
    assert not back[:, :, :first].any()
    np.testing.assert_array_equal(back[:, :, first:], labels[:, :, first:])
    cut = np.count_nonzero(labels[:, :, :first])
    note = f"{cut} of {np.count_nonzero(labels)} labelled voxels of the mask lie below the field of view"
    assert any(line.startswith(note) and line.endswith("lost codes: 7") for line in builder.quality[0].notes)


def test_prepare_and_predict_give_the_same_stack(head, centred, tmp_path, tiny_backbone):
    affine = centred((40, 48, 36), np.eye(3) * 3.0)
    file = tmp_path / "sub-1_T1w.nii.gz"
    nib.save(nib.Nifti1Image(head.image((40, 48, 36), affine, noise=3), affine), file)
    (tmp_path / "manifest.tsv").write_text(f"subject\tcontrast\tpath\n1\tT1w\t{file.name}\n")
    store = prepare(tmp_path / "manifest.tsv", tmp_path / "store", short())
    assert store.preprocessing.field_of_view_mm == KEPT_MM
    store.preprocessing.save(tmp_path)
    preprocessing = Preprocessing.load(tmp_path)
    predictor = Predictor(BrainFoundModel.from_backbone(tiny_backbone, contrasts=("T1w",)), preprocessing)
    (session,) = Cohort.read(tmp_path / "manifest.tsv").sessions()
    ready = predictor.prepare(session)
    np.testing.assert_array_equal(ready.stack.pixels, store[0].pixels)
    np.testing.assert_allclose(ready.stack.affine, store[0].affine)
    assert any("below the field of view are cut off" in note for note in ready.notes)
    assert "cut_mm" in (store.path / "quality.tsv").read_text().splitlines()[0]


def test_settings_of_before_keep_the_whole_head(tmp_path):
    short().save(tmp_path)
    file = tmp_path / "preprocessing.json"
    lines = [line for line in file.read_text().splitlines() if "field_of_view_mm" not in line]
    file.write_text("\n".join(lines))
    assert Preprocessing.load(tmp_path).field_of_view_mm is None
