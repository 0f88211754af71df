"""The engine with a task of one weight: rates, accumulation, skipped steps, signals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from brainfound.errors import RecipeError, StoreError, TrainingError
from brainfound.recipes import validate
from brainfound.training import checkpoint as checkpoints
from brainfound.training.checkpoint import latest_valid_checkpoint, list_checkpoints
from brainfound.training.engine import Engine, EngineRecipe, TrainTask, make_accelerator
from brainfound.training.health import NonfiniteStepMonitor
from brainfound.training.task import RollbackRequested


class Line(TrainTask):
    """Fits w to 3; batches are numbers, and some may be poison."""

    clip_norm = 100.0

    def __init__(self, poison: tuple[int, ...] = (), accumulation: int = 1) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.poison, self.accumulation = poison, accumulation
        self.moved: list[int] = []
        self.seen: list[dict] = []

    def make_optimizer(self):
        group = {"params": list(self.model.parameters()), "role": "new", "lr_scale": 0.5, "decays": True}
        return torch.optim.SGD([group], lr=1.0, fused=True)

    def batches(self, first_step):
        for step in range(first_step, 1000):
            for micro_batch in range(self.accumulation):
                yield torch.tensor([[float("nan") if step in self.poison else 1.0 + micro_batch]])

    def loss(self, model, batch, step, micro_batch):
        return (model(batch) - 3 * batch).square().mean(), {"batch": batch.mean()}

    def learning_rate(self, step, role):
        return 0.1 * (step + 1)

    def after_step(self, step, taken):
        if taken:
            self.moved.append(step)

    def on_log_line(self, step, line):
        self.seen.append(dict(line))


def engine(task: TrainTask, folder, **settings) -> Engine:
    content = {"steps": 4, "batch_size": 1, "precision": "no", "log_every": 1, "checkpoint_every": 100} | settings
    return Engine(task, EngineRecipe(**content), folder, make_accelerator("no"), quiet=True)


def test_a_step_uses_the_rate_of_its_role_and_group(tmp_path):
    task = Line()
    engine(task, tmp_path, steps=1).run()
    # d/dw (w − 3)² = −6 at w = 0; rate 0.1, group scale 0.5.
    assert task.model.weight.item() == pytest.approx(0.3)
    assert task.seen[0]["lr"] == 0.1


def test_accumulation_averages_micro_batches(tmp_path):
    task = Line(accumulation=2)
    engine(task, tmp_path, steps=1, accumulation=2).run()
    assert task.model.weight.item() == pytest.approx(0.05 * (6 + 24) / 2)
    assert task.seen[0]["batch"] == 1.5


def test_a_poisoned_step_is_skipped_and_counted(tmp_path):
    task = Line(poison=(1,))
    engine(task, tmp_path).run()
    assert task.moved == [0, 2, 3]
    assert torch.isfinite(task.model.weight).all()
    assert [line["skipped_steps"] for line in task.seen] == [0, 1, 1, 1]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is_finite(tmp_path, value):
    class Steep(Line):
        def loss(self, model, batch, step, micro_batch):
            loss, parts = super().loss(model, batch, step, micro_batch)
            if step == 1:
                model.weight.register_hook(lambda gradient: torch.full_like(gradient, value))
            return loss, parts

    task = Steep()
    engine(task, tmp_path, steps=2).run()
    assert task.moved == [0]
    assert math.isfinite(task.seen[1]["loss"])
    assert task.model.weight.item() == pytest.approx(0.3), "as after step 0"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_value_that_is_not_finite_is_a_broken_step(value):
    health = NonfiniteStepMonitor(torch.device("cpu"), max_consecutive_skips=3)
    assert health.check_finite([torch.tensor(1e30), torch.tensor(0.0)]).item() == 0
    assert health.check_finite([torch.tensor(1.0), torch.tensor(value)]).item() == 1
    assert health.check_finite([torch.tensor(value, dtype=torch.bfloat16), torch.tensor(1.0)]).item() == 1
    assert health.read(3) == {"skipped": 2, "skipped_in_a_row": 2}


def test_the_task_sees_nan_where_the_log_says_null(tmp_path):
    task = Line(poison=(1,))
    engine(task, tmp_path).run()
    texts = (tmp_path / "log.jsonl").read_text()
    assert json.loads(texts.splitlines()[1])["loss"] is None
    assert "NaN" not in texts
    assert math.isnan(task.seen[1]["loss"])


def test_too_many_poisoned_steps_stop_the_run(tmp_path):
    task = Line(poison=(0, 1, 2))
    with pytest.raises(TrainingError, match="not finite in 3 steps"):
        engine(task, tmp_path, max_skipped_in_a_row=3).run()
    assert task.model.weight.item() == 0


def test_sigterm_saves_a_checkpoint_and_resume_ends_the_same(tmp_path):
    class Terminated(Line):
        def after_step(self, step, taken):
            super().after_step(step, taken)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    with pytest.raises(TrainingError, match="--resume"):
        engine(Terminated(), stopped).run()
    assert signal.getsignal(signal.SIGTERM) is before
    checkpoint = latest_valid_checkpoint(stopped / "checkpoints")
    assert checkpoint.name == "step-000002"
    resumed = Line()
    going_on = engine(resumed, stopped)
    going_on.resume(checkpoint)
    going_on.run()
    whole = Line()
    engine(whole, tmp_path).run()
    assert resumed.model.weight.item() == whole.model.weight.item()
    losses = [[json.loads(text)["loss"] for text in (f / "log.jsonl").open()] for f in (stopped, tmp_path)]
    assert losses[0] == losses[1]


def test_the_log_is_whole_numbers_unrounded_and_a_torn_line_is_dropped(tmp_path):
    task = Line()
    first = engine(task, tmp_path)
    first.run()
    log = tmp_path / "log.jsonl"
    assert [json.loads(text)["loss"] for text in log.open()] == [line["loss"] for line in task.seen]
    with log.open("a") as file:
        file.write('{"step": 5, "lo')
    first.log.truncate_after(2)
    assert [json.loads(text)["step"] for text in log.open()] == [1, 2]


def test_a_skipped_step_leaves_weights_moments_and_counters_bit_for_bit(tmp_path):
    """AdamW's own state too: a moment that decayed, or a counter that moved, would make another run of it."""

    class Adam(Line):
        before: dict[str, torch.Tensor]

        def make_optimizer(self):
            group = {"params": list(self.model.parameters()), "role": "new", "lr_scale": 0.5, "decays": True}
            self.optimizer = torch.optim.AdamW([group], lr=1.0, fused=True)
            return self.optimizer

        def weight_decay(self, step):
            return 0.1

        def everything(self):
            (state,) = self.optimizer.state.values()
            return {"weight": self.model.weight.detach().clone(), **{k: v.clone() for k, v in state.items()}}

        def after_step(self, step, taken):
            super().after_step(step, taken)
            now = self.everything()
            if step > 0:
                same = {name: torch.equal(now[name], self.before[name]) for name in now}
                assert set(same.values()) == {step in self.poison}, (step, same)
            self.before = now

    task = Adam(poison=(2, 3))
    run = engine(task, tmp_path, steps=6)
    run.run()
    assert task.moved == [0, 1, 4, 5]
    assert task.before["step"] == 4
    without = Adam()
    without.batches = lambda first_step: (torch.ones(1, 1) for _ in range(4))
    without.learning_rate = lambda step, role: 0.1 * ([0, 1, 4, 5][step] + 1)
    (tmp_path / "without").mkdir()
    engine(without, tmp_path / "without", steps=4).run()
    assert all(torch.equal(without.before[name], task.before[name]) for name in task.before)


