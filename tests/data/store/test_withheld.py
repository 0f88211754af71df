"""A store that shows some of its contrasts: the others are absent and zero wherever it is read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from brainfound.data.batches import remove_contrasts
from brainfound.data.store.store import restrict_contrasts
from brainfound.errors import UsageError


def test_what_is_withheld_is_as_if_it_had_not_been_scanned(small_store):
    shown = restrict_contrasts(small_store, ["t1", "FLAIR"])  # by any of their names
    assert (shown.withheld, shown.shown) == (("T2w",), ("T1w", "FLAIR"))
    channel = small_store.contrasts.index("T2w")
    assert not shown.present[:, channel].any()
    assert shown.present.sum() == small_store.present.sum() - small_store.present[:, channel].sum()
    expected = remove_contrasts(small_store[3], ["T2w"])
    assert np.array_equal(shown[3].pixels, expected.pixels)
    assert np.array_equal(shown[3].present, expected.present)
    rows = np.array([0, 5])
    pixels = shown.read_slices(rows)
    assert not pixels[:, channel].any()
    others = [k for k in range(3) if k != channel]
    assert np.array_equal(pixels[:, others], small_store.read_slices(rows)[:, others])
    # The store itself is as it was.
    assert small_store.read_slices(rows)[:, channel].any()


def test_it_is_the_same_data(small_store):
    shown = restrict_contrasts(small_store, ["T1w"])
    assert shown.content_hash == small_store.content_hash
    assert restrict_contrasts(shown, None) is small_store
    assert restrict_contrasts(small_store, small_store.contrasts) is small_store
    assert restrict_contrasts(shown, ["FLAIR"]).shown == ("FLAIR",)
    again = pickle.loads(pickle.dumps(shown))
    assert again.withheld == shown.withheld
    assert np.array_equal(again[0].pixels, shown[0].pixels)
    some = shown.filter([number < 2 for number in range(len(shown))])
    assert (len(some), some.withheld) == (2, shown.withheld)
    assert shown.damaged_sessions() == []


def test_it_is_not_copied_as_if_it_were_whole(small_store, tmp_path):
    with pytest.raises(UsageError, match="withheld"):
        restrict_contrasts(small_store, ["T1w"]).save(tmp_path / "copy")
    with pytest.raises(UsageError, match="withheld"):
        restrict_contrasts(small_store, ["T1w"]).slices  # noqa: B018


@pytest.mark.parametrize(("contrasts", "says"), [(["SWI"], "not a contrast"), ([], "no contrast")])
def test_what_cannot_be_shown_is_refused(small_store, contrasts, says):
    with pytest.raises(UsageError, match=says):
        restrict_contrasts(small_store, contrasts)
