"""Automatic runs: the choice by inner cross-validation, and the one bundle that comes out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from brainfound.adapters import load_bundle
from brainfound.data.store import Store
from brainfound.errors import RecipeError, UsageError
from brainfound.finetuning.auto.recipe import AutoRecipe
from brainfound.finetuning.auto.run import finetune_auto
from brainfound.models.stack_prediction import infer
from brainfound.recipes import validate
from brainfound.training.run_folder import read_facts

TINY = {
    "inner_folds": 3,
    "inner_repeats": 2,
    "linear": {"methods": ["penalised"], "features": ["cls", "layers"], "pooling": ["mean", "mean_std"]},
    "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
    "engine": {"precision": "no"},
}


def auto_recipe(**changes) -> AutoRecipe:
    return validate(AutoRecipe, {**TINY, **changes})


@pytest.fixture(scope="module")
def run(store, backbone_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("auto") / "run"
    return finetune_auto(store, backbone_folder, "age_years", out, recipe=auto_recipe(), quiet=True)


def test_one_bundle_comes_out_with_the_table_of_what_was_tried(run, store):
    tried = pd.read_csv(run / "tried.tsv", sep="\t")
    assert {"trivial", "average", "stack", "penalised-cls-mean", "penalised-layers-mean-std"} <= set(tried["candidate"])
    assert tried["mae"].is_monotonic_increasing
    assert tried["winner"].sum() == 1
    assert (tried["folds"] == 6).all()
    scores = json.loads((run / "scores.json").read_text())
    assert scores["auto"]["winner"] == tried["candidate"][tried["winner"]].item()
    assert scores["calibration"]["fitted_on"] == "inner folds"
    assert {"scores", "trivial", "frozen", "verdict", "intervals"} <= set(scores)
    facts = read_facts(run)
    assert (facts["status"], facts["kind"]) == ("done", "finetune")
    assert (run / "export" / "README.md").is_file()
