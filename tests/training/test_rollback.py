"""Rollbacks: of a run to its kept checkpoint, at any moment of a kill, and of the files."""

from __future__ import annotations

import shutil

import pytest

from brainfound.errors import TrainingError
from brainfound.training import checkpoint
from brainfound.training.checkpoint import latest_valid_checkpoint, list_checkpoints
from brainfound.training.task import RollbackPolicy, RollbackRequested
from tests.tiny_runs import checkpoint_tensors, log_lines, untimed_lines
from tests.training.line_task import Killed, Line, checkpoint_names, engine, make_checkpoint


class Fickle(Line, RollbackPolicy):
    """Scores fall at step 6 unless the learning rate is low; the checkpoint of step 2 is kept."""

    evaluate_every = 2
    may_roll_back = True
    scale = 1.0
    rollbacks = 0
    first_steps: list[int]

    def __init__(self, falls_at: int = 6) -> None:
        super().__init__()
        self.falls_at, self.first_steps = falls_at, []
        self.rollback_policy = self

    def batches(self, first_step):
        self.first_steps.append(first_step)
        return super().batches(first_step)

    def learning_rate(self, step, role):
        return self.scale * 0.01 * (step + 1)

    def evaluate(self, step):
        return {"probe": 0.0 if step == self.falls_at and self.scale > 0.3 else 1.0}

    def on_log_line(self, step, line):
        super().on_log_line(step, line)
        if line.get("probe") == 0.0:
            raise RollbackRequested("the probe fell", step=2)

    def should_keep_checkpoint(self, step):
        return step == 2

    def on_rollback(self):
        self.rollbacks, self.scale = self.rollbacks + 1, self.scale / 2
        return {"lr_scale": self.scale}

    def state_dict(self):
        return {"rollbacks": self.rollbacks, "scale": self.scale}

    def load_state_dict(self, state):
        self.rollbacks, self.scale = state["rollbacks"], state["scale"]


FICKLE = {"steps": 8, "checkpoint_every": 1, "keep_checkpoints": 1}


def test_a_rollback_goes_back_to_the_kept_checkpoint_and_on_with_a_lower_rate(tmp_path):
    task = Fickle()
    engine(task, tmp_path, **FICKLE).run()
    # Half the rate is still too high, a quarter is not.
    assert (task.rollbacks, task.scale, task.first_steps) == (2, 0.25, [0, 2, 2])
    log = log_lines(tmp_path)
    events = [line for line in log if "rolled_back_from" in line]
    expected = {"step": 2, "rolled_back_from": 6, "reason": "the probe fell"}
    assert events == [{**expected, "rollback": 1, "lr_scale": 0.5}, {**expected, "rollback": 2, "lr_scale": 0.25}]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in log if "probe" in line] == [0, 2, 4, 6, 8]
    for number in (1, 2):
        moved = log_lines(tmp_path, file=f"log-before-rollback-{number}.jsonl")
        assert [line["step"] for line in moved] == [3, 4, 4, 5, 6, 6]
        assert moved[-1]["probe"] == 0
    # What is trained is what a run would be that took the low rate from step 2 on.
    (tmp_path / "direct").mkdir()
    direct = Fickle(falls_at=-1)
    direct.learning_rate = lambda step, role: (1.0 if step < 2 else 0.25) * 0.01 * (step + 1)
    engine(direct, tmp_path / "direct", **FICKLE).run()
    assert task.model.weight.item() == direct.model.weight.item()
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-000002", "step-000008"]


