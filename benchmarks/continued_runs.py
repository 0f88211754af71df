"""The pretraining runs of the benchmark: a start that has seen no brains, the safe ladder, deliberately bad settings.

Every run is `brainfound.pretrain` with a recipe; finished runs are reused, and interrupted ones are resumed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brainfound.data.store import Store
from brainfound.errors import TrainingError
from brainfound.pretraining.monitoring.retention import RETENTION_PROBES
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.recipes import load

LADDER_RECIPE = "pretrain-vits14-laptop"
"""The ladder is as in this recipe of the project: only sizes and steps are other."""
SMALL_START_LR = 1e-3
"""At batch 128, for a start that is trained here. The recipe's 1e-4 is for released models, which are larger and know
far more; of 1e-3 and 3e-3 the one that did better on the development part."""
UPSTREAM_LR = 4e-3
"""DINOv2's base rate, for its batch of 1,024, as it stands: not scaled down to the batch at hand."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run; in patches, so that they fit any patch size."""

    patch_size: int
    width: int
    layers: int
    heads: int
    global_patches: int
    local_patches: int
    num_local: int
    prototypes: int
    batch: int
    steps: int
    start_steps: int
    probe_target: str
    looks: int
    """Probes of a run, after the one before its first step."""
    objective: str
    """Of the continued runs, one of the project's kinds."""

    @property
    def views(self) -> list[str]:
        return [
            f"views.global_size={self.global_patches * self.patch_size}",
            f"views.local_size={self.local_patches * self.patch_size}",
            f"views.num_local={self.num_local}",
            f"engine.batch_size={self.batch}",
            'engine.precision="no"',
            "engine.num_workers=0",
        ]

    @property
    def projection(self) -> list[str]:
        return [
            f"objective.head.prototypes={self.prototypes}",
            "objective.head.hidden=512",
            "objective.head.bottleneck=128",
        ]

    def decoder(self, key: str) -> list[str]:
        """Two blocks that draw the hidden patches, as wide as the encoder."""
        return [f"{key}.width={self.width}", f"{key}.layers=2", f"{key}.heads={self.heads}"]


def from_scratch(sizes: Sizes, seed: int, changes: tuple[str, ...] = ()) -> PretrainRecipe:
    """The starting checkpoint: new weights, rates of the demo's recipe, our hybrid objective.

    In a few hundred steps self-distillation alone stays near a uniform answer; filling in hidden patches does not wait.
    """
    steps = sizes.start_steps
    return _recipe(
        "pretrain-demo", sizes, seed, steps,
        f"init.scratch.hidden_size={sizes.width}", f"init.scratch.num_layers={sizes.layers}",
        f"init.scratch.num_heads={sizes.heads}", f"init.scratch.patch_size={sizes.patch_size}",
        f"objective.teacher_temperature_warmup_steps={steps * 2 // 5}", "objective.momentum=[0.98,1.0]",
        *sizes.projection, "objective.kind=hybrid", *sizes.decoder("objective.reconstruction.decoder"),
        f"schedule.warmup_steps={max(1, steps // 10)}", "views.slice_margin=0", "probe.every=0", "guard.enabled=false",
        f"engine.checkpoint_every={max(1, steps // 4)}", *changes,
    )  # fmt: skip


