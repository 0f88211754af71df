"""The dry run: two real steps that leave no files behind, and a report on them.

Everything about this machine is measured. On others, speed follows from the FLOPs of a step, the peak rate of the GPU
and an assumed utilisation; memory follows from the number of weights and from the forward pass here, with only a few
images so that it works on a laptop. The estimate is good enough to choose or rule out a machine; it is no promise.

Published utilisations of self-supervised ViTs, derived from reported images/s: DINOv2 ViT-L/14 on A100 31%, DINOv3
ViT-L on H100 19%, CAPI 58%.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from brainfound.data.store import Store
from brainfound.pretraining.dry_run import report
from brainfound.pretraining.dry_run.costs import (
    AnalyticCosts,
    DryRunMeasurement,
    ForwardMemory,
    ParameterCounts,
    TargetHardware,
    available_memory_bytes,
)
from brainfound.pretraining.monitoring.guard import Guard
from brainfound.pretraining.objectives.registry import make_objective
from brainfound.pretraining.preflight import run_preflight_checks
from brainfound.pretraining.recipe import PretrainEngineRecipe, PretrainRecipe, resolve_auto_settings
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.starting_model import build_meta_model, build_model
from brainfound.pretraining.training_task import PretrainTask, make_task
from brainfound.training import distributed
from brainfound.training.engine import Engine
from brainfound.training.process import make_accelerator, make_console

NUM_STEPS = 2
NUM_ESTIMATE_IMAGES = 4  # in the micro-batch that is tried out for another machine
_GPU_CHOICES = {"attention": "sdpa", "crops": "packed"}


def report_dry_run(recipe: PretrainRecipe, store: Store, machine: TargetHardware | None, quiet: bool) -> None:
    """Train for two real steps in a temporary folder, and print speed, memory and cost of the whole run.

    If a `machine` is given, the run on it is estimated too.
    """
    precision = recipe.engine.precision
    if machine is not None:
        machine.require_divisible_batch(recipe.engine)
        # bfloat16 may be hundreds of times slower here than there.
        precision = "auto" if precision == "bf16" else precision
    accelerator = make_accelerator(precision)
    console = make_console(accelerator, quiet)
    for note in run_preflight_checks(recipe, store, machine.num_gpus if machine else accelerator.num_processes):
        console.print(note)
    # Schedules end with the trial, and there is no probe.
    short_engine = {"steps": NUM_STEPS, "log_every": 1, "precision": accelerator.mixed_precision}
    engine = recipe.engine.model_copy(update=short_engine)
    if machine is not None:
        engine = shrink_engine_for_estimate(engine, machine, accelerator.num_processes)
    short = recipe.model_copy(update={"engine": engine, "probe": recipe.probe.model_copy(update={"every": 0})})
    if machine is not None and _exceeds_available_memory(short, store, recipe, machine, accelerator):
        return
    with tempfile.TemporaryDirectory(prefix="brainfound-dry-run-") as temporary:
        folder = Path(temporary)
        model = build_model(short.init, store, short.views.global_size, short.seed)
        engine, _ = resolve_auto_settings(engine, model.encoder, short.views, accelerator.device)
        task = make_task(short.model_copy(update={"engine": engine}), store, model, folder, accelerator)
        measured = measure_training_steps(task, folder, accelerator, quiet, machine is not None)
    if measured is not None:
        for line in report.report(measured, recipe.engine, recipe.optim.lr, machine):
            print(line)


def _exceeds_available_memory(
    short: PretrainRecipe, store: Store, recipe: PretrainRecipe, machine: TargetHardware, accelerator: Accelerator
) -> bool:
    """Whether a trial's weights exceed the free memory here; if so, print what follows from the sizes alone."""
    encoder = build_meta_model(short.init, store, short.views.global_size).encoder
    with torch.device("meta"):
        objective = make_objective(short.objective, short.trained, encoder, short.views, short.engine.steps, short.seed)
    sizes = AnalyticCosts(ParameterCounts.of(objective), objective.flops, Guard(short.guard).may_roll_back)
    free = available_memory_bytes(accelerator.device)
    (too_large,) = distributed.any_over_ranks(sizes.weights.dry_run_bytes > free, device=accelerator.device)
    if too_large and accelerator.is_main_process:
        for line in report.report_without_measurement(sizes, free, recipe.engine, recipe.optim.lr, machine):
            print(line)
    return too_large


def shrink_engine_for_estimate(
    engine: PretrainEngineRecipe, machine: TargetHardware, num_processes: int
) -> PretrainEngineRecipe:
    """The engine of a trial with a few images, to estimate another machine.

    What a GPU would choose replaces "auto", so that a CPU measures the memory of a GPU run.
    """
    num_tried = min(NUM_ESTIMATE_IMAGES, machine.micro_batch_size(engine))
    on_gpu = {key: value for key, value in _GPU_CHOICES.items() if getattr(engine, key) == "auto"}
    few = {"batch_size": num_tried * num_processes, "accumulation": 1, "num_workers": 0}
    return engine.model_copy(update=on_gpu | few)


def measure_training_steps(
    task: PretrainTask, folder: Path, accelerator: Accelerator, quiet: bool, estimate: bool
) -> DryRunMeasurement | None:
    """Train for the two steps of a task; all ranks call it, and rank 0 gets the measurement.

    The first step shows memory and warms up, the second is timed. With `estimate` the forward pass of half the images
    is measured too. The folder gets a log.
    """
    engine = task.engine
    num_images = engine.batch_size // (accelerator.num_processes * engine.accumulation)

    def halve(batch: PretrainBatch) -> PretrainBatch:
        parts = {name: part[: num_images // 2] for name, part in vars(batch).items() if part is not None}
        return replace(batch, **parts)

    forward = ForwardMemory(task.loss, accelerator.device, halve if estimate and num_images > 1 else None)
    task.loss = forward  # type: ignore[method-assign, assignment]
    Engine(task, engine, folder, accelerator, task.seed, quiet).run(save=False)
    if not accelerator.is_main_process:
        return None
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return DryRunMeasurement(
        device=accelerator.device,
        precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        num_images=num_images,
        images_per_second=engine.batch_size / line["seconds_per_step"],
        forward_bytes=forward.peak_bytes or 0,
        half_batch_forward_bytes=forward.part_peak_bytes,
        sizes=AnalyticCosts(ParameterCounts.of(task.objective), task.objective.flops, task.guard.may_roll_back),
        loss=line["loss"],
        ln_k=line.get("ln_k"),
    )
