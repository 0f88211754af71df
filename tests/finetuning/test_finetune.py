"""Fine-tuning from door to door on a small store: three tasks, exact resume, splits, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Model

import brainfound
from brainfound.adapters import load_bundle
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.splits.split_file import Split
from brainfound.data.splits.training_history import TrainingHistory
from brainfound.data.store import Store
from brainfound.data.store.prepare import prepare
from brainfound.errors import BrainFoundError, ModelError, RecipeError, TrainingError, UsageError
from brainfound.finetuning import splits as session_split
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.scoring import read_scores
from brainfound.finetuning.tasks import TargetColumn
from brainfound.finetuning.training_task import FinetuneTask
from brainfound.finetuning.volumes import VolumeReader
from brainfound.inference.evaluation import evaluate
from brainfound.models.stack_prediction import unwrap_peft
from brainfound.recipes import validate
from tests.ranks import launch
from tests.tiny_runs import log_lines, subjects_by_part, tiny_finetuning

TINY = tiny_finetuning(engine={"steps": 3, "checkpoint_every": 3}, name="tiny", frozen_baseline=False, evaluate_every=3)
COLUMNS = {"classification": "diagnosis", "regression": "age_years", "segmentation": "mask"}
OWN = {
    "diagnosis": "aggregator=max",
    "age_years": "aggregator=max",
    "mask": "task={kind: segmentation, decoder_width: 8}",
}
"""A setting of each column's task, which another task would refuse."""


def tiny(*overrides: str) -> FinetuneRecipe:
    return validate(FinetuneRecipe, TINY, overrides)


def of_training(store, run: Path, column: str) -> pd.Series:
    return store.sessions.loc[store.sessions["subject"].isin(subjects_by_part(run)["train"]), column]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log_lines(run, "loss")]


