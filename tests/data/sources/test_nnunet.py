"""nnU-Net raw data sets and tasks of the Medical Segmentation Decathlon."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfound.data.cohort import Cohort
from brainfound.data.reading.archives import volume_path
from brainfound.data.reading.image_file import read_image_header, read_voxels
from brainfound.errors import CohortError, ScanError


def describe(root: Path, **content) -> Path:
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_channels_of_nnunet_are_named_by_its_json(layout):
    root = layout(
        *(f"imagesTr/tum_{case}_000{channel}.nii.gz" for case in (2, 10) for channel in range(3)),
        *(f"labelsTr/tum_{case}.nii.gz" for case in (2, 10)),
        "imagesTs/tum_11_0000.nii.gz",
    )
    labels = {"background": 0, "edema": 1, "core": 2}
    describe(root, channel_names={"0": "T1-Gd", "1": "flair", "2": "CT"}, labels=labels, file_ending=".nii.gz")
    cohort = Cohort.read(root)
    assert cohort.source == "nnU-Net"
    sessions = {session.subject: session for session in cohort.sessions()}
    assert sessions.keys() == {"tum_2", "tum_10", "tum_11"}
    assert {name: file.name for name, file in sessions["tum_10"].scans.items()} == {
        "T1ce": "tum_10_0000.nii.gz",
        "FLAIR": "tum_10_0001.nii.gz",
    }
    assert sessions["tum_10"].masks["mask"].name == "tum_10.nii.gz"
    assert not sessions["tum_11"].masks
    assert [reason for _, reason in cohort.unused] == ["no known contrast (CT in dataset.json)"] * 2
    assert any("1 edema, 2 core" in note for note in cohort.notes)


def test_volumes_of_the_decathlon_are_channels(layout, tmp_path):
    root = layout("labelsTr/BR_001.nii.gz", "imagesTr/._BR_001.nii.gz")
    voxels = np.arange(2 * 3 * 4 * 3, dtype=np.int16).reshape(2, 3, 4, 3)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), root / "imagesTr" / "BR_001.nii.gz")
    describe(root, modality={"0": "FLAIR", "1": "T1w", "2": "t1gd"}, labels={"0": "background", "1": "tumour"})
    (session,) = Cohort.read(root).sessions()
    assert session.scans.keys() == {"T1w", "T1ce", "FLAIR"}
    for number, contrast in enumerate(("FLAIR", "T1w", "T1ce")):
        found, low, high = read_voxels(read_image_header(session.scans[contrast]))
        assert np.array_equal(found, voxels[..., number])
        assert (low, high) == (voxels[..., number].min(), voxels[..., number].max())
    with pytest.raises(ScanError, match="no volume 3"):
        read_image_header(volume_path(root / "imagesTr" / "BR_001.nii.gz", 3))
    with pytest.raises(ScanError, match="not a 3-D volume"):
        read_image_header(root / "imagesTr" / "BR_001.nii.gz")


def test_cases_that_may_be_one_person_are_refused(layout):
    for number, cases in enumerate(
        [
            ("p7", "P07", "q8"),
            ("training01_01", "training01_02"),
            ("Eva_1.3.19", "Eva_2.4.20"),
            ("MS_study_001", "MS_study_002"),
        ]
    ):
        root = layout(*(f"set{number}/imagesTr/{case}_0000.nii.gz" for case in cases)) / f"set{number}"
        with pytest.raises(CohortError, match="two cases may be one person"):
            Cohort.read(describe(root, channel_names={"0": "T1"}, labels={}))


def test_channels_without_a_contrast_and_cases_in_both_parts_are_refused(layout):
    root = describe(layout("imagesTr/a1_0000.nii.gz"), channel_names={"0": "CT"}, labels={})
    with pytest.raises(CohortError, match=r"no channel has a known contrast.*CT"):
        Cohort.read(root)
    describe(layout("imagesTr/a1_0000.nii.gz", "imagesTs/a1_0000.nii.gz"), channel_names={"0": "T1"}, labels={})
    with pytest.raises(CohortError, match="in imagesTr and in imagesTs"):
        Cohort.read(root)
