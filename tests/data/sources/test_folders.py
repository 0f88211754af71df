"""Folders of data sets, scanners, processing steps, contrasts and label maps, as researchers have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfound.contrasts import UNKNOWN
from brainfound.data.cohort import Cohort
from brainfound.data.sources.folders import is_scanner, label_folder, names_contrast, read_folders
from brainfound.data.sources.named_file import describe_file
from brainfound.data.sources.named_files import _identify_subjects, can_read
from brainfound.errors import CohortError

CONTRAST_FOLDERS = {
    **{
        "T1": "T1w",
        "imagesT2": "T2w",
        "FLAIR_images": "FLAIR",
        "t2_flair": "FLAIR",
        "proton_density": "PDw",
        "T1_post": "T1ce",
    },
    **{
        "Sagittal_3D_FLAIR": "FLAIR",
        "FLAIR_to_T1": "FLAIR",
        "MPRAGE": "T1w",
        "t1ce": "T1ce",
        "SWI": "SWI",
        "TOF": "MRA",
    },
}
SUBJECTS = (
    "k{n}",
    "{n:03d}",
    "sub-{n:02d}",
    "HC_{n:02d}",
    "patient_{n}",
    "IXI{n:03d}-HH-1211",
    "BraTS2021_{n:05d}",
    "{n}",
)
FOLDER_PATHS = (
    *("{f}/{i}", "{i}/{f}/{i}", "{f}/{i}/image", "{i}/{f}/image", "{i}/{v}/{f}/{i}", "{f}/{i}_{v}", "{f}/{i}/{v}"),
    *(
        "3T/{f}/{i}",
        "{i}/raw/{f}/{i}",
        "train/{f}/{i}",
        "data/{i}/{f}/x",
        "{f}/registered/{i}",
        "NYU/{i}/{v}/{f}/image",
    ),
)
ADDITIONS = ("", "_bias", "_to_T1", "_T1space", "_mask", "_FA", "_gd", "_brain", "_reg_FLAIR", "_seg", "_phase", "_xyz")


@st.composite
def folder_names(draw: st.DrawFn) -> dict[Path, tuple[int, str, str]]:
    """Paths in folders of contrasts, each with its person, the contrast of its folder and what its name adds."""
    subject, template = draw(st.sampled_from(SUBJECTS)), draw(st.sampled_from(FOLDER_PATHS))
    folders = draw(st.lists(st.sampled_from(sorted(CONTRAST_FOLDERS)), min_size=1, max_size=3, unique=True))
    visits = draw(st.sampled_from((("v1", "v2"), ("ses-1", "ses-2"), ("2015-03-04", "2016-05-06"))))
    visits, addition = visits[: draw(st.integers(1, 2))], draw(st.sampled_from(ADDITIONS))
    return {
        Path("root", template.format(i=subject.format(n=person + 1), v=visit, f=folder) + f"{addition}.nii.gz"): (
            person,
            CONTRAST_FOLDERS[folder],
            addition,
        )
        for person in range(draw(st.integers(1, 3)))
        for visit in visits
        for folder in folders
    }


def assert_contrasts_and_persons(names: dict[Path, tuple[int, str, str]]) -> None:
    known = {part for path in names for part in path.parts[1:-1]}
    files = [describe_file(Path("root"), path, known) for path in names]
    scans = [file for file in files if file.is_scan and file.name.contrast != UNKNOWN]
    for file in scans:
        _, contrast, addition = names[file.path]
        with_agent = {"T1ce"} if addition == "_gd" and contrast == "T1w" else set()
        assert file.name.contrast in {contrast} - ({"T1w"} if with_agent else set()) | with_agent
        assert addition not in ("_bias", "_mask", "_FA", "_seg", "_phase")
        assert addition != "_T1space" or contrast == "T1w"
    try:
        found = _identify_subjects(Path("root"), [file for file in files if file in scans or not file.is_scan])
    except CohortError:
        return
    pairs = {(names[file.path][0], identity.subject) for file, identity in found if file.is_scan}
    assert len(pairs) == len({person for person, _ in pairs}) == len({subject for _, subject in pairs}), pairs


@settings(max_examples=150, derandomize=True, deadline=None)
@given(folder_names())
def test_folders_of_contrasts_give_them_to_silent_names_or_leave_doubt(names):
    assert_contrasts_and_persons(names)


@pytest.mark.slow
@settings(max_examples=5_000, derandomize=True, deadline=None)
@given(folder_names())
def test_many_folders_of_contrasts(names):
    assert_contrasts_and_persons(names)


LONI = (
    "ADNI/094_S_9001/{series}/{day}_09_10_11.0/I{image}/"
    "ADNI_094_S_9001_MR_{series}_br_raw_2012{image}_1_S1_I{image}.nii"
)


def read_first(cohort: Cohort) -> dict[tuple[str, str], dict[str, str]]:
    """(subject, session) → the path of the first scan of each contrast and of each label map, from the root."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for session in cohort.sessions():
        files = {**session.scans, **session.masks}
        found[session.subject, session.session] = {
            key: Path(path).relative_to(cohort.root).as_posix().split(".")[0] for key, path in files.items()
        }
    return found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (  # sites, and steps of processing
            ("Utrecht/11/pre/FLAIR", "Utrecht/11/orig/FLAIR", "Utrecht/11/wmh", "Singapore/61/pre/FLAIR"),
            {
                ("11", "1"): {"FLAIR": "Utrecht/11/pre/FLAIR", "mask": "Utrecht/11/wmh"},
                ("61", "1"): {"FLAIR": "Singapore/61/pre/FLAIR"},
            },
        ),
        (
            ("raw/k7/T1", "registered/k7/T1", "raw/k8/T1", "registered/k8/T1"),
            {("k7", "1"): {"T1w": "registered/k7/T1"}, ("k8", "1"): {"T1w": "registered/k8/T1"}},
        ),
        (
            ("k7/mni/T1", "k7/unprocessed/T1", "k8/mni/T1"),
            {("k7", "1"): {"T1w": "k7/unprocessed/T1"}, ("k8", "1"): {"T1w": "k8/mni/T1"}},
        ),
        (  # contrasts
            ("T2/k7", "T2/k8", "images/FLAIR/k7", "lesion_masks/k7", "brain_mask/k8"),
            {
                ("k7", "1"): {"T2w": "T2/k7", "FLAIR": "images/FLAIR/k7", "mask": "lesion_masks/k7"},
                ("k8", "1"): {"T2w": "T2/k8", "brain_mask": "brain_mask/k8"},
            },
        ),
        (
            ("k7/imagesT1/k7_v1", "k7/imagesT1/k7_v2", "k8/imagesT1/k8_v1"),
            {(k, v): {"T1w": f"{k}/imagesT1/{k}_{v}"} for k, v in (("k7", "v1"), ("k7", "v2"), ("k8", "v1"))},
        ),
        (
            ("T1w/sub-7", "FLAIR/sub-7", "gm_masks/sub-7_mask"),
            {("sub-7", "1"): {"T1w": "T1w/sub-7", "FLAIR": "FLAIR/sub-7", "gm_mask": "gm_masks/sub-7_mask"}},
        ),
        (
            ("007/t2_time01_on_middle_space", "007/t2_time02_on_middle_space"),
            {("007", f"time0{visit}"): {"T2w": f"007/t2_time0{visit}_on_middle_space"} for visit in (1, 2)},
        ),
        (("T2/k7", "T2_registered/k7", "T2_mni/k7"), {("k7", "1"): {"T2w": "T2_registered/k7"}}),
        (("FLAIR/7_to_T1", "FLAIR/8_to_T1"), {(k, "1"): {"FLAIR": f"FLAIR/{k}_to_T1"} for k in ("7", "8")}),
        # scanners, wrappers and kinds of data
        (
            ("Skyra/007/T1", "GE_1.5T/008/T1", "GE_1.5T/008/roi/tumor_mask"),
            {("007", "1"): {"T1w": "Skyra/007/T1"}, ("008", "1"): {"T1w": "GE_1", "mask": "GE_1"}},
        ),
        (
            ("Verio/T1/k7", "Verio/FLAIR/k7", "Trio/T1/k8"),
            {("k7", "1"): {"T1w": "Verio/T1/k7", "FLAIR": "Verio/FLAIR/k7"}, ("k8", "1"): {"T1w": "Trio/T1/k8"}},
        ),
        (
            ("Oslo/patient_7/nifti/T1", "Bergen/patient_8/nifti/T1"),
            {
                ("patient_7", "1"): {"T1w": "Oslo/patient_7/nifti/T1"},
                ("patient_8", "1"): {"T1w": "Bergen/patient_8/nifti/T1"},
            },
        ),
        (
            tuple(f"ABIDE/00500{k}/session_{v}/anat_1/mprage" for k, v in ((77, 1), (77, 2), (88, 1))),
            {
                (f"00500{k}", f"session_{v}"): {"T1w": f"ABIDE/00500{k}/session_{v}/anat_1/mprage"}
                for k, v in ((77, 1), (77, 2), (88, 1))
            },
        ),
        (
            ("Challenge_Data/BraTS-SSA-00077-001/BraTS-SSA-00077-001-t2f",),
            {("BraTS-SSA-00077", "001"): {"FLAIR": "Challenge_Data/BraTS-SSA-00077-001/BraTS-SSA-00077-001-t2f"}},
        ),
        (
            ("A00099/sub-A00099_ses-B2_T1w", "A00099/sub-A00099_ses-B2_T1w_brainmask"),
            {
                ("A00099", "B2"): {
                    "T1w": "A00099/sub-A00099_ses-B2_T1w",
                    "brain_mask": "A00099/sub-A00099_ses-B2_T1w_brainmask",
                }
            },
        ),
        (
            ("training07/preprocessed/training07_03_t2_pp", "training07/masks/training07_03_mask1"),
            {
                ("training07", "03"): {
                    "T2w": "training07/preprocessed/training07_03_t2_pp",
                    "mask": "training07/masks/training07_03_mask1",
                }
            },
        ),
        (  # names of time points
            tuple(f"K7/T{visit}/K7_T{visit}_{word}" for visit in (1, 2) for word in ("FLAIR", "T2")),
            {
                ("K7", f"tp{visit}"): {"FLAIR": f"K7/T{visit}/K7_T{visit}_FLAIR", "T2w": f"K7/T{visit}/K7_T{visit}_T2"}
                for visit in (1, 2)
            },
        ),
        (  # an agent alone, a resolution, the number of a protocol
            ("k7/GADO_preprocessed", "k7/T1_acpc_dc_0.80", "k8/T1_acpc_dc_0.80", "k8/k8_T2w_SPC2"),
            {
                ("k7", "1"): {"T1ce": "k7/GADO_preprocessed", "T1w": "k7/T1_acpc_dc_0"},
                ("k8", "1"): {"T1w": "k8/T1_acpc_dc_0", "T2w": "k8/k8_T2w_SPC2"},
            },
        ),
    ],
)
def test_folders_that_name_no_person_are_read(layout, names, expected):
    found = read_first(Cohort.read(layout(*(f"{name}.nii.gz" for name in names))))
    assert {key: {k: v.split(".")[0] for k, v in files.items()} for key, files in found.items()} == expected


