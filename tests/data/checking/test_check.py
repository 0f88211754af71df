"""Checks of scans against a model's contract: each question has an input that fails it, and a good one passes all."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfound.data.checking.check import check_session, load_model_contract, scan_to_dict
from brainfound.data.checking.contract import InputContract
from brainfound.data.checking.mean_stack import coarse_volume, encode
from brainfound.data.checking.rules import age_finding, skull_finding, slices_finding, worst_level
from brainfound.data.cohort import Session
from brainfound.data.hooks import Hook
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.errors import ModelError

PREPROCESSING = Preprocessing(contrasts=("T1w", "FLAIR"), spacing_mm=(4, 4, 4), size=(48, 48))
CONTRACT = InputContract(
    contrasts=("T1w", "FLAIR"),
    spacing_mm=(4, 4, 4),
    size=(48, 48),
    num_sessions=10,
    coarsest_mm={"T1w": 4.0, "FLAIR": 4.0},
    skull={"T1w": "stripped", "FLAIR": "stripped"},
    age_years=(20, 80),
    num_slices=(30, 40),
    foreground_ml=(1000, 1500),
    negative_values=False,
)
RADII_MM = {"stripped": (62.0, 76.0, 64.0), "head": (85.0, 104.0, 100.0)}


def _image(spacing=4.0, radii=RADII_MM["stripped"], shape=(56, 60, 56), seed=0):
    """A textured ellipsoid on exact zero."""
    scale = np.broadcast_to(spacing, 3)
    grid = (np.indices(shape) - (np.array(shape)[:, None, None, None] - 1) / 2) * scale[:, None, None, None]
    radius = (grid**2 / np.array(radii)[:, None, None, None] ** 2).sum(axis=0)
    rng = np.random.default_rng(seed)
    return np.where(radius < 1, 300 + 200 * (1 - radius) + rng.normal(0, 20, shape), 0).astype(np.float32)


_MEAN = encode(coarse_volume(_image().transpose(2, 1, 0) / 2, np.full(3, 4.0)))
CONTRACT = CONTRACT.model_copy(update={"mean_stack": {"T1w": _MEAN, "FLAIR": _MEAN}})


def _write(path: Path, data=None, spacing=4.0, affine=None, **header) -> Path:
    data = _image() if data is None else data
    if affine is None:
        affine = np.diag([*np.broadcast_to(spacing, 3), 1.0])
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(data.shape) - 1) / 2)
    image = nib.Nifti1Image(data, affine)
    for name, value in header.items():
        getattr(image, name)(*value)
    nib.save(image, path)
    return path


def _check(scans, contract=CONTRACT, preprocessing=PREPROCESSING, **covariates):
    session = Session("ann", "1", scans, {"age_years": 50, **covariates}, {})
    return check_session(session, preprocessing, contract)


def _t1(tmp_path, *arguments, contract=CONTRACT, preprocessing=PREPROCESSING, **settings):
    return _check({"T1w": _write(tmp_path / "t1.nii.gz", *arguments, **settings)}, contract, preprocessing).scans[0]


def _said(scan, check):
    return " ".join(finding.message for finding in scan.findings if finding.check == check)


def test_a_scan_like_the_training_scans_passes_every_question(tmp_path):
    scans = {"T1w": _write(tmp_path / "a.nii"), "FLAIR": _write(tmp_path / "b.nii", _image(seed=1))}
    checked = _check(scans)
    assert [finding for scan in checked.scans for finding in scan.findings if finding.level != "ok"] == []
    asked = [{finding.check for finding in scan.findings} for scan in checked.scans]
    one = {"contrast", "file", "orientation", "spacing", "intensity", "skull", "field", "position"}
    assert asked == [one, one | {"overlap"}]
    assert [(f.check, f.level) for f in checked.findings] == [("slices", "ok"), ("age", "ok")]
    assert checked.level == "ok"
    assert checked.stack.present.all()


def test_unreadable_files_and_headers(tmp_path):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    scan = _check({"T1w": broken}).scans[0]
    assert (scan.level, scan.check_level("file"), scan.quality) == ("fail", "fail", None)
    assert "broken" not in _said(scan, "file"), "names of files stay out"
    (tmp_path / "jane.hdr").write_bytes(b"x")
    half = _check({"T1w": tmp_path / "jane.hdr"}).scans[0]
    assert "the .img file of the same name" in _said(half, "file")
    assert "jane" not in _said(half, "file")
    gone = _check({"T1w": tmp_path / "gone.nii.gz"}).scans[0]
    assert "no such file" in _said(gone, "file")
    constant = _t1(tmp_path, np.zeros((20, 20, 20), np.float32))
    assert "all voxels are zero" in _said(constant, "file")


def test_the_next_scan_gives_the_grid_if_the_first_is_broken(tmp_path):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    checked = _check({"T1w": broken, "FLAIR": _write(tmp_path / "b.nii")})
    assert [scan.level for scan in checked.scans] == ["fail", "ok"]
    assert checked.stack.present.tolist() == [False, True]
    assert checked.level == "fail"


def test_an_orientation_that_the_header_does_not_say(tmp_path):
    scan = _t1(tmp_path, set_sform=(None, 0), set_qform=(None, 0))
    assert scan.check_level("orientation") == "warn"
    assert "no orientation" in _said(scan, "orientation")


def test_sform_and_qform_that_disagree(tmp_path):
    turned = np.diag([-4.0, 4, 4, 1])
    scan = _t1(tmp_path, set_qform=(turned, 1))
    assert scan.check_level("orientation") == "warn"
    assert "disagree" in _said(scan, "orientation")


@pytest.mark.parametrize(("thick", "level"), [(5.9, "ok"), (6.5, "warn")])
def test_voxels_much_coarser_than_in_training(tmp_path, thick, level):
    spacing = (4.0, 4.0, thick)
    scan = _t1(tmp_path, _image(spacing, shape=(56, 60, 34)), spacing=spacing)
    assert scan.check_level("spacing") == level
    if level == "warn":
        assert "6.5 mm long; the coarsest training scan of T1w had 4 mm" in _said(scan, "spacing")


def test_without_a_contract_the_grid_is_what_spacing_is_compared_with(tmp_path):
    contract = InputContract.from_preprocessing(PREPROCESSING)
    assert _t1(tmp_path, contract=contract).check_level("spacing") == "ok"
    fine = Preprocessing(contrasts=("T1w",), spacing_mm=(1, 1, None), size=(256, 256))
    scan = _t1(tmp_path, contract=InputContract.from_preprocessing(fine), preprocessing=fine)
    assert scan.check_level("spacing") == "warn"
    own = Preprocessing(contrasts=("T1w",), spacing_mm=(None, None, None), size=(48, 48))
    scan = _t1(tmp_path, contract=InputContract.from_preprocessing(own), preprocessing=own)
    assert scan.check_level("spacing") is None
    assert scan.check_level("skull") is None


def test_a_contrast_that_no_training_session_had(tmp_path):
    contract = CONTRACT.model_copy(update={"coarsest_mm": {"FLAIR": 4.0}})
    scan = _t1(tmp_path, contract=contract)
    assert scan.check_level("contrast") == "warn"
    assert scan.check_level("spacing") is None


def test_a_contrast_that_training_always_showed_is_missed(tmp_path):
    contract = CONTRACT.model_copy(update={"never_absent": ("T1w", "FLAIR")})
    checked = _check({"T1w": _write(tmp_path / "a.nii")}, contract)
    (finding,) = [finding for finding in checked.findings if finding.check == "contrast"]
    assert finding.level == "warn"
    assert finding.message.startswith("FLAIR is missing")


def test_masks_and_label_maps_are_no_images(tmp_path):
    image = _image()
    labels = np.digitize(image, [1, 350, 400, 450]).astype(np.float32)
    scan = _t1(tmp_path, labels)
    assert scan.check_level("intensity") == "fail"
    assert "as in a mask" in _said(scan, "intensity")
    # An anatomical map: many codes, each filling a region.
    blocks = np.indices(image.shape) // 14
    anatomy = np.where(image > 0, 1 + blocks[0] + 10 * blocks[1] + 3 * blocks[2], 0).astype(np.int16)
    assert len(np.unique(anatomy)) > 20
    assert _t1(tmp_path, anatomy).check_level("intensity") == "fail"
    bytes_ = (image / image.max() * 255).astype(np.uint8)
    assert _t1(tmp_path, bytes_).check_level("intensity") == "ok", "whole numbers alone make no label map"


def test_coarse_quantisation_and_clipping(tmp_path):
    image = _image()
    scan = _t1(tmp_path, np.round(image / 25) * 25)
    assert scan.check_level("intensity") == "warn"
    assert "coarsely quantised" in _said(scan, "intensity")
    high = np.percentile(image[image > 0], 90)
    scan = _t1(tmp_path, np.minimum(image, high))
    assert scan.check_level("intensity") == "warn"
    assert "10% of the foreground has the highest value" in _said(scan, "intensity")
    little = np.minimum(image, np.percentile(image[image > 0], 99))
    assert _t1(tmp_path, little).check_level("intensity") == "ok"


def test_negative_values(tmp_path):
    image = _image()
    image[20, 20, 20:30] = -9
    scan = _t1(tmp_path, image)
    assert scan.check_level("intensity") == "note"
    assert "down to -9, which no training scan had" in _said(scan, "intensity")
    used_to = CONTRACT.model_copy(update={"negative_values": True})
    assert _t1(tmp_path, image, contract=used_to).check_level("intensity") == "ok"
    image[20, 20, 20:30] = -900
    assert _t1(tmp_path, image, contract=used_to).check_level("intensity") == "warn"


def test_a_map_in_another_unit(tmp_path):
    preprocessing = Preprocessing(contrasts=("T1w",), spacing_mm=(4, 4, 4), size=(48, 48), ranges={"T1w": (0, 600)})
    image = _image()
    assert _t1(tmp_path, image, preprocessing=preprocessing).check_level("intensity") == "ok"
    scan = _t1(tmp_path, image * 1000, preprocessing=preprocessing)
    assert scan.check_level("intensity") == "fail"
    assert "outside of 0 to 600" in _said(scan, "intensity")


@pytest.mark.parametrize(
    ("model", "scan", "level"),
    [
        ("stripped", "stripped", "ok"),
        ("stripped", "head", "fail"),
        ("head", "stripped", "fail"),
        ("head", "head", "ok"),
        ("head", "unclear", "warn"),
        ("mixed", "head", None),
        ("unknown", "stripped", None),
    ],
)
def test_the_skull_must_be_as_in_training(tmp_path, model, scan, level):
    quality = replace(_t1(tmp_path).quality, skull=scan)
    contract = CONTRACT.model_copy(update={"skull": {"T1w": model}, "hooks": ("mine",)})
    found = skull_finding(quality, contract)
    assert (found and found.level) == level
    if (model, scan) == ("stripped", "head"):
        assert "--hook mine" in found.remedy
    if (model, scan) == ("head", "stripped"):
        assert "before skull-stripping" in found.remedy
    assert skull_finding(replace(quality, contrast="FLAIR"), contract) is None, "of which nothing is known"


@pytest.mark.parametrize(
    ("shape", "spacing", "state"),
    [
        ((56, 60, 56), 4.0, "stripped"),
        ((56, 60, 32), 4.0, "stripped"),  # a tight crop: small caps on two faces
        ((56, 60, 31), 4.0, "stripped"),  # 2 mm are cut off above and below
        ((56, 60, 20), (4.0, 4.0, 5.0), "unclear"),  # a slab of 20 slices
        ((20, 60, 56), 4.0, "unclear"),
    ],
)
def test_what_goes_on_beyond_the_volume_is_not_called_stripped(tmp_path, shape, spacing, state):
    file = _write(tmp_path / "t1.nii", _image(spacing, shape=shape), spacing=spacing)
    quality = _check({"T1w": file}).scans[0].quality
    assert quality.foreground_ml < 2200
    assert quality.skull == state


def test_the_head_of_an_infant_with_its_neck_is_not_called_stripped(tmp_path):
    shape = (56, 60, 56)
    head = _image(radii=(60, 75, 70), shape=shape)
    x, y, z = ((np.arange(n) - (n - 1) / 2) * 4 for n in shape)
    neck = (x[:, None, None] ** 2 + y[None, :, None] ** 2 < 34**2) & (z < 0)
    assert _t1(tmp_path, head).quality.skull == "stripped", "an ellipsoid of a brain's size ends within the volume"
    with_neck = _t1(tmp_path, np.where(neck & (head == 0), 250, head).astype(np.float32))
    assert with_neck.quality.foreground_ml < 2200
    assert with_neck.quality.skull == "unclear"


def test_a_whole_head_for_a_model_of_brains(tmp_path):
    scan = _t1(tmp_path, _image(radii=RADII_MM["head"]))
    assert scan.quality.skull == "head"
    assert scan.check_level("skull") == "fail"
    assert scan.check_level("field") == "warn", "its volume is far from that of the training's brains"


def test_a_brain_that_is_too_small_or_outside_of_the_field(tmp_path):
    small = _t1(tmp_path, _image(radii=(40, 40, 40)))
    assert "ml; 625 to 2400 were expected" in _said(small, "field")
    narrow = PREPROCESSING.model_copy(update={"size": (24, 24)})
    contract = CONTRACT.model_copy(update={"size": (24, 24)})
    cropped = _t1(tmp_path, preprocessing=narrow, contract=contract)
    assert cropped.check_level("field") == "warn"
    assert "outside of the model's 24 × 24 pixels" in _said(cropped, "field")
    assert "were expected" not in _said(cropped, "field")
    unmeasured = InputContract.from_preprocessing(PREPROCESSING)
    tiny = _t1(tmp_path, _image(radii=(30, 30, 30)), contract=unmeasured)
    assert "300 to 7000 were expected" in _said(tiny, "field")


def test_scans_that_hardly_overlap(tmp_path):
    first = _write(tmp_path / "a.nii")
    moved = np.array(nib.load(first).affine)
    moved[0, 3] += 80
    checked = _check({"T1w": first, "FLAIR": _write(tmp_path / "b.nii", _image(seed=1), affine=moved)})
    assert checked.scans[1].check_level("overlap") == "warn"
    moved[0, 3] += 400
    checked = _check({"T1w": first, "FLAIR": _write(tmp_path / "b.nii", _image(seed=1), affine=moved)})
    assert checked.scans[1].level == "fail"
    assert "does not overlap" in _said(checked.scans[1], "field")
    assert checked.stack.present.tolist() == [True, False]


def test_hooks_run_before_the_rules_are_checked(tmp_path):
    script = tmp_path / "strip.py"
    script.write_text(
        "import sys, nibabel as nib, numpy as np\n"
        "image = nib.load(sys.argv[1]); data = np.asarray(image.dataobj)\n"
        "axes = np.indices(data.shape) - (np.array(data.shape)[:, None, None, None] - 1) / 2\n"
        "inside = ((axes * 4 / np.array([62, 76, 64])[:, None, None, None]) ** 2).sum(0) < 1\n"
        "nib.save(nib.Nifti1Image(np.where(inside, data, 0).astype('f4'), image.affine), sys.argv[2])\n"
    )
    hook = Hook(name="strip", step="skull_strip", command=f"{sys.executable} {script} {{input}} {{output}}")
    session = Session("s", "1", {"T1w": _write(tmp_path / "a.nii", _image(radii=RADII_MM["head"]))}, {}, {})
    assert check_session(session, PREPROCESSING, CONTRACT).level == "fail"
    stripped = check_session(session, PREPROCESSING, CONTRACT, (hook,))
    assert [(scan.level, scan.quality.skull) for scan in stripped.scans] == [("ok", "stripped")]
    missing = hook.model_copy(update={"command": f"{sys.executable} gone.py {{input}} {{output}}"})
    failed = check_session(session, PREPROCESSING, CONTRACT, (missing,)).scans[0]
    assert "the hook strip failed" in _said(failed, "file")


def test_further_scans_are_registered_to_the_reference(tmp_path):
    script = tmp_path / "register.py"
    script.write_text("import sys, shutil; shutil.copy(sys.argv[2], sys.argv[3])")
    command = f"{sys.executable} {script} {{input}} {{reference}} {{output}}"
    hook = Hook(name="register", step="register", command=command)
    first = _write(tmp_path / "a.nii")
    away = np.array(nib.load(first).affine)
    away[0, 3] += 400
    scans = {"T1w": first, "FLAIR": _write(tmp_path / "b.nii", _image(seed=1), affine=away)}
    session = Session("s", "1", scans, {}, {})
    assert [scan.level for scan in check_session(session, PREPROCESSING, CONTRACT).scans] == ["ok", "fail"]
    registered = check_session(session, PREPROCESSING, CONTRACT, (hook,))
    assert [scan.level for scan in registered.scans] == ["ok", "ok"]


@pytest.mark.parametrize(("count", "level"), [(22, "warn"), (23, "ok"), (53, "ok"), (54, "warn")])
def test_the_number_of_slices(count, level):
    assert slices_finding(count, CONTRACT).level == level
    assert slices_finding(count, InputContract.from_preprocessing(PREPROCESSING)) is None


def test_a_short_stack_is_seen(tmp_path):
    short = _image()
    short[:, :, :20] = short[:, :, 36:] = 0
    checked = _check({"T1w": _write(tmp_path / "a.nii", short)})
    assert (checked.findings[0].check, checked.findings[0].level) == ("slices", "warn")
    assert "16 slices; training stacks had 30 to 40" in checked.findings[0].message


@pytest.mark.parametrize(
    ("age", "level"),
    [(20, "ok"), (80.0, "ok"), (19.9, "warn"), (81, "warn"), (None, "note"), (float("nan"), "note"), ("?", "note")],
)
def test_the_age(age, level):
    assert age_finding(age, CONTRACT).level == level
    assert age_finding(age, InputContract.from_preprocessing(PREPROCESSING)) is None


def test_names_of_contrasts(tmp_path):
    file = _write(tmp_path / "a.nii")
    checked = _check({"T1w": file, "SWI": _write(tmp_path / "b.nii"), "flare": _write(tmp_path / "c.nii")})
    used, other, unknown = checked.scans
    assert used.level == "ok"
    assert (other.level, other.is_used) == ("note", False)
    assert unknown.level == "fail"
    assert "FLAIR" in unknown.findings[0].remedy.upper()
    none = _check({"SWI": file})
    assert none.scans[0].level == "fail"
    assert "none of the model's contrasts (T1w, FLAIR)" in _said(none.scans[0], "contrast")
    assert none.stack is None


def test_the_same_file_twice_and_further_scans(tmp_path):
    file = _write(tmp_path / "a.nii")
    checked = _check({"T1w": file, "FLAIR": file})
    assert checked.scans[1].level == "fail"
    assert "listed as T1w" in _said(checked.scans[1], "contrast")
    session = Session("s", "1", {"T1w": file}, {}, {}, extra_scans=(("T1w", tmp_path / "other.nii"),))
    further = check_session(session, PREPROCESSING, CONTRACT).scans[1]
    assert (further.level, further.is_used) == ("note", False)


def test_plain_values_keep_names_only_if_requested(tmp_path):
    scan = _t1(tmp_path, _image(radii=RADII_MM["head"]))
    facts = scan_to_dict(scan, keep_ids=False)
    assert "t1.nii" not in str(facts)
    assert facts["checks"]["skull"] == "fail"
    assert facts["skull"] == "head"
    assert [found["check"] for found in facts["findings"]][:2] == ["skull", "field"]
    assert all(found["message"] and found["remedy"] for found in facts["findings"])
    assert scan_to_dict(scan, keep_ids=True)["file"] == "t1.nii.gz"


def test_models_stores_and_old_models(tmp_path, small_store):
    with pytest.raises(ModelError, match="no such folder"):
        load_model_contract(tmp_path / "gone")
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    PREPROCESSING.save(export)
    preprocessing, contract = load_model_contract(tmp_path / "run")
    assert preprocessing == PREPROCESSING
    assert not contract.is_measured
    CONTRACT.save(export)
    assert load_model_contract(export) == (PREPROCESSING, CONTRACT)
    preprocessing, contract = load_model_contract(small_store.path)
    assert preprocessing == small_store.preprocessing
    assert contract == InputContract.of(small_store)
    assert contract.num_sessions == len(small_store)


def test_the_gravest_level_counts():
    finding = slices_finding(1, CONTRACT)
    assert worst_level([]) == "ok"
    assert worst_level([replace(finding, level=level) for level in ("note", "fail", "warn")]) == "fail"
    assert worst_level([replace(finding, level=level) for level in ("warn", "note", "ok")]) == "warn"
