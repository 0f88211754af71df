"""``brainfound explain``: its files, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

CONTRASTS = ("T1w", "T2w", "FLAIR")


def test_one_session_gets_its_maps(cli, classifier, source, tmp_path):
    scans = [source / f"s01_{contrast}.nii.gz" for contrast in ("T1w", "FLAIR")]
    answer = cli("explain", classifier, *scans, "--out", tmp_path / "maps", "--class", "patient")
    assert answer.code == 0, answer.err
    written = [Path(line).name for line in answer.out.split()]
    endings = ("slice-attention.nii.gz", "rollout.nii.gz", "gradient.nii.gz", "pca.nii.gz", "explanation.json")
    assert written == [f"s01_T1w_{ending}" for ending in endings]
    scan = nib.load(scans[0])
    for ending, last in zip(endings, ((), (), (3,), (3,)), strict=False):
        image = nib.load(tmp_path / "maps" / f"s01_T1w_{ending}")
        assert image.shape == (*scan.shape, *last)
        np.testing.assert_array_equal(image.affine, scan.affine)
    gradient = nib.load(tmp_path / "maps" / "s01_T1w_gradient.nii.gz").get_fdata()
    assert [bool(gradient[..., number].any()) for number in range(3)] == [True, False, True]
    content = json.loads((tmp_path / "maps" / "s01_T1w_explanation.json").read_text())
    assert content["gradient"]["of"] == "patient"
    assert content["missing_contrasts"] == ["T2w"]
    assert len(content["slices"]) == len(content["slice-attention"]["weights"]) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "gradcam"], "unknown method 'gradcam'"),
        (["--method", ""], "no method is given"),
        (["--class", "ill"], "the model has no class 'ill'"),
        (["--method", "pca", "--class", "patient"], "a class is for the gradient"),
    ],
)
def test_what_cannot_be_explained_ends_with_2(cli, classifier, source, tmp_path, options, words):
    answer = cli("explain", classifier, source, "--out", tmp_path / "maps", *options)
    assert answer.code == 2
    assert words in answer.line
    assert not (tmp_path / "maps").exists()


def test_a_cohort_goes_past_failures(cli, classifier, source, tmp_path):
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype=str).query("subject in ('s00', 's01')")
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    for file in table["path"]:
        shutil.copy(source / file, cohort / file)
    table.drop(columns="mask").to_csv(cohort / "manifest.tsv", sep="\t", index=False)
    ask = ("explain", classifier, cohort, "--out", tmp_path / "maps", "--method", "rollout,slice-attention")
    (cohort / "s01_T2w.nii.gz").write_bytes(b"not an image")
    answer = cli(*ask)
    assert answer.code == 3
    assert "all sessions done, but 1 scans rejected" in answer.line
    assert len(list((tmp_path / "maps").iterdir())) == 6
    assert "already done" in cli(*ask).out
    for contrast in CONTRASTS:
        (cohort / f"s01_{contrast}.nii.gz").write_bytes(b"not an image")
    answer = cli(*ask, "--overwrite")
    assert answer.code == 3
    assert "1 of 2 sessions could not be done" in answer.line
    for contrast in CONTRASTS:
        (cohort / f"s00_{contrast}.nii.gz").write_bytes(b"not an image")
    assert cli(*ask, "--overwrite").code == 1
