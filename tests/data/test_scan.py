"""Reading one scan, and every way in which it can be unusable."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest

from brainfound.data.scan import load_scan
from brainfound.errors import ScanError


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "LIA", "SAR", "ILP"])
def test_any_axis_order_gives_the_same_ras_volume(write_scan, axes, tmp_path):
    path = write_scan("a.nii.gz")
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    nib.save(nib.load(path).as_reoriented(turn), tmp_path / "turned.nii.gz")
    scan, turned = load_scan(path), load_scan(tmp_path / "turned.nii.gz")
    np.testing.assert_array_equal(turned.data, scan.data)
    np.testing.assert_allclose(turned.affine, scan.affine, atol=1e-5)
    assert "".join(nib.aff2axcodes(turned.native_affine)) == axes


def test_scaled_integers_are_scaled(tmp_path):
    image = nib.Nifti1Image(np.arange(60).reshape(3, 4, 5).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "a.nii")
    expected = np.asarray(nib.load(tmp_path / "a.nii").dataobj).max()
    assert load_scan(tmp_path / "a.nii").data.max() == pytest.approx(expected)


def test_trailing_axis_of_one_is_dropped(write_scan):
    assert load_scan(write_scan("a.nii.gz", np.random.rand(5, 6, 7, 1))).data.shape == (5, 6, 7)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _not_an_image(path):
    path.write_bytes(gzip.compress(b"hello" * 100))


@pytest.mark.parametrize("break_file", [_truncate, _not_an_image])
def test_broken_files_are_refused_in_one_line(write_scan, break_file):
    path = write_scan("a.nii.gz", np.random.rand(20, 20, 20))
    break_file(path)
    with pytest.raises(ScanError, match=r"a\.nii\.gz: cannot be read") as caught:
        load_scan(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.random.rand(5, 6, 7, 3), "not a 3-D volume"),
        (np.zeros((5, 6, 7)), "all voxels are zero"),
        (np.full((5, 6, 7), 3.0), "all voxels have the value 3"),
        (np.where(np.arange(210).reshape(5, 6, 7) == 9, np.nan, 1.0), "NaN or infinite"),
        (np.where(np.arange(210).reshape(5, 6, 7) == 9, np.inf, 1.0), "NaN or infinite"),
        (np.random.rand(1, 6, 7), "implausible size"),
    ],
)
def test_unusable_content_is_refused(write_scan, data, reason):
    with pytest.raises(ScanError, match=reason):
        load_scan(write_scan("a.nii.gz", data))


def test_missing_file_and_singular_affine(write_scan, tmp_path):
    with pytest.raises(ScanError, match="no such file"):
        load_scan(tmp_path / "none.nii.gz")
    affine = np.eye(4)
    image = nib.Nifti1Image(np.random.rand(5, 6, 7), affine)
    image.header["srow_x"] = image.header["srow_y"]
    image.header["sform_code"] = 1
    image.header["qform_code"] = 0
    image.to_filename(tmp_path / "b.nii")
    raw = bytearray((tmp_path / "b.nii").read_bytes())
    raw[280:296] = raw[296:312]  # srow_x := srow_y
    (tmp_path / "b.nii").write_bytes(raw)
    with pytest.raises(ScanError, match="affine"):
        load_scan(tmp_path / "b.nii")


def test_label_maps_may_be_empty_but_must_be_whole_numbers(write_scan):
    assert load_scan(write_scan("m.nii.gz", np.zeros((4, 4, 4), np.uint8)), labels=True).data.max() == 0
    with pytest.raises(ScanError, match="not a label map"):
        load_scan(write_scan("p.nii.gz", np.random.rand(4, 4, 4)), labels=True)
