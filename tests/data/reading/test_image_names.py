"""Which names are those of images, wherever names are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfound.cli.predict import is_cohort
from brainfound.data.reading.image_names import IMAGE_SUFFIXES, holds_voxels, is_header, is_image, other_half, stem
from brainfound.data.sources.file_names import iter_images
from brainfound.phantom.label_maps import find_label_maps

SUFFIXES = [*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_part_of_the_package_knows_every_suffix(tmp_path, suffix):
    file = tmp_path / f"k3_T1w{suffix}"
    file.write_bytes(b"x")
    assert is_image(file)
    assert stem(file) == "k3_T1w"
    assert not is_cohort([file], {})
    if other := other_half(file):
        other.write_bytes(b"y")
        assert other_half(other) == file
    voxels = other if is_header(file) else file
    assert list(iter_images(tmp_path, [])) == [voxels]
    assert find_label_maps(tmp_path) == [voxels]


@pytest.mark.parametrize("name", ["manifest.tsv", "k3.json", "scans", "k3.png", "nii.gz.txt", "hdr"])
def test_other_names_are_no_images(name):
    assert not is_image(Path(name))
    assert is_cohort([Path(name)], {})


def test_a_folder_with_the_name_of_an_image_is_a_cohort(tmp_path):
    (tmp_path / "study.nii.gz").mkdir()
    assert is_cohort([tmp_path / "study.nii.gz"], {})


def test_copying_artefacts_hold_no_voxels():
    assert not holds_voxels(Path("._k3.nii.gz"))
