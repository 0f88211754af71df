"""The contract of an objective: one file and its line in the registry make it work everywhere.

A copy of the package gets a small objective. Everything that a run passes through is then tried with it: recipe,
preflight, training, dry run, exact resume, new weights, export with its card, the curves and the page of the run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from brainfound.recipes import recipe_folder
from tests.tiny_runs import log_lines

OBJECTIVE = '''
"""Two crops of a slice should look alike, and slices should not: a small objective of one file."""

import copy
from typing import Literal

from pydantic import Field

from brainfound.data.augmentation import MultiCrop
from brainfound.pretraining.objectives import losses
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.networks import EncoderWithHeads
from brainfound.recipes import Recipe
from brainfound.training.randomness import VIEWS, torch_generator


class AlikeRecipe(Recipe):
    kind: Literal["alike"] = "alike"
    spread_weight: float = Field(default=0.1, ge=0)


class Alike(Objective):
    recipe_class = AlikeRecipe

    def __init__(self, encoder, recipe, views, num_steps, seed):
        super().__init__(encoder, recipe, views, num_steps, seed)
        self.multi_crop = MultiCrop(views, encoder.patch_size)
        self.student = EncoderWithHeads(copy.deepcopy(encoder), {})
        self.student.encoder.backbone.embeddings.mask_token.requires_grad_(False)

    def compute_loss(self, student, batch, key):
        crops = self.multi_crop(
            batch.pixels,
            batch.present_on_cpu,
            torch_generator(VIEWS, key.seed, *key.keys),
            torch_generator(VIEWS, key.seed, *key.keys, 1, device=batch.pixels.device),
            batch.neighbours,
        ).global_views
        cls = student.encoder(crops.pixels, crops.contrast_mask).cls
        self.last_cls = cls.detach()
        alike, spread = losses.cosine_loss(*cls.chunk(2)), losses.koleo(cls.chunk(2)[0], batch.sessions)
        parts = {"loss_alike": alike.detach(), "loss_spread": spread.detach()}
        return alike + self.recipe.spread_weight * spread, parts

    def describe(self):
        return "two crops alike"
'''

RUN = """
import json, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from brainfound.cli.main import main
from brainfound.pretraining.pretrain import pretrain

folder, store = Path(sys.argv[1]), sys.argv[2]
recipe = folder / "recipe.yaml"
whole = pretrain(recipe, store, out=folder / "whole")
pretrain(recipe, store, out=folder / "dry", dry_run=True, gpus=2, gpu="A40")
resumed = folder / "resumed"
shutil.copytree(whole, resumed)
shutil.rmtree(resumed / "checkpoints" / "step-000004")
shutil.rmtree(resumed / "export")
pretrain(recipe, store, out=resumed, resume=True)
pretrain(recipe, store, init="none", out=folder / "scratch", overrides=["engine.steps=2"])
sys.argv = ["brainfound", "show", str(whole)]
main()
"""


@pytest.mark.slow
def test_one_file_and_one_line_make_an_objective(store, recipe, tiny_backbone, package_copy, run_on_copy, tmp_path):
    shutil.copytree(recipe_folder("model_cards"), package_copy / "_recipes" / "model_cards")
    objectives = package_copy / "pretraining" / "objectives"
    (objectives / "alike.py").write_text(OBJECTIVE)
    registry = (objectives / "registry.py").read_text()
    line = "    hybrid.Hybrid,\n"
    assert line in registry
    registry = registry.replace(line, f"{line}    alike.Alike,\n").replace("import hybrid", "import alike, hybrid")
    (objectives / "registry.py").write_text(registry)

    overrides = ["engine.steps=4", "engine.checkpoint_every=2", "probe.every=2", f"init.source={tiny_backbone}"]
    content = recipe(*overrides).model_dump(mode="json") | {"objective": {"kind": "alike", "spread_weight": 0.2}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    done = run_on_copy(RUN, tmp_path, store.path)
    assert done.returncode == 0, done.stderr[-3000:]

    whole, resumed, scratch = (tmp_path / name for name in ("whole", "resumed", "scratch"))
    lines = log_lines(whole)
    step = next(line for line in lines if "loss" in line)
    assert {"loss_alike", "loss_spread", "effective_rank", "mean_cosine", "grad_norm/backbone"} <= step.keys()
    assert abs(step["loss"] - step["loss_alike"] - 0.2 * step["loss_spread"]) < 1e-5
    assert any("probe" in line for line in lines)
    assert (whole / "curves.png").is_file()
    weights = Path("export") / "model.safetensors"
    assert (whole / weights).read_bytes() == (resumed / weights).read_bytes()
    card = (whole / "export" / "README.md").read_text()
    assert "The encoder of two crops alike" in card
    assert (scratch / weights).is_file()
    assert "2 × A40" in done.stdout  # the estimate of the dry run
    assert "fits" in done.stdout
    assert not (tmp_path / "dry").exists()
