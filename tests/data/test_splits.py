"""Splits never share a subject."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brainfound.data.splits import k_folds, require_disjoint, split_by_subject
from brainfound.errors import UsageError

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


@given(st.lists(st.integers(0, 40), min_size=30, max_size=120).filter(lambda s: len(set(s)) >= 10), st.integers(0, 9))
def test_parts_cover_everything_and_share_no_subject(numbers, seed):
    subjects = [f"s{n}" for n in numbers]
    split = split_by_subject(subjects, SHARES, seed)
    together = np.concatenate(list(split.values()))
    assert sorted(together) == list(range(len(subjects)))
    members = [{subjects[i] for i in index} for index in split.values()]
    assert len(set().union(*members)) == sum(map(len, members))
    assert all(members)


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    subjects = [f"s{n}" for n in range(50)]
    first = split_by_subject(subjects, SHARES, 0)
    turned = split_by_subject(subjects[::-1], SHARES, 0)
    assert {subjects[i] for i in first["test"]} == {subjects[::-1][i] for i in turned["test"]}
    other = split_by_subject(subjects, SHARES, 1)
    assert set(first["test"]) != set(other["test"])
    assert [len(v) for v in first.values()] == [35, 5, 10]


def test_strata_are_spread_over_the_parts():
    subjects = [f"s{n}" for n in range(100)]
    labels = ["ill" if n < 20 else "well" for n in range(100)]
    split = split_by_subject(subjects, SHARES, 3, labels)
    shares = {part: np.mean([labels[i] == "ill" for i in index]) for part, index in split.items()}
    assert all(abs(share - 0.2) <= 0.1 for share in shares.values())
    ages = np.linspace(20, 90, 100)
    split = split_by_subject(subjects, SHARES, 3, ages)
    assert abs(ages[split["test"]].mean() - 55) < 6


def test_folds_test_every_session_once():
    subjects = [f"s{n // 2}" for n in range(40)]
    folds = k_folds(subjects, 5, 0)
    assert sorted(np.concatenate([fold["test"] for fold in folds])) == list(range(40))
    for fold in folds:
        require_disjoint(fold, subjects)


def test_leaks_and_impossible_splits_are_refused():
    with pytest.raises(UsageError, match="share subjects"):
        require_disjoint({"train": np.array([0]), "test": np.array([1])}, ["a", "a"])
    with pytest.raises(UsageError, match="too few subjects"):
        split_by_subject(["a", "b"], SHARES, 0)
    with pytest.raises(UsageError, match="sum to 1"):
        split_by_subject(["a", "b"], {"train": 0.5, "test": 0.2}, 0)
