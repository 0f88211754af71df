"""``brainfound split`` writes a file that training takes, says what is in it, and names nobody."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.splits.split_file import Split
from brainfound.data.store.prepare import prepare


def test_folds_are_written_and_shown(cli, small_store, tmp_path):
    out = tmp_path / "folds.json"
    answer = cli("split", small_store.path, out, "--folds", 3, "--stratify", "diagnosis,site", quiet=False)
    assert (answer.code, answer.err) == (0, "")
    assert list(Split.load(out).folds) == ["fold-1", "fold-2", "fold-3"]
    assert "fold-3" in answer.out
    assert "healthy 2, patient 2" in answer.out
    assert not any(f"s{n:02d}" in answer.out for n in range(12))
    assert cli("split", small_store.path, out, "--folds", 3, "--stratify", "diagnosis,site", quiet=False).code == 0
    answer = cli("split", small_store.path, out, "--folds", 4, quiet=False)
    assert (answer.code, "--overwrite" in answer.line) == (2, True)
    assert cli("split", small_store.path, out, "--folds", 4, "--overwrite", quiet=False).code == 0
    assert len(Split.load(out).folds) == 4


@pytest.mark.parametrize("wish", [[], ["--subjects", "2,all"], ["--shots", "2", "--target", "diagnosis"]])
def test_a_cohort_that_is_tested_elsewhere_has_no_test_part(cli, small_store, tmp_path, wish):
    out = tmp_path / "split.json"
    answer = cli("split", small_store.path, out, "--test", 0, "--validation", 0.25, *wish, quiet=False)
    assert answer.code == 0, answer.err
    for parts in Split.load(out).folds.values():
        assert set(parts) == {"train", "validation"}
        assert len(parts["validation"]) == 3
    answer = cli("split", small_store.path, tmp_path / "b.json", "--test", 0, "--validation", 0, quiet=False)
    assert (answer.code, "above 0 and below 1" in answer.line) == (2, True)


def test_a_file_that_is_no_split_is_not_replaced(cli, small_store, tmp_path):
    (tmp_path / "notes.json").write_text("mine")
    answer = cli("split", small_store.path, tmp_path / "notes.json", quiet=False)
    assert (answer.code, "--overwrite" in answer.line) == (2, True)
    assert (tmp_path / "notes.json").read_text() == "mine"


def test_shared_images_sites_without_a_fold_and_missing_labels_are_stated(cli, make_cohort, tmp_path):
    source = make_cohort(tmp_path / "source", num_subjects=12, contrasts=("T1w",))
    shutil.copy(source / "s00_T1w.nii.gz", source / "s01_T1w.nii.gz")
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype=str)
    table["site"] = list("ABACACCCACCA")  # the only subject of B has the image of a subject of A
    table.loc[7, "age_years"] = None
    table.to_csv(source / "manifest.tsv", sep="\t", index=False)
    settings = Preprocessing(contrasts=("T1w",), spacing_mm=(4, 4, 4), size=(32, 32))
    store = prepare(source, tmp_path / "store", settings).path
    answer = cli("split", store, tmp_path / "a.json", "--leave-site-out", "--stratify", "age_years", quiet=False)
    assert answer.code == 0, answer.err
    assert list(Split.load(tmp_path / "a.json").folds) == ["site-A", "site-C"]
    said = " ".join(answer.err.split())
    assert "site B has no fold: all of its subjects were seen at another site too" in said
    assert re.search(r"1 subject with an image of another subject: kept in one part with it", said)
    rows = [" ".join(line.split()) for line in answer.out.splitlines()]
    (tested,) = [row for row in rows if "site-C test" in row]
    assert "site-C test 6 6 age_years: 37.5 to 72.5, median 52.5, 1 missing; site: C 6" in tested
    answer = cli("split", store, tmp_path / "b.json", "--target", "age_years", quiet=False)
    assert "single left out 1 –" in " ".join(answer.out.split())


def test_json_has_counts_and_no_names(cli, small_store, tmp_path):
    answer = cli(
        "split", small_store.path, tmp_path / "a.json", "--shots", "2,1", "--target", "diagnosis", "--test", 0.25,
        "--validation", 0.25, "--json", quiet=False,
    )  # fmt: skip
    content = json.loads(answer.out)
    assert content["sha256"] == Split.load(tmp_path / "a.json").to_dict()["sha256"]
    train = [row for row in content["parts"] if row["part"] == "train"]
    assert [(row["fold"], row["subjects"]) for row in train] == [("shots-1", 2), ("shots-2", 4)]
    assert train[1]["labels"] == {"diagnosis": {"healthy": 2, "patient": 2}}
    assert not any(f"s{n:02d}" in answer.out for n in range(12))


def test_a_file_changed_by_hand_is_made_anew(cli, small_store, tmp_path):
    first, changed = tmp_path / "a.json", tmp_path / "b.json"
    cli("split", small_store.path, first, quiet=False)
    content = json.loads(first.read_text())
    subjects = content["folds"]["single"]["subjects"]
    subjects["test"].append(subjects["train"].pop())
    changed.write_text(json.dumps(content))
    answer = cli("split", small_store.path, tmp_path / "c.json", "--from", changed, "--stratify", "site", quiet=False)
    assert answer.code == 0, answer.err
    assert set(Split.load(tmp_path / "c.json").parts()["test"]) == set(subjects["test"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shots", "1,many"], ["--shots", "1,many"]),
        (["--shots", "1"], ["--target"]),
        (["--shots", "1", "--target", "age_years"], ["column age_years", "--subjects"]),
        (["--subjects", "50"], ["at most 9"]),
        (["--folds", "13"], ["too few subjects"]),
        (["--stratify", "sight"], ["'sight'", "Did you mean site?"]),
        (["--folds", "3", "--leave-site-out"], ["exclude each other"]),
        (["--test", "0.95"], ["below 1"]),
        (["--from", "none.json", "--folds", "3"], ["--from"]),
    ],
)
def test_wishes_that_cannot_be_met_are_one_line(cli, small_store, tmp_path, arguments, words):
    answer = cli("split", small_store.path, tmp_path / "a.json", *arguments, quiet=False)
    assert answer.code == 2
    assert [word for word in words if word not in answer.line] == []
    assert not (tmp_path / "a.json").exists()
