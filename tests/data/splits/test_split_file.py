"""A split file proves that nobody is in two parts, and is refused where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfound.data.splits.split_file import SCHEMA, Split, read_folds, require_no_shared_images
from brainfound.errors import UsageError
from tests.table_store import TableStore


@pytest.fixture
def store() -> TableStore:
    subjects = [f"sub-{n // 2:02d}" for n in range(24)]
    return TableStore(
        pd.DataFrame(
            {
                "subject": subjects,
                "image_hash": [f"{n:04x}" for n in range(24)],
                "diagnosis": ["ill" if n // 2 % 2 else None for n in range(24)],
                "age_years": [20.0 + n // 2 for n in range(24)],
            }
        )
    )


PARTS = {"train": np.arange(12), "validation": np.arange(12, 16), "test": np.arange(16, 22)}


@pytest.fixture
def split(store) -> Split:
    folds = {"fold-1": PARTS, "fold-2": {**PARTS, "train": PARTS["test"], "test": PARTS["train"]}}
    return Split.from_folds(store, folds, seed=4, made={"kind": "k-fold"}, columns=["diagnosis", "age_years"])


def refused(path: Path, content: object, *words: str) -> str:
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        Split.load(path)
    line = str(error.value)
    assert "\n" not in line
    assert [word for word in words if word not in line] == []
    assert "sub-" not in line
    return line


def test_what_is_saved_is_loaded_and_holds_its_proof(split, tmp_path):
    split.save(tmp_path / "new" / "split.json")
    assert Split.load(tmp_path / "new" / "split.json") == split
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["split.json"]
    content = json.loads((tmp_path / "new" / "split.json").read_text())
    assert (content["schema"], content["seed"], content["data_hash"]) == (SCHEMA, 4, "abc")
    fold = content["folds"]["fold-1"]
    assert fold["shared_subjects"] == {"train and validation": 0, "train and test": 0, "validation and test": 0}
    assert fold["num_subjects"] == {"train": 6, "validation": 2, "test": 3}
    assert fold["num_sessions"] == {"train": 12, "validation": 4, "test": 6}
    assert fold["counts"]["train"]["diagnosis"] == {"ill": 6, "missing": 6}
    assert fold["counts"]["train"]["age_years"] == {"missing": 0, "min": 20.0, "median": 22.5, "max": 25.0}
    assert fold["num_left_out"] == 1


def test_a_fold_is_named_where_there_are_several(split, store):
    assert split.parts("fold-2")["test"] == tuple(f"sub-{n:02d}" for n in range(6))
    with pytest.raises(UsageError, match="fold-1, fold-2"):
        split.parts()
    with pytest.raises(UsageError, match="Did you mean fold-1"):
        split.parts("fold1")
    assert Split({"only": split.parts("fold-1")}).parts() == split.parts("fold-1")


def test_sessions_are_found_again_in_another_store(split, store):
    found = split.sessions(store, "fold-1")
    assert all(np.array_equal(found[part], PARTS[part]) for part in PARTS)
    other = TableStore(store.sessions.iloc[::-1][4:].reset_index(drop=True))
    names = other.sessions["subject"]
    for part, index in split.sessions(other, "fold-1").items():
        assert set(names.iloc[index]) == set(split.parts("fold-1")[part]) & set(names)


def test_an_overlap_is_refused_before_anything_else(split, tmp_path):
    content = split.to_dict()
    content["folds"]["fold-2"]["subjects"]["train"].append(content["folds"]["fold-2"]["subjects"]["test"][0])
    refused(tmp_path / "a.json", content, "fold-2", "'train' and 'test'", "1 shared", "divide anew")
    by_hand = {"train": ["sub-1", "sub-2"], "validation": ["sub-3"], "test": ["sub-2"]}
    refused(tmp_path / "by_hand.json", by_hand, "share subjects")
    with pytest.raises(UsageError, match="share subjects"):
        Split({"single": {"train": ("a", "b"), "test": ("b",)}})


def test_what_was_changed_by_hand_is_refused_with_the_remedy(split, tmp_path):
    content = split.to_dict()
    content["folds"]["fold-1"]["subjects"]["train"].pop()
    refused(tmp_path / "a.json", content, "changed after it was made", "brainfound split STORE NEW.json --from")
    for key, value in (("seed", 5), ("data_hash", "b"), ("sha256", "0" * 64), ("made", {})):
        refused(tmp_path / "a.json", {**split.to_dict(), key: value}, "changed after it was made")
    # Its parts can still be read, to make a checked file of them.
    content["folds"]["fold-1"]["subjects"]["test"].pop()
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert len(read_folds(tmp_path / "a.json")["fold-1"]["test"]) == 2


def test_a_digest_does_not_save_a_false_proof(split, tmp_path):
    from brainfound.data.splits import split_file

    content = split.to_dict()
    content["folds"]["fold-1"]["num_subjects"]["train"] = 60
    content.pop("sha256")
    refused(tmp_path / "a.json", {**content, "sha256": split_file._digest(content)}, "proof", "--from")
    del content["folds"]["fold-1"]["counts"]
    refused(tmp_path / "a.json", {**content, "sha256": split_file._digest(content)}, "counts")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], ["no JSON object"]),
        ({}, ["'train'", "missing"]),
        ({"schema": "brainfound-split/9"}, ["another schema", "brainfound-split/9", SCHEMA]),
        ({"schema": SCHEMA, "folds": {}}, ["without folds"]),
        ({"schema": SCHEMA, "folds": {"a": 3}}, ["lists of subjects"]),
        ({"train": ["a"]}, ["'test'", "missing"]),
        ({"train": ["a"], "test": []}, ["'test'", "empty"]),
        ({"train": ["a"], "test": [7]}, ["lists of subjects"]),
        ({"train": ["a"], "tset": ["b"]}, ["'tset'", "Did you mean test"]),
    ],
)
def test_files_that_are_no_splits(tmp_path, content, words):
    refused(tmp_path / "a.json", content, "a.json", *words)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json: not a split file"):
        Split.load(tmp_path / "none.json")
    for text in ("{", "\x00", "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UsageError, match="not a split file"):
            Split.load(tmp_path / "a.json")


def test_parts_without_a_digest_are_refused_with_the_remedy(tmp_path):
    by_hand = {"train": ["b", "a"], "validation": ["c"], "test": ["d"]}
    refused(tmp_path / "a.json", by_hand, "no digest", "brainfound split STORE NEW.json --from")
    assert read_folds(tmp_path / "a.json") == {"single": {"train": ("a", "b"), "validation": ("c",), "test": ("d",)}}


def test_an_image_under_two_names_is_a_leak(split, store):
    require_no_shared_images(store, PARTS)
    store.sessions.loc[17, "image_hash"] = store.sessions.loc[3, "image_hash"]
    with pytest.raises(UsageError, match="share an image") as error:
        require_no_shared_images(store, PARTS)
    assert "rows 3 and 17" in str(error.value)
    assert "sub-" not in str(error.value)
    with pytest.raises(UsageError, match="share an image"):
        split.sessions(store, "fold-1")
    with pytest.raises(UsageError, match="share an image"):
        Split.from_folds(store, {"single": PARTS}, seed=0, made={})
    store.sessions.loc[17, "image_hash"] = store.sessions.loc[18, "image_hash"]  # within one part
    require_no_shared_images(store, PARTS)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=4, max_size=20, unique=True), st.data())
def test_any_names_survive_the_file_and_any_overlap_is_found(tmp_path_factory, names, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    where = data.draw(st.lists(st.sampled_from(["train", "validation", "test"]), min_size=4, max_size=4))
    parts = {"train": [names[0]], "test": [names[1]], "validation": [names[2]]}
    for name, part in zip(names[3:], where, strict=False):
        parts[part].append(name)
    split = Split({"single": {part: tuple(sorted(members)) for part, members in parts.items()}})
    split.save(path)
    assert Split.load(path).folds == split.folds
    content = split.to_dict()
    content["folds"]["single"]["subjects"]["test"].append(names[0])
    refused_path = path.with_name("refused.json")
    refused_path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="share subjects"):
        Split.load(refused_path)
