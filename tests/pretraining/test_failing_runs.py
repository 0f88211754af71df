"""Runs that are made to fail, from a trained tiny checkpoint: each failure is seen, and the best teacher survives it.

The settings of facebookresearch/dinov2#204 are the first: continuing without a head warm-up, an anchor or
layer-wise decay, at a learning rate that is far too high for a trained backbone. What is far too high for two
layers of width 32 is not what is for a ViT, so it is set by what it does: the probe of the teacher falls.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from brainfound.data.augmentation import MultiCrop
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.store import Store
from brainfound.data.store.prepare import prepare
from brainfound.errors import TrainingError
from brainfound.models import BrainFoundModel
from brainfound.pretraining.monitoring.guard import Guard
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.training_task import PretrainTask
from tests.tiny_runs import log_lines

SIDE, NUM_SLICES = 32, 10
COMMON = (
    "engine.batch_size=16",
    "engine.checkpoint_every=1000",
    "probe.target=slice_position",
    "probe.slices_per_session=6",
    "probe.every=5",
    "guard.grace_steps=0",
)
SAFE = ("schedule.head_warmup_steps=4", "optim.lr=1e-3", "objective.anchor_gram_weight=1")
STOCK = (
    "schedule.head_warmup_steps=0",
    "schedule.warmup_steps=0",
    "objective.anchor_gram_weight=0",
    "objective.anchor_cls_weight=0",
    "optim.layer_decay=1",
    "optim.patch_embed_scale=1",
    "objective.momentum=[0.8,0.8]",
    "optim.lr=3",
)
QUICK = ("guard.probe_patience=2", "engine.steps=30")


def write_cohort(folder: Path, num_subjects: int, one_image: bool = False) -> Store:
    """Eggs with stripes that get finer upwards, so that each slice tells where it is.

    With `one_image`, all slices of all subjects are the same.
    """
    rng = np.random.default_rng(1)
    x, y, z = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (SIDE, SIDE, NUM_SLICES)], indexing="ij"))
    z = np.zeros_like(z) if one_image else z
    rows = []
    for subject in range(num_subjects):
        left, front = (0.0, 0.0) if one_image else rng.uniform(-0.08, 0.08, 2)
        head = ((x - left) ** 2 + (y - front) ** 2) / (0.75 + 0.2 * z) ** 2 + 0.4 * z**2 < 1
        ventricle = (x - left) ** 2 + (y - front + 0.15) ** 2 + z**2 < 0.1
        tissue = 1 + 0.15 * np.sin(14 * x * (1 + z))
        for contrast, (bright, fluid) in {"T1w": (600, 200), "T2w": (300, 900)}.items():
            noise = 0.0 if one_image else rng.normal(0, 20, x.shape)
            volume = np.where(head, (np.where(ventricle, fluid, bright * tissue) + noise).clip(1), 0)
            file = folder / f"s{subject}_{contrast}.nii.gz"
            nib.save(nib.Nifti1Image(volume.astype(np.float32), np.diag([6.0, 6.0, 6.0, 1.0])), file)
            rows.append({"subject": f"s{subject:02d}", "contrast": contrast, "path": file.name})
    pd.DataFrame(rows).to_csv(folder / "manifest.tsv", sep="\t", index=False)
    preprocessing = Preprocessing(contrasts=("T1w", "T2w"), spacing_mm=(6.0, 6.0, 6.0), size=(SIDE, SIDE))
    return prepare(folder / "manifest.tsv", folder / "store", preprocessing)


@pytest.fixture(scope="module")
def eggs(tmp_path_factory) -> Store:
    return write_cohort(tmp_path_factory.mktemp("eggs"), num_subjects=12)


@pytest.fixture(scope="module")
def trained(eggs, recipe, tmp_path_factory) -> Path:
    """The export of a run from scratch: the checkpoint that the others continue."""
    content = recipe(*COMMON, "optim.lr=1e-2", "engine.steps=40", "probe.every=0", "guard.enabled=false")
    return pretrain(content, eggs, out=tmp_path_factory.mktemp("trained") / "run", quiet=True) / "export"


def facts(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def same_encoder(run: Path, start: Path) -> bool:
    exported, before = (BrainFoundModel.from_pretrained(folder).encoder.state_dict() for folder in (run, start))
    return all(torch.equal(weight, before[name]) for name, weight in exported.items())


@pytest.mark.parametrize("seed", [0, 1])
def test_safe_settings_are_left_alone(eggs, trained, recipe, tmp_path, seed):
    """Without any grace, and with every look counting."""
    content = recipe(*COMMON, *SAFE, "engine.steps=30", "guard.confirm_log_lines=3", f"seed={seed}")
    run = pretrain(content, eggs, trained, tmp_path / "run", quiet=True)
    probes = [line["probe"] for line in log_lines(run, "probe")]
    assert probes[0] > 0.8
    assert min(probes) > probes[0] - 0.05
    assert facts(run)["status"] == "done"


def test_the_settings_of_dinov2_204_are_stopped_and_the_starting_teacher_is_exported(eggs, trained, recipe, tmp_path):
    content = recipe(*COMMON, *STOCK, *QUICK, "guard.confirm_log_lines=1000")
    with pytest.raises(TrainingError, match=r"the probe fell from .* \(step 0\)") as stop:
        pretrain(content, eggs, trained, tmp_path / "run", quiet=True)
    assert "\n" not in str(stop.value)
    assert "export/ holds the teacher of step 0" in str(stop.value)
    first, *later = [line["probe"] for line in log_lines(tmp_path / "run", "probe")]
    assert later[-1] < first - 0.1
    assert facts(tmp_path / "run")["exported_step"] == 0
    assert same_encoder(tmp_path / "run" / "export", trained)


def test_a_learning_rate_that_overflows_is_stopped_in_one_line(eggs, trained, recipe, tmp_path):
    """Whichever is seen first: steps that are not finite, features that are not, or a probe that fell."""
    content = recipe(*COMMON, *STOCK, *QUICK, "optim.lr=1e8", "engine.max_skipped_in_a_row=5")
    with pytest.raises(TrainingError, match=r"not finite|the probe fell|collapsed") as stop:
        pretrain(content, eggs, trained, tmp_path / "run", quiet=True)
    assert "\n" not in str(stop.value)
    assert same_encoder(tmp_path / "run" / "export", trained)


def test_the_settings_of_dinov2_204_are_rolled_back_with_a_lower_rate_and_the_run_ends(eggs, trained, recipe, tmp_path):
    going_back = ("guard.on_failure=roll_back", "guard.rollback_lr_factor=1e-4", "guard.confirm_log_lines=1000")
    run = pretrain(recipe(*COMMON, *STOCK, *QUICK, *going_back), eggs, trained, tmp_path / "run", quiet=True)
    (event,) = log_lines(run, "rolled_back_from")
    assert event["step"] == 0
    assert event["lr_scale"] == pytest.approx(1e-4)
    assert "the probe fell" in event["reason"]
    before = [json.loads(text) for text in (run / "log-before-rollback-1.jsonl").open()]
    fast, slow = (next(line["lr"] for line in log if "lr" in line) for log in (before, log_lines(run, "lr")))
    assert slow == pytest.approx(1e-4 * fast)
    assert [line["step"] for line in log_lines(run, "loss")] == list(range(1, 31))
    probes = [line["probe"] for line in log_lines(run, "probe")]
    assert min(probes) > probes[0] - 0.05
    assert facts(run)["status"] == "done"


def test_a_run_that_fails_at_every_rate_stops_after_its_rollbacks(eggs, trained, recipe, tmp_path):
    going_back = ("guard.on_failure=roll_back", "guard.rollback_lr_factor=0.9", "guard.max_rollbacks=1")
    with pytest.raises(TrainingError, match="after 1 rollback"):
        pretrain(recipe(*COMMON, *STOCK, *QUICK, *going_back), eggs, trained, tmp_path / "run", quiet=True)
    assert same_encoder(tmp_path / "run" / "export", trained)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_image_many_times_is_seen(trained, recipe, tmp_path, seed):
    """Crops differ, so rank and cosine look healthy; that crops of one image are no more alike does not."""
    store = write_cohort(tmp_path, num_subjects=4, one_image=True)
    content = recipe(*COMMON, *SAFE, "engine.steps=80", "probe.every=0", f"seed={seed}")
    with pytest.raises(TrainingError, match="crops of one image are no more alike"):
        pretrain(content, store, trained, tmp_path / "run", quiet=True)
    last = log_lines(tmp_path / "run", "loss")[-1]
    assert last["effective_rank"] > 3
    assert last["mean_cosine"] < 0.95


def test_a_constant_teacher_is_seen_and_the_one_before_is_exported(eggs, trained, recipe, tmp_path, monkeypatch):
    """It goes constant between two probes: the last one was still good."""
    after_step = PretrainTask.after_step

    def going_constant(self, step, taken):
        after_step(self, step, taken)
        if step >= 6:
            torch.nn.init.zeros_(self.objective.exported_encoder.backbone.layernorm.weight)

    monkeypatch.setattr(PretrainTask, "after_step", going_constant)
    content = recipe(*COMMON, *SAFE, "engine.steps=30", "probe.every=20", "guard.confirm_log_lines=3")
    with pytest.raises(TrainingError, match=r"step 10: .* collapsed: .*effective rank 0.*mean cosine 1\.0000"):
        pretrain(content, eggs, trained, tmp_path / "run", quiet=True)
    assert facts(tmp_path / "run")["exported_step"] == 0
    assert same_encoder(tmp_path / "run" / "export", trained)


@pytest.mark.parametrize("torn", ["model.safetensors", "state.json"])
def test_where_there_is_no_way_back_the_best_teacher_is_exported(eggs, trained, recipe, tmp_path, monkeypatch, torn):
    run, record_probe = tmp_path / "run", Guard.record_probe

    def tearing(self, step, *scores):
        if step == 10:
            (run / "checkpoints" / "step-000000" / torn).write_bytes(b"x")
        record_probe(self, step, *scores)

    monkeypatch.setattr(Guard, "record_probe", tearing)
    going_back = ("guard.on_failure=roll_back", "guard.confirm_log_lines=1000")
    with pytest.raises(TrainingError, match=r"the probe fell .*, and the checkpoint to return to is damaged") as stop:
        pretrain(recipe(*COMMON, *STOCK, *QUICK, *going_back), eggs, trained, run, quiet=True)
    assert "\n" not in str(stop.value)
    assert "export/ holds the teacher of step 0" in str(stop.value)
    assert facts(run)["exported_step"] == 0
    assert same_encoder(run / "export", trained)


def poison(monkeypatch, steps: range) -> None:
    """One pixel of one crop is not a number."""
    crop, calls = MultiCrop.__call__, iter(range(1000))

    def poisoned(self, *args, **settings):
        views = crop(self, *args, **settings)
        if next(calls) in steps:
            views.global_views.pixels[0, :, 0, 0] = float("nan")
        return views

    monkeypatch.setattr(MultiCrop, "__call__", poisoned)


def checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, teacher, anchor, both moments and the optimiser's step counters."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{name}.{i}": value for i, state in optimizer.items() for name, value in state.items()}
    return load_file(folder / "model.safetensors") | load_file(folder / "task.safetensors") | moments


def test_a_batch_that_is_not_a_number_changes_nothing_and_the_run_goes_on(eggs, trained, recipe, tmp_path, monkeypatch):
    poison(monkeypatch, range(3, 4))
    every = ("engine.steps=6", "engine.checkpoint_every=1", "engine.keep_checkpoints=9", "probe.every=0")
    run = pretrain(recipe(*COMMON, *SAFE, *every), eggs, trained, tmp_path / "run", quiet=True)
    before, after, later = (checkpoint(run, step) for step in (3, 4, 5))
    assert sum("exp_avg" in name for name in before) > 50
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in after)
    assert [line["skipped_steps"] for line in log_lines(run, "loss")] == [0, 0, 0, 1, 1, 1]
    assert all(torch.isfinite(value).all() for value in later.values())


def test_many_such_batches_stop_the_run_in_one_line(eggs, trained, recipe, tmp_path, monkeypatch):
    poison(monkeypatch, range(3, 99))
    few = ("engine.steps=20", "engine.max_skipped_in_a_row=4", "probe.every=0")
    with pytest.raises(TrainingError, match="not finite in 4 steps in a row") as stop:
        pretrain(recipe(*COMMON, *SAFE, *few), eggs, trained, tmp_path / "run", quiet=True)
    assert "\n" not in str(stop.value)
    exported = BrainFoundModel.from_pretrained(tmp_path / "run" / "export").encoder
    assert all(torch.isfinite(weight).all() for weight in exported.state_dict().values())


def test_going_back_gets_past_batches_that_are_not_numbers(eggs, trained, recipe, tmp_path, monkeypatch):
    poison(monkeypatch, range(3, 9))
    back = ("guard.on_failure=roll_back", "guard.confirm_log_lines=9", "engine.max_skipped_in_a_row=4")
    content = recipe(*COMMON, *SAFE, *back, "engine.steps=8", "probe.every=100")
    run = pretrain(content, eggs, trained, tmp_path / "run", quiet=True)
    (event,) = log_lines(run, "rolled_back_from")
    assert (event["step"], event["rolled_back_from"], event["lr_scale"]) == (0, 7, 0.3)
    assert "not finite in 4 steps" in event["reason"]
    assert [line["skipped_steps"] for line in log_lines(run, "loss")] == [1, 2, 2, 2, 2, 2, 2, 2]
    assert facts(run)["status"] == "done"
