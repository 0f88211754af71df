"""Folders of several data sets: whose people are whose, and what is lost."""

from __future__ import annotations

import json

import pytest

from brainfound.data.cohort import Cohort
from brainfound.errors import CohortError


@pytest.mark.parametrize(
    ("faulty", "people", "why"),
    [("participants.tsv", 2, "no column 'participant_id'"), ("manifest.csv", 1, "the manifest has no column 'path'")],
)
def test_a_data_set_that_is_lost_from_a_collection_is_rejected_by_name(layout, faulty, people, why):
    root = layout(
        *(f"{name}/sub-0{n}/anat/sub-0{n}_T1w.nii.gz" for name in ("east", "west") for n in (1, 2)),
        content={f"west/{faulty}": "subject,contrast\ns,T1w\n" if faulty == "manifest.csv" else "name\nsub-01\n"},
    )
    cohort = Cohort.read(root)
    assert set(cohort.table["dataset"]) == {"east"}
    ((folder, reason),) = cohort.rejected
    assert folder == root / "west"
    assert f"west is left out with its {people} subject" in reason
    assert why in reason
    assert cohort.notes[0] == reason


def test_folders_with_manifests_are_data_sets_too(layout, contents):
    header = "subject\tcontrast\tpath\n"
    root = layout(
        "bids/sub-01/anat/sub-01_T1w.nii.gz",
        content={
            "north/manifest.tsv": f"{header}n1\tT1w\tscans/1.nii\n",
            "south/manifest.tsv": f"{header}n1\tFLAIR\tscans/1.nii\n",
            "south/sub-9/anat/sub-9_T1w.nii.gz": "",
            "bids/manifest.csv": "file,md5\n",
        },
    )
    cohort = Cohort.read(root)
    assert cohort.source == "data sets"
    assert contents(cohort) == {("bids_sub-01", "1"): ["T1w"], ("north_n1", "1"): ["T1w"], ("south_n1", "1"): ["FLAIR"]}
    assert any("1 names of subjects are in several data sets" in note for note in cohort.notes)
    (root / "south" / "manifest.tsv").write_text(f"{header}s1\tT1w\t../north/scans/1.nii\n")
    with pytest.raises(CohortError, match="list the same scans.*north and south"):
        Cohort.read(root)


def test_several_data_sets_in_one_folder_keep_their_people_apart(layout, contents):
    root = layout(
        "ds1/sub-01/anat/sub-01_T1w.nii.gz",
        "ds2/sub-01/ses-b/anat/sub-01_ses-b_T2w.nii.gz",
        "ds2/sub-01/ses-b/anat/sub-01_ses-b_mask.nii.gz",
        "ds3/sub-01/func/sub-01_bold.nii.gz",
        content={"ds1/participants.tsv": "participant_id\tage\tsite\nsub-01\t20\tX\n"},
    )
    cohort = Cohort.read(root)
    assert cohort.source == "BIDS data sets"
    assert contents(cohort) == {("ds1_sub-01", "1"): ["T1w"], ("ds2_sub-01", "b"): ["T2w"]}
    sessions = list(cohort.sessions())
    assert [session.covariates["site"] for session in sessions] == ["X", "ds2"]
    assert sessions[0].covariates["age_years"] == 20
    assert sessions[1].masks["mask"].name == "sub-01_ses-b_mask.nii.gz"
    assert "ds3" in {file.name for file, _ in cohort.unused}


@pytest.mark.parametrize("above", ["derivatives", "mine"])
def test_derivatives_of_the_same_people_are_not_taken_for_others(layout, above):
    described = json.dumps({"DatasetType": "derivative"})
    root = layout(
        *(f"{above}/{name}/sub-01/anat/sub-01_T1w.nii.gz" for name in ("a", "b")),
        content={f"{above}/a/dataset_description.json": described},
    )
    with pytest.raises(CohortError, match="may hold the same people"):
        Cohort.read(root / above)


@pytest.mark.parametrize(
    ("raw", "other", "why"),
    [
        ("wave1", "wave2", "visits of the same people"),
        ("ses-1", "ses-2", "visits of the same people"),
        ("pre", "post", "visits or contrasts of the same people"),
        ("data2019", "data2020", "visits or contrasts of the same people"),
        ("anat", "dwi_bids", "visits or contrasts of the same people"),
        ("bids", "bids_stripped", "versions of one data set"),
        ("study_raw", "study_preproc", "versions of one data set"),
        ("ds000001", "ds000001-fmriprep", "versions of one data set"),
    ],
)
def test_data_sets_that_may_hold_the_same_people_are_refused(layout, raw, other, why):
    root = layout(*(f"{name}/sub-01/anat/sub-01_T1w.nii.gz" for name in (raw, other)))
    with pytest.raises(CohortError, match=rf"{why}.*write a manifest"):
        Cohort.read(root)


def test_names_in_several_data_sets_are_reported_and_sourcedata_is_passed_over(layout, contents):
    root = layout(*(f"{name}/sub-01/anat/sub-01_T1w.nii.gz" for name in ("siteA", "siteB", "sourcedata")))
    cohort = Cohort.read(root)
    assert sorted(contents(cohort)) == [("siteA_sub-01", "1"), ("siteB_sub-01", "1")]
    assert any("1 names of subjects are in several data sets" in note for note in cohort.notes)
    assert [(file.name, reason) for file, reason in cohort.unused] == [
        ("sourcedata", "a copy of the data set next to it")
    ]
