"""``brainfound list``: recipes, adapters and contrasts by name; of a cohort a summary, rows and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from brainfound.cli.main import app
from brainfound.errors import BrainFoundError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two persons in three sessions, one age missing, one functional scan."""
    for name in (
        "sub-anna/ses-a/anat/sub-anna_ses-a_T1w.nii.gz",
        "sub-anna/ses-a/anat/sub-anna_ses-a_run-2_T1w.nii.gz",
        "sub-anna/ses-a/anat/sub-anna_ses-a_FLAIR.nii.gz",
        "sub-anna/ses-b/anat/sub-anna_ses-b_T1w.nii.gz",
        "sub-ben/ses-a/anat/sub-ben_ses-a_T1w.nii.gz",
        "sub-ben/ses-a/func/sub-ben_ses-a_task-rest_bold.nii.gz",
        "derivatives/x/sub-anna/ses-a/anat/sub-anna_ses-a_label-lesion_mask.nii.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\nsub-anna\t40.5\tF\nsub-ben\tn/a\tM\n")
    return tmp_path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("recipes", "pretrain-vits14-laptop {about}"),
        ("adapters", "lora-r8 {about}"),
        ("contrasts", "T1ce {about} (t1c, t1ce, "),
    ],
)
def test_lists_have_names_and_what_they_stand_for(kind, line):
    rows = json.loads(run("list", kind, "--json"))
    text = run("list", kind).splitlines()
    assert len(text) == len(rows) > 5
    name = line.split()[0]
    (row,) = [row for row in rows if row["name"].strip() == name]
    assert len(row["about"]) > 10
    (printed,) = [" ".join(words.split()) for words in text if words.split()[0] == name]
    assert printed.startswith(line.format(about=row["about"]))


def test_the_summary_counts_and_names_nobody(source):
    text = run("list", "cohort", source)
    for words in (
        "BIDS",
        "2, in 3 sessions with 5 scans",
        "T1w 4, FLAIR 1",
        "T1w 2, FLAIR+T1w 1",
        "1 of a contrast that is there already",
        "40.5–40.5 years",
        "1 session without",
        "mask 1",
        "F 2, M 1",
        "1 × no known contrast (bold)",
    ):
        assert words in " ".join(text.split()), words
    assert "anna" not in text
    assert "ben" not in text


def test_rows_are_given_when_requested(source):
    lines = run("list", "cohort", source, "--sessions").splitlines()
    assert lines[-3:] == ["sub-anna  a  FLAIR,T1w  1  40.5  F  mask", "sub-anna  b  T1w  40.5  F", "sub-ben  a  T1w  M"]


def test_json_holds_all_of_it(source):
    facts = json.loads(run("list", "cohort", source, "--json"))
    assert facts["layout"] == "BIDS"
    assert facts["scans_of_contrast"] == {"T1w": 4, "FLAIR": 1}
    assert facts["age_years"] == {"min": 40.5, "median": 40.5, "max": 40.5}
    assert facts["sessions_without_age"] == 1
    assert [row["subject"] for row in facts["sessions"]] == ["sub-anna", "sub-anna", "sub-ben"]
    assert facts["unused_files"][0]["file"].endswith("bold.nii.gz")


def test_a_lost_data_set_is_exit_code_3_of_both_commands(tmp_path, write_scan):
    for name in ("east", "west"):
        write_scan(f"all/{name}/sub-1/anat/sub-1_T1w.nii.gz", spacing=6.0, shape=(20, 24, 18))
    (tmp_path / "all" / "west" / "participants.tsv").write_text("who\tage\nsub-1\t30\n")
    small = ["--contrasts", "T1w", "--set", "spacing_mm=[6,6,6]", "--set", "size=[28,28]", "-q"]
    for command in (["list", "cohort", "all"], ["prepare", "all", "store", *small]):
        paths = [str(tmp_path / word) if word in ("all", "store") else word for word in command]
        result = CliRunner().invoke(app, paths)
        assert result.exit_code == 3, result.output
        assert "west is left out with its 1 subject: participants.tsv: no column" in result.output
    rows = (tmp_path / "store" / "rejected.tsv").read_text().splitlines()
    assert [row.split("\t")[0] for row in rows[1:]] == ["west"]
    assert "1 subject" in rows[1]


def test_codes_of_label_maps_have_counts_and_names(small_store, tmp_path):
    source = small_store.path.parent / "source"
    (tmp_path / "lut.tsv").write_text("code\tname\n1\tlesion\n")
    table = ["--labels", "--lookup-table", tmp_path / "lut.tsv"]
    ill = sum(bool(small_store.read_masks(k).any()) for k in range(len(small_store)))
    for command in (["list", "cohort", source], ["show", small_store.path]):
        lines = run(*command, *table).splitlines()
        assert f"     1  lesion  {ill} sessions" in lines
        assert "     1  label 1  " in run(*command, "--labels")
    facts = json.loads(run("list", "cohort", source, "--labels", "--json"))
    assert facts["label_codes"] == {"mask": {"1": ill}}
    assert json.loads(run("show", small_store.path, "--labels", "--json"))["mask_codes"] == {"1": ill}


