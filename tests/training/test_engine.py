"""The engine with a task of one weight: rates, accumulation, skipped steps, signals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch

from brainfound.errors import RecipeError, StoreError, TrainingError
from brainfound.recipes import validate
from brainfound.training import checkpoint
from brainfound.training.checkpoint import latest_valid_checkpoint
from brainfound.training.engine import EngineRecipe
from brainfound.training.optim import NonfiniteStepMonitor
from tests.tiny_runs import log_lines
from tests.training.line_task import Line, engine


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
    saved = latest_valid_checkpoint(stopped / "checkpoints")
    assert saved.name == "step-000002"
    resumed = Line()
    going_on = engine(resumed, stopped)
    going_on.resume(saved)
    going_on.run()
    whole = Line()
    engine(whole, tmp_path).run()
    assert resumed.model.weight.item() == whole.model.weight.item()
    losses = [[line["loss"] for line in log_lines(f)] for f in (stopped, tmp_path)]
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


class Clock:
    """In the place of the module `time`: a step takes 0.01 s, and waits what a test adds."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock, loss = Clock(), Line.loss
    monkeypatch.setattr("brainfound.training.log.time", clock)
    monkeypatch.setattr(Line, "loss", lambda *inputs: clock.sleep(0.01) or loss(*inputs))
    return clock


def test_the_log_reports_how_long_a_step_waits_for_data(tmp_path, clock):
    class Slow(Line):
        def batches(self, first_step):
            for batch in super().batches(first_step):
                clock.sleep(0.03)
                yield batch

    slow, quick = Slow(), Line()
    engine(slow, tmp_path, steps=4, log_every=2).run()
    (tmp_path / "quick").mkdir()
    engine(quick, tmp_path / "quick", steps=4, log_every=2).run()
    assert [line["data_wait"] for line in slow.seen] == pytest.approx([0.75] * 2)
    assert [line["seconds_per_step"] for line in slow.seen] == pytest.approx([0.04] * 2)
    assert [line["data_wait"] for line in quick.seen] == [0, 0]
    assert [line["seconds_per_step"] for line in quick.seen] == pytest.approx([0.01] * 2)


def test_what_is_no_part_of_a_step_does_not_count_as_its_time(tmp_path, clock):
    class Gauged(Line):
        def health_metrics(self):
            clock.sleep(0.2)
            return {}

    task = Gauged()
    engine(task, tmp_path, steps=3, log_every=1).run()
    assert [line["seconds_per_step"] for line in task.seen] == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("kind", ["log", "state", "other"])
def test_whatever_the_disk_refuses_ends_the_run_in_one_line(tmp_path, monkeypatch, kind):
    """A full disk may be met first by the log or by a checkpoint; other errors of the package count as well."""

    def refuse(*arguments):
        raise OSError(28, "No space left on device") if kind != "other" else StoreError("it is gone", where="store")

    place = ("brainfound.training.log.TrainingLog.write",) if kind == "log" else (checkpoint, "save_checkpoint")
    monkeypatch.setattr(*place, refuse)
    expected = "it is gone" if kind == "other" else "No space left on device"
    with pytest.raises(TrainingError, match=expected) as error:
        engine(Line(), tmp_path).run()
    assert "\n" not in str(error.value)


def test_a_disk_that_is_too_small_for_the_run_is_an_error_before_the_first_step(tmp_path, monkeypatch):
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
