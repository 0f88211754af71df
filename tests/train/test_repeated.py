"""One fine-tuning over folds and seeds: what is run, what is told, and going on."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from brainfound.data.split_file import Split
from brainfound.errors import UsageError
from brainfound.recipes import validate
from brainfound.train import repeated
from brainfound.train.finetune import FinetuneRecipe
from brainfound.train.repeated import finetune_over, folds_for, summarise
from brainfound.train.session_scores import read_scores

TINY = {
    "name": "tiny",
    "adapter": "head-only",
    "cached_embeddings": True,
    "num_slices": 3,
    "head_fit_passes": 1,
    "evaluate_every": 0,
    "split": {"train": 0.5, "validation": 0.25, "test": 0.25},
    "engine": {"steps": 2, "batch_size": 4, "precision": "no", "log_every": 1, "checkpoint_every": 2, "num_workers": 0},
}
RECIPE = validate(FinetuneRecipe, TINY)


@pytest.fixture
def runs(monkeypatch):
    """The folders of the runs that were made."""
    made = []
    monkeypatch.setattr("brainfound.train.run_files.plot_curves", lambda folder: folder)
    finetune = repeated.finetune

    def noted(*arguments, **options):
        made.append(arguments[4].parts[-2:])
        return finetune(*arguments, **options)

    monkeypatch.setattr(repeated, "finetune", noted)
    return made


def test_every_fold_is_run_with_every_seed_and_everybody_is_tested_once(small_store, tiny_backbone, tmp_path, runs):
    split = folds_for(RECIPE, small_store, "age_years", folds=3)
    arguments = (split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "cv")
    table = finetune_over(*arguments, seeds=(0, 1), quiet=True)
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
        finetune_over(*arguments, seeds=(0, 1), quiet=True)
    other = folds_for(RECIPE, small_store, "age_years", folds=4)
    with pytest.raises(UsageError, match="another split"):
        finetune_over(other, *arguments[1:], resume=True, quiet=True)
    # Going on does only what is missing: here a third seed.
    before = (tmp_path / "cv" / "fold-1" / "seed-0" / "log.jsonl").stat().st_mtime_ns
    longer = finetune_over(*arguments, seeds=(0, 1, 2), resume=True, quiet=True)
    assert len(longer) == 9
    assert (tmp_path / "cv" / "fold-1" / "seed-0" / "log.jsonl").stat().st_mtime_ns == before
    assert longer.iloc[[0, 1]]["mae"].tolist() == table.iloc[[0, 1]]["mae"].tolist()


def test_shots_are_nested_and_tested_on_the_same_sessions(small_store, tiny_backbone, tmp_path, runs):
    split = folds_for(RECIPE, small_store, "age_years", num_subjects=[2, 4, None])
    table = finetune_over(split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "few", quiet=True)
    assert table["fold"].tolist() == ["subjects-2", "subjects-4", "subjects-all"]
    assert table["num_train"].tolist()[:2] == [2, 4]
    parts = [split.parts(fold) for fold in split.folds]
    assert set(parts[0]["train"]) < set(parts[1]["train"]) < set(parts[2]["train"])
    assert parts[0]["test"] == parts[1]["test"] == parts[2]["test"]
    assert summarise(table)["group"].unique().tolist() == ["subjects-2", "subjects-4", "subjects-all"]


def test_the_spread_is_that_over_folds_and_over_seeds():
    table = pd.DataFrame(
        {
            "group": "fold", "fold": ["fold-1", "fold-1", "fold-2", "fold-2"], "seed": [0, 1, 0, 1],
            "mae": [1.0, 3.0, 5.0, 9.0], "trivial mae": [10.0, 10.0, 20.0, 20.0],
        }
    )  # fmt: skip
    (row,) = summarise(table).to_dict(orient="records")
    assert row["mean"] == 4.5
    assert row["std_folds"] == pytest.approx(np.std([2, 7], ddof=1))
    assert row["std_seeds"] == pytest.approx(np.mean([np.std([1, 3], ddof=1), np.std([5, 9], ddof=1)]))
    assert (row["lowest"], row["highest"], row["trivial"]) == (1.0, 9.0, 15.0)
    (alone,) = summarise(table[:1]).to_dict(orient="records")
    assert np.isnan(alone["std_folds"])
    assert np.isnan(alone["std_seeds"])


def test_a_split_file_brings_its_own_folds(small_store, tmp_path):
    folds_for(RECIPE, small_store, "age_years", folds=3).save(tmp_path / "folds.json")
    assert list(folds_for(RECIPE, small_store, "age_years", file=tmp_path / "folds.json").folds) == [
        "fold-1",
        "fold-2",
        "fold-3",
    ]
    with pytest.raises(UsageError, match="has its folds"):
        folds_for(RECIPE, small_store, "age_years", file=tmp_path / "folds.json", folds=3)
    assert isinstance(folds_for(RECIPE, small_store, "age_years"), Split)


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_are_given_once_each(small_store, tiny_backbone, tmp_path, seeds):
    split = folds_for(RECIPE, small_store, "age_years", folds=3)
    with pytest.raises(UsageError, match="each once"):
        finetune_over(split, RECIPE, small_store, tiny_backbone, "age_years", tmp_path / "cv", seeds=seeds)
    assert not (tmp_path / "cv").exists()