def test_a_store_is_shown_with_what_it_holds(small_store):
    lines = run("show", small_store.path).splitlines()
    assert lines[0].split(maxsplit=1) == ["subjects", "12, in 12 sessions"]
    facts = {line[:17].strip(): line[18:] for line in lines[: lines.index("")]}
    assert facts["contrasts"] == "T1w 12, T2w 12, FLAIR 12"
    assert facts["age"].startswith("22.5–77.5 years, median 50")
    assert facts["masks"] == "in 12 sessions"
    assert facts["sex"] == "F 6, M 6"
    assert any(line.startswith("content_hash: ") for line in lines)


def test_a_label_map_that_is_listed_as_a_scan_is_rejected(tmp_path, write_scan):
    for name in ("sub-1", "sub-2"):
        scan = write_scan(f"all/{name}/anat/{name}_T1w.nii.gz", spacing=6.0, shape=(20, 24, 18))
    image = nib.load(scan)
    nib.save(nib.Nifti1Image((np.asarray(image.dataobj) > 20).astype(np.uint8) * 17, image.affine), scan)
    small = ["--contrasts", "T1w", "--set", "spacing_mm=[6,6,6]", "--set", "size=[28,28]", "-q"]
    result = CliRunner().invoke(app, ["prepare", str(tmp_path / "all"), str(tmp_path / "store"), *small])
    assert result.exit_code == 3, result.output
    (row,) = (tmp_path / "store" / "rejected.tsv").read_text().splitlines()[1:]
    assert "sub-2_T1w.nii.gz" in row
    assert "a mask or label map" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "cohort"], "path of the cohort is missing"),
        (["list", "cohort", "x", "--lookup-table", "lut.txt"], "Add --labels"),
        (["list", "recipes", "--labels"], "--labels goes with `cohort` only"),
        (["show", "pretrain-demo", "--labels"], "label codes are of a store"),
        (["list", "recipes", "--sessions"], "goes with `cohort` only"),
    ],
)
def test_misuse_is_one_clear_line(arguments, message):
    with pytest.raises(BrainFoundError, match=message):
        run(*arguments)


def test_what_a_later_row_of_a_session_says_counts_too(tmp_path):
    rows = "1\tT1w\ta.nii\t\t\n1\tT2w\tb.nii\t40\tF\n2\tT1w\tc.nii\t50\t\n"
    (tmp_path / "manifest.tsv").write_text(f"subject\tcontrast\tpath\tage\tsex\n{rows}")
    for letter in "abc":
        (tmp_path / f"{letter}.nii").touch()
    facts = json.loads(run("list", "cohort", tmp_path, "--json"))
    assert facts["age_years"] == {"min": 40, "median": 45, "max": 50}
    assert facts["sessions_without_age"] == 0
    assert facts["sex"] == {"F": 1, "not known": 1}
    text = " ".join(run("list", "cohort", tmp_path, "--sessions").split())
    assert "40–50 years, median 45 label maps none" in text  # and no session without
    assert text.endswith("1 1 T1w,T2w 40 F 2 1 T1w 50")


def test_a_cohort_without_ages_says_so(tmp_path):
    (tmp_path / "manifest.tsv").write_text("subject\tcontrast\tpath\n1\tT1w\ta.nii\n")
    (tmp_path / "a.nii").touch()
    text = " ".join(run("list", "cohort", tmp_path).split())
    assert "age not known label maps none files not used none" in text


@pytest.mark.parametrize(
    ("present", "count", "first"),
    [("lk", "2 of 4 files", "m.nii"), ("lmn", "1 of 4 files", "k.nii"), ("", "4 of 4 files", "k.nii")],
)
def test_missing_files_of_a_manifest_are_counted_and_the_first_is_named(tmp_path, present, count, first):
    rows = "1\tT1w\tk.nii\tl.nii\n2\tT1w\tm.nii\t\n3\tT1w\tn.nii\t\n3\tT1w\tn.nii\t\n"
    (tmp_path / "manifest.tsv").write_text(f"subject\tcontrast\tpath\tmask\n{rows}")
    for letter in present:
        (tmp_path / f"{letter}.nii").touch()
    result = CliRunner().invoke(app, ["list", "cohort", str(tmp_path)])
    assert result.exit_code == 3
    (line,) = [line for line in result.output.splitlines() if line.startswith("files missing")]
    assert f" {count}; the first: {tmp_path / first}. Check the paths" in line
    facts = json.loads(CliRunner().invoke(app, ["list", "cohort", str(tmp_path), "--json"]).output)
    assert facts["num_missing_files"] == len(facts["missing_files"]) == int(count.split()[0])
    assert facts["missing_files"][0] == {"file": str(tmp_path / first), "reason": "no such file"}
