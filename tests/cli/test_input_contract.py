"""The input contract at the door of predict, embed and explain, and options that contradict a model."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfound.data.checking.contract import FILE_NAME


@pytest.fixture
def scans(tmp_path, make_cohort):
    """Three sessions; the T1w of the second is a label map."""
    cohort = make_cohort(tmp_path / "cohort", num_subjects=3)
    file = cohort / "s01_T1w.nii.gz"
    image = nib.load(file)
    values = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(np.digitize(values, [1, 80, 100, 120]).astype(np.uint8), image.affine), file)
    return cohort


def _files(scans, subject):
    return [f"{contrast}={scans / f'{subject}_{contrast}.nii.gz'}" for contrast in ("T1w", "T2w", "FLAIR")]


def test_an_answer_says_what_does_not_fit(cli, scans, classifier, tmp_path):
    answer = cli("predict", classifier, *_files(scans, "s01"), "--out", tmp_path / "a")
    assert answer.code == 3
    assert "✗ T1w: only 5 different values, as in a mask or label map" in answer.err
    content = json.loads((tmp_path / "a" / "s01_T1w.json").read_text(encoding="utf-8"))
    assert content["input_level"] == "fail"
    assert [note for note in content["notes"] if note.startswith("✗ T1w: only 5 different values")]
    assert "s01" not in str(content["notes"])
    fine = cli("predict", classifier, *_files(scans, "s00"), "--out", tmp_path / "a")
    assert fine.code == 0, fine.err
    content = json.loads((tmp_path / "a" / "s00_T1w.json").read_text(encoding="utf-8"))
    assert (content["input_level"], content["notes"]) == ("ok", [])


def test_strict_refuses_instead(cli, scans, classifier, tmp_path):
    answer = cli("predict", classifier, *_files(scans, "s01"), "--out", tmp_path / "a", "--strict")
    assert answer.code == 3
    assert "unfit for the model" in answer.line
    assert not (tmp_path / "a").exists()
    cohort = cli("predict", classifier, scans, "--out", tmp_path / "b", "--strict")
    assert cohort.code == 3
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["s00_ses-1.json", "s02_ses-1.json"]
    assert "1 of 3 sessions unfit for the model (1 refused)" in cohort.line


@pytest.mark.parametrize("verb", ["predict", "embed", "explain"])
def test_a_cohort_s_table_and_summary(cli, scans, classifier, tmp_path, verb):
    more = ["--method", "pca"] if verb == "explain" else []
    answer = cli(verb, classifier, scans, "--out", tmp_path / "a", *more)
    assert answer.code == 3
    (row,) = [line for line in answer.out.splitlines() if "s01" in line]
    assert "✗ T1w: only" in row
    assert ["✗" in line for line in answer.out.splitlines() if "s00" in line or "s02" in line] == [False, False]
    assert "1 of 3 sessions unfit for the model; the first: ✗ T1w: only 5" in answer.line


def test_an_age_beyond_the_training_is_noted(cli, scans, classifier, tmp_path):
    table = pd.read_csv(scans / "manifest.tsv", sep="\t", dtype=str)
    table.loc[table["subject"] == "s02", "age_years"] = "97"
    table[table["subject"] != "s01"].to_csv(scans / "manifest.tsv", sep="\t", index=False)
    answer = cli("predict", classifier, scans, "--out", tmp_path / "a")
    assert answer.code == 0
    assert "1 of 2 sessions in need of a look; the first: ! 97 years" in answer.line


def test_a_model_without_a_contract_says_so(cli, scans, encoder, tmp_path):
    answer = cli("embed", encoder, *_files(scans, "s01"), "--out", tmp_path / "a")
    assert answer.code == 0
    assert "carries no input contract" in answer.line
    assert json.loads((tmp_path / "a" / "s01_T1w.json").read_text(encoding="utf-8"))["input_level"] is None


def test_an_encoder_with_a_contract_is_checked(cli, scans, encoder, classifier, tmp_path):
    shutil.copytree(encoder, tmp_path / "model")
    shutil.copy(classifier / "export" / FILE_NAME, tmp_path / "model" / FILE_NAME)
    answer = cli("embed", tmp_path / "model", *_files(scans, "s01"), "--out", tmp_path / "a")
    assert answer.code == 3
    assert "as in a mask" in answer.err


@pytest.fixture(scope="session")
def encoder(small_store, tiny_backbone, tmp_path_factory):
    from brainfound.models import BrainFoundModel

    folder = tmp_path_factory.mktemp("encoder") / "export"
    BrainFoundModel.from_backbone(tiny_backbone, contrasts=small_store.contrasts).save_pretrained(folder)
    small_store.preprocessing.save(folder)
    return folder


@pytest.mark.parametrize(("verb", "more"), [("predict", []), ("embed", []), ("explain", ["--method", "pca"])])
def test_what_is_there_is_not_overwritten(cli, scans, classifier, tmp_path, verb, more):
    given = (verb, classifier, *_files(scans, "s00"), "--out", tmp_path / "a", *more)
    assert cli(*given).code == 0
    again = cli(*given)
    assert again.code == 2
    assert "an answer of this name already exists" in again.line
    assert cli(*given, "--overwrite").code == 0


def test_like_with_an_option_that_contradicts_it(cli, scans, small_store, tmp_path):
    like = ("prepare", scans, tmp_path / "store", "--like", small_store.path)
    for option in (
        ["--contrasts", "T1w"],
        ["--contrasts", "FLAIR,T2w,T1w"],
        ["--set", "size=[24,24]"],
        ["--set", "bits=16"],
        ["--set", "contrasts=[T2w]"],
    ):
        answer = cli(*like, *option)
        assert answer.code == 2, option
        assert "contradicts --like" in answer.line
    assert not (tmp_path / "store").exists()
    fine = cli(*like, "--contrasts", "t1w,t2w,flair", "--set", "size=[32,32]")
    assert fine.code == 0, fine.err