def test_skipped_steps_between_two_log_lines_are_counted_and_their_rows_seen(tmp_path):
    task = Line(poison=(1, 2, 5))
    engine(task, tmp_path, steps=8, log_every=4).run()
    assert [line["skipped_steps"] for line in task.seen] == [2, 3]
    (tmp_path / "row").mkdir()
    with pytest.raises(TrainingError, match="not finite in 2 steps"):
        engine(Line(poison=(0, 1)), tmp_path / "row", steps=8, log_every=4, max_skipped_in_a_row=2).run()


def test_a_row_of_skipped_steps_is_remembered_over_a_resume(tmp_path):
    with pytest.raises(TrainingError, match="not finite in 3 steps"):
        engine(Line(poison=(1, 2, 3)), tmp_path, max_skipped_in_a_row=3, checkpoint_every=3).run()
    resumed = engine(Line(poison=(3,)), tmp_path, max_skipped_in_a_row=3)
    resumed.resume(latest_valid_checkpoint(tmp_path / "checkpoints"))
    with pytest.raises(TrainingError, match="not finite in 3 steps"):
        resumed.run()


def test_an_optimiser_that_cannot_skip_on_the_device_is_refused(tmp_path):
    class Plain(Line):
        def make_optimizer(self):
            optimizer = super().make_optimizer()
            optimizer.param_groups[0]["fused"] = False
            return optimizer

    with pytest.raises(ValueError, match="fused"):
        engine(Plain(), tmp_path).run()


