"""Bad input ends in one clear line and exit code 1, 2 or 3, and never stops the other scans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tests.damage import truncate

AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])
COARSE = ("--set", "spacing_mm=[4,4,4]", "--set", "size=[32,32]")


def save(path: Path, data: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(data, AFFINE), path)


def write_text(path: Path) -> None:
    path.write_text("not an image\n")


def write_4d(path: Path) -> None:
    save(path, np.ones((20, 20, 20, 3), np.float32))


def write_nan(path: Path) -> None:
    data = np.ones((20, 20, 20), np.float32)
    data[3, 4, 5] = np.nan
    save(path, data)


def write_zeros(path: Path) -> None:
    save(path, np.zeros((20, 20, 20), np.float32))


BAD_SCANS = {
    "missing": (Path.unlink, "no such file"),
    "truncated": (truncate, "cannot be read as an image"),
    "text": (write_text, "cannot be read as an image"),
    "four dimensions": (write_4d, "not a 3-D volume"),
    "NaN": (write_nan, "1 of 8000 voxels"),
    "zeros": (write_zeros, "all voxels are zero"),
}


@pytest.fixture
def source(tmp_path, make_cohort) -> Path:
    """Three sessions with three contrasts each."""
    return make_cohort(tmp_path / "source", num_subjects=3)


def rows_of(source: Path) -> list[list[str]]:
    return [line.split("\t") for line in (source / "manifest.tsv").read_text().splitlines()]


def rewrite(source: Path, rows: list[list[str]]) -> None:
    (source / "manifest.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", BAD_SCANS)
def test_prepare_rejects_the_bad_scan_alone(cli, source, tmp_path, kind):
    spoil, reason = BAD_SCANS[kind]
    spoil(source / "s01_T2w.nii.gz")
    answer = cli("prepare", source, tmp_path / "store", *COARSE)
    assert answer.code == 3
    assert reason in answer.line
    assert "rejected.tsv" in answer.line
    assert "s01_T2w" not in answer.line, "file names are kept out of messages"
    assert "s01_T2w.nii.gz" in cli("prepare", source, tmp_path / "store", *COARSE, "--keep-ids").line
    rejected = pd.read_csv(tmp_path / "store" / "rejected.tsv", sep="\t")
    assert rejected["file"].tolist() == ["s01_T2w.nii.gz"]
    sessions = pd.read_feather(tmp_path / "store" / "sessions.arrow")
    assert [list(present) for present in sessions["present"]] == [[True] * 3, [True, False, True], [True] * 3]


@pytest.mark.parametrize("kind", BAD_SCANS)
def test_predict_refuses_a_bad_scan_in_one_line(cli, classifier, source, tmp_path, kind):
    spoil, reason = BAD_SCANS[kind]
    spoil(source / "s01_T2w.nii.gz")
    answer = cli("predict", classifier, source / "s01_T2w.nii.gz", "--out", tmp_path / "answers")
    assert answer.code == (2 if kind == "missing" else 1)
    assert "s01_T2w.nii.gz" in answer.line
    assert reason in answer.line
    assert not (tmp_path / "answers").exists()


def test_predict_goes_on_where_a_session_fails(cli, classifier, source, tmp_path):
    rows = rows_of(source)
    rewrite(source, [row for row in rows if row[0] != "s01" or row[2] == "T1w"])
    truncate(source / "s01_T1w.nii.gz")
    answer = cli("predict", classifier, source, "--out", tmp_path / "answers")
    assert answer.code == 3
    assert "1 of 3 sessions" in answer.line
    assert "s01_T1w.nii.gz" in answer.line
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == ["s00_ses-1.json", "s02_ses-1.json"]


def test_predict_goes_on_without_a_bad_scan_and_says_so(cli, classifier, source, tmp_path):
    truncate(source / "s01_T1w.nii.gz")
    answer = cli("predict", classifier, source, "--out", tmp_path / "answers")
    assert answer.code == 3
    assert "s01_T1w.nii.gz" in answer.line
    content = json.loads((tmp_path / "answers" / "s01_ses-1.json").read_text())
    assert content["missing_contrasts"] == ["T1w"]
    assert "s01_T1w.nii.gz" in content["rejected"][0]
    assert json.loads((tmp_path / "answers" / "s00_ses-1.json").read_text())["rejected"] == []


def test_predict_ends_with_1_where_every_session_fails(cli, classifier, source, tmp_path):
    for file in source.glob("*w.nii.gz"):
        truncate(file)
    rewrite(source, [row for row in rows_of(source) if row[2] != "FLAIR"])
    answer = cli("predict", classifier, source, "--out", tmp_path / "answers")
    assert answer.code == 1
    assert "3 of 3 sessions" in answer.line


def test_an_unknown_contrast_in_a_manifest_stops_no_other_scan(cli, classifier, source, tmp_path):
    rows = rows_of(source)
    rows[4][2] = "T9w"
    rewrite(source, rows)
    answer = cli("prepare", source, tmp_path / "store", *COARSE, "--keep-ids")
    assert answer.code == 3
    assert "unknown contrast 'T9w'" in answer.line
    assert "s01_T1w.nii.gz" in answer.line
    assert len(pd.read_feather(tmp_path / "store" / "sessions.arrow")) == 3
    answer = cli("predict", classifier, source, "--out", tmp_path / "answers")
    assert answer.code == 3
    assert "unknown contrast 'T9w'" in answer.line
    assert len(list((tmp_path / "answers").iterdir())) == 3


def test_one_file_listed_as_two_contrasts_is_used_once(cli, source, tmp_path):
    rows = rows_of(source)
    rows[2][3] = rows[1][3]
    rewrite(source, rows)
    answer = cli("prepare", source, tmp_path / "store", *COARSE, "--keep-ids")
    assert answer.code == 3
    assert "s00_T1w.nii.gz: the same file is listed as T1w" in answer.line


def test_a_second_scan_of_a_contrast_is_listed_and_is_no_failure(cli, source, tmp_path):
    shutil.copy(source / "s00_T1w.nii.gz", source / "again_T1w.nii.gz")
    rows = rows_of(source)
    rewrite(source, [*rows, [*rows[1][:3], "again_T1w.nii.gz", *rows[1][4:]]])
    answer = cli("prepare", source, tmp_path / "store", *COARSE)
    assert answer.code == 0
    assert answer.err == ""
    assert "1 further scans" in answer.out
    listed = pd.read_csv(tmp_path / "store" / "rejected.tsv", sep="\t")
    assert listed[["file", "reason"]].to_numpy().tolist() == [
        ["again_T1w.nii.gz", "another scan of this contrast is used: s00_T1w.nii.gz"]
    ]
    assert json.loads((tmp_path / "store" / "store.json").read_text())["num_rejected_files"] == 0


@pytest.mark.parametrize("fault", ["truncated", "4-D", "gone", "elsewhere"])
def test_the_next_scan_of_a_contrast_is_tried(cli, classifier, source, tmp_path, fault):
    rows, first = rows_of(source), source / "s00_T2w.nii.gz"
    for name in ("again_T2w.nii.gz", "third_T2w.nii.gz"):
        shutil.copy(first, source / name)
    rewrite(source, [*rows, *([*rows[2][:3], f"{name}_T2w.nii.gz", *rows[2][4:]] for name in ("again", "third"))])
    image = nib.load(first)
    if fault == "truncated":
        truncate(first)
    elif fault == "4-D":
        nib.save(nib.Nifti1Image(np.stack([image.get_fdata()] * 2, axis=-1), image.affine), first)
    elif fault == "gone":
        first.unlink()
    else:
        nib.save(nib.Nifti1Image(image.get_fdata(), np.diag([3.0, 3, 3, 1]) + 900 * np.eye(4, k=3)), first)
    assert cli("prepare", source, tmp_path / "store", *COARSE).code == 3
    listed = pd.read_csv(tmp_path / "store" / "rejected.tsv", sep="\t").set_index("file")["reason"]
    assert set(listed.index) == {"s00_T2w.nii.gz", "third_T2w.nii.gz"}
    assert listed["third_T2w.nii.gz"] == "another scan of this contrast is used: again_T2w.nii.gz"
    quality = pd.read_csv(tmp_path / "store" / "quality.tsv", sep="\t").set_index(["subject", "contrast"])
    used = quality.loc[("s00", "T2w")]
    assert used["file"] == "again_T2w.nii.gz"
    assert "scan 2 of 3 of this contrast is used, since the first cannot be (" in used["notes"]
    checked = cli("check", source, "--contrasts", "T1w,T2w")
    assert checked.code == 3
    assert "scan 2 of 3 of this contrast is used, since the first cannot be (" in checked.out
    assert cli("predict", classifier, source, "--out", tmp_path / "answers").code == 3
    answer = json.loads((tmp_path / "answers" / "s00_ses-1.json").read_text())
    assert "T2w" in answer["contrasts"]
    assert any("scan 2 of 3" in note for note in answer["notes"])
    assert any("s00_T2w.nii.gz" in reason for reason in answer["rejected"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{tmp}/nowhere", "{tmp}/store"], 2, ["nowhere", "no such file or folder", "Check the path"]),
        (["{tmp}/empty", "{tmp}/store"], 2, ["empty", "this is an empty folder, not a source of scans"]),
        (["{store}", "{tmp}/store"], 2, ["this is a store, not a source of scans", "evaluate"]),
        (["{source}", "{store}"], 2, ["other preprocessing", "--overwrite"]),
        (["{source}", "{tmp}/store", "--contrasts", "T1,T9"], 2, ["contrasts", "unknown contrast 'T9'", "T1w"]),
        (["{source}", "{tmp}/store", "--contrasts", "flare"], 2, ["Did you mean FLAIR?"]),
        (["{source}", "{tmp}/store", "--contrasts", "SWI"], 1, ["none of the wanted contrasts (SWI). Check the files"]),
        (["{source}", "{tmp}/store", "--contrasts", "SWI", "--keep-ids"], 1, ["none of the wanted", "s00_T1w.nii.gz"]),
        (["{source}", "{tmp}/store", "--set", "sise=[32,32]"], 2, ["sise", "Did you mean size?"]),
        (["{source}", "{tmp}/store", "--set", "a"], 2, ["--set a", "key=value"]),
        (["{source}", "{tmp}/store", "--mask", "dseg"], 2, ["'dseg'", "expected mask"]),
        (["{source}", "{source}/manifest.tsv/store"], 2, ["manifest.tsv/store", "a file is in the way"]),
        (["{source}", "{tmp}/store", "--workers", "none"], 2, ["--workers", "brainfound prepare --help"]),
        (["{source}"], 2, ["Missing argument", "brainfound prepare --help"]),
    ],
)
def test_prepare_says_what_is_wrong(cli, source, small_store, tmp_path, arguments, code, words):
    (tmp_path / "empty").mkdir()
    places = {"tmp": tmp_path, "source": source, "store": small_store.path}
    answer = cli("prepare", *(text.format(**places) for text in arguments))
    assert answer.code == code
    assert [word for word in words if word not in answer.line] == []
    assert not (tmp_path / "store").exists()


FINETUNE = ["finetune", "finetune-classification", "--data", "{store}", "--model", "{backbone}", "--out", "{tmp}/run"]
DIAGNOSIS = [*FINETUNE, "--target", "diagnosis"]
PRETRAIN = ["pretrain", "pretrain-demo", "--data", "{store}", "--out", "{tmp}/run"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([*FINETUNE, "--target", "agee"], 2, ["no column 'agee'", "Did you mean age_years?"]),
        ([*FINETUNE, "--target", "mask"], 2, ["the mask can only be segmented"]),
        ([*FINETUNE], 2, ["Missing option", "--target", "brainfound finetune --help"]),
        ([*DIAGNOSIS, "--set", "engin.steps=2"], 2, ["engin", "unknown key", "Did you mean engine?"]),
        ([*DIAGNOSIS, "--set", "adapter.rank=4"], 2, ["adapter", "--set adapter=VALUE"]),
        ([*DIAGNOSIS, "--set", "engine.steps=none"], 2, ["engine.steps", "'none'"]),
        ([*DIAGNOSIS, "--set", "task=regression"], 2, ["column diagnosis", "numeric", "--set task=classification"]),
        ([*DIAGNOSIS, "--set", "task=segmentation"], 2, ["only the mask can be segmented", "'diagnosis'"]),
        ([*DIAGNOSIS, "--adapter", "lora-r9"], 2, ["lora-r9", "Did you mean lora-r8?"]),
        ([*DIAGNOSIS, "--split", "{tmp}/none.json"], 2, ["none.json", "splits.json of a run"]),
        ([*DIAGNOSIS, "--resume"], 2, ["no run to resume", "--resume"]),
        ([*DIAGNOSIS, "--out", "{run}"], 2, ["already holds a run", "--resume"]),
        ([*DIAGNOSIS, "--data", "{tmp}"], 2, ["not a store", "brainfound prepare"]),
        ([*DIAGNOSIS, "--model", "{store}"], 2, ["no config.json"]),
        ([*DIAGNOSIS, "--model", "{run}"], 2, ["this is a run, not a model", "Give its export"]),
        ([*DIAGNOSIS, "--model", "{run}/export"], 2, ["what a fine-tuning exported"]),
        (["finetune", "finetune-clasification", *DIAGNOSIS[2:]], 2, ["Did you mean finetune-classification?"]),
        ([*PRETRAIN, "--set", "views.globl_size=64"], 2, ["views.globl_size", "Did you mean views.global_size?"]),
        ([*PRETRAIN, "--resume"], 2, ["no run to resume"]),
        ([*PRETRAIN, "--init", "{tmp}"], 2, ["no config.json"]),
        ([*PRETRAIN, "--data", "{tmp}/nothing"], 2, ["nothing", "no such folder"]),
        (["pretrain", "pretrain-dem", *PRETRAIN[2:]], 2, ["Did you mean pretrain-demo?"]),
        (["pretrain", "pretrain-demo"], 2, ["no store was given", "--data STORE"]),
    ],
)
def test_training_says_what_is_wrong(cli, small_store, tiny_backbone, classifier, tmp_path, arguments, code, words):
    places = {"tmp": tmp_path, "store": small_store.path, "backbone": tiny_backbone, "run": classifier}
    answer = cli(*(text.format(**places) for text in arguments))
    assert answer.code == code
    assert [word for word in words if word not in answer.line] == []
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize("verb", ["predict", "embed", "explain", "check", "prepare"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{store}/slices", ["this is a folder inside a store", "evaluate"]),
        ("{run}/export", ["this is a fine-tuned model, not a source of scans"]),
        ("{backbone}", ["this is a model, not a source of scans"]),
        ("{tmp}/scans.zip", ["this is a zip archive", "Unpack it"]),
        ("{tmp}/raw", ["2 nnU-Net data sets", "Task02_Heart, Task05_Brain", "Choose one: ", "raw/Task02_Heart"]),
        ("{tmp}/raw/Task05_Brain/imagesTr", ["a part of an nnU-Net data set", "dataset.json"]),
    ],
)
def test_what_is_no_source_is_called_by_its_name(
    cli, classifier, small_store, tiny_backbone, tmp_path, verb, given, words
):
    (tmp_path / "scans.zip").write_bytes(b"PK")
    for name in ("Task05_Brain", "Task02_Heart"):
        (tmp_path / "raw" / name / "imagesTr").mkdir(parents=True)
        (tmp_path / "raw" / name / "dataset.json").write_text("{}")
        (tmp_path / "raw" / name / "imagesTr" / "case_0000.nii.gz").write_bytes(b"")
    given = given.format(tmp=tmp_path, store=small_store.path, run=classifier, backbone=tiny_backbone)
    arguments = {"check": ["check", given], "prepare": ["prepare", given, tmp_path / "out"]}
    answer = cli(*arguments.get(verb, [verb, classifier, given, "--out", tmp_path / "out"]))
    assert answer.code == 2
    assert [word for word in words if word not in answer.line] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("size=32", ["got 32, expected a list of 2 values", "Write --set 'size=[224, 224]'"]),
        ("size=(32, 32)", ["expected a list of 2 values", "'size=[224, 224]'"]),
        ("spacing_mm=[2, 2]", ["expected a list of 3 values", "'spacing_mm=[1, 1, 1]'"]),
        ("spacing_mm=[2, b, 2]", ["--set spacing_mm: ", "got 'b', expected a number"]),
        ("ranges={ADC: 3000}", ["--set ranges.ADC: ", "expected a list of 2 values"]),
        ("min_overlap=7", ["got 7, expected 1 or less"]),
        ("min_slices=no", ["got 'false', expected a whole number"]),
        ("percentiles=[1, 99", ["not valid YAML: expected ',' or ']'", "(line 1)"]),
    ],
)
def test_a_value_of_another_type_gets_plain_words_and_an_example(cli, source, tmp_path, value, words):
    answer = cli("prepare", source, tmp_path / "store", "--set", value)
    assert answer.code == 2
    assert [word for word in words if word not in answer.line] == []
    assert not [word for word in ("Input", "tuple", "dictionary", "integer") if word in answer.line]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["predict", "{source}", "{run}"], 2, ["no config.json"]),
        (["predict", "{scan}", "{run}"], 2, ["this is a file, not a model folder"]),
        (["predict", "{store}", "{source}"], 2, ["this is a store, not a model"]),
        (["predict", "{unfinished}", "{source}"], 2, ["unfinished", "the run has no export: it has not finished"]),
        (["predict", "{run}", "{tmp}/nowhere"], 2, ["nowhere", "no such file or folder"]),
        (["predict", "{run}", "{unfinished}"], 2, ["unfinished", "this is a run, not a source of scans"]),
        (["predict", "{run}", "{tmp}/plain.nii.gz"], 2, ["plain.nii.gz", "FLAIR=plain.nii.gz"]),
        (["predict", "{run}", "T9={scan}"], 2, ["unknown contrast 'T9'"]),
        (["predict", "{run}", "SWI={scan}"], 2, ["not trained with SWI", "expected T1w, T2w, FLAIR"]),
        (["predict", "{run}", "{scan}", "{scan}"], 2, ["two scans of T1w"]),
        (["predict", "{run}", "T1={scan}", "t1w={tmp}/plain.nii.gz"], 2, ["two scans of T1w", "plain.nii.gz"]),
        (["predict", "{run}", "{scan}", "FLAIR={scan}"], 2, ["s00_T1w.nii.gz", "FLAIR and as T1w"]),
        (["predict", "{run}", "{scan}", "--device", "gpu"], 2, ["device", "got gpu"]),
        (
            ["predict", "{run}", "{scan}", "--out", "{scan}"],
            2,
            ["s00_T1w.nii.gz", "a file is in the way of the output folder"],
        ),
        (["embed", "{segmenter}", "{scan}"], 2, ["segmentation", "no volume embedding"]),
        (["embed", "{backbone}", "{scan}"], 2, ["not a BrainFound model"]),
    ],
)
def test_predicting_says_what_is_wrong(
    cli, classifier, segmenter, small_store, tiny_backbone, source, tmp_path, arguments, code, words
):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("recipe.yaml", "run.json"):
        shutil.copy(classifier / name, unfinished / name)
    shutil.copy(source / "s00_FLAIR.nii.gz", tmp_path / "plain.nii.gz")
    places = {
        "tmp": tmp_path, "source": source, "scan": source / "s00_T1w.nii.gz", "run": classifier,
        "store": small_store.path, "unfinished": unfinished, "segmenter": segmenter, "backbone": tiny_backbone,
    }  # fmt: skip
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "{tmp}/answers"]
    answer = cli(*(text.format(**places) for text in arguments))
    assert answer.code == code
    assert [word for word in words if word not in answer.line] == []
    assert not (tmp_path / "answers").exists()


def test_a_mistyped_path_is_named_as_typed_before_the_model_is_loaded(cli, source, monkeypatch):
    monkeypatch.chdir(source.parent)
    for name in ("sub-x8_T1w.nii.gz", "sub-x8_T1ce.nii.gz", "sub-x8_mask.nii.gz"):
        for verb in ("predict", "embed", "explain"):
            answer = cli(verb, "no-model", f"source/{name}", "--out", "answers")
            assert answer.code == 2
            assert f"source/{name}: no such file. Check the path; scans are given as FILE" in answer.line
        answer = cli("check", f"T1w=source/{name}")
        assert f"source/{name}: no such file. Check the path" in answer.line


def test_one_session_has_the_line_of_the_cohort(cli, classifier, source, tmp_path):
    rewrite(source, rows_of(source)[:4])
    table = cli("predict", classifier, source, "--out", tmp_path / "all").out
    scans = []
    for contrast in ("T1w", "T2w", "FLAIR"):
        scans.append(tmp_path / f"sub-m0_ses-one_{contrast}.nii.gz")
        shutil.copy(source / f"s00_{contrast}.nii.gz", scans[-1])
    answer = cli("predict", classifier, *scans, "--out", tmp_path / "one")
    line, file = answer.out.splitlines()
    assert line.split()[0] in ("healthy", "patient")
    assert f" {line} " in table
    content = json.loads(Path(file).read_text())
    assert (content["subject"], content["session"]) == ("sub-m0", "one")
    embedded = cli("embed", classifier, scans[0], "--out", tmp_path / "vector")
    assert embedded.out.splitlines()[0] == "32 dimensions (without T2w, FLAIR)"


@pytest.mark.parametrize("how", [["--contrasts", "T1w,DWI,SWI"], ["--set", "contrasts=[T1w, DWI, SWI]"]])
def test_contrasts_that_no_session_has_are_noted(cli, source, tmp_path, how):
    line = "no session has DWI or SWI (there are T1w 3"
    answer = cli("prepare", source, tmp_path / "store", *COARSE, *how)
    assert answer.code == 0
    assert f"{line})" in answer.line
    if how[0] == "--contrasts":
        assert f"{line}, T2w 3, FLAIR 3)" in cli("check", source, *how).err
    assert cli("prepare", source, tmp_path / "other", *COARSE).err == ""


def test_a_scan_whose_name_says_another_contrast_is_noted(cli, classifier, source, tmp_path):
    answer = cli("predict", classifier, f"T1={source / 's00_FLAIR.nii.gz'}", "--out", tmp_path)
    assert answer.code == 0
    assert "s00_FLAIR.nii.gz was given as T1w, but the file name suggests FLAIR" in answer.line
    assert json.loads((tmp_path / "s00_FLAIR.json").read_text())["notes"] == [answer.line.removeprefix("brainfound: ")]


def test_embed_gives_the_embedding_that_a_head_reads(cli, classifier, source, tmp_path):
    answer = cli("embed", classifier, source / "s00_T1w.nii.gz", "--out", tmp_path)
    assert answer.code == 0
    vector = np.load(tmp_path / "s00_T1w_embedding.npy")
    assert vector.shape == (32,)
    assert np.isfinite(vector).all()
    content = json.loads((tmp_path / "s00_T1w.json").read_text())
    assert content["task"] == "embedding"
    assert "probabilities" not in content


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{tmp}", "--data", "{store}"], 2, ["no config.json"]),
        (["{unfinished}", "--data", "{store}"], 2, ["the run has no export: it has not finished"]),
        (["{run}", "--data", "{tmp}"], 2, ["not a store", "brainfound prepare"]),
        (["{run}", "--data", "{store}", "--part", "tset"], 2, ["--part", "got tset"]),
        (["{run}", "--data", "{store}", "--without", "T9"], 2, ["unknown contrast 'T9'"]),
        (["{run}"], 2, ["Missing option", "--data"]),
    ],
)
def test_evaluate_says_what_is_wrong(cli, classifier, small_store, tmp_path, arguments, code, words):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("recipe.yaml", "run.json"):
        shutil.copy(classifier / name, unfinished / name)
    places = {"tmp": tmp_path, "run": classifier, "store": small_store.path, "unfinished": unfinished}
    answer = cli("evaluate", *(text.format(**places) for text in arguments))
    assert answer.code == code
    assert [word for word in words if word not in answer.line] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prdict"], ["No such command 'prdict'", "brainfound --help"]),
        (["list", "adaptors"], ["adaptors", "Did you mean adapters?"]),
        (["show", "pretrain-dem"], ["pretrain-dem", "Did you mean pretrain-demo?"]),
        (["list", "--bogus"], ["No such option", "--bogus", "brainfound list --help"]),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(cli, arguments, words):
    answer = cli(*arguments, quiet=False)
    assert answer.code == 2
    assert [word for word in words if word not in answer.line] == []


@pytest.mark.parametrize("name", ["store.json", "scores.json", "run.json", "bundle.json", "config.json"])
@pytest.mark.parametrize(
    ("content", "fault"),
    [('{"a": ', "not valid JSON"), ("[1]", "the file has other content"), ("\x00", "not valid JSON")],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_damaged_file_is_one_line_of_show(cli, tmp_path, name, content, fault, options):
    (tmp_path / name).write_text(content)
    answer = cli("show", tmp_path, *options, quiet=False)
    assert answer.code == 1
    assert f"{name}: {fault}" in answer.line
    assert "Copy the folder again" in answer.line


def test_without_a_verb_the_help_is_shown(cli):
    answer = cli(quiet=False)
    assert answer.code == 2
    assert "prepare" in answer.err


def test_an_interrupt_ends_with_130(cli, monkeypatch, tmp_path):
    def interrupted(path, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("brainfound.data.cohort.Cohort.read", interrupted)
    answer = cli("prepare", tmp_path, tmp_path / "store")
    assert answer.code == 130
    assert "interrupted" in answer.line


def test_a_full_disk_is_one_line(cli, monkeypatch, tmp_path):
    def full(path, **_options):
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")

    monkeypatch.setattr("brainfound.data.cohort.Cohort.read", full)
    answer = cli("prepare", tmp_path, tmp_path / "store")
    assert answer.code == 1
    assert "No space left on device" in answer.line


def test_a_fault_of_the_program_is_not_hidden(cli, monkeypatch, tmp_path):
    def faulty(path, **_options):
        raise ZeroDivisionError

    monkeypatch.setattr("brainfound.data.cohort.Cohort.read", faulty)
    with pytest.raises(ZeroDivisionError):
        cli("prepare", tmp_path, tmp_path / "store")
