"""Label maps of several raters: a column each, and none in the place of another."""

from __future__ import annotations

import pytest

from brainfound.data.cohort import Cohort


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        ("mask1 mask2", "mask1_mask mask2_mask"),
        ("rater1 rater2 Consensus", "mask rater1_mask rater2_mask"),
        ("ManualSegmentation_1 ManualSegmentation_2 Consensus", "mask mask1_mask mask2_mask"),
        ("lesion_rater-1 lesion_rater-2", "rater1_mask rater2_mask"),
        ("lesion_expertA lesion_expertB consensus_lesion", "experta_mask expertb_mask mask"),
        ("lesion_mask lesion_mask_2", "mask mask2_mask"),
        ("brain_mask_rater1 brain_mask_rater2 lesion_mask", "mask rater1_brain_mask rater2_brain_mask"),
        ("reader_1_mask", "mask"),
        ("mask1", "mask"),
    ],
)
@pytest.mark.parametrize("pattern", ["q5/{}.nii.gz", "q5_{}.nii.gz"])
def test_masks_of_several_raters_are_columns_of_their_own(layout, pattern, names, columns):
    cohort = Cohort.read(layout(*(pattern.format(name) for name in ("FLAIR", *names.split()))))
    (session,) = cohort.sessions()
    assert sorted(session.masks) == columns.split()
    assert len({file.name for file in session.masks.values()}) == len(names.split())
    notes = " ".join(cohort.notes)
    assert ("several raters" in notes) == (len(names.split()) > 1)
    assert ("have none in 'mask': choose a column with --mask" in notes) == ("mask" not in columns.split())
    assert not cohort.unused


def test_raters_of_some_sessions_are_columns_in_all_of_them(layout):
    names = ("q1/FLAIR", "q1/rater1", "q1/rater2", "q2/FLAIR", "q2/rater1", "q3/FLAIR", "q3/lesion_mask")
    first, second, third = Cohort.read(layout(*(f"{name}.nii.gz" for name in names))).sessions()
    assert [sorted(s.masks) for s in (first, second, third)] == [
        ["rater1_mask", "rater2_mask"],
        ["rater1_mask"],
        ["mask"],
    ]


def test_raters_of_bids_are_columns_of_their_own(layout):
    folder = "derivatives/manual/sub-5/anat/sub-5"
    names = [f"{folder}_label-lesion_desc-{who}_mask.nii.gz" for who in ("rater1", "rater2", "consensus")]
    (session,) = Cohort.read(layout("sub-5/anat/sub-5_FLAIR.nii.gz", *names)).sessions()
    assert {column: file.name.split("desc-")[1] for column, file in session.masks.items()} == {
        "mask": "consensus_mask.nii.gz",
        "rater1_mask": "rater1_mask.nii.gz",
        "rater2_mask": "rater2_mask.nii.gz",
    }
