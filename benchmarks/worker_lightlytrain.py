"""LightlyTrain's DINOv2 method, driven step by step by `pretrain.py`; runs in an environment of its own.

Everything is made by LightlyTrain's own functions, in the order of its `pretrain`: model, method, optimiser,
schedules, loggers, callbacks and Lightning's trainer, with its defaults. Only the data differ: a loader
gives the same views at every step, so that neither tool waits for data.

Usage: python worker_lightlytrain.py SETTINGS.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import version_of
from step_breakdown import MODEL, TEACHER
from step_server import StepServer
from torch.profiler import record_function

STEPS = 125_000
"""The method's default; the length of the run sets the schedules."""
METHOD = "dinov2"


def declare_missing_operators() -> list[torch.library.Library]:
    """Let torchvision be imported where its compiled part cannot be loaded (built for a GPU, say).

    Only the names of two operators on boxes are declared, which nothing here calls. The result must be kept alive.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("torchvision is missing; benchmarks/README.md says how to install the peer")
    compiled = sorted(Path(found.origin).parent.glob("_C*.so"))
    try:
        torch.ops.load_library(compiled[0])
    except (OSError, IndexError):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return [library]
    return []


class ViewsInMemory:
    """A loader of one batch, again and again; the trainer asks for the next when a step is quite done."""

    def __init__(self, settings: dict[str, Any], server: StepServer) -> None:
        self.server, self.dataset = server, range(STEPS * settings["batch"])
        with np.load(settings["views"]) as arrays:
            # Crop-major rows → one tensor per crop, normalised as BrainFound's encoder does it inside.
            crops = [
                torch.from_numpy((array - 0.449) / 0.226).split(settings["batch"])
                for array in (arrays[name] for name in ("global_views", "local_views") if name in arrays)
            ]
        views = [view.contiguous().to(settings["device"]) for group in crops for view in group]
        self.batch = {"views": views, "filename": [f"slice {i}" for i in range(settings["batch"])]}

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.server.boundary()
            yield self.batch


def train(settings: dict[str, Any], server: StepServer) -> None:
    """The steps of LightlyTrain's `pretrain`, up to the end of the process."""
    from lightly_train._commands import train_helpers
    from lightly_train._configs.validate import no_auto
    from lightly_train._models import package_helpers

    transform_args = train_helpers.get_transform_args(method=METHOD, transform_args=None)
    num_channels = no_auto(transform_args.num_channels)
    wrapped_model = package_helpers.get_wrapped_model(
        model=settings["peer_model"],
        model_args={"drop_path_rate": settings["drop_path"]},
        num_input_channels=num_channels,
        load_weights=False,
    )
    embedding_model = train_helpers.get_embedding_model(wrapped_model=wrapped_model)
    trainer = make_trainer(settings, wrapped_model, embedding_model, transform_args.normalize)
    method = make_method(settings, wrapped_model, embedding_model, num_channels)
    name_the_parts(method)
    versions = ("lightly-train", "lightly", "pytorch-lightning", "torch", "torchvision", "xformers")
    server.facts = {
        "tool": "LightlyTrain",
        "versions": {name: version_of(name) for name in versions},
        "model": settings["peer_model"],
        "drop_path_rate": settings["drop_path"],
        "method_args": method.method_args.model_dump(mode="json"),
        "optimizer_args": method.optimizer_args.model_dump(mode="json"),
        "precision": str(trainer.precision),
        "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
        "loggers": [type(logger).__name__ for logger in trainer.loggers],
    }
    trainer.fit(model=method, train_dataloaders=ViewsInMemory(settings, server))


def make_trainer(settings: dict[str, Any], wrapped_model: Any, embedding_model: Any, normalize: Any) -> Any:
    """Lightning's trainer with the loggers and callbacks that a user gets."""
    from lightly_train._callbacks import callback_helpers
    from lightly_train._commands import train_helpers
    from lightly_train._license import LICENSE_INFO
    from lightly_train._loggers import logger_helpers

    out = Path(settings["out"])
    loggers = logger_helpers.get_loggers(logger_args=logger_helpers.get_logger_args(loggers=None), out=out)
    callbacks = callback_helpers.get_callbacks(
        callback_args=callback_helpers.get_callback_args(callback_args=None),
        out=out,
        wrapped_model=wrapped_model,
        embedding_model=embedding_model,
        normalize_args=normalize,
        loggers=loggers,
        license_info=LICENSE_INFO,
    )
    return train_helpers.get_trainer(
        out=out,
        epochs=1,
        gradient_accumulation_steps=1,
        accelerator="gpu" if settings["device"] == "cuda" else "cpu",
        strategy="auto",
        devices=1,
        num_nodes=1,
        precision="bf16-mixed" if settings["precision"] == "bf16" else "32-true",
        log_every_n_steps=50,
        loggers=loggers,
        callbacks=callbacks,
        trainer_args=None,
    )


def make_method(settings: dict[str, Any], wrapped_model: Any, embedding_model: Any, num_channels: int) -> Any:
    """The method with its optimiser's settings; all that is not a size stays at its default."""
    from lightly_train._commands import train_helpers
    from lightly_train._methods import method_helpers

    method_class = method_helpers.get_method_cls(method=METHOD)
    optimizer_args = train_helpers.get_optimizer_args(
        optim_type="auto", optim_args=None, method_cls=method_class, wrapped_model=wrapped_model
    )
    method_args = train_helpers.get_method_args(
        method_cls=method_class,
        method_args=peer_method_args(settings),
        scaling_info=train_helpers.get_scaling_info(dataset_size=STEPS * settings["batch"], epochs=1),
        optimizer_args=optimizer_args,
        wrapped_model=wrapped_model,
    )
    return train_helpers.get_method(
        method_cls=method_class,
        method_args=method_args,
        optimizer_args=optimizer_args,
        embedding_model=embedding_model,
        global_batch_size=settings["batch"],
        num_input_channels=num_channels,
    )


def peer_method_args(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that differ from the method's defaults."""
    sizes = {
        "output_dim": settings["prototypes"],
        "hidden_dim": settings["hidden"],
        "dino_bottleneck_dim": settings["bottleneck"],
        "ibot_bottleneck_dim": settings["bottleneck"],
        "ibot_separate_head": settings["separate_heads"],
    }
    return sizes | {"center_method": settings["peer_centering"]}


def name_the_parts(method: Any) -> None:
    """Name the teacher's update and the closure of the loss for the profiler; nothing else changes."""
    finish, step = method.on_train_batch_end, method.optimizer_step

    def on_train_batch_end(*args: Any, **kwargs: Any) -> None:
        with record_function(TEACHER):
            finish(*args, **kwargs)

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            with record_function(MODEL):
                return optimizer_closure()

        step(epoch, batch_idx, optimizer, closure)

    method.on_train_batch_end, method.optimizer_step = on_train_batch_end, optimizer_step


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = str(Path(settings["out"]) / "cache")
    warnings.filterwarnings("ignore")
    server = StepServer(settings)
    declared = declare_missing_operators()
    torch.manual_seed(0)
    train(settings, server)
    declared.clear()


if __name__ == "__main__":
    main()
