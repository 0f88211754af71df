"""Contrasts absent in training beside contrasts absent in the test: the same sessions, and a bundle that remembers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from brainfound.adapters import load_bundle
from brainfound.data.checking.contract import InputContract
from brainfound.data.store import Store
from brainfound.data.store.store import restrict_contrasts
from brainfound.errors import ScanError, UsageError
from brainfound.experiments.runs import finetune_subsets, make_folds
from brainfound.experiments.systems import parse_systems
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.frozen_baseline import load_frozen_baseline, score_frozen_baseline
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.scoring import read_scores
from brainfound.finetuning.tasks import from_dict
from brainfound.inference.evaluation import evaluate
from brainfound.inference.loading import load
from brainfound.metrics.cases import compute_headline_score
from brainfound.models.stack_prediction import infer
from brainfound.recipes import validate

TINY = {
    "name": "tiny",
    "adapter": "head-only",
    "num_slices": 3,
    "head_fit_passes": 1,
    "evaluate_every": 0,
    "split": {"train": 0.5, "validation": 0.25, "test": 0.25, "stratify": False},
    "engine": {"steps": 1, "batch_size": 4, "precision": "no", "log_every": 1, "checkpoint_every": 1},
}


@pytest.fixture(scope="module")
def patchy(small_store) -> Store:
    """The small store, in which every fourth session lacks FLAIR."""
    present = small_store.present.copy()
    present[::4, small_store.contrasts.index("FLAIR")] = False
    return Store(small_store.folders, replace(small_store.table, present=present))


@pytest.fixture(scope="module")
def subsets(patchy, tiny_backbone, tmp_path_factory):
    """The folder of an experiment on T1w and FLAIR, two folds."""
    out = tmp_path_factory.mktemp("subsets") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
        recipe = validate(FinetuneRecipe, TINY)
        split = make_folds(recipe, patchy, "age_years", folds=2)
        (system,) = parse_systems([str(tiny_backbone)])
        options = {"overrides": ["contrasts=[T1w, FLAIR]"], "quiet": True}
        finetune_subsets(split, recipe, patchy, system, "age_years", out, **options)
    return out


def test_all_rows_are_of_the_sessions_that_have_every_contrast(subsets, patchy):
    rows = pd.read_csv(subsets / "partial_input.tsv", sep="\t")
    assert rows.groupby("absence", sort=False).size().to_dict() == {"none": 2, "test": 4, "training": 4}
    flair = patchy.present[:, patchy.contrasts.index("FLAIR")]
    for fold, part in rows.groupby("fold"):
        assert part["num_test"].nunique() == 1
        assert part["num_test"].iloc[0] + part["num_left_out"].iloc[0] == 6
        full = part.loc[part["absence"] == "none", "mae"].item()
        assert part["drop"].to_numpy() == pytest.approx(part["mae"].to_numpy() - full)
        # Absence in the test: the full model, asked with the other withheld, about the complete sessions.
        run = subsets / "T1w+FLAIR" / fold / "seed-0"
        (asked,) = evaluate(run, patchy, without=["FLAIR"])
        complete = asked.cases[flair[asked.cases["row"]]]
        expected = compute_headline_score("regression", complete)
        alone = part[part["contrasts"] == "T1w"].set_index("absence")["mae"]
        assert alone["test"] == pytest.approx(expected)
        # Absence in training: the other model, about the very same ones.
        (other,) = evaluate(subsets / "T1w" / fold / "seed-0", patchy)
        assert alone["training"] == pytest.approx(
            compute_headline_score("regression", other.cases[flair[other.cases["row"]]])
        )
        # The frozen baseline of the run, about the same sessions; asked with less, it answers with less.
        frozen = pd.read_csv(subsets / "T1w" / fold / "seed-0" / "frozen-cases.tsv", sep="\t")
        expected = compute_headline_score("regression", frozen[flair[frozen["row"]]])
        of_frozen = part[part["contrasts"] == "T1w"].set_index("absence")["frozen mae"]
        assert of_frozen["training"] == pytest.approx(expected)
        assert of_frozen["test"] == pytest.approx(score_of_complete(run, patchy, flair))
        assert not part["frozen mae"].isna().any()
    summary = json.loads((subsets / "summary.json").read_text())
    assert len(summary["partial_input"]) == 5
    assert summary["baselines"] == ["trivial", "frozen"]
    assert (subsets / "report.png").is_file()
    page = (subsets / "report.md").read_text()
    assert "in training too" in page
    assert "lack a contrast and are not scored here" in page


def score_of_complete(run, store, complete) -> float:
    """The error of a run's frozen baseline on the complete sessions of its test part, shown T1w only."""
    bundle = load_bundle(run / "export")
    frozen = load_frozen_baseline(bundle, from_dict(bundle.labels), torch.device("cpu"))
    sessions = [row for row in pd.read_csv(run / "cases.tsv", sep="\t")["row"] if complete[row]]
    return score_frozen_baseline(frozen, store, sessions, ["T2w", "FLAIR"]).scores["mae"]


