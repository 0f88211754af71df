"""Pretraining from door to door, in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError

from brainfound import recipes
from brainfound.data.checking.contract import InputContract
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.splits.training_history import TrainingHistory
from brainfound.errors import BrainFoundError, RecipeError, TrainingError, UsageError
from brainfound.models import BrainFoundModel
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.pretraining.training_task import PretrainTask
from tests.tiny_runs import checkpoint_tensors, log_lines, untimed_lines


def test_run_folder_is_complete(finished, store):
    assert {p.name for p in finished.iterdir()} == {
        "recipe.yaml", "run.json", "log.jsonl", "curves.png", "checkpoints", "export",
    }  # fmt: skip
    content = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipes.validate(PretrainRecipe, content).engine.steps == 6
    facts = json.loads((finished / "run.json").read_text())
    assert facts["status"] == "done"
    assert facts["data_hash"] == store.content_hash
    assert facts["effective_lr"] == pytest.approx(1e-3 * (8 / 128) ** 0.5)
    assert facts["device_reason"]
    assert [line["step"] for line in log_lines(finished, "loss")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log_lines(finished, "probe")] == [0, 3, 6]


def test_retention_is_logged_and_a_later_process_finds_the_start_again(finished, store, recipe):
    from brainfound.pretraining.monitoring.guard import read_retention_scores
    from brainfound.pretraining.monitoring.probes import Probe

    first, _, last = (read_retention_scores(line) for line in log_lines(finished, "probe"))
    assert {"patch_texture", "slice_position", "age_years_knn", "kept_patches"} <= first.keys()
    assert all(error == 0 for _, error in first.values())
    assert last["patch_intensity"][1] > 0
    model = BrainFoundModel.from_pretrained(finished / "export")
    probe = Probe(store, recipe().probe, recipe().seed, finished / "checkpoints" / "start.safetensors")
    again = probe.run(model.encoder, torch.device("cpu")).retention
    assert again.keys() == last.keys()
    for name, told in again.items():
        assert told == pytest.approx(last[name], abs=1e-6)
    lost = Probe(store, recipe().probe, recipe().seed, finished / "no-such-file")
    with pytest.warns(UserWarning, match="not compared with the start"):
        assert "kept_patches" not in lost.run(model.encoder, torch.device("cpu")).retention


def test_export_is_the_teacher_with_its_preprocessing_and_card(finished, store):
    model = BrainFoundModel.from_pretrained(finished / "export").eval()
    saved = checkpoint_tensors(finished, 6, "task.safetensors")
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, saved[f"teacher.encoder.{name}"]), name
    student = checkpoint_tensors(finished, 6)
    assert not all(torch.equal(student[f"encoder.{n}"], w) for n, w in model.encoder.state_dict().items())
    assert Preprocessing.load(finished / "export") == store.preprocessing
    assert "medical device" in (finished / "export" / "README.md").read_text()
    with torch.no_grad():
        output = model(torch.from_numpy(store[0].pixels)[None])
    assert torch.isfinite(output.volume_embedding).all()


def test_card_names_device_start_and_the_slices_in_use(store, recipe, tmp_path):
    settings = recipe("views.slice_margin=0.2", "probe.every=0", "engine.steps=1")
    run = pretrain(settings, store, out=tmp_path / "run", quiet=True)
    card = (run / "export" / "README.md").read_text()
    facts = json.loads((run / "run.json").read_text())
    used = facts["num_slices"]
    assert used == sum(n - 2 * (n // 5) for n in store.sessions["num_slices"]) < store.num_slices
    assert f"| Slices | {used} |" in card
    assert "| Started from | new weights |" in card
    assert "| Device | " + facts["device"].split(":")[0] in card
    missing = [line for line in card.splitlines() if line.startswith("|") and "not recorded" in line]
    assert missing == ["| Data | not recorded |"]


def test_the_export_keeps_hashes_of_the_subjects_of_every_training(finished, store, recipe, tmp_path):
    first = TrainingHistory.load(finished / "export")
    assert first.complete
    assert first.seen(store, range(len(store))).all()
    text = (finished / "export" / "training_history.json").read_text()
    assert not any(f'"{name}"' in text for name in store.sessions["subject"])
    quick = ("probe.every=0",)
    further = pretrain(recipe(*quick, "engine.steps=1"), store, finished / "export", tmp_path / "further", quiet=True)
    again = TrainingHistory.load(further / "export")
    assert again.trainings[0] == first.trainings[0]
    assert (len(again.trainings), again.complete) == (2, True)
    untouched = pretrain(
        recipe(*quick, "engine.steps=0"), store, finished / "export", tmp_path / "untouched", quiet=True
    )
    assert TrainingHistory.load(untouched / "export") == first


def test_resume_is_exact(finished, store, recipe, tmp_path):
    """Continue from step 3 in fresh objects; log, student, teacher and optimiser must be those of the whole run."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    shutil.rmtree(run / "export")
    pretrain(recipe(), store, out=run, resume=True, quiet=True)
    for key in ("loss", "probe"):
        assert untimed_lines(finished, key) == untimed_lines(run, key)
    for file in ("model.safetensors", "task.safetensors"):
        first, second = checkpoint_tensors(finished, 6, file), checkpoint_tensors(run, 6, file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert (run / "export" / "model.safetensors").is_file()
    assert "resumed" in json.loads((run / "run.json").read_text())


def test_a_torn_newest_checkpoint_costs_steps_not_the_run(finished, store, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "checkpoints" / "step-000006" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="step-000006 is damaged"):
        pretrain(recipe(), store, out=run, resume=True, quiet=True)
    assert [line["loss"] for line in log_lines(run, "loss")] == [line["loss"] for line in log_lines(finished, "loss")]


def test_what_cannot_start_or_resume_is_refused(finished, store, recipe, tmp_path):
    with pytest.raises(UsageError, match="--resume"):
        pretrain(recipe(), store, out=finished, quiet=True)
    with pytest.raises(UsageError, match="no run to resume"):
        pretrain(recipe(), store, out=tmp_path / "new", resume=True, quiet=True)
    with pytest.raises(RecipeError, match=r"optim\.lr"):
        pretrain(recipe("optim.lr=2e-3"), store, out=finished, resume=True, quiet=True)
    with pytest.raises(UsageError, match="--data"):
        pretrain(recipe(), out=tmp_path / "new", quiet=True)
    with pytest.raises(RecipeError, match=r"optim\.learning_rate"):
        pretrain(recipe(), store, out=tmp_path / "new", overrides=["optim.learning_rate=1"], quiet=True)
    with pytest.raises(RecipeError, match=r"views\.local_size"):
        pretrain(recipe("views.local_size=20"), store, out=tmp_path / "new", quiet=True)
    with pytest.raises(RecipeError, match="head_warmup_steps"):
        pretrain(recipe("init.source=x", "schedule.head_warmup_steps=6"), store, out=tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_logging_may_change_on_resume(finished, store, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    shutil.rmtree(run / "export")
    pretrain(recipe("engine.log_every=2", "guard.enabled=false"), store, out=run, resume=True, quiet=True)
    assert [line["step"] for line in log_lines(run, "loss")] == [1, 2, 3, 4, 6]


def test_a_finished_run_is_left_as_it_is(finished, store, recipe, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr("brainfound.pretraining.pretrain.build_model", lambda *_: pytest.fail("a model was built"))
    assert pretrain(recipe(), store, out=run, resume=True) == run
    assert capsys.readouterr().err.strip().endswith(f"this run is finished; its export is {run / 'export'}")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(RecipeError, match=r"optim\.lr"):
        pretrain(recipe("optim.lr=2e-3"), store, out=run, resume=True, quiet=True)


def test_the_recipe_of_the_run_is_what_resumes_it(finished, store, recipe, tmp_path):
    file = finished / "recipe.yaml"
    with pytest.raises(RecipeError, match="give .*recipe.yaml as the recipe") as error:
        pretrain(recipe("optim.lr=2e-3"), store, out=finished, resume=True, quiet=True)
    assert str(file) in str(error.value)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    pretrain(run / "recipe.yaml", store, out=run, resume=True, quiet=True)
    assert (run / "checkpoints" / "step-000006").is_dir()


def test_slices_without_whole_patches_are_refused_before_anything_is_written(store, recipe, tmp_path):
    odd = ("init.scratch.patch_size=14", "views.global_size=28", "views.local_size=14")
    with pytest.raises(UsageError, match=r"got 32 . 32.*expected multiples of the patch size 14.*size=\[28,28\]"):
        pretrain(recipe(*odd), store, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    pretrain(recipe(*odd, "probe.every=0", "engine.steps=1"), store, out=tmp_path / "run", quiet=True)


def test_a_small_disk_is_reported_before_anything_is_written(store, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(TrainingError, match="no room for this run"):
        pretrain(recipe(), store, out=tmp_path / "run", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_before_the_first_step_leaves_no_export(store, recipe, tmp_path, monkeypatch):
    def full(weights, file):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("brainfound.pretraining.training_task.save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        pretrain(recipe(), store, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "export").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"].startswith("stopped: ")
    monkeypatch.undo()
    monkeypatch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
    pretrain(recipe(), store, out=tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "export").is_dir()


def test_an_export_that_cannot_be_written_is_one_line(store, recipe, tmp_path, monkeypatch):
    def full(self, folder, **_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(BrainFoundModel, "save_pretrained", full)
    with pytest.raises(TrainingError, match="the export cannot be written .*No space left"):
        pretrain(recipe("engine.steps=1", "probe.every=0"), store, out=tmp_path / "run", quiet=True)


def test_an_export_that_cannot_be_renamed_leaves_the_one_before(finished, store, recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    (run / "export" / "mark").write_text("the one before")
    (run / ".export.0123abcd.previous").mkdir()
    rename = Path.rename

    def fails(path, target):
        if Path(target) == run / "export" and not path.name.endswith(".previous"):
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(TrainingError, match="the export cannot be written"):
        pretrain(recipe(), store, out=run, resume=True, quiet=True)
    assert (run / "export" / "mark").is_file()
    monkeypatch.undo()
    monkeypatch.setattr("brainfound.training.run_folder.plot_curves", lambda folder: folder)
    pretrain(recipe(), store, out=run, resume=True, quiet=True)
    assert not (run / "export" / "mark").exists()
    assert not list(run.glob(".export*"))


@pytest.mark.parametrize(
    ("changes", "always_present"),
    [
        (("views.contrast_dropout=0.2",), False),
        (("views.contrast_dropout=0", "views.split_contrasts=0.5"), False),
        (("views.contrast_dropout=0",), True),
    ],
)
def test_the_contract_knows_whether_contrasts_were_withheld(store, recipe, tmp_path, changes, always_present):
    quick = recipe(*changes, "engine.steps=1", "probe.every=0")
    run = pretrain(quick, store, out=tmp_path / "run", quiet=True)
    always = [name for name, there in zip(store.contrasts, store.present.all(axis=0), strict=True) if there]
    assert always
    assert list(InputContract.load(run / "export").never_absent) == (always if always_present else [])


def test_a_rollback_is_on_the_terminal_in_the_facts_and_in_the_card(store, recipe, tmp_path, monkeypatch, capsys):
    from brainfound.pretraining.monitoring.probes import Probe, ProbeScores

    scores = iter([0.9, 0.2, 0.1, 0.9, 0.9, 0.9, 0.9])
    monkeypatch.setattr(Probe, "run", lambda *_: ProbeScores(next(scores), 0.0, 0.01, "r2", "age_years"))
    settings = ("guard.on_failure=roll_back", "guard.probe_patience=2", "guard.grace_steps=0", "probe.every=1")
    run = pretrain(recipe(*settings, "engine.steps=3", "init.scratch.layer_scale=0.5"), store, out=tmp_path / "run")
    told = " ".join(capsys.readouterr().err.split())
    assert "step 2: the probe fell from 0.900 (step 0) to 0.100" in told
    assert "back to step 0, learning rates × 0.3" in told
    (event,) = json.loads((run / "run.json").read_text())["rollbacks"]
    assert (event["step"], event["rolled_back_from"], event["lr_scale"]) == (0, 2, 0.3)
    assert "rollbacks 1, lr_scale 0.3" in " ".join((run / "export" / "README.md").read_text().split())


def test_no_steps_train_nothing_and_say_so(store, recipe, tmp_path, capsys):
    run = pretrain(recipe("engine.steps=0", "probe.every=0"), store, out=tmp_path / "run")
    told = capsys.readouterr().err
    assert "nothing is trained" in " ".join(told.split())
    assert "learning rate" not in told
    pretrain(recipe("engine.steps=0", "probe.every=0"), store, out=run, resume=True)
    assert "this run is finished" in capsys.readouterr().err


def test_head_warm_up_moves_heads_and_new_tokens_only(finished, store, recipe, tmp_path):
    """From an export, with anchor and warm-up on: the backbone waits, what is new learns."""
    changes = ("schedule.head_warmup_steps=4", "engine.steps=5", "engine.checkpoint_every=2", "probe.every=0")
    run = pretrain(
        recipe(*changes, "engine.keep_checkpoints=5"), store, finished / "export", tmp_path / "run", quiet=True
    )
    start = BrainFoundModel.from_pretrained(finished / "export").encoder.state_dict()
    waiting, moving = checkpoint_tensors(run, 4), checkpoint_tensors(run, 5)
    new = ("mask_token", "contrast_embedding")
    for name, weight in start.items():
        if any(part in name for part in new):
            assert not torch.equal(waiting[f"encoder.{name}"], weight), name
        else:
            assert torch.equal(waiting[f"encoder.{name}"], weight), name
            assert torch.equal(checkpoint_tensors(run, 4, "task.safetensors")[f"teacher.encoder.{name}"], weight), name
    assert any(
        not torch.equal(moving[f"encoder.{name}"], weight) for name, weight in start.items() if "layer.1" in name
    )
    assert all("loss_anchor_gram" in line and "gram_distance" in line for line in log_lines(run, "loss"))
    saved = checkpoint_tensors(run, 5, "task.safetensors")
    assert all(torch.equal(saved[f"anchor.{name}"], weight) for name, weight in start.items())


def test_from_scratch_turns_the_ladder_off_and_says_so(store, recipe, tmp_path, capsys):
    content = recipe(
        "objective.anchor_gram_weight=1", "schedule.head_warmup_steps=3", "engine.steps=1", "probe.every=0"
    )
    run = pretrain(content, store, out=tmp_path / "run")
    assert "objective.anchor_gram_weight 1 → 0" in capsys.readouterr().err
    assert yaml.safe_load((run / "recipe.yaml").read_text())["schedule"]["head_warmup_steps"] == 0


def test_a_poisoned_batch_leaves_weights_and_teacher_alone(store, recipe, tmp_path, monkeypatch):
    loss = PretrainTask.loss

    def poisoned(self, model, batch, step, micro_batch):
        value, parts = loss(self, model, batch, step, micro_batch)
        return (value * float("nan") if step == 3 else value), parts

    monkeypatch.setattr(PretrainTask, "loss", poisoned)
    content = recipe("engine.steps=4", "engine.checkpoint_every=1", "engine.keep_checkpoints=9", "probe.every=0")
    run = pretrain(content, store, out=tmp_path / "run", quiet=True)
    for file in ("model.safetensors", "task.safetensors"):
        before, after = checkpoint_tensors(run, 3, file), checkpoint_tensors(run, 4, file)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert log_lines(run, "loss")[-1]["skipped_steps"] == 1


def test_collapse_stops_with_an_export(store, recipe, tmp_path):
    content = recipe("guard.grace_steps=1", "guard.confirm_log_lines=2", "guard.max_mean_cosine=0.01", "probe.every=0")
    with pytest.raises(TrainingError, match="mean cosine") as stop:
        pretrain(content, store, out=tmp_path / "run", quiet=True)
    assert stop.value.exit_code == 1
    assert log_lines(tmp_path / "run", "loss")[-1]["step"] == 3
    BrainFoundModel.from_pretrained(tmp_path / "run" / "export")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"].startswith("stopped: step 3")


def test_a_probe_drop_stops_and_exports_the_best_teacher(store, recipe, tmp_path, monkeypatch):
    from brainfound.pretraining.monitoring.probes import Probe, ProbeScores

    scores = iter([0.5, 0.9, 0.2, 0.1])
    monkeypatch.setattr(Probe, "run", lambda *_: ProbeScores(next(scores), 0.0, 0.01, "r2", "age_years"))
    content = recipe(
        "probe.every=1",
        "guard.probe_patience=2",
        "guard.grace_steps=0",
        "engine.steps=9",
        "engine.checkpoint_every=1",
        "engine.keep_checkpoints=9",
    )
    with pytest.raises(TrainingError, match=r"0\.900 \(step 1\)"):
        pretrain(content, store, out=tmp_path / "run", quiet=True)
    best, last = (
        checkpoint_tensors(tmp_path / "run", 1, "task.safetensors"),
        checkpoint_tensors(tmp_path / "run", 2, "task.safetensors"),
    )
    exported = BrainFoundModel.from_pretrained(tmp_path / "run" / "export").encoder.state_dict()
    assert all(torch.equal(weight, best[f"teacher.encoder.{name}"]) for name, weight in exported.items())
    assert not all(torch.equal(weight, last[f"teacher.encoder.{name}"]) for name, weight in exported.items())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exported_step"] == 1


def test_accumulation_and_workers_run(store, recipe, tmp_path):
    content = recipe("engine.accumulation=2", "engine.num_workers=1", "engine.steps=2", "probe.every=0")
    assert len(log_lines(pretrain(content, store, out=tmp_path / "run", quiet=True), "loss")) == 2


def test_bfloat16_trains_with_float32_weights(store, recipe, tmp_path):
    run = pretrain(recipe("engine.precision=bf16", "engine.steps=2"), store, out=tmp_path / "run", quiet=True)
    assert all(t.dtype == torch.float32 for t in checkpoint_tensors(run, 2).values())
    assert all(abs(line["loss"]) < 100 for line in log_lines(run, "loss"))


def test_the_loss_falls(store, recipe, tmp_path):
    changes = (
        "engine.steps=60",
        "optim.lr=1e-2",
        "probe.every=0",
        "engine.checkpoint_every=100",
        "views.contrast_dropout=0",
    )
    losses = [
        line["loss_dino"] + line["loss_ibot"]
        for line in log_lines(pretrain(recipe(*changes), store, out=tmp_path / "r", quiet=True), "loss")
    ]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


@pytest.mark.parametrize("name", sorted(n for n in recipes.available("train") if n.startswith("pretrain-")))
def test_every_recipe_validates(name):
    content = recipes.load(PretrainRecipe, name, "train")
    assert content.name == name
    assert content.schedule.head_warmup_steps < content.engine.steps


def test_errors_are_of_one_line(store, recipe, tmp_path):
    with pytest.raises(BrainFoundError) as error:
        pretrain(recipe("engine.batch_size=9", "engine.accumulation=2"), store, out=tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert "engine.batch_size=8" in str(error.value)
