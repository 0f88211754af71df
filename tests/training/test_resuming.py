"""Which checkpoint a run goes on from: one choice for all ranks; and run folders that somebody has damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from brainfound.errors import RecipeError, TrainingError
from brainfound.models import BrainFoundModel
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.training_task import PretrainTask
from brainfound.training import distributed, run_folder
from tests.ranks import launch
from tests.training.line_task import Killed

# Rank 1 sees the newest checkpoint torn (its view of a network disk is old), or not at all.
CHOOSE = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from brainfound.errors import TrainingError
from brainfound.training import checkpoint, run_folder
from brainfound.training.process import make_accelerator

kind, folder = sys.argv[1], Path(sys.argv[2])
accelerator = make_accelerator("no")
hashed = []
find_corruption, is_dir = checkpoint.find_corruption, Path.is_dir

def fault(path):
    hashed.append(path.name)
    return "stale" if accelerator.process_index else find_corruption(path)

checkpoint.find_corruption = fault
run_folder.require_same_recipe_and_data = lambda *arguments: None
if kind == "missing" and accelerator.process_index:
    Path.is_dir = lambda self: self.name != "step-000006" and is_dir(self)
try:
    result = run_folder.find_resume_checkpoint(folder, None, None, True, (), accelerator).name
except TrainingError as error:
    result = str(error)
with open(f"{sys.argv[3]}.rank{accelerator.process_index}", "w") as file:
    json.dump([result, hashed], file)
"""


@pytest.mark.parametrize("kind", [pytest.param("stale", marks=pytest.mark.slow), "missing"])
def test_all_ranks_go_on_from_the_checkpoint_that_rank_0_chose(finished, tmp_path, kind):
    (tmp_path / "choose.py").write_text(CHOOSE)
    launch(tmp_path / "choose.py", kind, finished, tmp_path / "result")
    result, hashed = zip(*(json.loads((tmp_path / f"result.rank{rank}").read_text()) for rank in (0, 1)), strict=True)
    assert hashed == (["step-000006"], [])
    if kind == "stale":
        assert result == ("step-000006", "step-000006")
    else:
        assert all("step-000006: " in text and "\n" not in text for text in result)
        assert "not on every machine" in result[0]


@pytest.mark.parametrize("content", ["", "- a list\n", "engine: [", "\x00"])
def test_a_recipe_that_cannot_be_read_is_one_line(finished, store, recipe, tmp_path, content):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "run.json", run)
    (run / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: the recipe of this run cannot be read") as error:
        pretrain(recipe("engine.precision=auto"), store, out=run, resume=True, quiet=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"started": ', "run.json: not valid JSON"),
        ("[1]", "run.json: the file has other content .got a list"),
        ("{}", "run.json: the facts of this run are damaged .got data_hash null"),
        ('{"data_hash": 5}', "run.json: the facts of this run are damaged .got data_hash 5"),
        (None, "run.json: cannot be read: No such file"),
    ],
)
def test_facts_that_cannot_be_read_are_one_line(finished, store, recipe, tmp_path, content, words):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "recipe.yaml", run)
    if content is not None:
        (run / "run.json").write_text(content)
    with pytest.raises(TrainingError, match=words) as error:
        pretrain(recipe(), store, out=run, resume=True, quiet=True)
    assert "\n" not in str(error.value)
    assert "Put back the run.json" in str(error.value)


@pytest.mark.parametrize("target", [None, "age_years", {"task": "regression"}, {"task": 1, "column": "age_years"}])
def test_facts_without_a_usable_target_are_one_line(tmp_path, target):
    (tmp_path / "run.json").write_text(json.dumps({"model": "m", "target": target}))
    with pytest.raises(TrainingError, match=r"facts of this run are damaged .got target "):
        run_folder.read_facts(tmp_path, "model", "target")
    good = {"model": "m", "target": {"task": "regression", "column": "age_years"}}
    (tmp_path / "run.json").write_text(json.dumps(good))
    assert run_folder.read_facts(tmp_path, "model", "target") == good


def refused(*arguments, **keywords):
    raise OSError(122, "Disk quota exceeded")