def test_sessions_without_any_shown_contrast_are_left_out_of_training(subsets, patchy):
    table = pd.read_csv(subsets / "scores.tsv", sep="\t")
    learnt = table.pivot(index="fold", columns="contrasts", values="num_train")
    assert (learnt["T1w, FLAIR"] == learnt["T1w"]).all()
    assert (learnt["FLAIR"] < learnt["T1w"]).any()
    flair = table[table["contrasts"] == "FLAIR"]
    assert flair["num_test"].sum() == patchy.present[:, patchy.contrasts.index("FLAIR")].sum()


def test_the_bundle_remembers_what_it_may_see(subsets, patchy, small_store, tmp_path):
    run = subsets / "T1w" / "fold-1" / "seed-0"
    assert read_scores(run)["without"] == ["T2w", "FLAIR"]
    bundle = load_bundle(run / "export")
    assert bundle.metadata["withheld"] == ["T2w", "FLAIR"]
    assert InputContract.load(run / "export").contrasts == ("T1w",)
    predictor = load(run)
    answer = predictor.predict_stack(patchy[1])
    alone = infer(bundle.model, restrict_contrasts(patchy, ["T1w"])[1], 3).value
    assert answer.answer["value"] == pytest.approx(alone)
    assert answer.answer["value"] != pytest.approx(infer(bundle.model, patchy[1], 3).value, abs=1e-6)
    assert (answer.contrasts, answer.missing) == (("T1w",), ())
    assert "FLAIR was not read: the model learnt without it" in answer.notes
    (file := tmp_path / "x_FLAIR.nii.gz").touch()
    with pytest.raises(UsageError, match="not trained with FLAIR"):
        predictor.predict(FLAIR=file)
    # Its subsets are those of what it reads.
    assert [result.without for result in evaluate(run, patchy, partial_input=True)] == [("T2w", "FLAIR")]


def test_a_session_with_nothing_that_the_model_reads_is_reported(subsets, patchy):
    predictor = load(subsets / "FLAIR" / "fold-1" / "seed-0")
    with pytest.raises(ScanError, match="no contrast that the model reads"):
        predictor.predict_stack(patchy[0])


def test_withheld_contrasts_change_what_is_learnt_and_not_who_is_where(patchy, tiny_backbone, tmp_path):
    recipe = validate(FinetuneRecipe, TINY, ["cached_embeddings=true"])
    arguments = (patchy, tiny_backbone, "age_years")
    cache = tmp_path / "embeddings"
    whole = finetune(recipe, *arguments, tmp_path / "whole", cache=cache, quiet=True)
    flair = finetune(recipe, *arguments, tmp_path / "flair", cache=cache, overrides=["contrasts=[FLAIR]"], quiet=True)
    assert len(list(cache.iterdir())) == 2  # embeddings of other images are kept apart
    rows = {run: set(pd.read_csv(run / "cases.tsv", sep="\t")["row"]) for run in (whole, flair)}
    assert rows[flair] == {row for row in rows[whole] if row % 4}
    # Going on with it finds the same sessions.
    longer = ["contrasts=[FLAIR]"]
    again = finetune(recipe, *arguments, tmp_path / "flair", cache=cache, overrides=longer, resume=True, quiet=True)
    assert again == flair


def test_what_cannot_be_compared_is_refused_before_the_first_run(small_store, tiny_backbone, tmp_path):
    present = small_store.present.copy()
    present[:, 0] = np.arange(len(present)) % 2 == 0
    present[:, 1] = ~present[:, 0]
    never = Store(small_store.folders, replace(small_store.table, present=present))
    recipe = validate(FinetuneRecipe, TINY)
    split = make_folds(recipe, never, "age_years")
    (system,) = parse_systems([str(tiny_backbone)])
    with pytest.raises(UsageError, match="no test session has every contrast"):
        finetune_subsets(split, recipe, never, system, "age_years", tmp_path / "run", quiet=True)
    assert not list(tmp_path.rglob("recipe.yaml"))
