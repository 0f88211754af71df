"""A small real store, tiny recipes and a tiny encoder for the tests of training."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.splits.split_file import Split
from brainfound.data.store import Store
from brainfound.data.store.prepare import prepare
from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.recipes import validate

NUM_SUBJECTS = 12
SIDE = 32

TINY = {
    "name": "tiny",
    "init": {"source": "none", "scratch": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "patch_size": 8}},
    "views": {"global_size": 32, "local_size": 16, "num_local": 2, "slice_margin": 0.0},
    "objective": {
        "head": {"prototypes": 32, "hidden": 32, "bottleneck": 16},
        "drop_path": 0.1,
        "teacher_temperature_warmup_steps": 4,
        "momentum": [0.9, 1.0],
    },
    "optim": {"lr": 1e-3},
    "schedule": {"warmup_steps": 2, "head_warmup_steps": 0},
    "guard": {"grace_steps": 1000},
    "probe": {"every": 3, "slices_per_session": 2, "folds": 3},
    "engine": {
        "steps": 6,
        "batch_size": 8,
        "precision": "no",
        "attention": "sdpa",  # not timed: two runs must compute alike
        "log_every": 1,
        "checkpoint_every": 3,
        "num_workers": 0,
    },
}


def make_store(folder: Path) -> Store:
    """Heads of ellipsoids whose ventricles grow with age; some sessions lack FLAIR."""
    rng = np.random.default_rng(0)
    axes = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (SIDE, SIDE, 10)], indexing="ij"))
    radius = np.sqrt((axes**2).sum(axis=0))
    rows = []
    for subject in range(NUM_SUBJECTS):
        age = 20 + 5 * subject
        ventricle = radius < 0.15 + 0.004 * age
        for contrast, (tissue, fluid) in {"T1w": (600, 200), "T2w": (300, 900), "FLAIR": (500, 100)}.items():
            if contrast == "FLAIR" and subject % 4 == 3:
                continue
            volume = np.where(ventricle, fluid, tissue) + rng.normal(0, 40, radius.shape)
            volume = np.where(radius < 0.95, volume.clip(1), 0).astype(np.float32)
            file = folder / f"s{subject}_{contrast}.nii.gz"
            nib.save(nib.Nifti1Image(volume, np.diag([6.0, 6.0, 6.0, 1.0])), file)
            rows.append({"subject": f"s{subject:02d}", "contrast": contrast, "path": file.name, "age_years": age})
    pd.DataFrame(rows).to_csv(folder / "manifest.tsv", sep="\t", index=False)
    preprocessing = Preprocessing(spacing_mm=(6.0, 6.0, 6.0), size=(SIDE, SIDE))
    return prepare(folder / "manifest.tsv", folder / "store", preprocessing)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch):
    """Pictures take longer than tiny runs; those of the session's finished run are drawn."""
    monkeypatch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
    monkeypatch.setattr("brainfound.report.run_page.plot_cases", lambda cases, path, target: None)


@pytest.fixture(autouse=True, scope="session")
def _few_resamples():
    """Intervals of 2,000 resamples take longer than tiny runs; what an interval is has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfound.finetuning.scoring.NUM_RESAMPLES", 50)
        yield


def tiny_recipe(*overrides: str) -> PretrainRecipe:
    return validate(PretrainRecipe, TINY, overrides)


@pytest.fixture(scope="session")
def recipe():
    """A maker of tiny recipes: ``recipe("engine.steps=4", …)``."""
    return tiny_recipe


def tiny_finetuning(engine: dict[str, int] | None = None, **changes: object) -> dict[str, Any]:
    """The content of a fine-tuning recipe of two steps without evaluation, with some fields changed."""
    steps = {"steps": 2, "batch_size": 4, "precision": "no", "log_every": 1}
    parts = {"train": 0.5, "validation": 0.25, "test": 0.25}
    content = {"num_slices": 4, "head_fit_passes": 0, "evaluate_every": 0, "split": parts, "engine": steps}
    return {**content, **changes, "engine": {**steps, **(engine or {})}}


def log_lines(run: Path, key: str | None = None, file: str = "log.jsonl") -> list[dict]:
    """The lines of a run's log; with a key those that have it."""
    lines = [json.loads(text) for text in (run / file).open()]
    return [line for line in lines if key is None or key in line]


def untimed_lines(run: Path, key: str | None = None, file: str = "log.jsonl") -> list[dict]:
    """The lines of a log without what no two runs share."""
    timing = {"seconds_per_step", "images_per_second", "data_wait"}
    return [{name: value for name, value in line.items() if name not in timing} for line in log_lines(run, key, file)]


def checkpoint_tensors(run: Path, step: int, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / file)


def subjects_by_part(run: Path) -> dict[str, set[str]]:
    return {part: set(names) for part, names in Split.load(run / "splits.json").parts().items()}


def prefetch_threads() -> list[str]:
    """The live threads that load ahead."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def require_same_checkpoints(first: Path, second: Path, step: int) -> None:
    """The same weights and task state at a step, to the last bit."""
    for file in ("model.safetensors", "task.safetensors"):
        one, other = (checkpoint_tensors(run, step, file) for run in (first, second))
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == [], file


def tiny_model(seed: int = 0) -> BrainFoundModel:
    torch.manual_seed(seed)
    backbone = {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": SIDE,
    }
    return BrainFoundModel(BrainFoundConfig(backbone_config=backbone)).eval()


@pytest.fixture
def model() -> BrainFoundModel:
    return tiny_model()


@pytest.fixture(scope="session")
def finished(store, recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run; tests copy it before they change it."""
    torch.set_num_threads(1)
    return pretrain(recipe(), store, out=tmp_path_factory.mktemp("run") / "run", quiet=True)
