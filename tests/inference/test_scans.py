"""Which contrast each given scan is."""

from __future__ import annotations

import pytest

from brainfound.errors import UsageError
from brainfound.inference.scans import session_from_scans


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
    with pytest.raises(UsageError, match=r"does not state the contrast.*expected T1w, T2w\)\. Say it: T2w=a\.nii\.gz"):
        session_from_scans([scans["a"]], {"flair": scans["b"]}, ("T1w", "T2w", "FLAIR"))
    with pytest.raises(UsageError, match="does not state the contrast"):
        session_from_scans([scans["a"], scans["c"]], {"flair": scans["b"]}, ("T1w", "T2w", "FLAIR"))
    with pytest.raises(UsageError, match="does not state the contrast"):
        session_from_scans([scans["a"]], {"t1": scans["b"], "flair": scans["c"]}, ("T1w", "FLAIR"))


def test_a_name_that_says_it_counts_before_what_is_left(scans):
    with pytest.raises(UsageError, match="two scans of FLAIR"):
        session_from_scans([scans["s1_FLAIR"]], {"flair": scans["b"]}, ("T1w", "FLAIR"))
    session, notes = session_from_scans([scans["s1_FLAIR"], scans["s1_T1w"]], {}, ("T1w", "FLAIR"))
    assert (set(session.scans), notes) == ({"T1w", "FLAIR"}, [])