KEPT_THREE = {**FICKLE, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    """The folder of a run that went back twice, and was not disturbed."""
    folder = tmp_path_factory.mktemp("rolled-back")
    engine(Fickle(), folder, **KEPT_THREE).run()
    return folder


@pytest.mark.parametrize("moment", ["before", "committed", "half removed", "log moved", "later"])
def test_a_rollback_survives_a_kill_at_any_moment(rolled_back, tmp_path, monkeypatch, moment):
    whole, settings = rolled_back, KEPT_THREE
    run = tmp_path / "run"
    run.mkdir()

    def killed(*arguments, **keywords):
        raise Killed

    task = Fickle()
    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(checkpoint, "update_checkpoint_state", killed)
        elif moment == "committed":
            patch.setattr(checkpoint, "remove_rolled_back_checkpoints", killed)
        elif moment == "half removed":
            remove, removed = shutil.rmtree, []

            def once(path):
                if removed:
                    raise Killed
                if path.name == "step-000005":  # the newest of the forgotten ones
                    removed.append(remove(path))
                else:
                    remove(path)

            patch.setattr(checkpoint.shutil, "rmtree", once)
        elif moment == "log moved":
            patch.setattr("brainfound.training.log.TrainingLog._rewrite", killed)
        else:
            patch.setattr(task, "after_step", lambda step, taken: killed() if task.rollbacks and step == 4 else None)
        with pytest.raises(Killed):
            engine(task, run, **settings).run()
    resumed = Fickle()
    going_on = engine(resumed, run, **settings)
    going_on.resume(latest_valid_checkpoint(run / "checkpoints"))
    going_on.run()
    assert (resumed.rollbacks, resumed.scale) == (2, 0.25)
    for file in ("log.jsonl", "log-before-rollback-1.jsonl", "log-before-rollback-2.jsonl"):
        assert untimed_lines(whole, file=file) == untimed_lines(run, file=file), file
    assert checkpoint_tensors(whole, 8) == checkpoint_tensors(run, 8)
    assert checkpoint_names(whole / "checkpoints") == checkpoint_names(run / "checkpoints")


class Torn(Fickle):
    """The checkpoint to go back to is damaged before the scores fall."""

    def __init__(self, folder):
        super().__init__()
        self.kept_weights = folder / "checkpoints" / "step-000002" / "model.safetensors"

    def evaluate(self, step):
        if step == 6:
            self.kept_weights.write_bytes(b"")
        return super().evaluate(step)


def test_a_rollback_to_a_torn_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(TrainingError, match="step-000002.*is damaged"):
        engine(Torn(tmp_path), tmp_path, **FICKLE).run()


def test_a_task_whose_rollback_fails_is_as_before_it_and_may_end_the_run_itself(tmp_path):
    class EndsTheRun(Torn):
        def on_rollback_failed(self, step, request, error):
            raise TrainingError(f"{request.what}; {error.what}", where=step)

    task = EndsTheRun(tmp_path)
    with pytest.raises(TrainingError, match=r"^6: the probe fell; the checkpoint to return to is damaged$"):
        engine(task, tmp_path, **FICKLE).run()
    assert (task.rollbacks, task.scale) == (0, 1.0)


def test_the_kept_checkpoint_of_the_start_can_be_gone_back_to(tmp_path):
    class FromTheStart(Fickle):
        def should_keep_checkpoint(self, step):
            return step == 0

        def on_log_line(self, step, line):
            if line.get("probe") == 0.0:
                raise RollbackRequested("the probe fell", step=0)

    task = FromTheStart()
    engine(task, tmp_path, **FICKLE).run()
    assert task.first_steps == [0, 0, 0]
    assert [line["step"] for line in log_lines(tmp_path) if "probe" in line] == [0, 2, 4, 6, 8]


def test_after_a_rollback_its_checkpoint_goes_before_later_ones_and_they_are_removed(tmp_path):
    for step in (2, 3, 4):
        checkpoint.save_checkpoint(tmp_path, make_checkpoint(step, kept=step == 2), keep=3)
    back = checkpoint.checkpoint_path(tmp_path, 2)
    checkpoint.update_checkpoint_state(back, {"rollbacks": 1, "task": {"scale": 0.5}})
    assert checkpoint.latest_valid_checkpoint(tmp_path) == back
    present = checkpoint.load_checkpoint(back)
    assert present.state["task"] == {"scale": 0.5}
    assert present.state["kept"]
    checkpoint.remove_rolled_back_checkpoints(tmp_path, present)
    assert checkpoint_names(tmp_path) == ["step-000002"]
    later = checkpoint.save_checkpoint(tmp_path, make_checkpoint(3, rollbacks=1), keep=3)
    checkpoint.remove_rolled_back_checkpoints(tmp_path, present)
    assert checkpoint.latest_valid_checkpoint(tmp_path) == later


def test_a_torn_checkpoint_is_not_gone_back_to(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    (path / "task.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"is damaged.*task\.safetensors is missing"):
        checkpoint.update_checkpoint_state(path, {"rollbacks": 1})


def test_steps_of_seven_digits_come_after_those_of_six(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoint.save_checkpoint(tmp_path, make_checkpoint(step, kept=step == 999_999), keep=3)
    back = checkpoint.checkpoint_path(tmp_path, 999_999)
    checkpoint.update_checkpoint_state(back, {"rollbacks": 1})
    checkpoint.remove_rolled_back_checkpoints(tmp_path, checkpoint.load_checkpoint(back))
    assert checkpoint_names(tmp_path) == ["step-999999"]