def test_copies_of_several_steps_are_noted(layout):
    cohort = Cohort.read(layout("k7/raw/T1.nii.gz", "k7/reg/T1.nii.gz", "k7/reg/FLAIR.nii.gz", "k8/reg/T1.nii.gz"))
    assert [note for note in cohort.notes if note.startswith("1 scans lie in folders of several processing steps")]
    assert len(cohort.table) == 4


def test_archives_of_loni(layout, contents):
    images = (("MP-RAGE", "2012-03-04", 111), ("Axial_FLAIR", "2012-03-04", 112), ("MP-RAGE", "2013-03-04", 113))
    names = [LONI.format(series=series, day=day, image=image) for series, day, image in images]
    assert contents(Cohort.read(layout(*names))) == {
        ("094_S_9001", "2012-03-04"): ["FLAIR", "T1w"],
        ("094_S_9001", "2013-03-04"): ["T1w"],
    }


def test_the_longitudinal_stream_of_freesurfer_has_no_person_called_base(layout, contents):
    names = [f"{folder}/mri/T1.mgz" for folder in ("k7_tp1", "k7_tp1.long.k7_base", "k7_tp2.long.k7_base", "k7_base")]
    cohort = Cohort.read(layout(*names))
    assert contents(cohort) == {("k7", "tp1"): ["T1w", "T1w"], ("k7", "tp2"): ["T1w"]}
    assert [reason for _, reason in cohort.unused] == ["a template"]
    assert Path(cohort.table["path"][0]).parts[-3] == "k7_tp1"


