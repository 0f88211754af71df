"""A dry run: two real steps that leave no files behind, and a report on them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console

from brainfound.data.store import Store
from brainfound.pretraining.dry_run import report, trial
from brainfound.pretraining.dry_run.gpus import TargetHardware
from brainfound.pretraining.dry_run.memory import available_memory_bytes
from brainfound.pretraining.execution import resolve_auto_settings
from brainfound.pretraining.monitoring.guard import Guard
from brainfound.pretraining.objectives.registry import make_objective
from brainfound.pretraining.preflight import run_preflight_checks
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.pretraining.starting_model import build_meta_model, build_model
from brainfound.pretraining.task import make_task
from brainfound.training import distributed
from brainfound.training.process import make_accelerator


def report_dry_run(recipe: PretrainRecipe, store: Store, machine: TargetHardware | None, quiet: bool) -> None:
    """Train for two real steps in a temporary folder, and print speed, memory and cost of the whole run.

    Args:
        machine: also estimate the run on this one; None: only measure.
    """
    precision = recipe.engine.precision
    if machine is not None:
        machine.require_divisible_batch(recipe.engine)
        # bfloat16 may be hundreds of times slower here than there.
        precision = "auto" if precision == "bf16" else precision
    accelerator = make_accelerator(precision)
    console = Console(stderr=True, quiet=quiet or not accelerator.is_main_process, highlight=False, soft_wrap=True)
    for note in run_preflight_checks(recipe, store, machine.num_gpus if machine else accelerator.num_processes):
        console.print(note)
    # Schedules that end with the trial, and no probe.
    engine = recipe.engine.model_copy(update={"steps": trial.NUM_STEPS, "precision": accelerator.mixed_precision})
    if machine is not None:
        engine = trial.shrink_engine_for_estimate(engine, machine, accelerator.num_processes)
    short = recipe.model_copy(update={"engine": engine, "probe": recipe.probe.model_copy(update={"every": 0})})
    if machine is not None and _exceeds_available_memory(short, store, recipe, machine, accelerator):
        return
    with tempfile.TemporaryDirectory(prefix="brainfound-dry-run-") as temporary:
        folder = Path(temporary)
        model = build_model(short.init, store, short.views.global_size, short.seed)
        engine, _ = resolve_auto_settings(engine, model.encoder, short.views, accelerator.device)
        task = make_task(short.model_copy(update={"engine": engine}), store, model, folder, accelerator)
        measured = trial.measure_training_steps(task, engine, folder, accelerator, quiet, machine is not None)
    if measured is not None:
        for line in report.report(measured, recipe.engine, recipe.optim.lr, machine):
            print(line)


def _exceeds_available_memory(
    short: PretrainRecipe, store: Store, recipe: PretrainRecipe, machine: TargetHardware, accelerator: Accelerator
) -> bool:
    """Whether the weights of a trial do not fit into this machine; then prints what follows from the sizes alone."""
    encoder = build_meta_model(short.init, store, short.views.global_size).encoder
    with torch.device("meta"):
        objective = make_objective(short.objective, short.trained, encoder, short.views, short.engine.steps, short.seed)
    sizes = trial.AnalyticCosts.of(objective, Guard(short.guard).may_roll_back)
    free = available_memory_bytes(accelerator.device)
    (too_large,) = distributed.any_over_ranks(sizes.weights.dry_run_bytes > free, device=accelerator.device)
    if too_large and accelerator.is_main_process:
        for line in report.report_without_measurement(sizes, free, recipe.engine, recipe.optim.lr, machine):
            print(line)
    return too_large
