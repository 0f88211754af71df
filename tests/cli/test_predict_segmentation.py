"""``brainfound predict`` of a segmentation: what its options write."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainfound.models.stack_prediction import StackPrediction


def test_options_reach_the_files(cli, segmenter, source, tmp_path):
    scans = [source / f"s01_{contrast}.nii.gz" for contrast in ("T1w", "T2w", "FLAIR")]
    plain = cli("predict", segmenter, *scans, "--out", tmp_path / "plain", "--probabilities")
    assert plain.code == 0, plain.err
    answer, *files = plain.out.splitlines()
    assert answer.endswith(" mm³")
    assert [line.rsplit("/", 1)[1] for line in files] == [
        "s01_T1w_dseg.nii.gz",
        "s01_T1w_probability.nii.gz",
        "s01_T1w.json",
    ]
    again = ("predict", segmenter, *scans, "--out", tmp_path / "plain")
    refused = cli(*again)
    assert refused.code == 2
    assert "s01_T1w.json: an answer of this name already exists" in refused.line
    assert cli(*again, "--overwrite").code == 0
    options = ["--flip", "--overlap", "--min-volume-mm3", "700", "--probabilities"]
    assert cli("predict", segmenter, *scans, "--out", tmp_path / "more", *options).code == 0
    first, second = (json.loads((tmp_path / name / "s01_T1w.json").read_text()) for name in ("plain", "more"))
    assert not {"averaged", "min_volume_mm3", "removed_components"} & set(first)
    assert (second["averaged"], second["min_volume_mm3"]) == (["flips", "overlap"], 700.0)
    one, other = (nib.load(tmp_path / name / "s01_T1w_probability.nii.gz").get_fdata() for name in ("plain", "more"))
    assert np.abs(one - other).max() > 1e-4


def test_small_pieces_are_removed_from_the_file(cli, segmenter, write_scan, tmp_path, monkeypatch):
    """A model that marks what is bright, and a head with one large and two small bright blocks."""

    def bright(model, stack, *how):
        marked = stack.pixels[:, list(stack.contrasts).index("T1w")] > 200
        return StackPrediction(classes=marked.astype(np.uint8), foreground_probability=marked.astype(np.float32))

    monkeypatch.setattr("brainfound.inference.predictor.infer", bright)
    scan = write_scan("sub-1_T1w.nii.gz")
    voxels = nib.load(scan).get_fdata().clip(0, 200)
    for corner, size in (((14, 18, 14), 6), ((24, 30, 20), 2), ((24, 14, 20), 2)):
        voxels[tuple(slice(start, start + size) for start in corner)] = 600
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), nib.load(scan).affine), scan)
    num_pieces = {}
    for name, limit in (("all", 0), ("large", 2000)):
        options = ("--out", tmp_path / name, "--min-volume-mm3", limit)
        assert cli("predict", segmenter, scan, *options).code == 0
        codes = nib.load(tmp_path / name / "sub-1_T1w_dseg.nii.gz").get_fdata()
        num_pieces[name] = ndimage.label(codes, structure=np.ones((3, 3, 3)))[1]
    assert num_pieces == {"all": 3, "large": 1}
    answer = json.loads((tmp_path / "large" / "sub-1_T1w.json").read_text())
    assert answer["removed_components"] == {"label 1": 2}


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("classifier", ["--flip"], "are for segmentations"),
        ("classifier", ["--overlap"], "got a classification model"),
        ("classifier", ["--min-volume-mm3", "5"], "are for segmentations"),
        ("segmenter", ["--min-volume-mm3", "-1"], "min_volume_mm3: the smallest volume must be a number of at least 0"),
        ("segmenter", ["--min-volume-mm3", "nan"], "got nan"),
    ],
)
def test_options_that_do_not_fit_are_one_line(cli, request, source, tmp_path, model, options, words):
    folder = request.getfixturevalue(model)
    answer = cli("predict", folder, source / "s01_T1w.nii.gz", "--out", tmp_path / "answers", *options)
    assert answer.code == 2
    assert words in answer.line
    assert not (tmp_path / "answers").exists()
