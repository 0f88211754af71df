"""``brainfound predict`` of a segmentation: what its options write."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage


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
    codes = np.asarray(nib.load(tmp_path / "more" / "s01_T1w_dseg.nii.gz").dataobj)
    pieces, count = ndimage.label(codes, structure=np.ones((3, 3, 3)))
    assert (np.bincount(pieces.ravel())[1:] * 27.0 >= 699.9).all(), count


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
