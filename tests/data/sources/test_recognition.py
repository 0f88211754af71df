"""Which layout a path is read as, and what is said where none fits."""

from __future__ import annotations

import json

import pytest

from brainfound.data.cohort import Cohort
from brainfound.data.sources import SOURCE_LAYOUTS
from brainfound.errors import CohortError

MANIFEST = "subject\tcontrast\tpath\n1\tT1w\ta.nii\n"
INDEX = json.dumps(
    {
        "datasets": {
            "d": {"subjects": {"s": {"sessions": {"1": {"images": [{"image_path": "T1.nii", "modality": "T1"}]}}}}}
        }
    }
)
LAYOUTS = {
    "manifest": {"manifest.tsv": MANIFEST},
    "OpenMind": {"pretrain_data.json": INDEX, "T1.nii": ""},
    "FOMO task 1": {"fomo-task1/preprocessed/sub_1/ses_1/flair.nii.gz": ""},
    "FOMO300K": {"PT001_A/sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz": ""},
    "FOMO60K": {"sub_1/ses_1/t1.nii.gz": ""},
    "BIDS": {"sub-01/anat/sub-01_T1w.nii.gz": ""},
    "files by name": {"p1_T1.nii.gz": ""},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_recognised_alone(layout, name):
    assert Cohort.read(layout(content=LAYOUTS[name])).source == name


def test_layouts_exclude_each_other_but_for_the_general_ones(layout):
    """Only files by name, and folders of BIDS data sets, may lie over another layout, and come after it."""
    for name, content in LAYOUTS.items():
        root = layout(content={f"{name}/{file}": text for file, text in content.items()}) / name
        claims = [layout.name for layout in SOURCE_LAYOUTS if layout.can_read(root)]
        general = {"files by name", "BIDS data sets"} - {name}
        assert [claim for claim in claims if claim not in general] == [name.removesuffix(" 1")]
        assert claims[0] == name.removesuffix(" 1")


def test_what_a_user_wrote_comes_first(layout):
    root = layout(content={file: text for content in LAYOUTS.values() for file, text in content.items()})
    assert Cohort.read(root).source == "manifest"
    (root / "manifest.tsv").unlink()
    assert Cohort.read(root).source == "OpenMind"


def test_the_error_says_what_was_looked_for_and_what_was_found(layout):
    root = layout("a/x.png", "a/y.png", "b/z.nii.gz", "README")
    with pytest.raises(CohortError) as caught:
        Cohort.read(root)
    line = str(caught.value)
    assert "\n" not in line
    for words in (
        "no scans found",
        "2 .png",
        "1 .nii.gz",
        "1 without an ending",
        "sub-*/",
        "DICOM",
        "write a manifest",
    ):
        assert words in line


@pytest.mark.parametrize(
    ("name", "message"), [("a.nii.gz", "not a source of scans"), ("a.json", "cannot be read as JSON")]
)
def test_single_files_that_are_no_source(layout, name, message):
    with pytest.raises(CohortError, match=message):
        Cohort.read(layout(name) / name)


def test_reading_twice_gives_the_same_and_the_text_is_one_line(layout):
    names = [f"sub-{number}/anat/sub-{number}_{word}.nii.gz" for number in (10, 2, 1) for word in ("T1w", "acq-b_T1w")]
    root = layout(*names, "sub-1/func/sub-1_bold.nii.gz")
    first, second = Cohort.read(root), Cohort.read(root)
    assert first.table.equals(second.table)
    assert first.unused == second.unused
    assert list(first.table["subject"].drop_duplicates()) == ["sub-1", "sub-2", "sub-10"]
    assert repr(first) == "Cohort(BIDS, 3 sessions of 3 subjects: T1w 6; 1 files unused)"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_cohort_can_be_described_without_reading_voxels(layout, name):
    cohort = Cohort.read(layout(content=LAYOUTS[name]))
    assert len(cohort) == len(list(cohort.sessions())) >= 1
    assert set(cohort.mask_columns) >= {"mask"}


def test_folders_next_to_bids_data_sets_are_not_lost_in_silence(tmp_path, write_scan):
    write_scan("one/sub-01/anat/sub-01_T1w.nii.gz")
    write_scan("two/patient_T1w.nii.gz")
    cohort = Cohort.read(tmp_path)
    assert len(cohort) == 1
    assert [(path.name, reason.split(" (")[0]) for path, reason in cohort.rejected] == [
        ("two", "two: a folder that is not a BIDS data set")
    ]


@pytest.mark.parametrize("file", ["sub-4/anat/sub-4_FLAIR.nii.gz", "q4/q4_flair.nii.gz", "sub_4/ses_1/flair.nii.gz"])
def test_a_data_set_that_was_not_fetched_says_so(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).symlink_to("../../.git/annex/objects/aa/bb/k.nii.gz/k.nii.gz")
    with pytest.raises(CohortError, match=r"no image is there, only links to them \(got 1 links\).*datalad get"):
        Cohort.read(tmp_path)
    other = tmp_path / file.replace("4", "5")
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    cohort = Cohort.read(tmp_path)
    assert len(cohort) == 1
    assert any(note.startswith("1 files are links whose target is not there") for note in cohort.notes)
    assert [reason for _, reason in cohort.unused if "datalad get" in reason]
