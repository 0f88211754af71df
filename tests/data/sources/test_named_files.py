"""Files by name: who is who, and an error wherever that leaves doubt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfound.contrasts import CONTRASTS
from brainfound.data.cohort import Cohort
from brainfound.data.sources.file_names import parse_filename
from brainfound.data.sources.identifiers import parse_identifier
from brainfound.errors import CohortError


@pytest.mark.parametrize(
    ("name", "contrast", "identifier"),
    [
        ("BraTS2021_00000_t1ce", "T1ce", "BraTS2021_00000"),
        ("BraTS-GLI-00000-000-t1c", "T1ce", "BraTS-GLI-00000-000"),
        ("IXI002-Guys-0828-T1", "T1w", "IXI002-Guys-0828"),
        ("UPENN-GBM-00001_11_T1GD", "T1ce", "UPENN-GBM-00001_11"),
        ("UPENN-GBM-00001_11_FLAIR_unstripped", "FLAIR", "UPENN-GBM-00001_11"),
        ("TCGA-02-0003_1996.06.08_t1Gd", "T1ce", "TCGA-02-0003_1996.06.08"),
        ("patient1_flair", "FLAIR", "patient1"),
        ("patient1_t2_flair", "FLAIR", "patient1"),
        ("patient1_T1_2", "T1w", "patient1"),
        ("patient1_T1_run-2_brain", "T1w", "patient1"),
        ("patient1_brain_T1", "T1w", "patient1"),
        ("T1_patient1", "T1w", "patient1"),
        ("study_T1_01", "T1w", "study_01"),
        ("study_T1_patient1", "T1w", "study_patient1"),
        ("lesion_001_T1", "T1w", "lesion_001"),
        ("dwi_b1000", "DWI", ""),
        ("dwi_b0", "unknown", ""),
        ("t1", "T1w", ""),
    ],
)
def test_names_say_contrast_and_identifier(name, contrast, identifier):
    found = parse_filename(Path(f"{name}.nii.gz"))
    assert (found.contrast, found.identifier, found.label_column) == (contrast, identifier, None)


@pytest.mark.parametrize(
    ("name", "column", "identifier"),
    [
        ("BraTS-GLI-00000-000-seg", "mask", "BraTS-GLI-00000-000"),
        ("patient1_flair_seg", "mask", "patient1"),
        ("patient1_mask", "mask", "patient1"),
        ("patient1_T1_lesion", "mask", "patient1"),
        ("lesions", "mask", ""),
        ("consensus_gt", "mask", ""),
        ("UCSF-PDGM-0004_tumor_segmentation", "mask", "UCSF-PDGM-0004"),
        ("UCSF-PDGM-0004_brain_segmentation", "brain_mask", "UCSF-PDGM-0004"),
        ("patient1_brain_mask", "brain_mask", "patient1"),
        ("brainmask", "brain_mask", ""),
        ("patient1_dseg", "dseg", "patient1"),
    ],
)
def test_label_maps_are_known_by_name(name, column, identifier):
    found = parse_filename(Path(f"{name}.nii.gz"))
    assert (found.contrast, found.label_column, found.identifier) == ("unknown", column, identifier)


@pytest.mark.parametrize(
    ("identifier", "subject", "session"),
    [
        ("BraTS-GLI-00000-001", "BraTS-GLI-00000", "001"),
        ("BraTS2021_00012", "BraTS2021_00012", None),
        ("IXI002-Guys-0828", "IXI002", None),
        ("UPENN-GBM-00001_21", "UPENN-GBM-00001", "21"),
        ("OAS1_0001_MR2", "OAS1_0001", "MR2"),
        ("OAS30001_MR_d0129", "OAS30001", "d0129"),
        ("ADNI_002_S_0413_20190301", "002_S_0413", "20190301"),
        ("sub-01_ses-b_acq-x", "sub-01", "b"),
        ("patient1_v2", "patient1", "v2"),
        ("patient1_baseline", "patient1", "baseline"),
        ("UCSF-PDGM-0004_nifti", "UCSF-PDGM-0004", None),
        ("UCSF-PDGM-0004_FU003d_nifti", "UCSF-PDGM-0004", "FU003d"),
        ("TCGA-02-0003_1996.06.08", "TCGA-02-0003", "1996.06.08"),
        ("case1_06-08-1996", "case1", "06-08-1996"),
        ("patient1_2019-03-01", "patient1", "2019-03-01"),
        ("patient1", "patient1", None),
        ("1234567_20253_3_0", "1234567", "3"),
        ("q07_2019_03_01", "q07", "2019_03_01"),
        ("q07_20190301_101530", "q07", "20190301"),
        ("q07_20190301101530", "q07", "20190301"),
        ("q07_1mar2019", "q07", "1mar2019"),
        ("q07_sc", "q07", "sc"),
        ("q07_18m", "q07", "18m"),
        ("q07_tp2_tse", "q07", "tp2"),
        ("q07_tse_time-point-2", "q07", "time-point-2"),
        ("HC_q07_week-000-1_space_3d", "HC_q07", "week-000-1"),
        ("baseline_q07", "q07", "baseline"),
        ("20190301_q07", "q07", "20190301"),
        ("BraTS2021_00012_v2", "BraTS2021_00012", "v2"),
        ("OAS1_0001_MR1_mpr-1_anon", "OAS1_0001", "MR1"),
        ("HC_m01", "HC_m01", None),
        ("v1_m01", "v1_m01", None),
        ("cor_07", "cor_07", None),
    ],
)
def test_visits_are_distinguished_from_persons(identifier, subject, session):
    found = parse_identifier(identifier)
    assert (found.subject, found.session) == (subject, session)


@given(
    prefix=st.from_regex(r"[a-z]{2,5}(?<!scan)", fullmatch=True),
    number=st.integers(0, 9999),
    contrast=st.sampled_from([alias for c in CONTRASTS.values() if c.name != "unknown" for alias in c.aliases]),
    repeat=st.sampled_from(["", "_2", "_run-3", "_brain"]),
)
def test_a_name_gives_back_what_it_was_made_of(prefix, number, contrast, repeat):
    identifier = f"{prefix}x{number:04d}"
    found = parse_filename(Path(f"{identifier}_{contrast}{repeat}.nii.gz"))
    assert found.identifier == identifier
    assert contrast in CONTRASTS[found.contrast].aliases
    assert found.label_column is None


@given(st.text(st.characters(blacklist_characters="/\x00"), min_size=1, max_size=40))
def test_any_name_can_be_read(name):
    found = parse_filename(Path(f"{name}.nii.gz"))
    assert found.contrast in CONTRASTS
    # Nothing is invented: what the subject is called stands in the name, in that order.
    characters = iter(name)
    assert all(character in characters for character in parse_identifier(found.identifier).subject)


def test_one_folder_of_public_names(layout, contents):
    root = layout(
        *(
            f"BraTS-GLI-00000-{visit}-{word}.nii.gz"
            for visit in ("000", "001")
            for word in ("t1n", "t1c", "t2f", "seg")
        ),
        *(f"IXI{person}.nii.gz" for person in ("002-Guys-0828-T1", "002-Guys-0828-T2", "012-HH-1211-PD")),
        "IXI012-HH-1211-DTI-00.nii.gz",
    )
    cohort = Cohort.read(root)
    assert cohort.source == "files by name"
    assert {key: sorted(found) for key, found in contents(cohort).items()} == {
        ("BraTS-GLI-00000", "000"): ["FLAIR", "T1ce", "T1w"],
        ("BraTS-GLI-00000", "001"): ["FLAIR", "T1ce", "T1w"],
        ("IXI002", "1"): ["T1w", "T2w"],
        ("IXI012", "1"): ["PDw"],
    }
    masks = {(s.subject, s.session): s.masks for s in cohort.sessions()}
    assert masks[("BraTS-GLI-00000", "001")]["mask"].name == "BraTS-GLI-00000-001-seg.nii.gz"
    assert set(cohort.table["site"].dropna()) == {"Guys", "HH"}
    assert [file.name for file, _ in cohort.unused] == ["IXI012-HH-1211-DTI-00.nii.gz"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ("T1/IXI002-Guys-0828-T1", "T2/IXI002-Guys-0828-T2", "T2/IXI012-HH-1211-T2"),
            {("IXI002", "1"): ["T1w", "T2w"], ("IXI012", "1"): ["T2w"]},
        ),
        (
            ("train/BraTS2021_00000/BraTS2021_00000_t1", "train/BraTS2021_00002/BraTS2021_00002_t1"),
            {("BraTS2021_00000", "1"): ["T1w"], ("BraTS2021_00002", "1"): ["T1w"]},
        ),
        (
            ("p1/study1_T1", "p1/study2_T1", "p2/study1_T1"),
            {("p1", "study1"): ["T1w"], ("p1", "study2"): ["T1w"], ("p2", "study1"): ["T1w"]},
        ),
        (("p1/T1", "p1/T1_2", "p2/t2"), {("p1", "1"): ["T1w", "T1w"], ("p2", "1"): ["T2w"]}),
        (("p1/ses-1/T1", "p1/ses-2/T1"), {("p1", "ses-1"): ["T1w"], ("p1", "ses-2"): ["T1w"]}),
        (("p1/2019/T1", "p1/2020/T1"), {("p1", "2019"): ["T1w"], ("p1", "2020"): ["T1w"]}),
        (("site1/p1/T1", "site2/p2/T1"), {("p1", "1"): ["T1w"], ("p2", "1"): ["T1w"]}),
        (("batch1/p1_T1", "batch1/p2_T1", "batch2/p3_T1"), {(f"p{i}", "1"): ["T1w"] for i in (1, 2, 3)}),
        (("p01_v1_T1", "p01_v2_T1", "p02_T1"), {("p01", "v1"): ["T1w"], ("p01", "v2"): ["T1w"], ("p02", "1"): ["T1w"]}),
        (
            ("UPENN-GBM-00001/UPENN-GBM-00001_11/T1", "UPENN-GBM-00001/UPENN-GBM-00001_21/T1"),
            {("UPENN-GBM-00001", "11"): ["T1w"], ("UPENN-GBM-00001", "21"): ["T1w"]},
        ),
        (("imagesTr/p1_T1", "labelsTr/p1"), {("p1", "1"): ["T1w"]}),
        (("q7_t1_vibe_cor", "q7_t2_spc_abc", "q7_tirm_flair"), {("q7", "1"): ["FLAIR", "T1w", "T2w"]}),
        (("q7/q7_abc_T1", "q7/q7_xyz_T2", "q7/q7_T1_seg"), {("q7", "1"): ["T1w", "T2w"]}),
        (("q7/abc_T1", "q7/xyz_T2"), {("q7", "1"): ["T1w", "T2w"]}),
        (("q7_tse_v1_t2", "q7_v2_t1"), {("q7", "v1"): ["T2w"], ("q7", "v2"): ["T1w"]}),
        (("q7/v1_t1_mpr", "q7/v2_t1_mpr"), {("q7", "v1"): ["T1w"], ("q7", "v2"): ["T1w"]}),
        (("baseline/q7_T1", "followup/q7_T1"), {("q7", "baseline"): ["T1w"], ("q7", "followup"): ["T1w"]}),
        (("ses-1/q7/T1", "ses-2/q7/T1"), {("q7", "ses-1"): ["T1w"], ("q7", "ses-2"): ["T1w"]}),
        (("1234567/20253_2_0/T1", "1234567/20253_3_0/T1"), {("1234567", "2"): ["T1w"], ("1234567", "3"): ["T1w"]}),
        (
            ("NYU_50001_T1", "NYU_50002_T1", "Pitt_50003_T1"),
            {(f"{n}", "1"): ["T1w"] for n in ("NYU_50001", "NYU_50002", "Pitt_50003")},
        ),
        (("HC/001_T1", "HC/002_T1"), {("001", "1"): ["T1w"], ("002", "1"): ["T1w"]}),
    ],
)
def test_folders_of_subjects_visits_and_groups(layout, contents, names, expected):
    cohort = Cohort.read(layout(*(f"{name}.nii.gz" for name in names)))
    assert {key: sorted(found) for key, found in contents(cohort).items()} == expected
    if "labelsTr/p1" in names:
        assert cohort.table["mask"][0].endswith("labelsTr/p1.nii.gz")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("p1_1_T1", "p1_2_T1"), "two subjects or two visits"),
        (("2021_001_T1", "2021_002_T1"), "two subjects or two visits"),
        (("p1_T1", "p1_a_T2"), "one name begins with another"),
        (("P1_T1", "p1_T2"), "capital letters"),
        (("siteA/p1/T1", "p2/T1"), "different depths"),
        (("anna/one/T1", "anna/two/T1"), "visits or subjects"),
        (("batch1/p1_T1", "batch2/p1_T2"), "in several folders"),
        (("batch1/p1_T1", "batch1/p2_T1", "batch2/p1_T2"), "in several folders"),
        (("p1_T1", "T1"), "some names say a subject and others none"),
        (("a/b/c/T1",), "too deep"),
        (("p1_pre_T1", "p1_post_T1"), "visits or a contrast agent"),
        (("p001_T1", "rp001_FLAIR"), "prefix of processing"),
        (("case07_T1", "c1case07_T2", "wmcase07_FLAIR"), "prefix of processing"),
        (("study2021_001_T1", "study2021_002_T1"), "two subjects or two visits"),
        (("Eva_Roth_T1", "Roth_Eva_FLAIR"), "the order of their words"),
        (("Jürgens3_T1", "Juergens3_FLAIR"), "separators or zeros"),
        (("eva_T1", "reva_FLAIR"), "prefix of processing"),
        (("3_T1", "5_FLAIR", "8_T2"), "subjects, or series of one"),
        (("p1_Besuch1_T1", "p1_Besuch2_T1"), "two subjects or two visits"),
        (("eva_vorher_T1", "eva_nachher_T1"), "two subjects or two visits"),
        (("evam00_T1", "evam12_T1"), "two subjects or two visits"),
        (("evav1_T1", "evav2_T1"), "two subjects or two visits"),
        (("evad1_T1", "evad2_T1", "oled1_T1"), "two subjects or two visits"),
        (("eva_I_T1", "eva_II_T1"), "two subjects or two visits"),
        (("eva_01.03.19_T1", "eva_02.04.20_T1"), "two subjects or two visits"),
        (("eva_2019_T1", "eva_2020_T1", "ole_2019_T1"), "two subjects or two visits"),
        (("ward7/T1_01", "ward7/T1_02"), "people or repeats"),
        (("p1/T1/flair", "p1/T2/flair"), "visits or contrasts"),
        (("trial2/study101/T1", "trial2/study102/T1"), "visits or subjects"),
        (("participant1_1_T1", "participant1_2_T1"), "two subjects or two visits"),
        (("p1/left_T1", "p1/right_T1", "p2/left_T1"), "a protocol or a person"),
        (("p1/ses-1/p2_T1",), "names another subject than its folders"),
        # One name of two persons, or two names of one.
        (("train/001_T1", "test/001_T1"), "in training and in test"),
        (("train/001_T1", "test/001_T2"), "in training and in test"),
        (("train/001/T1", "validation/001/T1"), "in training and in test"),
        (("raw/p1_T1", "derivatives/p1_T1"), "lies in several folders"),
        (("raw/p1/T1", "derivatives/p1/T1"), "lies in several folders"),
        (("HC_m01_T1", "HC_m02_T1"), "two subjects or two visits"),
        (("anna_v1_T1", "anna_v2_T1"), "two subjects or two visits"),
        (("HC/m01_T1", "HC/m02_T1"), "visits or subjects"),
        (("HC/m01/T1", "HC/m02/T1"), "visits or subjects"),
        (("site1/m01_T1", "site1/m02_T1"), "visits or subjects"),
        (("site1/m01/T1", "site1/m02/T1"), "visits or subjects"),
        (("ses-1_T1", "p1_T1"), "others a visit only"),
        (("1234567_2_0_T1", "1234567_3_0_T1"), "two subjects or two visits"),
        (("q7_abc_T1", "q7_xyz_T2"), "two subjects or two visits"),
        (("q7_t1_abc", "q7_t1_xyz"), "a protocol or a person"),
        (("q7/q7_301_T1", "q7/q7_501_T2"), "two subjects or two visits"),
        (("q7/301_T1", "q7/501_T2"), "series of one"),
        (("anna/301_T1", "anna/501_T2"), "series of one"),
        (("q7v1_T1", "q7v2_T1"), "two subjects or two visits"),
        (("q7a_T1", "q7b_T1"), "two subjects or two visits"),
        (("v1_q7_T1", "v2_q7_T1"), "two subjects or two visits"),
        (("v1_T1", "v2_T1"), "two subjects or two visits"),
        (("20190301_T1", "20200301_T1"), "two subjects or two visits"),
        (("20190301_01_T1", "20200301_01_T1"), "two subjects or two visits"),
        (("anna_20190301_T1", "anna_20200301_T1"), "two subjects or two visits"),
        (("study1_007_T1", "study2_007_T1"), "two subjects or two visits"),
        (("q-07_T1", "q07_T1"), "separators or zeros"),
        (("q7_T1", "q007_T1"), "separators or zeros"),
        (("site1/q7/T1", "site2/q7/T1"), "in several groups"),
        (("q7/01/T1", "q7/02/T1"), "visits or subjects"),
        (("2021/001/T1", "2021/002/T1"), "visits or subjects"),
        (("301_T1_q7", "501_T2_q7"), "after the contrast is the same"),
        (("anna/anna_abc_T1", "anna/anna_xyz_T2"), "begins with another|protocols of one"),
        (("q7_pre_mpr_x_T1", "q7_T2"), "begins with another"),
    ],
)
def test_what_leaves_doubt_asks_for_a_manifest(layout, names, why):
    with pytest.raises(CohortError, match=rf"{why}.*Write a manifest"):
        Cohort.read(layout(*(f"{name}.nii.gz" for name in names)))


def test_templates_are_no_subjects(layout, contents):
    cohort = Cohort.read(layout("p1/mri/T1.mgz", "fsaverage/mri/T1.mgz"))
    assert list(contents(cohort)) == [("p1", "1")]
    assert [(file.parts[-3], reason) for file, reason in cohort.unused] == [("fsaverage", "a template")]


def test_a_label_map_of_nobody_is_listed_and_stops_nothing(layout):
    cohort = Cohort.read(layout("p1_T1.nii.gz", "p1_jones_seg.nii.gz", "p1_seg.nii.gz"))
    assert cohort.table["mask"][0].endswith("p1_seg.nii.gz")
    assert [(file.name, reason) for file, reason in cohort.unused] == [
        ("p1_jones_seg.nii.gz", "a label map of a session without scans")
    ]


def test_public_sets_in_their_folders(layout, contents):
    upenn = [f"UPENN-GBM-00001_11_{word}{rest}" for word in ("T1", "FLAIR") for rest in ("", "_unstripped")]
    ucsf = [f"UCSF-PDGM-0004_{word}" for word in ("T1", "T1_bias", "T1c", "ASL", "tumor_segmentation")]
    cohort = Cohort.read(
        layout(
            *(f"UPENN-GBM-00001_11/{name}.nii.gz" for name in upenn),
            *(f"UCSF-PDGM-0004_nifti/{name}.nii.gz" for name in ucsf),
        )
    )
    assert contents(cohort) == {
        ("UCSF-PDGM-0004", "1"): ["T1w", "T1ce", "T1w"],
        ("UPENN-GBM-00001", "11"): ["FLAIR", "T1w", "FLAIR", "T1w"],
    }
    sessions = {session.subject: session for session in cohort.sessions()}
    assert sessions["UPENN-GBM-00001"].scans["T1w"].name == "UPENN-GBM-00001_11_T1.nii.gz"
    assert sessions["UCSF-PDGM-0004"].masks["mask"].name == "UCSF-PDGM-0004_tumor_segmentation.nii.gz"


def test_dicom_next_to_images_is_not_lost_silently(layout):
    cohort = Cohort.read(layout("p1_T1.nii.gz", "p1/raw.dcm"))
    assert [(file.name, reason) for file, reason in cohort.unused] == [
        ("raw.dcm", "DICOM in a folder of images is not read")
    ]


def test_real_brains_are_recognised_by_name_as_their_manifest_says(real_data, tmp_path):
    for name in ("ms", "ms_raw", "glioma"):
        (tmp_path / name).mkdir()
        for folder in (real_data / name).iterdir():
            if folder.is_dir():
                (tmp_path / name / folder.name).symlink_to(folder)
        by_hand, by_name = Cohort.read(real_data / name), Cohort.read(tmp_path / name)
        said = [(s.subject, s.session, set(s.scans), set(s.masks)) for s in by_hand.sessions()]
        assert [(s.subject, s.session, set(s.scans), set(s.masks)) for s in by_name.sessions()] == said


def test_one_man_is_no_visit(layout, contents):
    assert list(contents(Cohort.read(layout("HC_m01_T1.nii.gz", "HC_f01_T1.nii.gz")))) == [
        ("HC_f01", "1"),
        ("HC_m01", "1"),
    ]


@pytest.mark.parametrize(
    ("names", "root", "expected"),
    [
        (("p1/ses-1/T1", "p1/ses-1/flair"), "p1/ses-1", ("p1", "ses-1")),
        (("p1/ses-1/anat/T1",), "p1/ses-1/anat", ("p1", "ses-1")),
        (("p1/images/T1",), "p1/images", ("p1", "1")),
        (("anna/T1",), "anna", ("anna", "1")),
        (("p1/ses-1_T1",), "p1", ("p1", "ses-1")),
        (("anna/images/T1",), "anna/images", None),
        (("anna/ses-1/T1",), "anna/ses-1", None),
        (("anna/ses-1_T1",), "anna", None),
    ],
)
def test_a_folder_that_is_given_names_its_person_or_none(layout, contents, names, root, expected):
    path = layout(*(f"{name}.nii.gz" for name in names)) / root
    if expected is None:
        with pytest.raises(CohortError, match=r"subject.*Write a manifest"):
            Cohort.read(path)
    else:
        assert list(contents(Cohort.read(path))) == [expected]


def test_dicom_without_an_ending_is_not_lost_silently(layout):
    root = layout("p1_T1.nii.gz", "p1/notes", "p1/1.2.840.113", "p1/IM0001")
    for name in ("IM0001", "1.2.840.113"):
        (root / "p1" / name).write_bytes(bytes(128) + b"DICM")
    cohort = Cohort.read(root)
    assert sorted(file.name for file, _ in cohort.unused) == ["1.2.840.113", "IM0001"]


@pytest.mark.parametrize(
    ("name", "contrast", "identifier"),
    [
        ("PD_001", "unknown", "PD_001"),
        ("MD_001_T1", "T1w", "MD_001"),
        ("PD_T1_001", "T1w", "PD_001"),
        ("T1_PD_001", "T1w", "PD_001"),
        ("001_PD", "PDw", "001"),
        ("PD", "PDw", ""),
        ("brain_PD", "PDw", ""),
    ],
)
def test_letters_that_may_name_a_disease_need_a_person_before_them(name, contrast, identifier):
    found = parse_filename(Path(f"{name}.nii.gz"))
    assert (found.contrast, found.identifier) == (contrast, identifier)


def test_subjects_of_freesurfer(layout):
    names = ("T1", "orig", "brainmask", "aseg", "aparc+aseg", "wm")
    root = layout(*(f"{person}/mri/{name}.mgz" for person in ("ann1", "bob2") for name in names))
    cohort = Cohort.read(root)
    first = next(iter(cohort.sessions()))
    assert (first.subject, list(first.scans)) == ("ann1", ["T1w"])
    assert first.masks.keys() == {"dseg"}
    assert any("dseg: 'aparc aseg' is used and not 'aseg'" in note for note in cohort.notes)


def test_files_of_fsl_next_to_a_scan_are_not_scans(layout):
    names = (
        "T1",
        "T1_brain_mask",
        "T1_fast/T1_brain_pve_1",
        "T1_fast/T1_brain_seg",
        "T1_first/T1_first_all_fast_firstseg",
    )
    names += ("transforms/T1_to_MNI_warp", "transforms/T1_to_MNI_warp_jac")
    cohort = Cohort.read(layout(*(f"case7/{name}.nii.gz" for name in names)))
    assert list(cohort.table["contrast"]) == ["T1w"]


def test_pairs_of_analyze(layout):
    root = layout("p1/T1.img", "p1/T1.hdr", "p2/T1.img", "p2/T1.hdr", "p2/FLAIR.img")
    cohort = Cohort.read(root)
    assert [Path(path).name for path in cohort.table["path"]] == ["T1.img", "T1.img"]
    assert [reason for _, reason in cohort.unused] == ["an .img without its .hdr"]


@pytest.mark.parametrize(
    ("folder", "stem", "ending", "subject", "session"),
    [
        ("HGG/Brats17_TCIA_605_1", "Brats17_TCIA_605_1", "_t1ce", "Brats17_TCIA_605_1", "1"),
        ("LGG/Brats18_2013_28_1", "Brats18_2013_28_1", "_t1ce", "Brats18_2013_28_1", "1"),
        ("BraTS20_Training_044", "BraTS20_Training_044", "_t1ce", "BraTS20_Training_044", "1"),
        ("BraTS2021_00402", "BraTS2021_00402", "_t1ce", "BraTS2021_00402", "1"),
        ("BraTS-MET-00077-002", "BraTS-MET-00077-002", "-t1c", "BraTS-MET-00077", "002"),
        ("BraTS-MEN-RT-0103-1", "BraTS-MEN-RT-0103-1", "_t1c", "BraTS-MEN-RT-0103", "1"),
    ],
)
def test_tumours_of_every_year(layout, folder, stem, ending, subject, session):
    mask = "_gtv" if "RT" in stem else f"{ending[0]}seg"
    root = layout(f"{folder}/{stem}{ending}.nii.gz", f"{folder}/{stem}{mask}.nii.gz")
    (found,) = Cohort.read(root).sessions()
    assert (found.subject, found.session, list(found.scans)) == (subject, session, ["T1ce"])
    assert found.masks["mask"].name == f"{stem}{mask}.nii.gz"
