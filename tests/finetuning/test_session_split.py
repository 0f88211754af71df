"""Who a run learns from: split files that cannot leak, and a bundle that remembers without naming."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfound.data.splits.split_file import Split
from brainfound.data.splits.training_history import TrainingHistory, hash_split, is_in_parts, seen_in_training
from brainfound.errors import UsageError
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.splits import SplitRecipe, make_split, split_from_file, split_sessions, write_split
from brainfound.finetuning.tasks import TargetColumn
from brainfound.recipes import validate
from tests.table_store import TableStore


@pytest.fixture
def table_store():
    """40 subjects with two sessions each, without images."""
    subjects = [f"sub-{n // 2:02d}" for n in range(80)]
    columns = {
        "subject": subjects,
        "image_hash": [f"{n:04x}" for n in range(80)],
        "mask_dtype": "",
        "diagnosis": ["ill" if n // 2 % 3 == 0 else "well" for n in range(80)],
        "age_years": [20.0 + n / 2 for n in range(80)],
        "site": [f"site{n // 2 % 4}" for n in range(80)],
    }
    return TableStore(pd.DataFrame(columns))


def divide(recipe, store, target: str, file=None, fold=None, notify=None):
    return split_sessions(recipe, store, TargetColumn.find(store, target), file, fold, notify)


def names_of(store, parts) -> dict[str, set[str]]:
    return {part: set(store.sessions["subject"].iloc[index]) for part, index in parts.items()}


def test_sessions_without_a_label_are_counted(table_store):
    told: list[str] = []
    divide(RECIPE, table_store, "age_years", None, notify=told.append)
    assert not told
    table_store.sessions.loc[[3, 8, 9], "age_years"] = np.nan
    parts = divide(RECIPE, table_store, "age_years", None, notify=told.append)
    assert sum(map(len, parts.values())) == 77
    assert told == ["3 of 80 sessions have no age_years: left out"]


RECIPE = validate(SplitRecipe, {"train": 0.5, "validation": 0.25, "test": 0.25}, ())


@pytest.mark.parametrize(
    ("wishes", "names"),
    [
        ({}, ["single"]),
        ({"folds": 4}, ["fold-1", "fold-2", "fold-3", "fold-4"]),
        ({"shots": [5, 1], "target": "diagnosis"}, ["shots-1", "shots-5"]),
        ({"num_subjects": [4, 8]}, ["subjects-4", "subjects-8"]),
        ({"leave_site_out": True}, [f"site-site{n}" for n in range(4)]),
    ],
)
def test_each_kind_of_split_is_one_that_training_takes(table_store, tmp_path, wishes, names):
    split = make_split(table_store, stratify=["diagnosis", "site"], seed=3, **wishes)
    assert list(split.folds) == names
    split.save(tmp_path / "split.json")
    for name in names:
        parts = divide(RECIPE, table_store, "diagnosis", tmp_path / "split.json", name)
        found = names_of(table_store, parts)
        assert {part: tuple(sorted(members)) for part, members in found.items()} == dict(split.parts(name))
    if wishes.get("leave_site_out"):
        assert set(table_store.sessions["site"].iloc[parts["test"]]) == {"site3"}
    if len(names) > 1:
        with pytest.raises(UsageError, match="--fold"):
            divide(RECIPE, table_store, "diagnosis", tmp_path / "split.json")


def test_wishes_that_cannot_be_met(table_store):
    for wishes, words in (
        ({"folds": 3, "shots": [1]}, "exclude each other"),
        ({"folds": 0}, "at least two folds"),
        ({"folds": 0, "shots": [1]}, "exclude each other"),
        ({"shots": [1]}, "--target"),
        ({"shots": [1], "target": "age_years"}, "numbers, not classes"),
        ({"test": 0.9, "validation": 0.1}, "leave some to train on"),
        ({"num_subjects": [100]}, "at most 28"),
    ):
        with pytest.raises(UsageError, match=words):
            make_split(table_store, **wishes)


def test_a_target_divides_only_those_who_have_it(table_store):
    table_store.sessions.loc[table_store.sessions.index < 40, "diagnosis"] = None
    split = make_split(table_store, target="diagnosis")
    assert min(min(names) for names in split.parts().values()) == "sub-20"
    assert split.num_left_out == {"single": 20}
    assert split.made["stratify"] == ["diagnosis"]


def test_training_fails_closed_on_a_split_that_leaks(small_store, tiny_backbone, tmp_path, monkeypatch):
    def start(file: Path, **options) -> str:
        with pytest.raises(UsageError) as error:
            finetune(
                "finetune-classification", small_store, tiny_backbone, "diagnosis", tmp_path / "run",
                split=file, quiet=True, **options,
            )  # fmt: skip
        assert not (tmp_path / "run").exists()
        assert "\n" not in str(error.value)
        assert not any(f"s{n:02d}" in error.value.what for n in range(12))
        return str(error.value)

    file = tmp_path / "split.json"
    made = make_split(small_store, test=0.25, validation=0.25)
    content = made.to_dict()
    subjects = content["folds"]["single"]["subjects"]
    subjects["train"].append(subjects["test"][0])
    file.write_text(json.dumps(content))
    assert "share subjects" in start(file)
    file.write_text(json.dumps(subjects))  # nor when it is written by hand
    assert "share subjects" in start(file)
    subjects["train"] = subjects["train"][:-2]
    file.write_text(json.dumps(content))
    assert "changed after it was made" in start(file)
    make_split(small_store, test=0.25, validation=0).save(file)
    assert "--validation 0.1" in start(file)
    made.save(file)
    assert "no fold" in start(file, fold="fold-1")
    with pytest.raises(UsageError, match="--split"):
        divide(RECIPE, small_store, "diagnosis", None, "fold-1")

    first, last = (made.sessions(small_store)[part][0] for part in ("train", "test"))
    hashes = small_store.sessions["image_hash"].copy()
    hashes[int(last)] = hashes[int(first)]
    monkeypatch.setitem(small_store.sessions, "image_hash", hashes)
    line = start(file)
    assert "share an image" in line
    assert f"rows {first} and {last}" in line


def test_new_divisions_keep_subjects_with_one_image_together(table_store):
    said: list[str] = []
    table_store.sessions["image_hash"] = [f"{n % 40:04x}" for n in range(80)]  # everybody is there twice
    for seed in range(5):
        recipe = RECIPE.model_copy(update={"seed": seed})
        parts = divide(recipe, table_store, "diagnosis", None, notify=said.append)
        images = [set(table_store.sessions["image_hash"].iloc[index]) for index in parts.values()]
        assert sum(map(len, images)) == len(set().union(*images)) == 40
    assert "20 subjects have an image of another" in said[0]
    for wishes in ({"folds": 3}, {"num_subjects": [3]}, {"leave_site_out": True}):
        make_split(table_store, seed=1, **wishes)  # proves it, or raises


def test_what_is_left_out_is_reported(table_store, tmp_path):
    split = make_split(table_store, seed=1)
    split.save(tmp_path / "split.json")
    names = sorted(set(table_store.sessions["subject"]))
    renamed = table_store.sessions["subject"].replace({names[0]: "new-1", names[5]: "new-2"})
    diagnosis = table_store.sessions["diagnosis"].where(table_store.sessions["subject"] != names[7])
    other = TableStore(table_store.sessions.assign(subject=renamed, diagnosis=diagnosis))
    said: list[str] = []
    parts = divide(RECIPE, other, "diagnosis", tmp_path / "split.json", notify=said.append)
    assert [line.split(" subjects")[0] for line in said[:2]] == ["2 of 40", "2 of 40"]
    assert "2 of 76 sessions" in said[2]
    used = set().union(*names_of(other, parts).values())
    assert used == set(names) - {names[0], names[5], names[7]}
    assert not any("sub-" in line or "new-" in line for line in said)


def test_parts_written_by_hand_become_a_split_file(table_store, tmp_path):
    own = {"train": ["sub-01", "sub-02"], "validation": ["sub-03"], "test": ["sub-04", "sub-05"]}
    (tmp_path / "own.json").write_text(json.dumps(own))
    split = split_from_file(table_store, tmp_path / "own.json", ["diagnosis"])
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json").parts() == {part: tuple(names) for part, names in own.items()}
    assert split.num_left_out == {"single": 35}
    (tmp_path / "own.json").write_text(json.dumps({**own, "test": ["sub-99"]}))
    with pytest.raises(UsageError, match="no session of the store is in the part 'test'"):
        split_from_file(table_store, tmp_path / "own.json")


def test_the_split_of_a_run_is_a_split_file(table_store, tmp_path):
    recipe = RECIPE.model_copy(update={"stratify_columns": ("site",)})
    diagnosis = TargetColumn.find(table_store, "diagnosis")
    parts = divide(recipe, table_store, "diagnosis", None)
    write_split(tmp_path, table_store, parts, diagnosis, recipe, None)
    split = Split.load(tmp_path / "splits.json")
    assert split.made["stratify_columns"] == ["site"]
    assert (split.seed, split.data_hash) == (0, "abc")
    again = divide(RECIPE, table_store, "age_years", tmp_path / "splits.json")
    assert all(np.array_equal(again[part], parts[part]) for part in parts)
    for site in range(4):
        counts = [np.mean(table_store.sessions["site"].iloc[index] == f"site{site}") for index in parts.values()]
        assert max(counts) - min(counts) <= 0.2


def test_a_bundle_knows_its_subjects_again_and_names_none(table_store):
    parts = divide(RECIPE, table_store, "diagnosis", None)
    split = hash_split(table_store, parts)
    text = json.dumps(split)
    assert not any(name in text for name in table_store.sessions["subject"])
    assert not any(f'"{content}"' in text for content in table_store.sessions["image_hash"])
    other = hash_split(table_store, parts)
    assert not set(split["subjects"]["train"]) & set(other["subjects"]["train"])  # a salt of its own
    everybody = np.arange(80)
    for part, index in parts.items():
        assert np.array_equal(np.flatnonzero(is_in_parts(split, table_store, everybody, part)), index)
    learnt = np.sort(np.concatenate([parts["train"], parts["validation"]]))
    assert np.array_equal(np.flatnonzero(seen_in_training(split, table_store, everybody)), learnt)


def test_a_known_image_is_known_under_another_name(table_store):
    parts = divide(RECIPE, table_store, "diagnosis", None)
    split = hash_split(table_store, parts)
    renamed = TableStore(table_store.sessions.assign(subject=[f"other-{n // 2}" for n in range(80)]))
    assert not is_in_parts(split, renamed, range(80), "train", "validation").any()
    assert np.flatnonzero(seen_in_training(split, renamed, range(80))).tolist() == sorted(
        [*parts["train"], *parts["validation"]]
    )


def test_a_history_knows_subjects_of_each_training_by_name_or_image(table_store, tmp_path):
    parts = divide(RECIPE, table_store, "diagnosis", None)
    first = TrainingHistory(complete=True).extended(table_store, {"train": np.arange(10)})
    both = first.extended(table_store, parts)
    both.save(tmp_path)
    text = (tmp_path / "training_history.json").read_text()
    assert not any(name in text for name in table_store.sessions["subject"])
    again = TrainingHistory.load(tmp_path)
    assert again == both
    learnt = {*range(10), *parts["train"], *parts["validation"]}
    assert set(np.flatnonzero(again.seen(table_store, range(80)))) == learnt, "a test part is not learnt from"
    renamed = TableStore(table_store.sessions.assign(subject=[f"other-{n // 2}" for n in range(80)]))
    assert set(np.flatnonzero(again.seen(renamed, range(80)))) == learnt
    others = TableStore(renamed.sessions.assign(image_hash=[f"new-{n}" for n in range(80)]))
    assert not again.seen(others, range(80)).any()


def test_a_run_says_which_file_it_followed_and_how_many_it_left_out(table_store, tmp_path):
    given = tmp_path / "few.json"
    make_split(table_store, num_subjects=[4], seed=1).save(given)
    diagnosis = TargetColumn.find(table_store, "diagnosis")
    parts = split_sessions(RECIPE, table_store, diagnosis, given)
    write_split(tmp_path / "run", table_store, parts, diagnosis, RECIPE, given)
    split = Split.load(tmp_path / "run" / "splits.json")
    assert split.made["sha256"] == hashlib.sha256(given.read_bytes()).hexdigest()
    assert split.seed is None
    assert split.num_left_out == {"single": 24}
    written = (tmp_path / "run" / "splits.json").read_bytes()
    write_split(tmp_path / "run", table_store, parts, diagnosis, RECIPE, tmp_path / "run" / "splits.json")
    assert (tmp_path / "run" / "splits.json").read_bytes() == written