def ladder(sizes: Sizes, seed: int, changes: tuple[str, ...] = ()) -> PretrainRecipe:
    """The safe ladder; its phases keep the shares of the steps that they have in the project's recipe."""
    recipe = load(PretrainRecipe, LADDER_RECIPE, "train")
    share = sizes.steps / recipe.engine.steps

    def scaled(steps: int) -> int:
        return max(1, round(steps * share))

    schedule, objective = recipe.schedule, recipe.objective
    if sizes.objective == "masked_autoencoder":
        objective_settings = ["objective={kind: masked_autoencoder}", *sizes.decoder("objective.decoder")]
    else:
        # A teacher that follows at the same pace per step would end a shorter run nearer to where it started.
        momentum = max(0.0, 1 - (1 - objective.momentum[0]) / share)  # type: ignore[union-attr]
        warmup = objective.teacher_temperature_warmup_steps  # type: ignore[union-attr]
        objective_settings = [
            *sizes.projection,
            f"objective.teacher_temperature_warmup_steps={scaled(warmup)}",
            f"objective.momentum=[{momentum:.4g},1.0]",
        ]
        if sizes.objective == "hybrid":
            objective_settings += ["objective.kind=hybrid", *sizes.decoder("objective.reconstruction.decoder")]
    return _recipe(
        LADDER_RECIPE, sizes, seed, sizes.steps,
        f"schedule.warmup_steps={scaled(schedule.warmup_steps)}",
        f"schedule.head_warmup_steps={scaled(schedule.head_warmup_steps)}",
        *objective_settings, f"guard.grace_steps={scaled(recipe.guard.grace_steps)}",
        f"probe.every={max(1, sizes.steps // sizes.looks)}", f"probe.target={sizes.probe_target}",
        f"probe.retention=[{','.join(question for question in RETENTION_PROBES if question != 'labels')}]",
        f"engine.checkpoint_every={max(1, sizes.steps // 3)}",
        *changes,
    )  # fmt: skip


def unsafe(sizes: Sizes, seed: int, changes: tuple[str, ...] = ()) -> PretrainRecipe:
    """The settings of dinov2#204: heads are warmed up, and then everything learns at the stock rate; no anchor."""
    at_batch_128 = UPSTREAM_LR * (128 / sizes.batch) ** 0.5  # as `optim.lr` states it
    return ladder(
        replace(sizes, objective="self_distillation"), seed,
        (f"optim.lr={at_batch_128}", "optim.layer_decay=1.0", "optim.patch_embed_scale=1.0", "optim.beta2=0.999",
         "objective.anchor_gram_weight=0", "objective.anchor_cls_weight=0", *changes),
    )  # fmt: skip


def _recipe(name: str, sizes: Sizes, seed: int, steps: int, *changes: str) -> PretrainRecipe:
    overrides = [*sizes.views, f"engine.steps={steps}", f"seed={seed}", "engine.log_every=5", *changes]
    return load(PretrainRecipe, name, "train", overrides)


def run_once(recipe: PretrainRecipe, store: Path, init: str, folder: Path, threads: int = 1) -> Path:
    """Start or resume a run unless it is finished; returns its folder. A stop by the guard counts as finished."""
    import torch

    torch.set_num_threads(threads)
    if not _finished(folder):
        begun = (folder / "recipe.yaml").is_file()
        try:
            pretrain(recipe, Store.open(store), init, folder, resume=begun, quiet=True)
        except TrainingError:
            if not _finished(folder):
                raise
    return folder


def _finished(folder: Path) -> bool:
    facts = folder / "run.json"
    if not facts.is_file() or not (folder / "export" / "config.json").is_file():
        return False
    return json.loads(facts.read_text(encoding="utf-8"))["status"] != "running"


def read_run(folder: Path) -> dict[str, Any]:
    """How a run went: its end, the probe of its teacher, the retention probes, its lr, and the last gauges."""
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    probes = [line for line in lines if "probe" in line]
    losses = [line for line in lines if "loss" in line]
    gauges = ("loss_dino", "ln_k", "teacher_entropy", "effective_rank", "mean_cosine", "gram_distance", "view_margin")
    return {
        "status": facts["status"],
        "steps_done": facts["step"],
        "exported_step": facts["exported_step"],
        "effective_lr": facts["effective_lr"],
        "probe": {
            "target": probes[0]["probe_target"] if probes else None,
            "metric": probes[0]["probe_metric"] if probes else None,
            "steps": [line["step"] for line in probes],
            "linear": [line["probe/linear"] for line in probes],
            "knn": [line["probe/knn"] for line in probes],
            "standard_error": [line["probe_standard_error"] for line in probes],
        },
        "retention": {
            key.removeprefix("retention/"): {
                "scores": [line.get(key) for line in probes],
                "standard_error": [line.get(key.replace("retention/", "retention_error/")) for line in probes],
            }
            for key in (probes[0] if probes else {})
            if key.startswith("retention/")
        },
        "last": {name: losses[-1].get(name) for name in gauges} if losses else {},
    }
