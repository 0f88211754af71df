"""Which contrast each given scan is."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfound.errors import ScanError, UsageError
from brainfound.inference.scans import parse_inputs, session_from_scans


@pytest.fixture
def scans(tmp_path):
    names = ("a.nii.gz", "b.nii.gz", "c.nii.gz", "s1_T1w.nii.gz", "s1_FLAIR.nii.gz")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    return {name.split(".")[0]: tmp_path / name for name in names}


def test_a_name_that_says_nothing_is_the_contrast_that_is_left(scans):
    session, notes = session_from_scans([scans["a"]], {"flair": scans["b"]}, ("T1w", "FLAIR"))
    assert session.scans == {"T1w": scans["a"], "FLAIR": scans["b"]}
    assert notes == ["a.nii.gz was read as T1w: its name does not say, and no other contrast was left"]
    session, notes = session_from_scans([scans["a"]], {}, ("T2w",))
    assert (session.scans, notes) == ({"T2w": scans["a"]}, [])


def test_nothing_is_guessed_where_two_are_left(scans):
    with pytest.raises(UsageError, match=r"does not state the contrast.*expected T1w, T2w\)\. Write T2w=a\.nii\.gz"):
        session_from_scans([scans["a"]], {"flair": scans["b"]}, ("T1w", "T2w", "FLAIR"))
    with pytest.raises(UsageError, match="does not state the contrast"):
        session_from_scans([scans["a"], scans["c"]], {"flair": scans["b"]}, ("T1w", "T2w", "FLAIR"))
    with pytest.raises(UsageError, match="does not state the contrast"):
        session_from_scans([scans["a"]], {"t1": scans["b"], "flair": scans["c"]}, ("T1w", "FLAIR"))


@pytest.mark.parametrize("name", ["z.nii.gz", "s2_T1w.nii.gz", "s2_SWI.nii.gz", "s2_T1w_mask.nii.gz"])
def test_a_file_that_does_not_exist_is_not_judged_by_its_name(scans, tmp_path, name):
    for arguments in (([tmp_path / "in" / name], {}), ([scans["a"]], {"flair": tmp_path / "in" / name})):
        with pytest.raises(ScanError, match="no such file. Check the path; scans are given as") as error:
            session_from_scans(*arguments, ("T1w", "FLAIR"))
        assert error.value.where == str(tmp_path / "in" / name)
    text = str(tmp_path / "visit=2" / name)
    assert parse_inputs([text]) == ([Path(text)], {})


def test_bids_names_state_subject_and_session(tmp_path):
    def read(*names: str) -> tuple[str, str, list[str]]:
        files = [tmp_path / name for name in names]
        for file in files:
            file.write_bytes(file.name.encode())
        session, notes = session_from_scans(files[1:], {"t1": files[0]}, ("T1w", "FLAIR"))
        return session.subject, session.session, notes

    assert read("sub-k7_ses-b_T1w.nii.gz") == ("sub-k7", "b", [])
    assert read("sub-k7_T1w.nii.gz", "sub-k7_acq-3_FLAIR.nii.gz") == ("sub-k7", "", [])
    assert read("k7_T1w.nii.gz") == ("", "", [])
    two = ["the names of the files state 2 different subjects", "the names of the files state 2 different sessions"]
    assert read("sub-k7_ses-b_T1w.nii.gz", "sub-k8_ses-b_FLAIR.nii.gz") == ("", "b", two[:1])
    assert read("sub-k7_ses-b_T1w.nii.gz", "sub-k7_ses-c_FLAIR.nii.gz") == ("sub-k7", "", two[1:])


def test_a_name_that_says_it_counts_before_what_is_left(scans):
    with pytest.raises(UsageError, match="two scans of FLAIR"):
        session_from_scans([scans["s1_FLAIR"]], {"flair": scans["b"]}, ("T1w", "FLAIR"))
    session, notes = session_from_scans([scans["s1_FLAIR"], scans["s1_T1w"]], {}, ("T1w", "FLAIR"))
    assert (set(session.scans), notes) == ({"T1w", "FLAIR"}, [])
