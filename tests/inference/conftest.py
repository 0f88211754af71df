"""A small fine-tuned run and untrained predictors."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from brainfound.data.store.prepare import prepare
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.tasks import Segmentation
from brainfound.inference.loading import load
from brainfound.inference.predictor import Predictor
from brainfound.models import BrainFoundForSegmentation, BrainFoundModel
from brainfound.recipes import validate
from tests.tiny_runs import _few_resamples, _no_pictures, _one_thread  # noqa: F401


@pytest.fixture(scope="session")
def run(small_store, tiny_backbone, tmp_path_factory) -> Path:
    """A classification of the diagnosis, trained for two steps."""
    content = {
        "num_slices": 6,
        "head_fit_passes": 1,
        "frozen_baseline": False,
        "evaluate_every": 0,
        "split": {"train": 0.5, "validation": 0.2, "test": 0.3},
        "engine": {"steps": 2, "batch_size": 4, "precision": "no"},
    }
    out = tmp_path_factory.mktemp("predict") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
        return finetune(validate(FinetuneRecipe, content), small_store, tiny_backbone, "diagnosis", out, quiet=True)


@pytest.fixture(scope="session")
def other_store(source, small_store, make_cohort, tmp_path_factory):
    """A cohort of another place: all subjects of the first one but one, each a second time as new-…, and two others."""
    folder = tmp_path_factory.mktemp("other")
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype=str).query("subject != 's00'")
    twins = table.assign(subject="new-" + table["subject"])
    table = pd.concat([table, twins])
    for column in ("path", "mask"):
        table[column] = [str(source / name) for name in table[column]]
    make_cohort(folder / "others", num_subjects=2, seed=5)
    others = pd.read_csv(folder / "others" / "manifest.tsv", sep="\t", dtype=str)
    for column in ("path", "mask"):
        others[column] = [str(folder / "others" / name) for name in others[column]]
    table = pd.concat([table, others.assign(subject="other-" + others["subject"])])
    table.to_csv(folder / "manifest.tsv", sep="\t", index=False)
    return prepare(folder / "manifest.tsv", folder / "store", small_store.preprocessing)


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return load(run)


@pytest.fixture(scope="session")
def segmenter(small_store, tiny_backbone) -> Predictor:
    """An untrained segmentation with the codes 0 and 7."""
    torch.manual_seed(0)
    names = {0: "background", 1: "lesion"}
    model = BrainFoundForSegmentation.from_backbone(
        tiny_backbone, contrasts=small_store.contrasts, decoder_width=8, id2label=names
    )
    target = Segmentation("mask", names=tuple(names.values()), codes=(0, 7))
    return Predictor(model, small_store.preprocessing, target)


@pytest.fixture(scope="session")
def encoder_export(small_store, tiny_backbone, tmp_path_factory) -> Path:
    """What pretraining exports: a model and its preprocessing."""
    folder = tmp_path_factory.mktemp("encoder") / "export"
    BrainFoundModel.from_backbone(tiny_backbone, contrasts=small_store.contrasts).save_pretrained(folder)
    small_store.preprocessing.save(folder)
    return folder
