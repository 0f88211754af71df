"""Runs whose test is another cohort: all subjects are trained and validated on."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from brainfound.data.splits.split_file import Split
from brainfound.errors import UsageError
from brainfound.experiments.runs import finetune_folds
from brainfound.experiments.systems import read_compared_runs
from brainfound.finetuning.auto.recipe import AutoRecipe
from brainfound.finetuning.auto.run import finetune_auto
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.splits import make_split
from brainfound.inference.evaluation import evaluate
from brainfound.recipes import validate
from tests.tiny_runs import tiny_finetuning

PARTS = {"train": 0.75, "validation": 0.25, "test": 0}


def read(run):
    scores = json.loads((run / "scores.json").read_text())
    return scores, set(pd.read_csv(run / "cases.tsv", sep="\t")["row"]), (run / "export" / "README.md").read_text()


@pytest.fixture(scope="module")
def run(small_store, tiny_backbone, tmp_path_factory):
    recipe = validate(FinetuneRecipe, tiny_finetuning(split=PARTS, evaluate_every=1))
    out = tmp_path_factory.mktemp("no-test") / "run"
    return finetune(recipe, small_store, tiny_backbone, "age_years", out, quiet=True)


def test_the_scores_are_of_the_validation_part_and_say_so(run):
    scores, rows, card = read(run)
    split = Split.load(run / "splits.json").parts()
    assert sorted(split) == ["train", "validation"]
    assert (scores["part"], len(rows)) == ("validation", 3)
    assert "validation subjects" in scores["verdict"]["text"]
    assert "test it on another cohort" in scores["verdict"]["text"]
    assert {"scores", "trivial", "frozen", "intervals"} <= set(scores)
    assert scores["calibration"]["fitted_on"] == "validation"
    assert "coverage" not in json.dumps(scores["calibration"])
    assert "No subject was kept back for a test" in card
    assert "validation part (3 sessions of 3 subjects)" in card


def test_another_cohort_tests_it(run, small_store, other_store, tmp_path):
    (result,) = evaluate(run, other_store)
    assert {name.split("-")[0] for name in result.cases["subject"]} == {"other"}
    with pytest.raises(UsageError, match="no labelled session of the store may be scored"):
        evaluate(run, small_store)


def test_a_split_file_without_a_test_part_is_taken(small_store, tiny_backbone, tmp_path):
    split = make_split(small_store, test=0, validation=0.25, target="age_years")
    split.save(tmp_path / "parts.json")
    recipe = validate(FinetuneRecipe, tiny_finetuning(frozen_baseline=False))
    place = small_store, tiny_backbone, "age_years", tmp_path / "run"
    run = finetune(recipe, *place, split=tmp_path / "parts.json", quiet=True)
    assert read(run)[0]["part"] == "validation"
    assert finetune(recipe, *place, split=tmp_path / "parts.json", resume=True, quiet=True) == run


def test_comparisons_need_a_test_part(run, small_store, tiny_backbone, tmp_path):
    with pytest.raises(UsageError, match="no test part.*evaluate RUN"):
        read_compared_runs([run], frozen=True)
    split = make_split(small_store, test=0, validation=0.25, target="age_years")
    recipe = validate(FinetuneRecipe, tiny_finetuning())
    with pytest.raises(UsageError, match="compared on a test part, and the split has none"):
        finetune_folds(split, recipe, small_store, tiny_backbone, "age_years", tmp_path / "cv", quiet=True)
    assert not (tmp_path / "cv").exists()


@pytest.mark.parametrize("target", ["age_years", "diagnosis"])
def test_an_automatic_run_reports_subjects_left_out_in_turn(small_store, tiny_backbone, tmp_path, target):
    content = {
        "inner_folds": 2,
        "inner_repeats": 1,
        "linear": {"methods": ["penalised"], "features": ["cls"], "pooling": ["mean", "mean_std"]},
        "split": PARTS,
        "engine": {"precision": "no"},
    }
    recipe = validate(AutoRecipe, content)
    run = finetune_auto(small_store, tiny_backbone, target, tmp_path / "run", recipe=recipe, quiet=True)
    scores, rows, card = read(run)
    assert (scores["part"], rows) == ("inner folds", set(range(12)))
    metric = {"age_years": "mae", "diagnosis": "log_loss"}[target]
    assert scores["scores"][metric] == pytest.approx(scores["auto"]["inner_score"], rel=1e-6)
    assert "subjects left out in turn" in scores["verdict"]["text"]
    frozen = pd.read_csv(run / "tried.tsv", sep="\t").set_index("candidate").loc["penalised-cls-mean", metric]
    assert scores["frozen"][metric] == pytest.approx(frozen, rel=1e-6)
    assert "inner folds" in card
