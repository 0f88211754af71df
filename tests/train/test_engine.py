"""The engine with a task of one weight: rates, accumulation, skipped steps, signals."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from torch import nn

from brainfound.errors import TrainingError
from brainfound.train.checkpoint import latest_valid
from brainfound.train.engine import Engine, EngineRecipe, TrainTask, make_accelerator


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

    def look(self, step, line):
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
    checkpoint = latest_valid(stopped / "checkpoints")
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
    first.log.forget_after(2)
    assert [json.loads(text)["step"] for text in log.open()] == [1, 2]
