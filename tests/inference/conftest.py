"""A small fine-tuned run and untrained predictors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.tasks import Segmentation
from brainfound.inference.predictor import Predictor
from brainfound.models import BrainFoundForSegmentation, BrainFoundModel
from brainfound.recipes import validate


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _few_resamples():
    """Intervals of 2,000 resamples take longer than tiny runs; what an interval is has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfound.finetuning.scoring.NUM_RESAMPLES", 50)
        yield


@pytest.fixture(scope="session")
def run(small_store, tiny_backbone, tmp_path_factory) -> Path:
    """A classification of the diagnosis, trained for two steps."""
    content = {
        "num_slices": 6,
        "head_fit_passes": 1,
        "frozen_baseline": False,
        "evaluate_every": 0,
        "split": {"train": 0.5, "validation": 0.2, "test": 0.3},
        "engine": {"steps": 2, "batch_size": 4, "precision": "no", "num_workers": 0},
    }
    out = tmp_path_factory.mktemp("predict") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
        return finetune(validate(FinetuneRecipe, content), small_store, tiny_backbone, "diagnosis", out, quiet=True)


@pytest.fixture(scope="session")
def source(small_store) -> Path:
    """The cohort of which the small store was made."""
    return small_store.path.parent / "source"


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
