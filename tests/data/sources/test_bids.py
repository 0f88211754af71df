"""BIDS folders: what is a scan, which is first, and what the tables and sidecars say."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from brainfound.data.cohort import Cohort
from brainfound.data.sources.bids_files import BidsName, contrast_from_bids_name, mask_column
from brainfound.errors import CohortError


def sessions_of(root: Path) -> dict[tuple[str, str], object]:
    return {(s.subject, s.session): s for s in Cohort.read(root).sessions()}


def test_several_scans_of_a_contrast_are_kept_in_the_stated_order(layout):
    names = ("space-MNI_T1w", "run-10_T1w", "run-2_T1w", "acq-x_rec-norm_T1w", "echo-2_T2starw", "echo-10_T2starw")
    root = layout(*(f"sub-1/anat/sub-1_{name}.nii.gz" for name in names))
    session = sessions_of(root)[("sub-1", "1")]
    assert session.scans["T1w"].name == "sub-1_run-2_T1w.nii.gz"
    assert [file.name.removeprefix("sub-1_") for contrast, file in session.extra_scans if contrast == "T1w"] == [
        "run-10_T1w.nii.gz",
        "acq-x_rec-norm_T1w.nii.gz",
        "space-MNI_T1w.nii.gz",
    ]
    assert session.scans["T2starw"].name == "sub-1_echo-2_T2starw.nii.gz"
    assert any("4 further scans" in note for note in Cohort.read(root).notes)


@pytest.mark.parametrize(
    ("name", "contrast"),
    [
        ("sub-1_T1w", "T1w"),
        ("sub-1_ce-none_T1w", "T1w"),
        ("sub-1_ce-gd_T1w", "T1ce"),
        ("sub-1_part-mag_T2starw", "T2starw"),
        ("sub-1_part-phase_T2starw", "unknown"),
        ("sub-1_T1w_defacemask", "unknown"),
        ("sub-1_inv-1_MP2RAGE", "unknown"),
        ("sub-1_task-rest_bold", "unknown"),
        ("sub-1_asl", "unknown"),
        ("sub-1_t1", "T1w"),
        ("sub-1_desc-preproc_T1w", "T1w"),
        ("sub-1_adc", "ADC"),
        ("sub-1_swi", "SWI"),
        ("sub-1_angio", "MRA"),
    ],
)
def test_only_the_suffix_says_the_contrast(name, contrast):
    found, reason = contrast_from_bids_name(BidsName.parse(Path(f"{name}.nii.gz")))
    assert found == contrast
    assert bool(reason) == (contrast == "unknown")


def test_inversions_come_behind_and_chunks_are_noted(layout):
    names = ("acq-inv1_T1w", "acq-inv2_T1w", "acq-uniden_T1w", "chunk-2_FLAIR", "chunk-1_FLAIR", "UNIT1")
    cohort = Cohort.read(layout(*(f"sub-1/anat/sub-1_{name}.nii.gz" for name in names)))
    (session,) = cohort.sessions()
    assert session.scans["T1w"].name == "sub-1_UNIT1.nii.gz"
    assert "acq-inv" not in next(file.name for contrast, file in session.extra_scans if contrast == "T1w")
    assert any("2 scans are chunks" in note for note in cohort.notes)


def test_what_is_not_used_is_listed_with_its_reason(layout):
    root = layout(
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-1/anat/._sub-1_T1w.nii.gz",
        "sub-1/func/sub-1_task-rest_bold.nii.gz",
        "sub-1/perf/sub-1_asl.nii.gz",
        "sub-1/anat/sub-1_part-phase_T2starw.nii.gz",
        "derivatives/strip/sub-1/anat/sub-1_desc-brain_T1w.nii.gz",
        "derivatives/lesions/sub-2/anat/sub-2_mask.nii.gz",
    )
    (root / "sub-1" / "anat" / "sub-1_T2w.nii.gz").symlink_to(root / "not-downloaded")
    cohort = Cohort.read(root)
    assert list(cohort.table["contrast"]) == ["T1w"]
    reasons = {file.name: reason for file, reason in cohort.unused}
    assert reasons.keys() == {
        "sub-1_task-rest_bold.nii.gz",
        "sub-1_asl.nii.gz",
        "sub-1_part-phase_T2starw.nii.gz",
        "sub-1_desc-brain_T1w.nii.gz",
        "sub-2_mask.nii.gz",
        "sub-1_T2w.nii.gz",
    }
    assert "not there" in reasons["sub-1_T2w.nii.gz"]
    assert "no known contrast (bold)" in reasons["sub-1_task-rest_bold.nii.gz"]


def test_lesions_brains_and_tissues_are_different_label_maps(layout):
    root = layout(
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "derivatives/a/sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        "derivatives/a/sub-1/anat/sub-1_desc-ribbon_mask.nii.gz",
        "derivatives/a/sub-1/anat/sub-1_dseg.nii.gz",
        "derivatives/b/sub-1/anat/sub-1_label-lesion_mask.nii.gz",
        "derivatives/b/sub-1/anat/sub-1_space-MNI_label-lesion_mask.nii.gz",
    )
    cohort = Cohort.read(root)
    (session,) = cohort.sessions()
    assert {column: file.name for column, file in session.masks.items()} == {
        "mask": "sub-1_label-lesion_mask.nii.gz",
        "brain_mask": "sub-1_desc-brain_mask.nii.gz",
        "dseg": "sub-1_dseg.nii.gz",
    }
    assert "derivatives" not in session.masks["brain_mask"].parts
    assert set(cohort.mask_columns) == {"mask", "brain_mask", "dseg"}
    assert mask_column(Path("sub-1_task-rest_desc-brain_mask.nii.gz")) is None
    assert any("further label map" in reason for _, reason in cohort.unused)


def test_a_visit_knows_its_age_better_than_the_person(layout):
    root = layout(
        "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz",
        "sub-1/ses-b/anat/sub-1_ses-b_T1w.nii.gz",
        "sub-2/ses-a/anat/sub-2_ses-a_T1w.nii.gz",
        content={
            "participants.tsv": "participant_id\tage\tsex\tsite\nsub-1\t40\tF\tX\n2\t50.5\tM\tY\nsub-9\t1\tF\tX\n",
            "sub-1/sub-1_sessions.tsv": "session_id\tage\tdiagnosis\nses-a\tn/a\tn/a\nses-b\t42.25\tms\n",
        },
    )
    cohort = Cohort.read(root)
    found = {(s.subject, s.session): s.covariates for s in cohort.sessions()}
    assert [found[key]["age_years"] for key in sorted(found)] == [40, 42.25, 50.5]
    assert found[("sub-1", "b")]["diagnosis"] == "ms"
    assert found[("sub-1", "a")]["diagnosis"] is None
    assert found[("sub-2", "a")]["site"] == "Y"
    assert any("1 subjects of participants.tsv have no scans" in note for note in cohort.notes)


def test_ages_in_another_unit_become_years(layout):
    root = layout(
        "sub-1/anat/sub-1_T2w.nii.gz",
        content={
            "participants.tsv": "participant_id\tage\nsub-1\t26.1\n",
            "participants.json": json.dumps({"age": {"Units": "weeks"}}),
        },
    )
    cohort = Cohort.read(root)
    assert cohort.table["age_years"][0] == pytest.approx(26.1 * 7 / 365.25)
    assert any("weeks" in note for note in cohort.notes)


def test_a_row_with_a_session_is_of_that_session_alone(layout):
    rows = "sub-1\tses-m00\t71\tMCI\nsub-1\tn/a\tn/a\t\nsub-2\t\t66\thealthy\nsub-3\tses-9\t50\thealthy\n"
    root = layout(
        *(f"sub-{n}/ses-{visit}/anat/sub-{n}_ses-{visit}_T1w.nii.gz" for n in "12" for visit in ("m00", "m24")),
        "sub-3/anat/sub-3_T1w.nii.gz",
        content={"participants.tsv": f"participant_id\tsession_id\tage\tgroup\n{rows}"},
    )
    cohort = Cohort.read(root)
    found = {(s.subject, s.session): (s.covariates["age_years"], s.covariates["diagnosis"]) for s in cohort.sessions()}
    assert found == {
        ("sub-1", "m00"): (71, "MCI"),
        ("sub-1", "m24"): (None, None),
        ("sub-2", "m00"): (66, "healthy"),
        ("sub-2", "m24"): (66, "healthy"),
        ("sub-3", "1"): (50, "healthy"),  # its only row, and no session in the names of its files
    }


def test_rows_of_participants_fill_each_other(layout):
    rows = "sub-1\t44\t\nsub-1\t\tFemale\nsub-1\t44\tf\n"
    root = layout("sub-1/anat/sub-1_T1w.nii.gz", content={"participants.tsv": f"participant_id\tage\tgender\n{rows}"})
    (session,) = Cohort.read(root).sessions()
    assert (session.covariates["age_years"], session.covariates["sex"]) == (44, "F")


def test_faults_in_tables_of_visits_are_counted_together_and_name_nobody(layout):
    table = "session_id\tage\nses-a\t{0}\n"
    root = layout(
        *(f"sub-{n}/ses-a/anat/sub-{n}_ses-a_T1w.nii.gz" for n in (1, 2, 3)),
        content={f"sub-{n}/sub-{n}_sessions.tsv": table.format(age) for n, age in ((1, "x"), (2, "y"), (3, "70"))}
        | {"sub-1/sub-1_sessions.json": "{", "sub-2/sub-2_sessions.json": "{"},
    )
    cohort = Cohort.read(root)
    assert any("sub-*_sessions.tsv: 2 × an age that is not a number" in note for note in cohort.notes)
    assert not any("sub-1" in note or "sub-2" in note for note in cohort.notes)


def test_sidecars_are_inherited_and_the_nearest_wins(layout):
    root = layout(
        "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz",
        "sub-1/ses-a/anat/sub-1_ses-a_T2w.nii.gz",
        "sub-2/anat/sub-2_T1w.nii.gz",
        "sub-3/anat/sub-3_acq-fast_T1w.nii.gz",
        content={
            "T1w.json": json.dumps(
                {"MagneticFieldStrength": 3, "Manufacturer": "Siemens", "InstitutionName": "Secret"}
            ),
            "acq-fast_T1w.json": json.dumps({"Manufacturer": "GE"}),
            "sub-1/sub-1_T1w.json": json.dumps({"MagneticFieldStrength": "1.5"}),
            "sub-2/anat/sub-2_T1w.json": json.dumps({"ManufacturersModelName": "Prisma"}),
        },
    )
    table = Cohort.read(root).table.set_index(["subject", "contrast"])
    assert table.loc[("sub-1", "T1w"), "field_strength_t"] == 1.5
    assert table.loc[("sub-1", "T1w"), "manufacturer"] == "Siemens"
    assert pd.isna(table.loc[("sub-1", "T2w"), "manufacturer"])
    assert table.loc[("sub-2", "T1w"), "scanner"] == "Prisma"
    assert table.loc[("sub-3", "T1w"), "manufacturer"] == "GE"
    assert not table.astype(str).eq("Secret").any(axis=None)
    assert table["site"].isna().all()


def test_masks_next_to_a_scan_of_openmind_are_no_lesions(layout):
    root = layout("sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T1w__Data/deface_mask.nii.gz")
    cohort = Cohort.read(root)
    assert cohort.table["mask"].isna().all()
    assert [file.name for file, _ in cohort.unused] == ["deface_mask.nii.gz"]


def test_a_broken_sidecar_is_noted_and_stops_nothing(layout):
    root = layout(
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-2/anat/sub-2_T1w.nii.gz",
        content={
            "sub-1/anat/sub-1_T1w.json": '{"MagneticFieldStrength": 3,',
            "sub-2/anat/sub-2_T1w.json": '{"MagneticFieldStrength": 30000}',
            "dataset_description.json": "nothing",
        },
    )
    cohort = Cohort.read(root)
    assert len(cohort) == 2
    assert any("2 sidecars cannot be used" in note for note in cohort.notes)
    assert any("dataset_description.json is not valid JSON" in note for note in cohort.notes)
    assert {file.name for file, _ in cohort.unused} == {"sub-1_T1w.json", "sub-2_T1w.nii.gz"}
    assert not any("sub-" in note for note in cohort.notes)


def test_a_derivative_data_set_is_a_source_of_its_own(layout):
    root = layout(
        "derivatives/prep/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz",
        "derivatives/prep/sub-1/anat/sub-1_space-MNI_desc-preproc_T1w.nii.gz",
        "derivatives/prep/sub-1/anat/sub-1_space-MNI_T2w.nii.gz",
        "derivatives/prep/sub-1/anat/sub-1_desc-brain_mask.nii.gz",
        content={
            "derivatives/prep/dataset_description.json": json.dumps({"DatasetType": "derivative"}),
            "participants.tsv": "participant_id\tage\nsub-1\t33\n",
        },
    )
    cohort = Cohort.read(root / "derivatives" / "prep")
    (session,) = cohort.sessions()
    assert session.scans["T1w"].name == "sub-1_desc-preproc_T1w.nii.gz"
    assert session.masks.keys() == {"brain_mask"}
    assert session.covariates["age_years"] == 33
    assert any("different spaces" in note for note in cohort.notes)


def test_a_b0_is_no_diffusion_weighted_image(layout):
    root = layout(
        "sub-1/dwi/sub-1_acq-a_dwi.nii.gz",
        "sub-1/dwi/sub-1_acq-b_dwi.nii.gz",
        content={"sub-1/dwi/sub-1_acq-a_dwi.bval": "0 5 0", "sub-1/dwi/sub-1_acq-b_dwi.bval": "0 1000"},
    )
    cohort = Cohort.read(root)
    assert [Path(file).name for file in cohort.table["path"]] == ["sub-1_acq-b_dwi.nii.gz"]
    assert "b0" in cohort.unused[0][1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name\tage\nsub-1\t4\n", "no column 'participant_id'"),
        (
            "participant_id\tage\nsub-1\t4\nsub-2\t4\nsub-1\t5\n",
            r"tsv, line 4, column 'age_years': rows of one subject contradict .*got 5, but 4 in line 2",
        ),
    ],
)
def test_faulty_participants_are_one_clear_line(layout, table, message):
    root = layout("sub-1/anat/sub-1_T1w.nii.gz", content={"participants.tsv": table})
    with pytest.raises(CohortError, match=message):
        Cohort.read(root)


def test_a_folder_that_cannot_be_listed_is_not_lost_silently(layout, monkeypatch):
    import os

    root = layout("sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("sub-2/anat"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    cohort = Cohort.read(root)
    assert len(cohort) == 1
    assert "cannot be listed" in cohort.unused[0][1]


def test_a_link_that_leads_back_up_does_not_hang(layout):
    root = layout("sub-1/anat/sub-1_T1w.nii.gz")
    (root / "sub-1" / "anat" / "up").symlink_to(root / "sub-1")
    assert len(Cohort.read(root).table) == 1


def test_participant_id_names_the_person_whatever_other_columns_are_called(layout):
    root = layout(
        *(f"sub-{number}/anat/sub-{number}_T1w.nii.gz" for number in ("01", "02")),
        content={"participants.tsv": "subject\tparticipant_id\tage\n02\tsub-01\t20\n01\tsub-02\t80\n"},
    )
    cohort = Cohort.read(root)
    assert [(s.subject, s.covariates["age_years"]) for s in cohort.sessions()] == [("sub-01", 20), ("sub-02", 80)]
    assert list(cohort.table["subject_2"]) == ["02", "01"]
    assert any("participant_id names the subject" in note for note in cohort.notes)


def test_session_id_names_the_visit_whatever_other_columns_are_called(layout):
    root = layout(
        *(f"sub-1/ses-{visit}/anat/sub-1_ses-{visit}_T1w.nii.gz" for visit in "ab"),
        content={"sub-1/sub-1_sessions.tsv": "session\tsession_id\tage\nb\tses-a\t20\na\tses-b\t21\n"},
    )
    assert [s.covariates["age_years"] for s in Cohort.read(root).sessions()] == [20, 21]


@pytest.mark.parametrize(
    ("scan", "label_map", "joined"),
    [
        ("T1w", "space-MNI152NLin6Asym_label-lesion_mask", False),
        ("T1w", "space-T1w_label-lesion_mask", True),
        ("T1w", "label-lesion_mask", True),
        ("space-MNI_T1w", "space-MNI_label-lesion_mask", True),
        ("space-MNI_T1w", "label-lesion_mask", False),
    ],
)
def test_a_label_map_must_lie_in_the_space_of_the_scans(layout, scan, label_map, joined):
    cohort = Cohort.read(layout(*(f"sub-1/anat/sub-1_{name}.nii.gz" for name in (scan, label_map))))
    assert cohort.table["mask"].notna().all() == joined
    assert ["another space" in reason for _, reason in cohort.unused] == ([] if joined else [True])


def test_rows_of_a_table_that_find_no_scan_are_counted(layout):
    root = layout(
        "sub-1/ses-01/anat/sub-1_ses-01_T1w.nii.gz",
        content={"sub-1/sub-1_sessions.tsv": "session_id\tage\n1\t20\n\t21\n"},
    )
    cohort = Cohort.read(root)
    assert cohort.table["age_years"].isna().all()
    assert any("1 of 1 rows of sub-*_sessions.tsv match no scan" in note for note in cohort.notes)


@pytest.mark.parametrize("described", ["sessions.json", "participants.json", "sub-1/sub-1_sessions.json"])
def test_the_unit_of_ages_at_visits_is_inherited(layout, described):
    root = layout(
        "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz",
        content={
            described: json.dumps({"age": {"Units": "months"}}),
            "sub-1/sub-1_sessions.tsv": "session_id\tage\nses-a\t24\n",
        },
    )
    cohort = Cohort.read(root)
    assert cohort.table["age_years"][0] == 2
    assert any("months" in note and "sub-1" not in note for note in cohort.notes)


def test_an_age_in_months_that_is_no_number_is_not_lost_silently(layout):
    root = layout(
        "sub-1/anat/sub-1_T1w.nii.gz",
        content={
            "participants.json": json.dumps({"age": {"Units": "months"}}),
            "participants.tsv": "participant_id\tage\nsub-1\t24;5\n",
        },
    )
    cohort = Cohort.read(root)
    assert cohort.table["age_years"].isna().all()
    assert any("1 × an age that is not a number, now missing: line 2 '24;5'" in note for note in cohort.notes)


def test_a_file_that_names_another_person_than_its_folder_is_not_used(layout, contents):
    root = layout(
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-1/anat/sub-2_T2w.nii.gz",
        "sub-1/anat/sub-1_ses-b_FLAIR.nii.gz",
        "sub-3/ses-a/anat/sub-3_ses-b_T1w.nii.gz",
        "sub-HC4/ses-a/anat/sub-hc4_ses-A_T1w.nii.gz",
        "derivatives/x/sub-1/anat/sub-2_mask.nii.gz",
    )
    cohort = Cohort.read(root)
    assert sorted(contents(cohort)) == [("sub-1", "1"), ("sub-1", "b"), ("sub-HC4", "a")]
    assert [file.name for file, reason in cohort.unused if "another subject or session" in reason] == [
        "sub-2_T2w.nii.gz",
        "sub-3_ses-b_T1w.nii.gz",
        "sub-2_mask.nii.gz",
    ]


LABELS_IN_DOUBT = [
    *[("AA", "aa"), ("p1v1", "p1v2"), ("OAS30001MR1", "OAS30001MR2"), ("21a", "21b"), ("21A", "21c"), ("21", "21b")],
    *[("7", "07"), ("K007", "K07"), ("21pre", "21post"), ("21bl", "21fu"), ("21m06", "21m12"), ("21t0", "21t1")],
    *[("adaVisit1", "adaVisit2"), ("pre21", "post21"), ("21", "21retest"), ("7a", "07b"), ("21y1", "21y3")],
]


@pytest.mark.parametrize("labels", LABELS_IN_DOUBT)
def test_labels_that_may_be_one_person_are_refused_with_the_line_to_write(layout, labels):
    root = layout(*(f"sub-{label}/anat/sub-{label}_T1w.nii.gz" for label in labels))
    with pytest.raises(CohortError, match=r"may be one person.*participants\.tsv.* sub-\w+, \w+, T1w, sub-\w+/anat/"):
        Cohort.read(root)
    (root / "participants.tsv").write_text(
        "participant_id\tsex\tage\n" + "".join(f"sub-{x}\tF\t3{x[-1:]}\n" for x in labels)
    )
    with pytest.raises(CohortError, match="may be one person"):
        Cohort.read(root)


@pytest.mark.parametrize("facts", [("F\t41", "M\t41"), ("F\t12", "F\t41"), ("n/a\t12", "F\t41")])
@pytest.mark.parametrize("labels", [("21a", "21b"), ("7", "07"), ("21", "21b"), ("21pre", "21post")])
def test_labels_alike_are_two_people_where_the_table_shows_it(layout, labels, facts):
    rows = "".join(f"sub-{label}\t{text}\n" for label, text in zip(labels, facts, strict=True))
    scans = (f"sub-{label}/anat/sub-{label}_T1w.nii.gz" for label in labels)
    cohort = Cohort.read(layout(*scans, content={"participants.tsv": f"participant_id\tsex\tage\n{rows}"}))
    assert set(cohort.table["subject"]) == {f"sub-{label}" for label in labels}


@pytest.mark.parametrize("facts", [("F\t41", "n/a\tn/a"), ("F\t41", "F\t43"), ("F\t41", None)])
def test_a_table_that_does_not_show_two_people_leaves_the_doubt(layout, facts):
    rows = "".join(f"sub-{label}\t{text}\n" for label, text in zip(("21a", "21b"), facts, strict=True) if text)
    root = layout(*(f"sub-21{x}/anat/sub-21{x}_T1w.nii.gz" for x in "ab"))
    (root / "participants.tsv").write_text(f"participant_id\tsex\tage\n{rows}")
    with pytest.raises(CohortError, match="sub-21a and sub-21b"):
        Cohort.read(root)


@pytest.mark.parametrize(
    "labels",
    [
        *[("21c", "21p"), ("abc", "abd"), ("control01", "patient01"), ("m01", "m02", "v01"), ("20190301", "20190302")],
        *[("1001", "101"), ("ecog01", "ecog02"), ("2m1", "3m1"), ("xp101", "xp102"), ("A00028185", "A00028186")],
    ],
)
def test_labels_of_different_people_are_read(layout, labels):
    cohort = Cohort.read(layout(*(f"sub-{label}/anat/sub-{label}_T1w.nii.gz" for label in labels)))
    assert set(cohort.table["subject"]) == {f"sub-{label}" for label in labels}


def test_a_folder_of_dicom_is_not_bids_for_its_names(layout):
    from brainfound.data.sources import bids, fomo60k

    root = layout("sub-01/ses-1/a.dcm", "x/sub_1/ses_1/a.dcm")
    assert not bids.can_read(root)
    assert not fomo60k.can_read(root / "x")
    (root / "dataset_description.json").write_text("{}")
    assert bids.can_read(root)


def test_masks_of_brains_and_tissues_are_no_lesions(layout):
    names = ("T1w_brain_mask", "desc-hdbet_mask", "label-ventricles_mask", "desc-deface_mask", "label-lesion_mask")
    columns = {name: mask_column(Path(f"sub-5_{name}.nii.gz")) for name in names}
    assert list(columns.values()) == ["brain_mask", "brain_mask", "ventricle_mask", "deface_mask", "mask"]


def test_masks_of_strokes_lie_in_derivatives_without_a_pipeline(layout):
    root = layout(
        "sub-strokecase0007/ses-0001/dwi/sub-strokecase0007_ses-0001_dwi.nii.gz",
        "derivatives/sub-strokecase0007/ses-0001/sub-strokecase0007_ses-0001_msk.nii.gz",
        "derivatives/other/sub-strokecase0007/sub-strokecase0007_desc-brain_mask.nii.gz",
    )
    (session,) = Cohort.read(root).sessions()
    assert {column: file.name.rsplit("_", 1)[1] for column, file in session.masks.items()} == {"mask": "msk.nii.gz"}
