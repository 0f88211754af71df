"""The layouts of the FOMO sets: FOMO60K in both releases, FOMO300K with its zips, the tasks of FOMO25 and FOMO26."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from brainfound.data.cohort import Cohort
from brainfound.errors import CohortError

MAPPING = "dataset\tparticipant_id\tsession_id\tfilename\n"
PEOPLE = "dataset\tparticipant_id\tsession_id\tage\tgroup\n"


@pytest.mark.parametrize("above", ["", "fomo-60k/"])
def test_first_release_of_fomo60k(layout, contents, above):
    root = layout(
        *(f"{above}sub_1/ses_1/{name}.nii.gz" for name in ("t1", "t1_2", "scan_3", "dwi_b0", "dwi_b1000")),
        f"{above}sub_1/ses_2/flair.nii.gz",
        f"{above}sub_10/ses_1/t2.nii.gz",
    )
    cohort = Cohort.read(root)
    assert cohort.source == "FOMO60K"
    found = contents(cohort)
    assert sorted(found[("sub_1", "ses_1")]) == ["DWI", "T1w", "T1w", "unknown", "unknown"]
    assert found[("sub_1", "ses_2")] == ["FLAIR"]
    assert found[("sub_10", "ses_1")] == ["T2w"]
    first = next(iter(cohort.sessions()))
    assert first.scans["T1w"].name == "t1.nii.gz"
    assert [file.name for contrast, file in first.extra_scans if contrast == "T1w"] == ["t1_2.nii.gz"]


def test_later_release_of_fomo60k_keeps_data_sets_apart(layout, contents):
    root = layout(
        "PT001_A/sub_1/ses_1/t1.nii.gz",
        "PT002_B/sub_1/ses_1/t1.nii.gz",
        "PT002_B/sub_1/ses_2/scan.nii.gz",
        "PT002_B/sub_1/ses_2/extra.nii.gz",
        content={
            "mapping.tsv": MAPPING
            + "PT001_A\tsub_1\tses_1\tt1.nii.gz\nPT002_B\tsub_1\tses_1\tt1.nii.gz\n"
            + "PT002_B\tsub_1\tses_2\tscan.nii.gz\nPT002_B\tsub_2\tses_1\tt1.nii.gz\n",
            "participants.tsv": PEOPLE + "PT001_A\tsub_1\tses_1\t30.5\tcontrol\nPT002_B\tsub_1\tses_2\t71\tAD\n",
        },
    )
    cohort = Cohort.read(root)
    assert contents(cohort) == {
        ("PT001_A_sub_1", "ses_1"): ["T1w"],
        ("PT002_B_sub_1", "ses_1"): ["T1w"],
        ("PT002_B_sub_1", "ses_2"): ["unknown"],
    }
    found = {(s.subject, s.session): s.covariates for s in cohort.sessions()}
    assert found[("PT001_A_sub_1", "ses_1")]["age_years"] == 30.5
    assert found[("PT002_B_sub_1", "ses_1")]["age_years"] is None
    assert found[("PT002_B_sub_1", "ses_2")]["diagnosis"] == "AD"
    assert found[("PT002_B_sub_1", "ses_2")]["site"] == "PT002_B"
    reasons = sorted(reason for _, reason in cohort.unused)
    assert reasons == ["listed in mapping.tsv, but not there", "not listed in mapping.tsv"]
    assert any("1 of 4 files" in note for note in cohort.notes)


@pytest.mark.parametrize(
    "row", ["..\t..\tetc\tpasswd.nii", "PT001_A\tsub_1\tses_1\t../../../../x.nii.gz", "/etc\tsub_1\tses_1\tx.nii.gz"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(layout, row):
    root = layout("PT001_A/sub_1/ses_1/t1.nii.gz", content={"mapping.tsv": f"{MAPPING}{row}\n"})
    with pytest.raises(CohortError, match="leads out of the folder"):
        Cohort.read(root)


def test_a_damaged_index_is_one_clear_line(layout):
    root = layout("a/b/c/t1.nii.gz", content={"mapping.tsv": "dataset\tfilename\na\tt1.nii.gz\n"})
    with pytest.raises(CohortError, match=r"no column 'participant_id'.*got dataset, filename"):
        Cohort.read(root)


def zip_of(path: Path, *names: str, content: dict[str, bytes] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**dict.fromkeys(names, b"x"), **(content or {})}.items():
            archive.writestr(name, data)
    return path


def test_fomo300k_is_read_inside_its_zips(tmp_path, contents):
    zip_of(
        tmp_path / "PT001_A" / "sub-01" / "ses-01.zip",
        *("anat/sub-01_ses-01_T1w.nii.gz", "anat/sub-01_ses-01_run-2_T1w.nii.gz", "anat/scan.nii.gz"),
        *("dwi/sub-01_ses-01_dwi.nii.gz", "anat/sub-01_ses-01_part-phase_T2starw.nii.gz", "notes.txt"),
        content={"dwi/sub-01_ses-01_dwi.bval": b"0 5"},
    )
    zip_of(tmp_path / "PT002_B" / "sub-01" / "ses-01.zip", "anat/sub-01_ses-01_FLAIR.nii.gz")
    zip_of(tmp_path / "PT002_B" / "sub-02" / "ses-01.zip", "../../evil_T1w.nii.gz")
    (tmp_path / "PT002_B" / "sub-02" / "ses-02.zip").write_bytes(b"no zip")
    unpacked = tmp_path / "PT002_B" / "sub-03" / "ses-07" / "anat" / "sub-03_ses-07_T2w.nii.gz"
    unpacked.parent.mkdir(parents=True)
    unpacked.touch()
    (tmp_path / "mri_info.tsv").write_text(
        "dataset\tparticipant_id\tsession_id\tfilename\tMagneticFieldStrength\n"
        "PT002_B\tsub-01\tses-01\tsub-01_ses-01_FLAIR.nii.gz\t1.5\n"
    )
    cohort = Cohort.read(tmp_path)
    assert cohort.source == "FOMO300K"
    found = contents(cohort)
    assert sorted(found.pop(("PT001_A_sub-01", "01"))) == ["T1w", "T1w", "unknown", "unknown"]
    assert found == {("PT002_B_sub-01", "01"): ["FLAIR"], ("PT002_B_sub-03", "07"): ["T2w"]}
    first = next(iter(cohort.sessions()))
    expected = tmp_path / "PT001_A" / "sub-01" / "ses-01.zip" / "anat" / "sub-01_ses-01_T1w.nii.gz"
    assert first.scans["T1w"] == expected
    assert first.covariates["site"] == "PT001_A"
    assert {file.name for file, _ in cohort.unused} == {
        "ses-01.zip",
        "ses-02.zip",
        "sub-01_ses-01_part-phase_T2starw.nii.gz",
    }
    assert all(reason for _, reason in cohort.unused)
    flair = cohort.table[cohort.table["contrast"] == "FLAIR"].iloc[0]
    assert flair["MagneticFieldStrength"] == 1.5


def test_one_data_set_of_fomo300k_has_the_same_subjects(tmp_path):
    zip_of(tmp_path / "PT001_A" / "sub-01" / "ses-01.zip", "anat/sub-01_ses-01_T1w.nii.gz")
    whole, part = Cohort.read(tmp_path), Cohort.read(tmp_path / "PT001_A")
    assert part.source == "FOMO300K"
    assert list(whole.table["subject"]) == list(part.table["subject"]) == ["PT001_A_sub-01"]


@pytest.mark.parametrize("pointed_at", ["", "PT030_OpenNeuro", "PT030_OpenNeuro/ds000002"])
def test_openneuro_in_fomo300k_has_a_level_more(tmp_path, contents, pointed_at):
    for dataset in ("ds000001", "ds000002"):
        zip_of(tmp_path / "PT030_OpenNeuro" / dataset / "sub-01" / "ses-01.zip", "anat/sub-01_ses-01_T1w.nii.gz")
    (tmp_path / "mapping.tsv").write_text("dataset\tparticipant_id\tsession_id\tfilename\n")
    row = "PT030_OpenNeuro/{0}\tsub-01\tses-01\t{1}\tc\n"
    (tmp_path / "participants.tsv").write_text(PEOPLE + row.format("ds000001", 30) + row.format("ds000002", 40))
    cohort = Cohort.read(tmp_path / pointed_at)
    assert cohort.source == "FOMO300K"
    found = {s.subject: s.covariates["age_years"] for s in cohort.sessions()}
    expected = {"PT030_OpenNeuro-ds000001_sub-01": 30, "PT030_OpenNeuro-ds000002_sub-01": 40}
    assert found == {k: v for k, v in expected.items() if not pointed_at.endswith("2") or v == 40}


def test_rows_that_cannot_be_distinguished_are_not_used(tmp_path):
    for dataset in ("ds000001", "ds000002"):
        zip_of(tmp_path / "PT030_OpenNeuro" / dataset / "sub-01" / "ses-01.zip", "anat/sub-01_ses-01_T1w.nii.gz")
    rows = "".join(f"PT030_OpenNeuro\tsub-01\tses-01\t{age}\tc\n" for age in (30, 40))
    (tmp_path / "participants.tsv").write_text(PEOPLE + rows)
    cohort = Cohort.read(tmp_path)
    assert cohort.table["age_years"].isna().all()
    assert any("2 rows of participants.tsv are not used" in note for note in cohort.notes)


def test_only_faulty_zips_are_one_clear_line(tmp_path):
    (tmp_path / "PT001_A" / "sub-01").mkdir(parents=True)
    (tmp_path / "PT001_A" / "sub-01" / "ses-01.zip").write_bytes(b"no zip")
    with pytest.raises(CohortError, match="no images found"):
        Cohort.read(tmp_path)


@pytest.mark.parametrize("susceptibility", ["swi", "t2s"])
@pytest.mark.parametrize("pointed_at", ["fomo-task1", "", "fomo-task1/preprocessed"])
def test_infarct_task_from_wherever_it_is_pointed_at(layout, contents, susceptibility, pointed_at):
    root = layout(
        *(f"fomo-task1/preprocessed/sub_1/ses_1/{name}.nii.gz" for name in ("dwi_b1000", "flair", "adc")),
        f"fomo-task1/preprocessed/sub_1/ses_1/{susceptibility}.nii.gz",
        "fomo-task1/preprocessed/sub_2/ses_1/flair.nii.gz",
        content={"fomo-task1/labels/sub_1/ses_1/label.txt": "1\n", "fomo-task1/labels/sub_2/label.txt": "0"},
    )
    cohort = Cohort.read(root / pointed_at)
    expected = {"DWI", "FLAIR", "ADC", "SWI" if susceptibility == "swi" else "T2starw"}
    assert set(contents(cohort)[("sub_1", "ses_1")]) == expected
    assert cohort.source == "FOMO task 1"
    assert [session.covariates["label"] for session in cohort.sessions()] == [1, 0]
    assert all(type(session.covariates["label"]) is int for session in cohort.sessions())


@pytest.mark.parametrize("folder", ["labels/sub_1/ses_1/", "labels/sub_1/"])
def test_segmentation_task_has_masks(layout, folder):
    root = layout("fomo-task2/preprocessed/sub_1/ses_1/flair.nii.gz", f"fomo-task2/{folder}seg.nii.gz")
    (session,) = Cohort.read(root / "fomo-task2").sessions()
    assert session.masks["mask"] == root / "fomo-task2" / folder / "seg.nii.gz"


@pytest.mark.parametrize("top", ["fomo-task3/", "Task_3/Task_3/"])
@pytest.mark.parametrize("name", ["label.txt", "labels.txt"])
def test_ages_are_never_cut_to_whole_years(layout, top, name):
    root = layout(f"{top}preprocessed/sub_1/ses_1/t1w.nii.gz", content={f"{top}labels/sub_1/ses_1/{name}": "45.73\n"})
    (session,) = Cohort.read(root).sessions()
    assert session.covariates["age_years"] == 45.73
    assert "label" not in session.covariates


def test_a_task_without_the_preprocessed_folder(layout, contents):
    root = layout("Task_4/Task_4/sub_1/ses_1/t2.nii.gz", "Task_4/Task_4/labels/sub_1/ses_1/seg.nii.gz")
    cohort = Cohort.read(root / "Task_4")
    assert contents(cohort) == {("sub_1", "ses_1"): ["T2w"]}
    assert cohort.table["mask"][0].endswith("seg.nii.gz")


def test_subjects_of_two_tasks_are_not_one_person(layout):
    root = layout(
        "fomo-task1/preprocessed/sub_1/ses_1/flair.nii.gz", "fomo-task2/preprocessed/sub_1/ses_1/flair.nii.gz"
    )
    cohort = Cohort.read(root)
    assert sorted(cohort.table["subject"]) == ["task1_sub_1", "task2_sub_1"]
    assert any("2 sessions have no label" in note for note in cohort.notes)


@pytest.mark.parametrize("text", ["", "one", "1 2", "nan", "inf", "-3", "400"])
def test_a_malformed_label_is_one_clear_line(layout, text):
    root = layout(
        "fomo-task3/preprocessed/sub_1/ses_1/t1.nii.gz", content={"fomo-task3/labels/sub_1/ses_1/label.txt": text}
    )
    with pytest.raises(CohortError, match=r"labels/sub_1/ses_1/label.txt: the label is not one number"):
        Cohort.read(root)


def test_loose_files_and_label_maps_of_fomo60k_are_not_lost_and_no_scans(layout, contents):
    root = layout(
        *(f"sub_1/ses_1/{name}.nii.gz" for name in ("t1", "t1_seg", "brain_mask")),
        *("sub_1/t2.nii.gz", "sub_02/t1.nii.gz", "sub_02/visit2/t1.nii.gz", "p3/t1.nii.gz"),
    )
    cohort = Cohort.read(root)
    assert contents(cohort) == {("sub_1", "ses_1"): ["T1w"], ("sub_02", "ses_1"): ["T1w"]}
    masks = {session.subject: session.masks for session in cohort.sessions()}
    assert {column: file.name for column, file in masks["sub_1"].items()} == {
        "mask": "t1_seg.nii.gz",
        "brain_mask": "brain_mask.nii.gz",
    }
    assert {(file.parent.name, reason) for file, reason in cohort.unused} == {
        ("sub_1", "not in the folder of a session"),
        ("visit2", "not in the folder of a session"),
        ("p3", "not in the folder of a subject"),
    }


def test_a_mapping_of_another_program_is_not_fomo60k(layout):
    root = layout("sub-01/anat/sub-01_T1w.nii.gz", content={"mapping.tsv": "old\tnew\na\tb\n"})
    assert Cohort.read(root).source == "BIDS"


@pytest.mark.parametrize("cell", ["", "n/a"])
def test_an_empty_cell_of_an_index_is_one_clear_line(layout, cell):
    root = layout("a/s/1/t1.nii.gz", content={"mapping.tsv": f"{MAPPING}a\ts\t1\tt1.nii.gz\na\ts\t1\t{cell}\n"})
    with pytest.raises(CohortError, match=r"^mapping\.tsv, line 3: a value is missing"):
        Cohort.read(root)


def test_ages_and_sessions_of_an_index_that_cannot_be_used_stop_nothing(layout):
    people = PEOPLE + "a\ts1\t1\t20-25\tc\na\ts2\t1\t40\tc\na\ts3\t\tunknown\tc\n"
    mapping = MAPPING + "".join(f"a\ts{number}\t1\tt1.nii.gz\n" for number in (1, 2))
    root = layout(
        *(f"a/s{number}/1/t1.nii.gz" for number in (1, 2)), content={"mapping.tsv": mapping, "participants.tsv": people}
    )
    cohort = Cohort.read(root)
    assert [s.covariates["age_years"] for s in cohort.sessions()] == [None, 40]
    assert any("2 × an age that is not a number" in note for note in cohort.notes)


def test_an_empty_cell_of_the_scan_facts_stops_nothing(tmp_path):
    zip_of(tmp_path / "PT001_A" / "sub-01" / "ses-01.zip", "anat/sub-01_ses-01_T1w.nii.gz", "anat/t1_seg.nii.gz")
    loose = tmp_path / "PT001_A" / "sub-02" / "sub-02_T1w.nii.gz"
    loose.parent.mkdir()
    loose.touch()
    (tmp_path / "mri_info.tsv").write_text(
        "subject\tdataset\tparticipant_id\tsession_id\tfilename\tMagneticFieldStrength\n"
        "x\tPT001_A\tsub-01\tses-01\t\t1.5\nx\tPT001_A\tsub-01\tses-01\tsub-01_ses-01_T1w.nii.gz\t3\n"
    )
    cohort = Cohort.read(tmp_path)
    assert list(cohort.table["MagneticFieldStrength"]) == [3]
    assert {(file.name, reason) for file, reason in cohort.unused} == {
        ("t1_seg.nii.gz", "a label map"),
        ("sub-02_T1w.nii.gz", "not in the zip or folder of a session"),
    }


def test_a_task_is_known_where_it_is_called_by_a_point(layout, monkeypatch):
    root = layout(
        "fomo-task3/preprocessed/sub_1/ses_1/t1.nii.gz",
        "fomo-task3/preprocessed/sub_1/ses_1/t1_seg.nii.gz",
        "fomo-task3/preprocessed/sub_1/t2.nii.gz",
        content={"fomo-task3/labels/sub_1/ses_1/label.txt": "45.5"},
    )
    for folder in (root / "fomo-task3", root / "fomo-task3" / "preprocessed"):
        monkeypatch.chdir(folder)
        cohort = Cohort.read(".")
        assert cohort.source == "FOMO task 3"
        assert list(cohort.table["age_years"]) == [45.5]
    assert [file.name for file, _ in cohort.unused] == ["t2.nii.gz", "t1_seg.nii.gz"]