def test_the_log_tells_how_long_a_step_waits_for_data(tmp_path):
    class Slow(Line):
        def batches(self, first_step):
            for batch in super().batches(first_step):
                time.sleep(0.05)
                yield batch

    slow, quick = Slow(), Line()
    engine(slow, tmp_path, steps=4, log_every=2).run()
    (tmp_path / "quick").mkdir()
    engine(quick, tmp_path / "quick", steps=4, log_every=2).run()
    assert all(line["data_wait"] > 0.5 and line["seconds_per_step"] > 0.05 for line in slow.seen)
    assert all(0 <= line["data_wait"] < 0.5 for line in quick.seen)


class Fickle(Line):
    """Scores fall at step 6 unless the learning rate is low; the checkpoint of step 2 is kept."""

    evaluate_every = 2
    may_roll_back = True
    scale = 1.0
    rollbacks = 0
    first_steps: list[int]

    def __init__(self, falls_at: int = 6) -> None:
        super().__init__()
        self.falls_at, self.first_steps = falls_at, []

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

    def on_rollback(self, from_step, reason):
        self.rollbacks, self.scale = self.rollbacks + 1, self.scale / 2
        return {"lr_scale": self.scale}

    def state_dict(self):
        return {"rollbacks": self.rollbacks, "scale": self.scale}

    def load_state_dict(self, state):
        self.rollbacks, self.scale = state["rollbacks"], state["scale"]


def log_of(folder):
    return [json.loads(text) for text in (folder / "log.jsonl").open()]


def weights_of(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "model.safetensors")["weight"].item()


FICKLE = {"steps": 8, "checkpoint_every": 1, "keep_checkpoints": 1}


def test_a_rollback_goes_back_to_the_kept_checkpoint_and_on_with_a_lower_rate(tmp_path):
    task = Fickle()
    engine(task, tmp_path, **FICKLE).run()
    # Half the rate is still too high, a quarter is not.
    assert (task.rollbacks, task.scale, task.first_steps) == (2, 0.25, [0, 2, 2])
    log = log_of(tmp_path)
    events = [line for line in log if "rolled_back_from" in line]
    told = {"step": 2, "rolled_back_from": 6, "reason": "the probe fell"}
    assert events == [{**told, "rollback": 1, "lr_scale": 0.5}, {**told, "rollback": 2, "lr_scale": 0.25}]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in log if "probe" in line] == [0, 2, 4, 6, 8]
    for number in (1, 2):
        moved = [json.loads(text) for text in (tmp_path / f"log-before-rollback-{number}.jsonl").open()]
        assert [line["step"] for line in moved] == [3, 4, 4, 5, 6, 6]
        assert moved[-1]["probe"] == 0
    # What is trained is what a run would be that took the low rate from step 2 on.
    (tmp_path / "direct").mkdir()
    direct = Fickle(falls_at=-1)
    direct.learning_rate = lambda step, role: (1.0 if step < 2 else 0.25) * 0.01 * (step + 1)
    engine(direct, tmp_path / "direct", **FICKLE).run()
    assert task.model.weight.item() == direct.model.weight.item()
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step-000002", "step-000008"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the engine catches it."""


