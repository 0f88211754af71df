"""One fine-tuning over folds and seeds: what is run, what is told, and going on."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Dinov2Model

from brainfound.data.splits.split_file import Split
from brainfound.errors import RecipeError, UsageError
from brainfound.experiments import runs as repeated
from brainfound.experiments.folder import summarise_runs
from brainfound.experiments.runs import finetune_folds, finetune_systems, make_folds
from brainfound.experiments.systems import parse_systems
from brainfound.finetuning.finetune import resolve_parts_and_task
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.scoring import read_scores
from brainfound.metrics import compare
from brainfound.recipes import validate

TINY = {
    "name": "tiny",
    "adapter": "head-only",
    "cached_embeddings": True,
    "num_slices": 3,
    "head_fit_passes": 1,
    "frozen_baseline": False,
    "evaluate_every": 0,
    "split": {"train": 0.5, "validation": 0.25, "test": 0.25},
    "engine": {"steps": 2, "batch_size": 4, "precision": "no", "log_every": 1, "checkpoint_every": 2},
}
RECIPE = validate(FinetuneRecipe, TINY)


@pytest.fixture
def runs(monkeypatch):
    """The folders of the runs that were made."""
    made = []
    monkeypatch.setattr("brainfound.experiments.page.draw_figure", lambda experiment: None)
    finetune = repeated.finetune

    def noted(*arguments, **options):
        made.append(arguments[4].parts[-2:])
        return finetune(*arguments, **options)

    monkeypatch.setattr(repeated, "finetune", noted)
    return made


def test_every_fold_is_run_with_every_seed_and_everybody_is_tested_once(small_store, tiny_backbone, tmp_path, runs):
    split = make_folds(RECIPE, small_store, "age_years", folds=3)
    arguments = (split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "cv")
    table = finetune_folds(*arguments, seeds=(0, 1), quiet=True)
    assert runs == [(f"fold-{k}", f"seed-{s}") for k in (1, 2, 3) for s in (0, 1)]
    assert table[["fold", "seed"]].to_numpy().tolist() == [[f"fold-{k}", s] for k in (1, 2, 3) for s in (0, 1)]
    of_one_seed = [pd.read_csv(tmp_path / "cv" / f"fold-{k}" / "seed-0" / "cases.tsv", sep="\t") for k in (1, 2, 3)]
    tested = pd.concat(of_one_seed)["row"].tolist()
    assert sorted(tested) == sorted(np.flatnonzero(small_store.covariate("age_years").notna()).tolist())
    for row in table.itertuples():
        content = read_scores(tmp_path / "cv" / row.run)
        assert row.mae == content["scores"]["mae"]
        assert table.loc[row.Index, "trivial mae"] == content["trivial"]["mae"]
        assert row.num_test == content["num_sessions"]
    summary = json.loads((tmp_path / "cv" / "summary.json").read_text())
    mae = next(line for line in summary["scores"] if line["score"] == "mae")
    assert (summary["headline"], summary["num_runs"]) == ("mae", 6)
    assert mae["mean"] == pytest.approx(table["mae"].mean())
    assert (mae["num_folds"], mae["num_seeds"]) == (3, 2)
    # All runs share the embeddings of their frozen backbone.
    assert len(list((tmp_path / "cv" / "embeddings").iterdir())) == 1

    with pytest.raises(UsageError, match="holds runs already"):
        finetune_folds(*arguments, seeds=(0, 1), quiet=True)
    other = make_folds(RECIPE, small_store, "age_years", folds=4)
    with pytest.raises(UsageError, match="another split"):
        finetune_folds(other, *arguments[1:], resume=True, quiet=True)
    # Going on does only what is missing: here a third seed.
    before = (tmp_path / "cv" / "fold-1" / "seed-0" / "log.jsonl").stat().st_mtime_ns
    longer = finetune_folds(*arguments, seeds=(0, 1, 2), resume=True, quiet=True)
    assert len(longer) == 9
    assert (tmp_path / "cv" / "fold-1" / "seed-0" / "log.jsonl").stat().st_mtime_ns == before
    assert longer.iloc[[0, 1]]["mae"].tolist() == table.iloc[[0, 1]]["mae"].tolist()


def test_shots_are_nested_and_tested_on_the_same_sessions(small_store, tiny_backbone, tmp_path, runs):
    split = make_folds(RECIPE, small_store, "age_years", num_subjects=[2, 4, None])
    table = finetune_folds(split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "few", quiet=True)
    assert table["fold"].tolist() == ["subjects-2", "subjects-4", "subjects-all"]
    assert table["num_train"].tolist()[:2] == [2, 4]
    parts = [split.parts(fold) for fold in split.folds]
    assert set(parts[0]["train"]) < set(parts[1]["train"]) < set(parts[2]["train"])
    assert parts[0]["test"] == parts[1]["test"] == parts[2]["test"]
    assert summarise_runs(table)["group"].unique().tolist() == ["subjects-2", "subjects-4", "subjects-all"]


def test_the_spread_is_that_over_folds_and_over_seeds():
    table = pd.DataFrame(
        {
            "group": "fold", "fold": ["fold-1", "fold-1", "fold-2", "fold-2"], "seed": [0, 1, 0, 1],
            "mae": [1.0, 3.0, 5.0, 9.0], "trivial mae": [10.0, 10.0, 20.0, 20.0],
        }
    )  # fmt: skip
    (row,) = summarise_runs(table).to_dict(orient="records")
    assert row["mean"] == 4.5
    assert row["std_folds"] == pytest.approx(np.std([2, 7], ddof=1))
    assert row["std_seeds"] == pytest.approx(np.mean([np.std([1, 3], ddof=1), np.std([5, 9], ddof=1)]))
    assert (row["lowest"], row["highest"], row["trivial"]) == (1.0, 9.0, 15.0)
    (alone,) = summarise_runs(table[:1]).to_dict(orient="records")
    assert np.isnan(alone["std_folds"])
    assert np.isnan(alone["std_seeds"])


def test_the_seed_is_that_of_the_recipe_unless_others_are_given(small_store, tiny_backbone, tmp_path, runs):
    split = make_folds(RECIPE, small_store, "age_years")
    table = finetune_folds(
        split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "a", overrides=["seed=7"], quiet=True
    )
    assert table["seed"].tolist() == [7]
    assert runs == [("single", "seed-7")]


def test_a_class_that_cannot_be_learnt_is_reported_before_the_first_run(
    small_store, tiny_backbone, tmp_path, runs, monkeypatch
):
    """Of a site left out that alone has a class; every run before it would have been in vain."""
    monkeypatch.setitem(small_store.sessions, "site", ["A"] * 4 + ["B"] * 4 + ["C"] * 4)
    monkeypatch.setitem(small_store.sessions, "diagnosis", ["x", "y"] * 4 + ["x", "y", "z", "z"])
    recipe = validate(FinetuneRecipe, TINY, ["split.stratify=false"])
    split = make_folds(recipe, small_store, "diagnosis", leave_site_out=True)
    with pytest.raises(UsageError, match="'z' is in the test part and not in.*2 subjects have it"):
        finetune_folds(split, recipe, small_store, tiny_backbone, "diagnosis", tmp_path / "sites", quiet=True)
    assert not runs
    assert not any((tmp_path / "sites").iterdir()), "the same command can be given again"


def test_a_part_without_a_class_is_reported(small_store, tmp_path, monkeypatch):
    monkeypatch.setitem(small_store.sessions, "site", ["A"] * 6 + ["B"] * 6)
    monkeypatch.setitem(small_store.sessions, "diagnosis", ["x", "y"] * 3 + ["x"] * 6)
    recipe, told = validate(FinetuneRecipe, TINY, ["split.stratify=false"]), []
    make_folds(recipe, small_store, "diagnosis", leave_site_out=True).save(tmp_path / "split.json")
    resolve_parts_and_task(recipe, small_store, "diagnosis", tmp_path / "split.json", "site-B", told.append)
    assert "no session of the test part is y: scores that need it are not defined there" in told
    assert not [line for line in told if "train" in line]


def test_one_shot_of_three_classes_can_be_learnt(small_store, tiny_backbone, tmp_path, runs, monkeypatch):
    monkeypatch.setitem(small_store.sessions, "diagnosis", ["x", "y", "z"] * 4)
    split = make_folds(RECIPE, small_store, "diagnosis", shots=[1])
    table = finetune_folds(split, RECIPE, small_store, tiny_backbone, "diagnosis", tmp_path / "one", quiet=True)
    assert table["num_train"].tolist() == [3]


def test_folds_that_are_tested_on_others_are_one_group_whatever_they_are_called(small_store, tmp_path):
    split = make_folds(RECIPE, small_store, "age_years", folds=3)
    renamed = Split({f"cv{n}": members for n, members in enumerate(split.folds.values())})
    assert set(repeated._group_folds(renamed).values()) == {"all folds"}
    few = make_folds(RECIPE, small_store, "age_years", num_subjects=[2, 3])
    assert list(repeated._group_folds(few).values()) == ["subjects-2", "subjects-3"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "site-A/B", ".hidden", "embeddings"])
def test_the_name_of_a_fold_leads_nowhere_else(small_store, tiny_backbone, tmp_path, name):
    split = Split({name: make_folds(RECIPE, small_store, "age_years").parts()})
    with pytest.raises(UsageError, match="cannot be a folder name"):
        finetune_folds(split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "cv", quiet=True)
    assert not (tmp_path / "cv").exists()


def test_the_folder_of_a_single_run_is_left_alone(small_store, tiny_backbone, tmp_path, runs):
    (tmp_path / "recipe.yaml").write_text("name: other")
    split = make_folds(RECIPE, small_store, "age_years")
    with pytest.raises(UsageError, match="holds a single run"):
        finetune_folds(split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path, quiet=True)


def test_shares_and_strata_are_those_of_a_single_run(small_store):
    plain = validate(FinetuneRecipe, TINY, ["split.stratify=false"])
    assert make_folds(plain, small_store, "age_years").made["stratify"] == []
    assert make_folds(RECIPE, small_store, "age_years").made["stratify"] == ["age_years"]
    uneven = validate(FinetuneRecipe, TINY, ["split.train=0.3"])
    with pytest.raises(UsageError, match="do not sum to 1"):
        make_folds(uneven, small_store, "age_years")


def test_a_score_that_is_undefined_is_not_counted():
    table = pd.DataFrame(
        {"group": "all folds", "fold": ["a", "b"], "seed": 0, "auroc": [np.nan, 0.8], "trivial auroc": [0.5, 0.5]}
    )
    (row,) = summarise_runs(table).to_dict(orient="records")
    assert (row["mean"], row["num_folds"]) == (0.8, 1)


def test_a_split_file_brings_its_own_folds(small_store, tmp_path):
    make_folds(RECIPE, small_store, "age_years", folds=3).save(tmp_path / "folds.json")
    assert list(make_folds(RECIPE, small_store, "age_years", file=tmp_path / "folds.json").folds) == [
        "fold-1",
        "fold-2",
        "fold-3",
    ]
    with pytest.raises(UsageError, match="already has folds"):
        make_folds(RECIPE, small_store, "age_years", file=tmp_path / "folds.json", folds=3)
    assert isinstance(make_folds(RECIPE, small_store, "age_years"), Split)


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_given_once_each(small_store, tiny_backbone, tmp_path, seeds):
    split = make_folds(RECIPE, small_store, "age_years", folds=3)
    with pytest.raises(UsageError, match="once each"):
        finetune_folds(split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "cv", seeds=seeds)
    assert not (tmp_path / "cv").exists()


def test_systems_are_compared_on_the_same_cases_with_the_same_budget(small_store, tiny_backbone, tmp_path, runs):
    split = make_folds(RECIPE, small_store, "age_years", folds=2)
    systems = parse_systems([str(tiny_backbone)], ["head-only", "fast=head-only,optim.head_lr=0.1"])
    arguments = (split, RECIPE, small_store, systems, "age_years", tmp_path / "grid")
    table = finetune_systems(*arguments, quiet=True)
    # The systems innermost: what is done is comparable, whenever it stops.
    assert table["run"].tolist()[:2] == ["head-only/fold-1/seed-0", "fast/fold-1/seed-0"]
    assert table["system"].tolist() == ["head-only", "fast"] * 2
    assert table["adapter"].unique().tolist() == ["head-only"]
    first, second = (table[table["system"] == name] for name in ("head-only", "fast"))
    assert first["num_test"].tolist() == second["num_test"].tolist()
    assert first["mae"].tolist() != second["mae"].tolist()

    summary = json.loads((tmp_path / "grid" / "summary.json").read_text())
    spread = {row["system"]: row for row in summary["scores"] if row["score"] == "mae"}
    assert spread["fast"]["mean"] == pytest.approx(second["mae"].mean())
    assert [(s["name"], s["overrides"]) for s in summary["systems"]][1] == ("fast", ["optim.head_lr=0.1"])

    # The comparison is that of the runs' own cases, whose subjects are looked up by hand here.
    def cases_of(name):
        parts = []
        for row in table[table["system"] == name].itertuples():
            part = pd.read_csv(tmp_path / "grid" / row.run / "cases.tsv", sep="\t")
            subject = small_store.sessions["subject"].iloc[part["row"]].to_numpy()
            parts.append(part.assign(subject=subject, row=[f"{row.fold} {row.seed} {n}" for n in part["row"]]))
        return pd.concat(parts)

    expected = compare({name: cases_of(name) for name in ("head-only", "fast")}, "head-only", ["mae"]).iloc[1]
    found = pd.read_csv(tmp_path / "grid" / "comparison.tsv", sep="\t").set_index("system").loc["fast"]
    assert found["num_subjects"] == 12
    assert found["difference"] == pytest.approx(expected["difference"])
    assert found["difference"] == pytest.approx(spread["fast"]["mean"] - spread["head-only"]["mean"])
    assert 0 < found["p_holm"] <= 1
    assert "s00" not in (tmp_path / "grid" / "cases.tsv").read_text()
    page = (tmp_path / "grid" / "report.md").read_text()
    assert "Against head-only, by mae" in page
    assert "optim.head_lr=0.1" in page

    with pytest.raises(UsageError, match="another experiment"):
        finetune_folds(
            split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "grid", resume=True, quiet=True
        )


def test_starting_points_are_compared_each_from_its_own_weights(small_store, tiny_backbone, tmp_path, runs):
    model = Dinov2Model.from_pretrained(tiny_backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "other")
    recipe = validate(FinetuneRecipe, TINY, ["frozen_baseline=true"])
    split = make_folds(recipe, small_store, "age_years")
    systems = parse_systems([f"first={tiny_backbone}", f"again={tiny_backbone}", f"other={tmp_path / 'other'}"])
    table = finetune_systems(split, recipe, small_store, systems, "age_years", tmp_path / "grid", quiet=True)
    assert table["system"].tolist() == ["first", "again", "other"]
    assert table["model"].tolist() == ["first", "again", "other"]
    first, again, other = table["mae"]
    assert first == again != other
    frozen = table["frozen mae"].tolist()
    assert frozen[0] == frozen[1] != frozen[2]


def test_a_system_that_cannot_be_trained_is_refused_before_the_first_run(small_store, tiny_backbone, tmp_path, runs):
    split = make_folds(RECIPE, small_store, "age_years", folds=2)
    systems = parse_systems([str(tiny_backbone)], ["head-only", "lora-r8"])  # kept embeddings want a frozen backbone
    with pytest.raises(RecipeError, match="embeddings can be kept"):
        finetune_systems(split, RECIPE, small_store, systems, "age_years", tmp_path / "grid", quiet=True)
    assert not runs
