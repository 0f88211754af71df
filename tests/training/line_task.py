"""A task of one weight and its checkpoints, for tests of the engine."""

from __future__ import annotations

import torch
from torch import nn

from brainfound.training.checkpoint import Checkpoint, list_checkpoints
from brainfound.training.engine import Engine, EngineRecipe
from brainfound.training.process import make_accelerator
from brainfound.training.task import TrainTask


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


def make_checkpoint(step: int, **state) -> Checkpoint:
    """A checkpoint whose weights are its step."""
    weight = torch.full((2, 3), float(step))
    optimizer = {"state": {0: {"exp_avg": weight}}, "param_groups": []}
    return Checkpoint(step, {"weight": weight}, {"teacher": weight + 1}, optimizer, {"task": {}, **state})


def checkpoint_names(folder) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in a run catches it."""
