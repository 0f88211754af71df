"""A run folder belongs to one training at a time, and what is no run is not written into."""

from __future__ import annotations

import shutil

import pytest
from filelock import FileLock

from brainfound.errors import RecipeError, TrainingError, UsageError
from brainfound.finetuning.finetune import finetune
from brainfound.pretraining import starting_model
from brainfound.pretraining.pretrain import pretrain
from brainfound.report.curves import RunFolder
from brainfound.training import run_folder
from brainfound.training.process import make_accelerator
from brainfound.training.run_folder import LOCK_FILE, lock_run_folder


@pytest.fixture
def no_model(monkeypatch):
    """A refusal that comes only after a model was built fails the test."""
    monkeypatch.setattr("brainfound.pretraining.pretrain.build_model", lambda *_: pytest.fail("a model was built"))
    monkeypatch.setattr("brainfound.finetuning.finetune.build_task", lambda *_: pytest.fail("a model was built"))


@pytest.fixture(params=["pretrain", "finetune"])
def start(request, store, recipe, no_model):
    """Begin a pretraining or a fine-tuning in a folder."""

    def begin(out, resume=False):
        if request.param == "pretrain":
            pretrain(recipe(), store, out=out, resume=resume, quiet=True)
        else:
            finetune("finetune-classification", store, "nowhere", "age_years", out, resume=resume, quiet=True)

    return begin


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_folder_of_something_else_is_refused_and_left_alone(start, tmp_path):
    cohort = tmp_path / "cohort"
    (cohort / "sub-01").mkdir(parents=True)
    (cohort / "participants.tsv").write_text("participant_id\n")
    before = contents(cohort)
    with pytest.raises(UsageError, match=r"not empty and holds no run \(got participants.tsv, sub-01\)") as error:
        start(cohort)
    assert error.value.exit_code == 2
    assert contents(cohort) == before


def test_the_store_is_refused(start, store):
    before = contents(store.path)
    with pytest.raises(UsageError, match="holds no run"):
        start(store.path)
    assert contents(store.path) == before


@pytest.mark.parametrize("below", ["", "run/deep"])
def test_a_file_is_no_run_folder(start, tmp_path, below):
    file = tmp_path / "run.json"
    file.write_text("{}")
    with pytest.raises(UsageError, match="a file is in the way") as error:
        start(file / below if below else file)
    assert error.value.exit_code == 2
    assert file.read_text() == "{}"


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_in_a_folder_is_refused(start, finished, tmp_path, resume):
    run = tmp_path / "run"
    if resume:
        shutil.copytree(finished, run)
    else:
        run.mkdir()
    with FileLock(run / LOCK_FILE):
        before = contents(run)
        with pytest.raises(TrainingError, match="another process is training in this folder") as error:
            start(run, resume)
        assert error.value.exit_code == 1
        if resume:
            assert RunFolder.read(run).records  # a reader needs no lock
        assert contents(run) == before


def test_the_lock_is_held_while_training_and_gone_after_it(store, recipe, tmp_path, monkeypatch):
    build, seen = starting_model.build_model, []

    def look(*arguments):
        with pytest.raises(TrainingError, match="another process"):
            pretrain(recipe(), store, out=tmp_path / "run", quiet=True)
        monkeypatch.setattr("brainfound.pretraining.pretrain.build_model", build)
        seen.append((tmp_path / "run" / LOCK_FILE).is_file())
        return build(*arguments)

    monkeypatch.setattr("brainfound.pretraining.pretrain.build_model", look)
    run = pretrain(recipe("engine.steps=1", "probe.every=0"), store, out=tmp_path / "run", quiet=True)
    assert seen == [True]
    assert not (run / LOCK_FILE).exists()


def test_what_a_run_left_that_was_killed_before_its_recipe_is_no_obstacle(tmp_path):
    accelerator = make_accelerator("no")
    for name in (LOCK_FILE, run_folder.FACTS_FILE, ".partial-7-recipe.yaml"):
        (tmp_path / name).write_text("")
    with lock_run_folder(tmp_path, False, accelerator):
        pass
    (tmp_path / LOCK_FILE).unlink(missing_ok=True)
    with pytest.raises(UsageError, match="not empty"), lock_run_folder(tmp_path, False, accelerator):
        pass


def test_a_folder_made_for_nothing_goes_again(store, recipe, tmp_path):
    with pytest.raises(RecipeError, match="local_size"):
        pretrain(recipe("views.local_size=20"), store, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
