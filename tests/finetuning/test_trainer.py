"""The Trainer of transformers with every class: it learns, is scored, and what it saves comes back with its head."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from brainfound.adapters import AdapterRecipe, attach_adapter
from brainfound.data.batches import collate, evenly_spaced_slices
from brainfound.data.store.prepare import prepare
from brainfound.errors import UsageError
from brainfound.finetuning.tasks import TargetColumn, resolve
from brainfound.finetuning.volumes import VolumeAugmentation, VolumeDataset, collate_volumes
from brainfound.models import BrainFoundForClassification, BrainFoundForRegression, BrainFoundForSegmentation

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "trainer.md"

BINS = {"regression_head": "bins", "regression_bins": 8, "regression_range": [0.0, 100.0]}
CASES = {
    "classes": (BrainFoundForClassification, "classification", "diagnosis", {"aggregator": "attention"}),
    "labels": (BrainFoundForClassification, "classification", "ill,old", {}),
    "number": (BrainFoundForRegression, "regression", "age_years", {"aggregator": "transformer"}),
    "gaussian": (BrainFoundForRegression, "regression", "age_years", {"regression_head": "gaussian"}),
    "bins": (BrainFoundForRegression, "regression", "age_years", BINS),
    "mask": (BrainFoundForSegmentation, "segmentation", "mask", {"decoder_width": 8}),
}


@pytest.fixture(scope="module")
def store(small_store, tmp_path_factory):
    """Eight sessions with two labels that do not exclude each other; the last one has no diagnosis."""
    folder, source = tmp_path_factory.mktemp("trainer"), small_store.path.parent / "source"
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype=str).query("subject < 's08'")
    for column in ("path", "mask"):
        table[column] = [str(source / name) for name in table[column]]
    table["ill"] = (table["diagnosis"] == "patient").astype(int)
    table["old"] = (table["age_years"].astype(float) > 45).astype(int)
    table.loc[table["subject"] == "s07", "diagnosis"] = ""
    table.to_csv(folder / "manifest.tsv", sep="\t", index=False)
    return prepare(folder / "manifest.tsv", folder / "store", small_store.preprocessing)


def start(case, store, backbone):
    """A new model of a case, always the same, and what it is to learn."""
    kind, task, column, fields = CASES[case]
    target = resolve(store, TargetColumn.find(store, column).labelled, column, task)
    if task == "regression":
        fields = {**fields, "target_mean": target.mean, "target_std": target.std}
    else:
        fields = {**fields, "id2label": dict(enumerate(target.names))}
    if case == "labels":
        fields = {**fields, "problem_type": "multi_label_classification"}
    torch.manual_seed(0)
    return kind.from_backbone(backbone, contrasts=store.contrasts, **fields), target


def arguments(folder, **settings):
    return TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        warmup_steps=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )


def first_score(prediction):
    """Mean absolute difference of the answers and the truth, whatever they are: shows that they go together."""
    answers = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    truth = prediction.label_ids
    if truth.ndim >= 4:
        assert answers.shape == (*truth.shape[:2], 2, *truth.shape[2:])
        answers = np.where(truth < 0, truth, answers.argmax(axis=2))
    elif answers.ndim > truth.ndim:
        answers = answers.argmax(axis=1)
    assert answers.shape == truth.shape
    return {"difference": float(np.abs(answers - truth).mean())}


def answers_of(model, batch):
    with torch.no_grad():
        output = model.eval()(**{name: value for name, value in batch.items() if name != "labels"})
    return {name: value for name, value in output.items() if name != "loss"}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("case", "adapter"), [*((case, None) for case in CASES), ("bins", "lora"), ("mask", "lora")])
def test_each_class_is_trained_scored_saved_and_loaded(case, adapter, store, tiny_backbone, tmp_path):
    model, target = start(case, store, tiny_backbone)
    if adapter:
        model = attach_adapter(model, AdapterRecipe(method=adapter, rank=2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(
        model,
        # Frozen weights under checkpointing are where adapters would be left without gradients.
        arguments(tmp_path / "run", gradient_checkpointing=adapter is not None),
        train_dataset=VolumeDataset(store, target, num_slices=4, augmentation=VolumeAugmentation()),
        eval_dataset=VolumeDataset(store, target, num_slices=4),
        data_collator=collate_volumes,
        compute_metrics=first_score,
    )
    assert np.isfinite(trainer.train().training_loss)
    found = trainer.evaluate()
    assert np.isfinite([found["eval_loss"], found["eval_difference"]]).all()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("lora_" in name for name in changed) == bool(adapter)
    assert any(".encoder.layer.0." in name for name in changed)
    assert any(name.startswith(("head.", "decoder.")) or ".modules_to_save." in name for name in changed)

    trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("*.pt"))
    batch = collate_volumes([trainer.eval_dataset[0], trainer.eval_dataset[1]])
    if adapter:
        reloaded = PeftModel.from_pretrained(start(case, store, tiny_backbone)[0], tmp_path / "saved")
    else:
        reloaded = CASES[case][0].from_pretrained(tmp_path / "saved")
    assert_equal(answers_of(model, batch), answers_of(reloaded, batch))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_checkpointing_changes_no_gradient(adapter, store, tiny_backbone, tmp_path):
    losses = []
    for checkpointing in (False, True):
        model, target = start("number", store, tiny_backbone)
        model.head.dropout.p = 0.0
        if adapter:
            model = attach_adapter(model, AdapterRecipe(method=adapter, rank=2))
        trainer = Trainer(
            model,
            arguments(tmp_path, gradient_checkpointing=checkpointing, logging_steps=1, seed=3),
            train_dataset=VolumeDataset(store, target, num_slices=3),
            data_collator=collate_volumes,
        )
        trainer.train()
        losses.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_its_head(store, tiny_backbone, tmp_path):
    def trainer(steps):
        model, target = start("bins", store, tiny_backbone)
        settings = arguments(tmp_path)
        settings.max_steps, settings.save_strategy, settings.save_steps = steps, "steps", 1
        data = VolumeDataset(store, target, num_slices=2)
        return Trainer(model, settings, train_dataset=data, data_collator=collate_volumes)

    trainer(1).train()
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    saved = BrainFoundForRegression.from_pretrained(tmp_path / "checkpoint-1")
    untrained = start("bins", store, tiny_backbone)[0]
    assert not torch.equal(saved.head.score.weight, untrained.head.score.weight)
    assert (saved.head.score.weight - resumed.model.head.score.weight).abs().max() < 0.1


def test_examples_are_what_the_store_holds(store):
    target = resolve(store, range(7), "diagnosis", "classification")
    data = VolumeDataset(store, target, num_slices=5)
    assert (len(data), data.num_left_out) == (7, 1)
    sessions = [2, 5]
    stacks = [store[i] for i in sessions]
    expected = collate(stacks, [evenly_spaced_slices(len(stack.pixels), 5) for stack in stacks])
    chosen = VolumeDataset(store, target, sessions)
    assert chosen[0]["pixel_values"].shape[0] == len(store[2].pixels)
    examples = [data[i] for i in sessions]
    batch = collate_volumes(examples)
    assert batch.pop("labels").tolist() == target.values(store, sessions).tolist()
    assert all(torch.equal(value, getattr(expected, name)) for name, value in batch.items())
    assert batch.keys() == expected.inputs().keys()
    with pytest.raises(UsageError, match="none of 1 sessions has a label"):
        VolumeDataset(store, target, [7])


def test_training_examples_vary_as_the_seed_says(store):
    target = resolve(store, range(8), "mask", "segmentation")
    data = VolumeDataset(store, target, num_slices=4, augmentation=VolumeAugmentation())

    def draw(seed):
        torch.manual_seed(seed)
        return [data[1] for _ in range(2)]

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])
    assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])
    assert first[0]["labels"].shape == (4, *store[1].grid[1:])
    assert set(first[0]["labels"].unique().tolist()) == {0, 1}
    side_by_side = VolumeDataset(
        store, target, num_slices=4, augmentation=VolumeAugmentation(), neighbours=True, foreground_share=1.0
    )
    for _ in range(3):
        example = side_by_side[1]
        assert torch.allclose(example["positions_mm"].diff(), torch.tensor(4.0))
        assert example["labels"].any()


def test_batches_are_padded_where_nothing_is_read():
    def example(num_slices):
        return {
            "pixel_values": torch.full((num_slices, 1, 2, 2), 7, dtype=torch.uint8),
            "contrast_mask": torch.tensor([True]),
            "slice_mask": torch.ones(num_slices, dtype=torch.bool),
            "positions_mm": torch.arange(num_slices, dtype=torch.float32) + 1,
            "labels": torch.ones(num_slices, 2, 2, dtype=torch.long),
        }

    batch = collate_volumes([example(3), example(1)])
    assert batch["slice_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["positions_mm"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch["pixel_values"][1, :, 0, 0, 0].tolist() == [7, 0, 0]
    assert batch["labels"][1, :, 0, 0].tolist() == [1, -100, -100]
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["contrast_mask"].shape == (2, 1)


PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=["classification", "regression", "segmentation"])
def test_the_programs_of_the_page_run(program, small_store, tiny_backbone, tmp_path, monkeypatch, capsys):
    for said, here in (
        ("facebook/dinov2-small", tiny_backbone),
        ("stores/own", small_store.path),
        ("max_steps=200", "max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy='no'"),
    ):
        assert said in program
        program = program.replace(said, str(here))
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(PAGE), "exec"), {"__name__": "program"})
    assert "eval_loss" in capsys.readouterr().out
