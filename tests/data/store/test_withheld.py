"""A store that shows some of its contrasts: the others are absent and zero wherever it is read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from brainfound.data.batches import remove_contrasts
from brainfound.data.store.store import Store, restrict_contrasts
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
    assert restrict_contrasts(small_store, small_store.contrasts) is small_store
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
        restrict_contrasts(small_store, ["T1w"]).push_to_hub("lab/data")
    with pytest.raises(UsageError, match="withheld"):
        restrict_contrasts(small_store, ["T1w"]).slices  # noqa: B018


def test_what_is_withheld_stays_withheld(small_store):
    shown = restrict_contrasts(small_store, ["T1w", "FLAIR"])
    assert restrict_contrasts(shown, None) is shown
    assert restrict_contrasts(shown, ["T1w", "T2w"]).shown == ("T1w",)
    with pytest.raises(UsageError, match=r"no contrast would be shown \(got T2w, expected T1w, FLAIR\)"):
        restrict_contrasts(shown, ["T2w"])


def test_stores_that_withhold_the_same_become_one(small_store):
    first = [number % 2 == 0 for number in range(len(small_store))]
    parts = [small_store.filter(keep) for keep in (first, [not yes for yes in first])]
    joined = Store.concatenate([restrict_contrasts(part, ["FLAIR"]) for part in parts])
    expected = restrict_contrasts(Store.concatenate(parts), ["FLAIR"])
    assert joined.withheld == expected.withheld == ("T1w", "T2w")
    rows = np.arange(joined.num_slices)
    assert np.array_equal(joined.read_slices(rows), expected.read_slices(rows))
    assert np.array_equal(joined.present, expected.present)
    assert joined.content_hash == expected.content_hash
    with pytest.raises(UsageError, match="withhold different contrasts .*without T1w, T2w; without none"):
        Store.concatenate([restrict_contrasts(parts[0], ["FLAIR"]), parts[1]])


@pytest.mark.parametrize(("contrasts", "says"), [(["SWI"], "not a contrast"), ([], "no contrast")])
def test_what_cannot_be_shown_is_refused(small_store, contrasts, says):
    with pytest.raises(UsageError, match=says):
        restrict_contrasts(small_store, contrasts)
