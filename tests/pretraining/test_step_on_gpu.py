"""What only a GPU shows: steps that order work and never wait for it, and batches copied beside them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.recipes import validate
from brainfound.training.data_loading import prefetch_to_device
from brainfound.training.engine import Engine, EngineRecipe
from brainfound.training.process import make_accelerator
from brainfound.training.task import TrainTask

BACKBONE = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@dataclass(frozen=True)
class Numbers:
    values: torch.Tensor


class Line(TrainTask):
    """Fits a line on the GPU; the batch of step 2 is not a number."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 4)
        self.taken: list[torch.Tensor] = []

    def make_optimizer(self):
        group = {"params": list(self.model.parameters()), "role": "new", "lr_scale": 1.0, "decays": True}
        return torch.optim.AdamW([group], fused=True)

    def batches(self, first_step):
        values = (torch.full((8, 4), float("nan") if step == 2 else 1.0 + step) for step in range(first_step, 99))
        return prefetch_to_device(map(Numbers, values), torch.device("cuda"))

    def loss(self, model, batch, step, micro_batch):
        loss = (model(batch.values) - 3).square().mean()
        return loss, {"part": loss.detach()}

    def learning_rate(self, step, role):
        return 0.01

    def after_step(self, step, taken):
        self.taken.append(taken)


class Unwaiting(Engine):
    """Raises at whatever makes the host wait within a step, once the first has allocated what it needs."""

    def _train_step(self, batches):
        torch.cuda.set_sync_debug_mode("error" if self.step else "default")
        try:
            return super()._train_step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_step_waits_for_the_gpu_and_a_poisoned_one_is_skipped(tmp_path):
    task = Line()
    recipe = EngineRecipe(steps=6, batch_size=8, precision="no", log_every=3, checkpoint_every=100)
    run = Unwaiting(task, recipe, tmp_path, make_accelerator("no"), quiet=True)
    run.run()
    assert [taken.item() for taken in task.taken] == [1, 1, 0, 1, 1, 1]
    assert all(torch.isfinite(parameter).all() for parameter in task.model.parameters())
    assert run.nonfinite_steps.read(6) == {"skipped": 1, "skipped_in_a_row": 0}
    (state, *_) = run.optimizer.state.values()
    assert state["step"].item() == 5


@pytest.mark.parametrize("kind", ["self_distillation", "masked_autoencoder", "hybrid"])
def test_no_step_of_an_objective_waits_for_the_gpu(store, recipe, tmp_path, monkeypatch, kind):
    """The whole step of a run: the copy of its batch, views, masks, loss, gradients, optimiser and teacher."""
    content = recipe().model_dump(mode="json")
    own = {"kind": kind} if kind == "masked_autoencoder" else {**content["objective"], "kind": kind}
    content["objective"] = own | {"anchor_gram_weight": 1.0, "anchor_cls_weight": 0.1}
    monkeypatch.setattr("brainfound.pretraining.pretrain.Engine", Unwaiting)
    # From a checkpoint, so that there is an anchor.
    start = BrainFoundModel(BrainFoundConfig(backbone_config=BACKBONE))
    start.save_pretrained(tmp_path / "start")
    settings = ["probe.every=0", "engine.steps=4", "engine.checkpoint_every=4", "engine.precision=bf16"]
    run = pretrain(validate(PretrainRecipe, content, settings), store, tmp_path / "start", tmp_path / "run", quiet=True)
    losses = [json.loads(line)["loss"] for line in (run / "log.jsonl").open()]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)


def test_batches_reach_the_gpu_whole_and_in_order_however_busy_it_is():
    busy = torch.randn(2048, 2048, device="cuda")
    seen = []
    for batch in prefetch_to_device(
        (Numbers(torch.full((512, 512), float(i))) for i in range(50)), torch.device("cuda")
    ):
        busy = (busy @ busy).clamp(-1, 1)
        assert batch.values.is_cuda
        seen.append(torch.stack([batch.values.amin(), batch.values.amax()]))
    expected = torch.arange(50.0).repeat(2, 1).T
    assert torch.equal(torch.stack(seen).cpu(), expected)
