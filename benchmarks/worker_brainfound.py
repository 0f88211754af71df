"""BrainFound's `pretrain`, driven step by step by `pretrain.py`: the real loop on a real store.

Usage: python worker_brainfound.py SETTINGS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_breakdown import TEACHER, VIEWS
from step_server import StepServer
from torch.profiler import record_function

from brainfound.data.augmentation import MultiCrop
from brainfound.pretraining.pretrain import pretrain
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.pretraining.training_task import PretrainTask
from brainfound.recipes import validate

ENDLESS = 1_000_000


def recipe_of(settings: dict[str, Any]) -> PretrainRecipe:
    """The recipe of a comparison; one head for CLS and patches, as the peer has by default."""
    content = {
        "name": "benchmark",
        "init": {"source": settings["checkpoint"]},
        "views": {name: settings[name] for name in ("global_size", "local_size", "num_local")},
        "objective": {
            "head": {name: settings[name] for name in ("prototypes", "hidden", "bottleneck")},
            "shared_head": not settings["separate_heads"],
            "drop_path": settings["drop_path"],
        },
        "schedule": {"head_warmup_steps": 0},
        "probe": {"every": 0},
        "guard": {"grace_steps": ENDLESS},
        "engine": {
            "steps": ENDLESS,
            "batch_size": settings["batch"],
            "precision": "bf16" if settings["precision"] == "bf16" else "no",
            "checkpoint_every": ENDLESS,
            "num_workers": 0,
        },
    }
    if not settings["anchor"]:
        content["objective"] |= {"anchor_gram_weight": 0, "anchor_cls_weight": 0}
    return validate(PretrainRecipe, content, settings["set"])


class InMemoryViews:
    """The views of the first step, kept; they are used again unless the server's command wants new ones."""

    def __init__(self, server: StepServer) -> None:
        self.server = server
        self.kept: Any = None
        make = MultiCrop.__call__

        def views(multi_crop: MultiCrop, *args: Any, **kwargs: Any) -> Any:
            if self.kept is not None and self.server.command.get("views") != "from uint8":
                return self.kept
            with record_function(VIEWS):
                made = make(multi_crop, *args, **kwargs)
            self.kept = self.kept or made
            return made

        MultiCrop.__call__ = views  # type: ignore[method-assign]

    def save(self, command: dict[str, Any]) -> None:
        """Write them for the peer, as grey values of 0–1."""
        small = self.kept.local_views
        arrays = {"global_views": self.kept.global_views.pixels.float().cpu().numpy()}
        if small is not None:
            arrays["local_views"] = small.pixels.float().cpu().numpy()
        np.savez(command["file"], **arrays)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    recipe = recipe_of(settings)
    server = StepServer(settings)
    server.facts = {
        "tool": "BrainFound",
        "torch": torch.__version__,
        "recipe": recipe.model_dump(mode="json", exclude={"init"}),
    }
    server.extra["save_views"] = InMemoryViews(server).save
    finish = PretrainTask.after_step

    def after_step(task: PretrainTask, *args: Any, **kwargs: Any) -> None:
        with record_function(TEACHER):
            finish(task, *args, **kwargs)
        server.boundary()

    PretrainTask.after_step = after_step  # type: ignore[method-assign]
    pretrain(recipe, settings["store"], out=settings["out"], quiet=True)


if __name__ == "__main__":
    main()