@pytest.mark.parametrize("folder", ["", "mri/"])
def test_results_of_spm_and_cat12_are_no_scans(layout, folder):
    results = [f"{folder}{mark}k{number}_T1.nii" for mark in ("p0", "mwp1", "wm", "y_") for number in (7, 8)]
    cohort = Cohort.read(layout("k7_T1.nii", "k8_T1.nii", *results))
    assert sorted(cohort.table["subject"]) == ["k7", "k8"]
    assert {reason for _, reason in cohort.unused} == {f"made by SPM or CAT12 of k{number}_T1.nii" for number in (7, 8)}


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("3T/k7/T1", "7T/k7/FLAIR"), "in several groups"),
        (("Prisma/patient_7/T1", "Trio/patient_7/T1"), "in several groups"),
        (("cohort_1/007/T1", "cohort_2/007/FLAIR"), "in several groups"),
        (("site1/7/T1", "site2/7/T1"), "in several groups"),
        (("anna/7/T1", "anna/8/T1"), "visits or subjects"),
        (("2018/T1_7", "2019/T1_7"), "years or subjects"),
        (("k7/pre/T1", "k7/post/T1"), "visits or subjects"),
        (("k7/T0/x", "k7/T1/x", "k7/T2/x"), "may name a contrast, or not"),
        (("PD/007", "HC/007"), "may name a contrast, or not"),
        (("T1_space/007", "T1_space/008"), "may name a contrast, or not"),
        (("FLAIR/007_T1space",), "FLAIR or T1w"),
        (("k7_to_T1",), "a target of registration, and no scan"),
        (("T1/007_reg_FLAIR",), "T1w or FLAIR"),
        (("T1/FLAIR/007",), "folders of T1w and of FLAIR"),
        (("T1/c1ab",), "mark of SPM"),
        (("T1/mwp1k7", "T1/mwp1k8"), "mark of SPM"),
        (("k7/T1/k7_AFI", "k7/T1/k7_B1"), "may say what an image of T1w shows"),
        (("T2/7_bias",), "may say what an image of T2w shows"),
        (("k7_T1", "mk7_T1"), "prefix of processing"),
        (("FLAIR/7", "T2/007"), "separators or zeros"),
    ],
)
def test_folders_that_leave_doubt_ask_for_a_manifest(layout, names, why):
    with pytest.raises(CohortError, match=rf"{why}.*Write a manifest"):
        Cohort.read(layout(*(f"{name}.nii.gz" for name in names)))


def test_what_one_folder_says():
    assert [
        name for name in ("T1", "IXI-PD", "Sagittal_3D_FLAIR", "T1_07", "T1_xyz", "k7_T1") if names_contrast(name)
    ] == ["T1", "IXI-PD", "Sagittal_3D_FLAIR"]
    assert [name for name in ("3T", "GE_1.5T", "Prisma", "GE_07", "3T_07", "anna") if is_scanner(name)] == [
        "3T",
        "GE_1.5T",
        "Prisma",
    ]
    folders = ("brain_masks", "ground_truth", "tumor_segmentation", "FLAIR_masks", "lesions", "masks_anna")
    assert [label_folder(name) for name in folders] == ["brain_mask", "mask", "mask", "mask", None, None]
    assert read_folders(("disc1", "OAS1_0777_MR2", "RAW"), ()).named == ("OAS1_0777_MR2",)


def test_a_label_map_in_the_folder_of_a_dicom_series_is_no_scan(layout):
    root = layout("k7/FLAIR/lesion.nii.gz", "k7/FLAIR/masks/k7.nii.gz")
    assert not can_read(root)
    assert can_read(layout("k7/FLAIR/k7.nii.gz"))
