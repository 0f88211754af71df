"""Splits never share a subject."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfound.data.splits.dividing import (
    few_shot,
    k_folds,
    leave_one_site_out,
    merge_linked_subjects,
    require_disjoint,
    split_by_subject,
)
from brainfound.errors import UsageError

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


@settings(deadline=None)
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


@st.composite
def cohorts(draw, min_subjects: int = 20):
    """Sessions of 20 to 60 subjects, up to three each: subjects, labels, sites and ages, some of them missing."""
    number = draw(st.integers(min_subjects, 60))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    subjects = [f"s{n:02d}" for n in range(number) for _ in range(rng.integers(1, 4))]
    label_of = dict(zip(sorted(set(subjects)), rng.choice(["a", "b", None], number, p=[0.5, 0.4, 0.1]), strict=True))
    labels = [label_of[subject] for subject in subjects]
    site_of = {subject: rng.choice(["north", "south", "west"]) for subject in label_of}
    moves = rng.random(len(subjects)) < 0.05
    sites = [rng.choice(["north", None]) if move else site_of[s] for s, move in zip(subjects, moves, strict=True)]
    ages = np.where(rng.random(len(subjects)) < 0.1, np.nan, rng.uniform(20, 90, len(subjects))).tolist()
    return subjects, labels, sites, ages, seed


def members(split, subjects) -> dict[str, set[str]]:
    return {part: {subjects[i] for i in index} for part, index in split.items()}


def every_split(subjects, labels, sites, ages, seed):
    """All kinds of splits of a cohort, by name."""
    columns = {"label": labels, "site": sites, "age": ages}
    yield "single", split_by_subject(subjects, SHARES, seed, columns)
    for n, fold in enumerate(k_folds(subjects, 4, seed, columns, validation=0.15)):
        yield f"fold {n}", fold
    for n, few in few_shot(subjects, [1, 2], seed, labels, {"train": 0.6, "validation": 0.2, "test": 0.2}).items():
        yield f"{n} shots", few
    for n, few in few_shot(subjects, [3, 7], seed, stratify=columns).items():
        yield f"{n} subjects", few
    for site, fold in leave_one_site_out(subjects, sites, seed, 0.1, columns).items():
        yield site, fold


def enough_shots(cohort) -> bool:
    """Two subjects of each class are left to draw from when the smallest class has six."""
    subjects, labels, *_ = cohort
    classes = dict(zip(subjects, labels, strict=True))
    return min(sum(kind == wanted for kind in classes.values()) for wanted in "ab") >= 6


@settings(deadline=None, max_examples=30)  # ten splits each
@given(cohorts().filter(enough_shots), st.randoms(use_true_random=False))
def test_no_split_shares_a_subject_or_depends_on_the_order(cohort, random):
    *columns, seed = cohort
    order = list(range(len(columns[0])))
    random.shuffle(order)
    shuffled = [[column[i] for i in order] for column in columns]
    for (name, split), (_, again) in zip(every_split(*columns, seed), every_split(*shuffled, seed), strict=True):
        parts = members(split, columns[0])
        assert all(parts.values()), name
        assert len(set().union(*parts.values())) == sum(map(len, parts.values())), name
        assert parts == members(again, shuffled[0]), name
        for part, index in split.items():  # all sessions of a subject
            assert len(index) == sum(subject in parts[part] for subject in columns[0]), name


@settings(deadline=None)
@given(cohorts(min_subjects=30))
def test_parts_have_about_the_mix_of_labels_and_of_sites(cohort):
    subjects, labels, sites, _, seed = cohort
    names = sorted(set(subjects))
    label_of = dict(zip(subjects, labels, strict=True))
    site_of = {name: sites[subjects.index(name)] for name in names}
    columns = {"label": [label_of[s] for s in names], "site": [site_of[s] for s in names]}
    combined = list(zip(*columns.values(), strict=True))
    for split in (split_by_subject(names, SHARES, seed, columns), *k_folds(names, 5, seed, columns, validation=0.1)):
        for values in (*columns.values(), combined):
            for value in set(values):
                total = values.count(value)
                for index in split.values():
                    inside = sum(values[i] == value for i in index)
                    assert abs(inside - len(index) / len(names) * total) <= 2.7
    sizes = [len(index) for index in split_by_subject(names, SHARES, seed, columns).values()]
    assert max(abs(size - share * len(names)) for size, share in zip(sizes, SHARES.values(), strict=True)) < 1


def test_missing_labels_are_a_stratum():
    subjects = [f"s{n}" for n in range(90)]
    for missing in (None, float("nan"), ""):
        ages = [missing if n % 3 == 0 else 20.0 + n for n in range(90)]
        split = split_by_subject(subjects, {"a": 0.5, "b": 0.5}, 1, ages)
        inside = sum(n % 3 == 0 for n in split["a"])
        assert abs(inside - 15) <= 1


def test_strata_count_a_subject_once_by_its_most_frequent_label():
    subjects = [f"s{n // 3}" for n in range(120)]
    labels = ["ill" if n % 3 and n // 3 < 20 else "well" for n in range(120)]
    split = split_by_subject(subjects, {"a": 0.5, "b": 0.5}, 2, labels)
    assert len({subjects[i] for i in split["a"] if labels[i] == "ill"}) == 10


def test_folds_take_their_validation_part_from_the_training_part():
    subjects = [f"s{n // 2}" for n in range(80)]
    plain, watched = k_folds(subjects, 4, 3), k_folds(subjects, 4, 3, validation=0.1)
    for without, fold in zip(plain, watched, strict=True):
        assert np.array_equal(without["test"], fold["test"])
        assert sorted([*fold["train"], *fold["validation"]]) == without["train"].tolist()
        assert len({subjects[i] for i in fold["validation"]}) == 4
    with pytest.raises(UsageError, match="left to train on"):
        k_folds(subjects, 2, 3, validation=0.5)


@settings(deadline=None)
@given(st.integers(0, 50))
def test_more_shots_contain_fewer_and_the_test_part_stays(seed):
    subjects = [f"s{n // 2}" for n in range(120)]
    labels = [["ill", "well", "other"][n // 2 % 3] for n in range(120)]
    label_of = dict(zip(subjects, labels, strict=True))
    few = few_shot(subjects, [10, 1, 5], seed, labels)
    assert list(few) == [1, 5, 10]
    parts = {number: members(split, subjects) for number, split in few.items()}
    assert parts[1]["train"] < parts[5]["train"] < parts[10]["train"]
    for number, split in parts.items():
        assert sorted(label_of[s] for s in split["train"]) == sorted(["ill", "other", "well"] * number)
        assert (split["test"], split["validation"]) == (parts[1]["test"], parts[1]["validation"])
    # Whichever numbers are asked for.
    assert members(few_shot(subjects, [5], seed, labels)[5], subjects) == parts[5]
    counted = {n: members(s, subjects) for n, s in few_shot(subjects, [4, 9], seed, stratify=labels).items()}
    assert counted[4]["train"] < counted[9]["train"]
    assert [len(split["train"]) for split in counted.values()] == [4, 9]
    assert sorted(label_of[s] for s in counted[9]["train"]) == sorted(["ill", "other", "well"] * 3)


def test_shots_that_are_not_there_are_refused():
    subjects = [f"s{n}" for n in range(20)]
    labels = ["rare" if n < 4 else "common" for n in range(20)]
    with pytest.raises(UsageError, match="of the class rare"):
        few_shot(subjects, [4], 0, labels)
    with pytest.raises(UsageError, match="at most 14"):
        few_shot(subjects, [15], 0)
    with pytest.raises(UsageError, match="positive"):
        few_shot(subjects, [0], 0)
    for missing in ([None] * 20, [float("nan")] * 20):
        with pytest.raises(UsageError, match="column disease: no session has a label. Fill it"):
            few_shot(subjects, [1], 0, {"disease": missing})
    assert members(few_shot(subjects, [2], 0, {"rarity": labels})[2], subjects) == members(
        few_shot(subjects, [2], 0, labels)[2], subjects
    )
    unlabelled = [None if n % 2 else "a" if n % 4 else "b" for n in range(20)]
    few = few_shot(subjects, [2], 0, unlabelled)
    assert all(unlabelled[i] for i in few[2]["train"])


def test_a_subject_of_two_sites_is_left_out_where_one_of_them_is_tested():
    subjects = ["a", "b", "c", "d", "e", "f", "moved", "moved", "unknown", "unknown"]
    sites = ["X", "X", "Y", "Y", "Z", "Z", "X", "Y", "Z", None]
    folds = leave_one_site_out(subjects, sites, 0)
    parts = {site: members(fold, subjects) for site, fold in folds.items()}
    assert parts == {
        "X": {"train": {"c", "d", "e", "f"}, "test": {"a", "b"}},
        "Y": {"train": {"a", "b", "e", "f"}, "test": {"c", "d"}},
        "Z": {"train": {"a", "b", "c", "d", "moved"}, "test": {"e", "f"}},
    }
    watched = leave_one_site_out(subjects, sites, 0, validation=0.2)
    assert all(set(fold) == {"train", "validation", "test"} for fold in watched.values())
    with pytest.raises(UsageError, match="two sites"):
        leave_one_site_out(subjects, ["X"] * 10, 0)


def test_subjects_who_share_an_image_go_by_one_name():
    subjects = ["d", "a", "b", "b", "c", "e"]
    assert merge_linked_subjects(subjects, ["1", "2", "3", "2", "1", "4"]) == ["c", "a", "a", "a", "c", "e"]
    assert merge_linked_subjects(subjects, list("123456")) == subjects
