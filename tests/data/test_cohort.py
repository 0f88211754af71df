"""The cohort table: what a BIDS folder and a manifest say, and how faulty ones are refused."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from brainfound.data.cohort import Cohort, Session
from brainfound.errors import CohortError


@pytest.fixture
def cohort_folder(tmp_path, make_cohort):
    return make_cohort(tmp_path / "cohort")


def test_manifest_is_read_with_its_columns(cohort_folder):
    cohort = Cohort.read(cohort_folder)
    assert len(cohort) == 6
    assert len(cohort.table) == 18
    assert list(cohort.table.columns[:9]) == [
        "subject",
        "session",
        "contrast",
        "path",
        "mask",
        "age_years",
        "sex",
        "site",
        "diagnosis",
    ]
    assert len(Cohort.read(cohort_folder / "manifest.tsv")) == 6


def test_csv_and_parquet_manifests_say_the_same(cohort_folder):
    table = pd.read_csv(cohort_folder / "manifest.tsv", sep="\t", dtype={"session": str})
    table.to_csv(cohort_folder / "other.csv", index=False)
    table.to_parquet(cohort_folder / "other.parquet")
    expected = Cohort.read(cohort_folder).table
    for name in ("other.csv", "other.parquet"):
        pd.testing.assert_frame_equal(Cohort.read(cohort_folder / name).table, expected, check_dtype=False)


def test_bids_folder_with_sessions_masks_and_participants(tmp_path, write_scan):
    for name in (
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_ce-gd_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_FLAIR.nii.gz",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "sub-02/func/sub-02_task-rest_bold.nii.gz",
        "derivatives/masks/sub-01/ses-a/anat/sub-01_ses-a_label-lesion_mask.nii.gz",
        "derivatives/masks/sub-01/ses-a/anat/sub-01_ses-a_desc-brain_mask.nii.gz",
    ):
        write_scan(name)
    people = ["participant_id\tage\tsex\tdiagnosis", "sub-01\t40\tF\tms", "sub-02\t89+\tM\tn/a"]
    (tmp_path / "participants.tsv").write_text("\n".join(people) + "\n")
    cohort = Cohort.read(tmp_path)
    assert len(cohort) == 3
    table = cohort.table.set_index(["subject", "session", "contrast"])
    assert set(table.index) == {
        ("sub-01", "a", "T1w"),
        ("sub-01", "a", "T1ce"),
        ("sub-01", "b", "FLAIR"),
        ("sub-02", "1", "T2w"),
    }
    assert table.loc[("sub-01", "a", "T1w"), "mask"].endswith("label-lesion_mask.nii.gz")
    assert pd.isna(table.loc[("sub-01", "b", "FLAIR"), "mask"])
    assert table.loc[("sub-02", "1", "T2w"), "age_years"] == 89
    assert pd.isna(table.loc[("sub-02", "1", "T2w"), "diagnosis"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("subject\tpath\n1\ta.nii\n", "no column 'contrast'"),
        ("subject\tcontrast\tpath\n1\tT1x\ta.nii\n", "line 2: unknown contrast 'T1x'. Did you mean"),
        ("subject\tcontrast\tpath\n1\tT1w\t\n", "'path' is empty"),
        ("subject\tcontrast\tpath\n", "no rows"),
    ],
)
def test_faulty_manifests_are_refused(tmp_path, content, message):
    (tmp_path / "manifest.tsv").write_text(content)
    with pytest.raises(CohortError, match=message):
        Cohort.read(tmp_path)


def test_sessions_come_in_order(tmp_path):
    rows = "b\t2\tT1w\tx.nii\nb\t1\tT1w\ty.nii\na\t9\tFLAIR\tz.nii\n"
    (tmp_path / "manifest.tsv").write_text(f"subject\tsession\tcontrast\tpath\n{rows}")
    cohort = Cohort.read(tmp_path)
    assert [(s.subject, s.session) for s in cohort.sessions()] == [("a", "9"), ("b", "1"), ("b", "2")]
    assert repr(cohort) == "Cohort(manifest, 3 sessions of 2 subjects: T1w 2, FLAIR 1)"


def test_candidates_are_the_wanted_scans_in_order_and_a_file_counts_for_one_contrast():
    first, second, third, fourth = (Path(f"{name}.nii") for name in "abcd")
    extra = (("T1w", third), ("T1w", first), ("FLAIR", first), ("SWI", fourth))
    session = Session("s", "1", {"T1w": first, "FLAIR": second, "SWI": fourth}, {}, {}, extra)
    scans, repeated = session.candidates(("FLAIR", "T1w", "T2w"))
    assert list(scans.items()) == [("FLAIR", [second]), ("T1w", [first, third])]
    assert repeated == [("FLAIR", first, "T1w")]


def test_folders_without_scans_are_refused(tmp_path):
    with pytest.raises(CohortError, match="an empty folder, not a source of scans"):
        Cohort.read(tmp_path)
    with pytest.raises(CohortError, match="no such file or folder"):
        Cohort.read(tmp_path / "none")