KEPT_THREE = {**FICKLE, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def on_rollback(tmp_path_factory):
    """The folder of a run that went back twice, and was not disturbed."""
    folder = tmp_path_factory.mktemp("rolled-back")
    engine(Fickle(), folder, **KEPT_THREE).run()
    return folder


@pytest.mark.parametrize("moment", ["before", "committed", "half removed", "log moved", "later"])
def test_a_rollback_survives_a_kill_at_any_moment(on_rollback, tmp_path, monkeypatch, moment):
    whole, settings = on_rollback, KEPT_THREE
    run = tmp_path / "run"
    run.mkdir()

    def killed(*arguments, **keywords):
        raise Killed

    task = Fickle()
    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(checkpoints, "update_checkpoint_state", killed)
        elif moment == "committed":
            patch.setattr(checkpoints, "remove_rolled_back_checkpoints", killed)
        elif moment == "half removed":
            remove, removed = shutil.rmtree, []

            def once(path):
                if removed:
                    raise Killed
                if path.name == "step-000005":  # the newest of the forgotten ones
                    removed.append(remove(path))
                else:
                    remove(path)

            patch.setattr(checkpoints.shutil, "rmtree", once)
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
    timing = {"seconds_per_step", "images_per_second", "data_wait"}
    files = ("log.jsonl", "log-before-rollback-1.jsonl", "log-before-rollback-2.jsonl")
    for file in files:
        one, other = (
            [{k: v for k, v in json.loads(text).items() if k not in timing} for text in (folder / file).open()]
            for folder in (whole, run)
        )
        assert one == other, file
    assert weights_of(whole, 8) == weights_of(run, 8)
    names = [[p.name for p in list_checkpoints(folder / "checkpoints")] for folder in (whole, run)]
    assert names[0] == names[1]


def test_a_rollback_to_a_torn_checkpoint_is_one_clear_error(tmp_path):
    class Torn(Fickle):
        def evaluate(self, step):
            if step == 6:
                (tmp_path / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"")
            return super().evaluate(step)

    with pytest.raises(TrainingError, match="step-000002.*not whole"):
        engine(Torn(), tmp_path, **FICKLE).run()


def test_a_task_whose_rollback_fails_is_as_before_it_and_may_end_the_run_itself(tmp_path):
    class Torn(Fickle):
        def evaluate(self, step):
            if step == 6:
                (tmp_path / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"")
            return super().evaluate(step)

        def on_rollback_failed(self, step, rollback_request, error):
            raise TrainingError(f"{rollback_request.what}; {error.what}", where=step)

    task = Torn()
    with pytest.raises(TrainingError, match=r"^6: the probe fell; the checkpoint to go back to is not whole$"):
        engine(task, tmp_path, **FICKLE).run()
    assert (task.rollbacks, task.scale) == (0, 1.0)


def test_what_is_no_part_of_a_step_does_not_count_as_its_time(tmp_path):
    class Gauged(Line):
        def health_metrics(self):
            time.sleep(0.2)
            return {}

    task = Gauged()
    engine(task, tmp_path, steps=3, log_every=1).run()
    assert max(line["seconds_per_step"] for line in task.seen) < 0.1


@pytest.mark.parametrize("kind", ["log", "state", "other"])
def test_whatever_the_disk_refuses_ends_the_run_in_one_line(tmp_path, monkeypatch, kind):
    """A full disk may be met first by the log or by a checkpoint; other errors of the package count as well."""

    def refuse(*arguments):
        raise OSError(28, "No space left on device") if kind != "other" else StoreError("it is gone", where="store")

    place = ("brainfound.training.log.TrainingLog.write",) if kind == "log" else (checkpoints, "save_checkpoint")
    monkeypatch.setattr(*place, refuse)
    expected = "it is gone" if kind == "other" else "No space left on device"
    with pytest.raises(TrainingError, match=expected) as told:
        engine(Line(), tmp_path).run()
    assert "\n" not in str(told.value)


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
    assert [line["step"] for line in log_of(tmp_path) if "probe" in line] == [0, 2, 4, 6, 8]


def test_a_disk_that_is_too_small_for_the_run_is_told_before_the_first_step(tmp_path, monkeypatch):
    # Weight and two moments of four bytes; two checkpoints, a third while it is written, and the export.
    num_bytes = int(3 * 12 * 1.05) + 4
    free = {"bytes": num_bytes - 1}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free["bytes"]))
    task = Line()
    with pytest.raises(TrainingError, match=r"3 checkpoints.*keep_checkpoints") as error:
        engine(task, tmp_path, keep_checkpoints=2).require_space()
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    free["bytes"] = num_bytes
    fitting = engine(task, tmp_path, keep_checkpoints=2)
    fitting.require_space()
    fitting.run()
    assert task.moved == [0, 1, 2, 3]


def test_a_bare_no_is_a_precision():
    """YAML 1.1 reads it as false."""
    assert validate(EngineRecipe, {}, ["precision=no"]).precision == "no"
    with pytest.raises(RecipeError, match="precision"):
        validate(EngineRecipe, {}, ["precision=yes"])