@pytest.fixture(scope="module")
def six_steps(small_store, tiny_backbone, tmp_path_factory) -> Path:
    """A regression of six steps with a checkpoint in the middle; tests copy it before they change it."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
        recipe = tiny("engine.steps=6", "frozen_baseline=true")
        return finetune(recipe, small_store, tiny_backbone, "age_years", out, quiet=True)


@pytest.fixture(scope="module")
def t1w_store(tmp_path_factory, make_cohort) -> Store:
    folder = tmp_path_factory.mktemp("t1w")
    cohort = make_cohort(folder / "source", num_subjects=8)
    return prepare(cohort, folder / "store", Preprocessing(contrasts=("T1w",), spacing_mm=(4, 4, 4), size=(32, 32)))


@pytest.mark.parametrize("task", COLUMNS)
def test_each_task_trains_and_leaves_a_whole_run(small_store, tiny_backbone, tmp_path, monkeypatch, task):
    trained_on: set[int] = set()
    read = VolumeReader.read

    def spy(self, positions, key):
        batch, sessions = read(self, positions, key)
        trained_on.update(int(session) for session in sessions)
        return batch, sessions

    monkeypatch.setattr(VolumeReader, "read", spy)
    recipe = tiny("head_fit_passes=1", OWN[COLUMNS[task]])
    run = finetune(recipe, small_store, tiny_backbone, COLUMNS[task], tmp_path / "run", quiet=True)
    assert len(log_lines(run, "loss")) == 3
    assert all(np.isfinite(losses(run)))
    parts = subjects_by_part(run)
    assert set(parts) == {"train", "validation", "test"}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 12
    subjects = small_store.sessions["subject"]
    seen = {subjects.iloc[session] for session in trained_on}
    assert seen
    assert seen <= parts["train"]

    scores = json.loads((run / "scores.json").read_text())
    cases = pd.read_csv(run / "cases.tsv", sep="\t")
    assert scores["task"] == task
    assert scores["num_sessions"] == len(cases) == 3
    assert {subjects.iloc[row] for row in cases["row"]} == parts["test"]
    assert cases["subject_row"].tolist() == cases["row"].tolist(), "every subject has one session"
    assert not {"subject", "session"} & set(cases.columns), "names only with keep_ids"
    assert set(scores["scores"]) >= set(scores["trivial"]) - {"clean_negatives"}
    assert "frozen" not in scores, "not asked for"
    names = {"classification": ["auroc", "balanced_accuracy"], "regression": ["mae", "r2", "pearson"]}.get(
        task, ["dice"]
    )
    assert set(scores["intervals"]["scores"]) >= {n for n in names if scores["scores"][n] is not None}
    for ends in scores["intervals"]["scores"].values():
        assert ends["low"] is ends["high"] is None, "three subjects give no 95% interval"
        assert 1 <= ends["num_subjects"] <= 3
    if task == "segmentation":
        assert cases["dice"].mean() == pytest.approx(scores["scores"]["dice"])
    bundle = load_bundle(run / "export")
    assert bundle.task == task
    assert bundle.metadata["test"] == scores
    assert json.loads((run / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize("features", ["patches", "cls_and_patches"])
def test_what_of_a_slice_is_read_may_be_chosen(small_store, tiny_backbone, tmp_path, features):
    """From a plain ViT, and then from a saved model that read something else; the bundle answers as the run did."""
    first = finetune(
        tiny(f"slice_features={features}", "frozen_baseline=true"), small_store, tiny_backbone, "age_years",
        tmp_path / "first", quiet=True,
    )  # fmt: skip
    bundle = load_bundle(first / "export")
    assert bundle.model.get_base_model().config.slice_features == features
    assert features in (first / "export" / "README.md").read_text()
    (again,) = evaluate(first, small_store)
    written = read_scores(first)
    assert again.to_dict()["scores"] == pytest.approx(written["scores"])
    assert again.to_dict()["frozen"] == pytest.approx(written["frozen"])
    second = finetune(tiny("adapter=full"), small_store, tiny_backbone, "age_years", tmp_path / "cls", quiet=True)
    with pytest.warns(UserWarning, match=f"gets new weights.*the requested one .* on {features}"):
        third = finetune(
            tiny(f"slice_features={features}"), small_store, second / "export", "age_years", tmp_path / "third",
            quiet=True,
        )  # fmt: skip
    assert load_bundle(third / "export").model.get_base_model().config.slice_features == features
    with pytest.raises(RecipeError, match="slice_features: this setting is for a classification or a regression"):
        finetune(tiny(f"slice_features={features}"), small_store, tiny_backbone, "mask", tmp_path / "no", quiet=True)
    with pytest.raises(RecipeError, match="slice_features: no such choice .got 'patch'.*patches"):
        finetune(tiny("slice_features=patch"), small_store, tiny_backbone, "age_years", tmp_path / "no", quiet=True)


@pytest.mark.parametrize(("stem", "column"), [("per_contrast", "age_years"), ("slices", "mask")])
def test_a_stem_may_be_chosen_and_blocks_computed_again(
    small_store, t1w_store, tiny_backbone, tmp_path, monkeypatch, stem, column
):
    again_or_not, loss = [], FinetuneTask.loss

    def spy(self, *arguments):
        again_or_not.append({block.gradient_checkpointing for block in unwrap_peft(self.model).encoder.blocks})
        return loss(self, *arguments)

    monkeypatch.setattr(FinetuneTask, "loss", spy)
    store, runs = t1w_store if stem == "slices" else small_store, []
    for again in ("false", "true"):
        recipe = tiny(f"stem={stem}", OWN[column], f"gradient_checkpointing={again}", "evaluate_every=0")
        runs.append(finetune(recipe, store, tiny_backbone, column, tmp_path / again, quiet=True))
    assert again_or_not == [{False}] * 3 + [{True}] * 3
    np.testing.assert_allclose(losses(runs[0]), losses(runs[1]), rtol=1e-4)
    model = load_bundle(runs[1] / "export").model.get_base_model()
    assert (model.config.stem, model.config.aggregator) == (stem, "mean" if column == "mask" else "max")


def test_what_the_validation_part_calibrates_stands_next_to_the_scores(small_store, tiny_backbone, tmp_path):
    recipe = tiny("task=regression", "task.head=bins", "task.bins=12", "task.interval_confidence=0.5")
    run = finetune(recipe, small_store, tiny_backbone, "age_years", tmp_path / "run", quiet=True)
    scores = json.loads((run / "scores.json").read_text())
    said = scores["calibration"]
    assert (said["fitted_on"], said["num_sessions"]) == ("validation", 3)
    cases = pd.read_csv(run / "cases.tsv", sep="\t")
    half = said["interval"]["half_width"] * cases["prediction_std"]
    inside = (cases["truth"] - cases["prediction"]).abs() <= half
    assert said["interval"]["normalised"] is True
    assert said["interval"]["coverage"] == pytest.approx(inside.mean())
    assert said["interval"]["mean_width"] == pytest.approx(2 * half.mean())
    assert scores["scores"]["mae"] == pytest.approx((cases["truth"] - cases["prediction"]).abs().mean()), "raw"
    # The half-width is that of the validation part, which another look at it gives again.
    watched = evaluate(run, small_store, part="validation")[0].cases
    ratios = sorted((watched["truth"] - watched["prediction"]).abs() / watched["prediction_std"])
    assert said["interval"]["half_width"] == pytest.approx(ratios[1], rel=1e-4)
    predictor = brainfound.load(run)
    answer = predictor.predict_stack(small_store[0]).answer
    width = said["interval"]["half_width"] * answer["standard_deviation"]
    low, high = answer["value"] - width, answer["value"] + width
    assert answer["interval"] == {"low": pytest.approx(low), "high": pytest.approx(high), "confidence": 0.5}
    ages = of_training(small_store, run, "age_years").to_numpy()
    margin = 0.1 * np.ptp(ages)
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["regression_range"] == pytest.approx([ages.min() - margin, ages.max() + margin])


def test_a_run_in_bf16_answers_as_its_bundle_does(small_store, tiny_backbone, tmp_path):
    # Asked for by name: "auto" takes it only where it is fast.
    settings = ["engine.steps=1", "engine.batch_size=2", "num_slices=4", "evaluate_every=0", "engine.precision=bf16"]
    run = finetune(
        "finetune-regression", small_store, tiny_backbone, "age_years", tmp_path / "run", overrides=settings, quiet=True
    )
    written = json.loads((run / "scores.json").read_text(encoding="utf-8"))
    again = evaluate(run, small_store)[0]
    assert written["scores"]["mae"] == pytest.approx(again.scores["mae"], rel=1e-5)


def test_weighted_and_focal(small_store, tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setitem(small_store.sessions, "diagnosis", ["a", "b", "b", "b"] * 3)
    recipe = tiny("task=classification", "task.class_weights=balanced", "task.focal_gamma=2")
    run = finetune(recipe, small_store, tiny_backbone, "diagnosis", tmp_path / "run", quiet=True)
    learnt = of_training(small_store, run, "diagnosis").tolist()
    config = load_bundle(run / "export").model.config
    assert config.classification_focal_gamma == 2
    assert config.class_weights == pytest.approx([len(learnt) / (2 * learnt.count(name)) for name in "ab"])
    said = json.loads((run / "scores.json").read_text())["calibration"]
    assert 0 <= said["brier"]["raw"] <= 1
    assert 0 <= said["ece"]["raw"] <= 1
    assert (run / "reliability.png").stat().st_size > 1000
    card = (run / "export" / "README.md").read_text()
    assert "focal loss (gamma 2) on cross-entropy, weighted by inverse frequency" in card


def test_several_labels_from_door_to_door(small_store, tiny_backbone, tmp_path, monkeypatch):
    for name, values in {"ill": [0, 1] * 6, "old": [0] * 6 + [1] * 6}.items():
        monkeypatch.setitem(small_store.sessions, name, values)
    recipe = tiny("head_fit_passes=1", "task={kind: classification, class_weights: balanced}")
    run = finetune(recipe, small_store, tiny_backbone, "ill,old", tmp_path / "run", quiet=True)
    scores = json.loads((run / "scores.json").read_text())
    assert {"auroc", "auroc(ill)", "auroc(old)"} <= set(scores["scores"]) == set(scores["trivial"])
    cases = pd.read_csv(run / "cases.tsv", sep="\t")
    assert cases["truth(ill)"].tolist() == [[0, 1][row % 2] for row in cases["row"]]
    again = evaluate(run, small_store)[0]
    assert again.scores["balanced_accuracy"] == pytest.approx(scores["scores"]["balanced_accuracy"])
    assert again.trivial["balanced_accuracy"] == pytest.approx(scores["trivial"]["balanced_accuracy"])
    answer = brainfound.load(run).predict_stack(small_store[0]).answer
    assert answer["present"] == [name for name in ("ill", "old") if answer["probabilities"][name] > 0.5]
    assert Split.load(run / "splits.json").counts


def test_regression_learns_by_heart(small_store, tiny_backbone, tmp_path):
    """Full training of a tiny model on the same volumes again and again."""
    still = [f"augmentation.{key}=0" for key in ("rotation_degrees", "scale", "shear", "contrast_dropout")]
    still += [f"augmentation.intensity.{key}_probability=0" for key in ("gamma", "contrast", "blur")]
    recipe = tiny(
        *still,
        "engine.steps=40",
        "engine.batch_size=6",
        "num_slices=40",
        "aggregator=mean",
        "optim.lr=1e-3",
        "optim.head_lr=1e-2",
        "evaluate_every=0",
    )
    run = finetune(recipe, small_store, tiny_backbone, "age_years", tmp_path / "run", adapter="full", quiet=True)
    assert np.mean(losses(run)[-3:]) < 0.5 * np.mean(losses(run)[:3])


def test_lora_leaves_the_base_as_it_was(six_steps, tiny_backbone):
    before = Dinov2Model.from_pretrained(tiny_backbone).state_dict()
    saved = load_file(six_steps / "checkpoints" / "step-000006" / "model.safetensors")
    plain = {name.replace(".base_layer.", "."): value for name, value in saved.items()}
    found = 0
    for name, weight in before.items():
        if name.startswith("encoder.layer") or name == "layernorm.weight":
            matches = [value for key, value in plain.items() if key.endswith(f"backbone.{name}")]
            assert len(matches) == 1, name
            assert torch.equal(matches[0], weight), name
            found += 1
    assert found > 30
    updates = [value for key, value in saved.items() if "lora_B" in key]
    assert updates
    assert all(value.abs().max() > 0 for value in updates)


def test_card_next_to_the_weights_names_the_scores(six_steps, tiny_backbone):
    card = (six_steps / "export" / "README.md").read_text()
    scores = json.loads((six_steps / "scores.json").read_text())
    mae = next(line for line in card.splitlines() if line.startswith("| mae |"))
    assert f"{scores['scores']['mae']:.4g}" in mae
    assert f"{scores['trivial']['mae']:.4g}" in mae
    assert "trivial baseline" in card
    assert "frozen baseline" in card
    assert f"{scores['frozen']['mae']:.4g}" in mae
    assert "train 6 sessions of 6 subjects" in card
    assert f"| Data hash | {data_hash_of_split(six_steps)}" in card
    assert str(tiny_backbone.parent) not in card
    assert "load_bundle" in card
    assert "not a medical device" in card


SEEN = "3 of the 3 tested subjects were, by name or image, in the training data of the model that it started from"


@pytest.mark.parametrize("data", ["the same", "other names", "others", "not recorded"])
def test_card_says_whether_the_starting_model_saw_the_tested_subjects(finished, store, tmp_path, monkeypatch, data):
    """`finished` was pretrained on the store, from random weights."""
    pretrained = shutil.copytree(finished, tmp_path / "pretrained")
    if data in ("other names", "others"):
        names = [f"p{n}" for n in range(len(store))]
        monkeypatch.setitem(store.sessions, "subject", names)
        if data == "others":
            monkeypatch.setitem(store.sessions, "image_hash", [f"image-{name}" for name in names])
    elif data == "not recorded":
        (pretrained / "export" / "training_history.json").unlink()
    run = finetune(tiny("engine.steps=1"), store, pretrained / "export", "age_years", tmp_path / "run", quiet=True)
    card = " ".join((run / "export" / "README.md").read_text().split())
    if data == "others":
        assert "Its scores are of subjects that it never saw." in card
    else:
        assert "never saw" not in card
    if data == "not recorded":
        assert "the subjects in the training of its starting model are not recorded" in card
    else:
        assert (SEEN in card) == (data != "others")
    (scored,) = evaluate(run, store)
    assert any("3 of 3 sessions are" in note for note in scored.notes) == (SEEN in card)
    assert TrainingHistory.load(run / "export").complete == (data != "not recorded")
    assert "| Started from | pretrained/export (a local folder) |" in card


def test_card_names_device_and_slices(six_steps, small_store):
    """What is known does not read "not recorded"; a correlation with a constant is undefined."""
    card = (six_steps / "export" / "README.md").read_text()
    assert "| Device | " + json.loads((six_steps / "run.json").read_text())["device"].split(":")[0] in card
    assert "the subjects in the training of its starting model are not recorded" in " ".join(card.split())
    assert f"| Slices | {small_store.num_slices} (4 of a session at a time) |" in card
    assert [line for line in card.splitlines() if "| not recorded |" in line] == ["| Data | not recorded |"]
    pearson = next(line for line in card.splitlines() if line.startswith("| pearson |"))
    assert pearson.split(" | ")[2] == "undefined"


def data_hash_of_split(run: Path) -> str:
    return Split.load(run / "splits.json").data_hash


def test_a_card_may_be_edited_and_the_weights_may_not(six_steps, tmp_path):
    export = shutil.copytree(six_steps / "export", tmp_path / "export")
    (export / "README.md").write_text("a better card")
    load_bundle(export)
    (export / "preprocessing.json").write_text("{}")
    with pytest.raises(BrainFoundError, match=r"preprocessing\.json"):
        load_bundle(export)


def test_resume_is_exact(six_steps, small_store, tiny_backbone, tmp_path):
    run = shutil.copytree(six_steps, tmp_path / "run")
    for name in ("checkpoints/step-000006", "export"):
        shutil.rmtree(run / name)
    (run / "scores.json").unlink()
    recipe = tiny("engine.steps=6", "frozen_baseline=true")
    finetune(recipe, small_store, tiny_backbone, "age_years", run, resume=True, quiet=True)
    assert losses(run) == losses(six_steps)
    first, second = (
        load_file(folder / "checkpoints" / "step-000006" / "model.safetensors") for folder in (six_steps, run)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (run / "scores.json").read_text() == (six_steps / "scores.json").read_text()
    assert json.loads((run / "scores.json").read_text())["frozen"]["mae"] > 0


def test_a_finished_run_may_be_resumed(six_steps, small_store, tiny_backbone, tmp_path):
    run = shutil.copytree(six_steps, tmp_path / "run")
    finetune(tiny("engine.steps=6"), small_store, tiny_backbone, "age_years", run, resume=True, quiet=True)
    assert losses(run) == losses(six_steps)
    assert (run / "scores.json").read_text() == (six_steps / "scores.json").read_text()
    load_bundle(run / "export")


def test_another_run_learns_and_tests_on_the_same_subjects(six_steps, small_store, tiny_backbone, tmp_path):
    other = "split.seed=5"
    target = TargetColumn.find(small_store, "diagnosis")
    fresh = session_split.split_sessions(tiny(other).split, small_store, target, None)
    given = session_split.split_sessions(tiny(other).split, small_store, target, six_steps / "splits.json")
    assert not np.array_equal(fresh["test"], given["test"])
    run = tmp_path / "run"
    finetune(
        tiny(other, "engine.steps=1"), small_store, tiny_backbone, "diagnosis", run,
        split=six_steps / "splits.json", quiet=True,
    )  # fmt: skip
    assert subjects_by_part(run) == subjects_by_part(six_steps)

    # The continuation follows the run's own split, whether or not it is told again.
    shutil.rmtree(run / "checkpoints")
    finetune(tiny(other, "engine.steps=1"), small_store, tiny_backbone, "diagnosis", run, resume=True, quiet=True)
    assert subjects_by_part(run) == subjects_by_part(six_steps)
    own = (run / "splits.json").read_text()
    finetune(
        tiny(other, "engine.steps=1"), small_store, tiny_backbone, "diagnosis", run,
        split=six_steps / "splits.json", resume=True, quiet=True,
    )  # fmt: skip
    assert (run / "splits.json").read_text() == own
    parts = Split.load(run / "splits.json").parts()
    Split({"moved": {**parts, "train": parts["test"], "test": parts["train"]}}).save(tmp_path / "moved.json")
    with pytest.raises(UsageError, match="another split"):
        finetune(
            tiny(other, "engine.steps=1"), small_store, tiny_backbone, "diagnosis", run,
            split=tmp_path / "moved.json", resume=True, quiet=True,
        )  # fmt: skip


def test_what_cannot_start_or_resume_is_refused(six_steps, small_store, tiny_backbone, tmp_path):
    def start(column="age_years", *overrides, out=tmp_path / "new", **options):
        finetune(tiny(*overrides), small_store, tiny_backbone, column, out, quiet=True, **options)

    with pytest.raises(UsageError, match="--resume"):
        start(out=six_steps)
    with pytest.raises(UsageError, match="no run to resume"):
        start(resume=True)
    with pytest.raises(RecipeError, match=r"optim\.lr"):
        start("age_years", "engine.steps=6", "optim.lr=1", out=six_steps, resume=True)
    with pytest.raises(UsageError, match="another target"):
        start("diagnosis", "engine.steps=6", out=six_steps, resume=True)
    with pytest.raises(RecipeError, match="task.class_weights: unknown key"):
        start("age_years", "task=regression", "task.class_weights=balanced")
    with pytest.raises(RecipeError, match=r"huber_delta has no effect with loss=smooth_l1; .*task\.loss=huber"):
        start("age_years", "task={kind: regression, huber_delta: 2}")
    with pytest.raises(RecipeError, match="loss has no effect with head=bins"):
        start("age_years", "task={kind: regression, head: bins, loss: l1}")
    with pytest.raises(RecipeError, match="aggregator"):
        start("age_years", "aggregator=median")
    with pytest.raises(RecipeError, match="Did you mean per_contrast"):
        start("age_years", "stem=per_contrasts")
    with pytest.raises(ModelError, match="one contrast"):
        start("age_years", "stem=slices")
    with pytest.raises(UsageError, match="height_cm"):
        start("height_cm")
    with pytest.raises(UsageError, match="must be numeric"):
        start("diagnosis", "task=regression")
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(UsageError, match="not a split"):
        start(split=tmp_path / "no.json")
    assert not (tmp_path / "new").exists()


def test_targets_with_nothing_to_learn_are_refused(small_store, tiny_backbone, tmp_path, monkeypatch):
    def start(column, *overrides):
        finetune(tiny(*overrides), small_store, tiny_backbone, column, tmp_path / "new", quiet=True)

    monkeypatch.setitem(small_store.sessions, "constant", 3.0)
    monkeypatch.setitem(small_store.sessions, "mask_dtype", "")
    with pytest.raises(UsageError, match="constant") as constant:
        start("constant", "task=regression")
    with pytest.raises(UsageError, match="two classes") as one_class:
        start("constant", "task=classification")
    with pytest.raises(UsageError, match="no session has a mask") as no_mask:
        start("mask")
    assert all("\n" not in str(error.value) for error in (constant, one_class, no_mask))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("at", ["write_start", "write_end"])
def test_what_the_disk_refuses_is_one_line(small_store, tiny_backbone, tmp_path, monkeypatch, at):
    def refused(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "run.json")

    monkeypatch.setattr(f"brainfound.training.run_folder.{at}", refused)
    with pytest.raises(TrainingError, match=r"^run\.json: a file cannot be written \(got No space left on device\)"):
        finetune(tiny(), small_store, tiny_backbone, "age_years", tmp_path / "run", quiet=True)


@pytest.mark.slow
def test_two_ranks_train_together(small_store, tiny_backbone, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny("frozen_baseline=true").to_yaml())
    (tmp_path / "run.py").write_text(
        "import sys, torch\ntorch.set_num_threads(1)\nfrom brainfound.finetuning.finetune import finetune\n"
        "finetune(*sys.argv[1:4], 'diagnosis', sys.argv[4], quiet=True)\n"
    )
    arguments = [tmp_path / "tiny.yaml", small_store.path, tiny_backbone, tmp_path / "run"]
    launch(tmp_path / "run.py", *arguments, HF_HUB_OFFLINE="1", ACCELERATE_USE_CPU="true")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
    assert [line["step"] for line in log_lines(tmp_path / "run", "loss")] == [1, 2, 3]
    load_bundle(tmp_path / "run" / "export")


def test_a_stop_in_the_middle_is_gone_on_with(six_steps, small_store, tiny_backbone, tmp_path, monkeypatch):
    """What really trained before the stop, not only a copied folder."""

    def broken(self, step, taken):
        if step == 4:
            raise TrainingError("pulled the plug")

    run = tmp_path / "run"
    recipe = tiny("engine.steps=6")
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTask, "after_step", broken)
        with pytest.raises(TrainingError, match="plug"):
            finetune(recipe, small_store, tiny_backbone, "age_years", run, quiet=True)
    assert not (run / "export").exists()
    finetune(recipe, small_store, tiny_backbone, "age_years", run, resume=True, quiet=True)
    assert losses(run) == losses(six_steps)