@pytest.fixture
def to_export(finished, tmp_path) -> Path:
    """A run of which only the export is missing."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "export")
    return run


def test_an_export_that_cannot_be_written_is_one_line_and_resume_writes_it(to_export, store, recipe, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(BrainFoundModel, "save_pretrained", refused)
        with pytest.raises(TrainingError, match="export: the export cannot be written .*quota.*--resume") as error:
            pretrain(recipe(), store, out=to_export, resume=True, quiet=True)
    assert "\n" not in str(error.value)
    assert not list(to_export.glob("*export*"))
    pretrain(recipe(), store, out=to_export, resume=True, quiet=True)
    assert (to_export / "export" / "README.md").is_file()


def test_a_stop_is_still_reported_where_its_export_cannot_be_written(store, recipe, tmp_path, monkeypatch):
    def on_log_line(self, step, line):
        raise TrainingError("the features collapsed", where=f"step {step}", remedy="export/ holds the last teacher")

    monkeypatch.setattr(PretrainTask, "on_log_line", on_log_line)
    monkeypatch.setattr(BrainFoundModel, "save_pretrained", refused)
    content = recipe("engine.steps=1", "probe.every=0")
    with pytest.raises(TrainingError, match="collapsed, and then the export cannot be written") as error:
        pretrain(content, store, out=tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert "export/ holds" not in str(error.value)


def test_the_best_teacher_that_cannot_be_kept_ends_the_run_on_all_ranks(store, recipe, tmp_path, monkeypatch):
    """`distributed.run_on_main_rank` is where the others wait and learn of it."""
    called, run_on_main_rank = [], distributed.run_on_main_rank

    def recording(work, is_main):
        called.append(work)
        run_on_main_rank(work, is_main)

    monkeypatch.setattr(distributed, "run_on_main_rank", recording)
    monkeypatch.setattr("brainfound.pretraining.training_task.save_file", refused)
    content = recipe("engine.steps=2", "probe.every=2")
    with pytest.raises(TrainingError, match="the encoder of the best probe cannot be written .*quota") as error:
        pretrain(content, store, out=tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert any("_save_best_encoder" in work.__qualname__ for work in called)


def test_the_best_teacher_of_the_checkpoint_outlives_a_newer_one_that_no_checkpoint_knows(
    store, recipe, tmp_path, monkeypatch
):
    """Killed after a better probe, gone on with from the checkpoint before it, and stopped again before it is there."""
    run = tmp_path / "run"
    scores = {0: 0.5, 2: 0.8, 4: 0.9, 6: 0.95}
    monkeypatch.setattr(PretrainTask, "evaluate", lambda self, step: {"probe": scores[step], "probe_standard_error": 0})
    after_step, stops_at = PretrainTask.after_step, {"killed": 5, "stopped": None}

    def mortal(self, step, taken):
        after_step(self, step, taken)
        if step + 1 == stops_at["killed"]:
            raise Killed
        if step + 1 == stops_at["stopped"]:
            self.guard.handle_failure(step + 1, "it went wrong", None)

    monkeypatch.setattr(PretrainTask, "after_step", mortal)
    content = recipe("engine.steps=6", "engine.checkpoint_every=3", "engine.keep_checkpoints=1", "probe.every=2")
    with pytest.raises(Killed):
        pretrain(content, store, out=run, quiet=True)
    best = {path.name: path for path in (run / "checkpoints" / "best").iterdir()}
    assert best.keys() == {"step-000002.safetensors", "step-000004.safetensors"}
    of_step_2 = load_file(best["step-000002.safetensors"])
    stops_at.update(killed=None, stopped=4)
    with pytest.raises(TrainingError, match="export/ holds the teacher of step 2"):
        pretrain(content, store, out=run, resume=True, quiet=True)
    exported = BrainFoundModel.from_pretrained(run / "export").encoder.state_dict()
    assert all(torch.equal(weight, of_step_2[name]) for name, weight in exported.items())
    assert json.loads((run / "run.json").read_text())["exported_step"] == 2


def test_a_best_teacher_that_no_checkpoint_knows_any_more_makes_room(store, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(PretrainTask, "evaluate", lambda self, step: {"probe": step, "probe_standard_error": 0})
    content = recipe("engine.steps=6", "engine.checkpoint_every=2", "engine.keep_checkpoints=2", "probe.every=1")
    run = pretrain(content, store, out=tmp_path / "run", quiet=True)
    names = sorted(path.name for path in (run / "checkpoints" / "best").iterdir())
    # When step 6 was probed, the checkpoints were of steps 2 and 4.
    assert names == [f"step-{step:06d}.safetensors" for step in (2, 4, 6)]


ONE_FAILS = """
import os, sys
from brainfound.errors import BrainFoundError, StoreError
from brainfound.training import distributed
from brainfound.training.process import make_accelerator

accelerator = make_accelerator("no")

def work():
    if sys.argv[1] == "ours":
        raise StoreError("it is gone", where="a store", remedy="Look for it")
    raise OSError(28, "full", "a file")

try:
    distributed.run_on_main_rank(work, accelerator.is_main_process)
    result = "nothing"
except BrainFoundError as error:
    result = f"{type(error).__name__}: {error}"
with open(f"{sys.argv[2]}.rank{accelerator.process_index}", "w") as file:
    file.write(result)
import torch.distributed
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        pytest.param("ours", "a store: it is gone. Look for it", marks=pytest.mark.slow),
        ("system", "a file: a file cannot be written (got full)"),
    ],
)
def test_what_fails_on_rank_0_is_the_same_error_on_all(tmp_path, kind, line):
    (tmp_path / "one.py").write_text(ONE_FAILS)
    launch(tmp_path / "one.py", kind, tmp_path / "result")
    for rank in (0, 1):
        assert (tmp_path / f"result.rank{rank}").read_text().startswith(f"TrainingError: {line}")
