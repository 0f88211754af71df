"""Continued self-supervised pretraining: from a recipe, a store and a starting model to a run folder.

The run folder:

    recipe.yaml   the resolved recipe
    run.json      versions, device and why, data hash, seed, world size, effective learning rate
    log.jsonl     one JSON object per line
    curves.png    the log as pictures
    checkpoints/  for --resume
    export/       the teacher (of masked autoencoding alone the student) as a model folder, with preprocessing and card
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from pydantic import Field
from rich.console import Console
from torch import Tensor

from brainfound.data.augmentation import ViewsRecipe
from brainfound.data.store import Store
from brainfound.errors import RecipeError, TrainingError, UsageError
from brainfound.models import BrainFoundModel
from brainfound.pretraining import execution as running
from brainfound.pretraining.dry_run import report as dry_run_report
from brainfound.pretraining.dry_run import trial as trials
from brainfound.pretraining.dry_run.trial import TargetHardware
from brainfound.pretraining.execution import PretrainEngineRecipe
from brainfound.pretraining.export import export
from brainfound.pretraining.monitoring.guard import Guard, GuardRecipe
from brainfound.pretraining.monitoring.probes import Probe, ProbeRecipe
from brainfound.pretraining.objectives import registry as making
from brainfound.pretraining.objectives.registry import ObjectiveRecipe, make_objective
from brainfound.pretraining.objectives.self_distillation import SelfDistillationRecipe
from brainfound.pretraining.preflight import run_preflight_checks
from brainfound.pretraining.starting_model import (
    FROM_SCRATCH,
    InitRecipe,
    TrainedPartRecipe,
    build_meta_model,
    build_model,
)
from brainfound.pretraining.task import PretrainTask
from brainfound.recipes import Recipe, load, validate
from brainfound.training import distributed as ranks
from brainfound.training import distributed as sharding
from brainfound.training import run_folder as run_files
from brainfound.training.engine import Engine
from brainfound.training.optim import OptimRecipe
from brainfound.training.process import make_accelerator
from brainfound.training.run_folder import (
    common_run_info,
    find_resume_checkpoint,
    is_run_complete,
    lock_run_folder,
    restore_auto_settings,
)
from brainfound.training.schedules import ScheduleRecipe, effective_lr


class PretrainRecipe(Recipe):
    """Everything that a pretraining run is made of."""

    lookalikes: ClassVar[Mapping[str, str]] = {
        "brainfound.finetuning.recipe:FinetuneRecipe": "this is a fine-tuning recipe; use `brainfound finetune`"
    }

    name: str = "pretrain"
    """Name of the run; also of its default folder."""
    seed: int = Field(default=0, ge=0)
    """Of initialisation, order, views, masks and dropout."""
    data: str | None = None
    """The store; `--data` on the command line goes before it."""
    init: InitRecipe = InitRecipe()
    views: ViewsRecipe = ViewsRecipe()
    objective: ObjectiveRecipe = SelfDistillationRecipe()
    """What is learnt: `kind` is self_distillation, masked_autoencoder or hybrid; the other keys depend on it."""
    trained: TrainedPartRecipe = TrainedPartRecipe()
    optim: OptimRecipe = OptimRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    guard: GuardRecipe = GuardRecipe()
    probe: ProbeRecipe = ProbeRecipe()
    engine: PretrainEngineRecipe = PretrainEngineRecipe()


# What may change between a run and its continuation: nothing in here is part of what is learnt, beyond rounding and
# what stochastic depth drops.
CHANGEABLE_ON_RESUME = (
    "name",
    "data",
    "guard",
    "engine.parallel",
    "engine.attention",
    "engine.compile",
    "engine.gradient_checkpointing",
    "engine.crops",
    "engine.log_every",
    "engine.checkpoint_every",
    "engine.keep_checkpoints",
    "engine.max_skipped_in_a_row",
    "engine.num_workers",
)


def pretrain(
    recipe: PretrainRecipe | str | Path,
    data: str | Path | Store | None = None,
    init: str | Path | None = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overrides: Iterable[str] = (),
    quiet: bool = False,
    dry_run: bool = False,
    gpus: int | None = None,
    gpu: str | None = None,
) -> Path:
    """Pretrain on the slices of a store.

    Args:
        recipe: a recipe, its name or its file.
        data: a store or its folder; None takes ``data`` of the recipe.
        init: overrides ``init.source``: a Hub id, a folder, or "none".
        out: the run folder; None: ``runs/<name of the recipe>``.
        resume: go on from the newest whole checkpoint in `out`.
        overrides: ``"a.b=c"`` strings.
        quiet: no progress bar and no notes.
        dry_run: two real steps in a temporary folder, then a report on speed and memory; `out` is not touched.
        gpus, gpu: of a dry run: also an estimate for so many GPUs of a kind
            (`brainfound.pretraining.dry_run.gpus`); 1 of that kind without `gpus`.

    Returns:
        The run folder (of a dry run: the folder that a real run would use).

    Raises:
        RecipeError: a bad recipe, or one that differs from that of the run to be resumed.
        UsageError: `out` holds a run already, or what is no run; there is nothing to resume; or no such kind of GPU
            is known.
        TrainingError: the guard stopped the run (the best teacher is exported), it was interrupted, or another
            process is training in `out`.
    """
    machine = TargetHardware.of(gpus, gpu)
    if machine is not None and not dry_run:
        raise UsageError("an estimate for other GPUs is part of a dry run", where="--gpu", remedy="Give --dry-run too")
    content, notes = _resolve(recipe, init, overrides)
    store = _open_store(content, data)
    folder = Path(out) if out is not None else Path("runs") / content.name
    if dry_run:
        _dry_run(content, store, machine, quiet)
        return folder
    return _run(content, store, folder, resume, quiet, notes)


def _dry_run(recipe: PretrainRecipe, store: Store, machine: TargetHardware | None, quiet: bool) -> None:
    """Two real steps that leave nothing behind, and what they say about the whole run."""
    precision = recipe.engine.precision
    if machine is not None:
        machine.require_divisible_batch(recipe.engine)
        # What is fast there may be hundreds of times slower here.
        precision = "auto" if precision == "bf16" else precision
    accelerator = make_accelerator(precision)
    console = Console(stderr=True, quiet=quiet or not accelerator.is_main_process, highlight=False, soft_wrap=True)
    for note in run_preflight_checks(recipe, store, machine.num_gpus if machine else accelerator.num_processes):
        console.print(note)
    # Schedules that end with the trial, and no probe.
    trial = _update_engine(recipe, steps=trials.NUM_STEPS, precision=accelerator.mixed_precision)
    trial = trial.model_copy(update={"probe": recipe.probe.model_copy(update={"every": 0})})
    if machine is not None:
        few = trials.shrink_engine_for_estimate(trial.engine, machine, accelerator.num_processes)
        trial = trial.model_copy(update={"engine": few})
        if _exceeds_available_memory(trial, store, recipe, machine, accelerator):
            return
    with tempfile.TemporaryDirectory(prefix="brainfound-dry-run-") as temporary:
        folder = Path(temporary)
        model = build_model(trial.init, store, trial.views.global_size, trial.seed)
        settled, _ = running.resolve_auto_settings(trial.engine, model.encoder, trial.views, accelerator.device)
        trial = trial.model_copy(update={"engine": settled})
        task = _make_task(trial, store, model, folder, accelerator)
        found = trials.measure_training_steps(
            task, trial.views, trial.engine, folder, accelerator, quiet, machine is not None
        )
    if found is not None:
        for line in dry_run_report.report(found, recipe.engine, recipe.optim.lr, machine):
            print(line)


def _exceeds_available_memory(
    trial: PretrainRecipe, store: Store, recipe: PretrainRecipe, machine: TargetHardware, accelerator: Any
) -> bool:
    """Whether the weights of a trial do not fit into this machine; what can be said without one is printed then."""
    model = build_meta_model(trial.init, store, trial.views.global_size)
    with torch.device("meta"):
        objective = make_objective(
            trial.objective, trial.trained, model.encoder, trial.views, trial.engine.steps, trial.seed
        )
    sizes = trials.AnalyticCosts.of(objective, trial.views, Guard(trial.guard).may_roll_back)
    free = trials.available_memory_bytes(accelerator.device)
    (too_large,) = ranks.any_over_ranks(sizes.weights.dry_run_bytes > free, device=accelerator.device)
    if too_large and accelerator.is_main_process:
        for line in dry_run_report.report_without_measurement(sizes, free, recipe.engine, recipe.optim.lr, machine):
            print(line)
    return too_large


def _resolve(
    recipe: PretrainRecipe | str | Path, init: str | Path | None, overrides: Iterable[str]
) -> tuple[PretrainRecipe, list[str]]:
    """The recipe with overrides and with what follows from them, and notes on what was changed."""
    content, notes = _with_overrides(recipe, list(overrides))
    if init is not None:
        content = content.model_copy(update={"init": content.init.model_copy(update={"source": str(init)})})
    if content.init.source == FROM_SCRATCH:
        content, more = _adapt_to_scratch(content)
        notes += more
    if content.schedule.head_warmup_steps >= content.engine.steps > 0:
        raise RecipeError(
            "the backbone would never learn",
            where="schedule.head_warmup_steps",
            got=content.schedule.head_warmup_steps,
            expected=f"less than engine.steps={content.engine.steps}",
            remedy="Set schedule.head_warmup_steps to a tenth of the steps",
        )
    return content, notes


def _with_overrides(recipe: PretrainRecipe | str | Path, overrides: list[str]) -> tuple[PretrainRecipe, list[str]]:
    """The recipe with overrides, and notes on what they put out of use."""
    values = {key.strip(): value.strip() for key, _, value in (text.partition("=") for text in overrides)}
    kind = values.get("objective.kind")
    notes: list[str] = []
    if kind in making.OBJECTIVE_RECIPES:
        # What the recipe says of its own objective need not mean anything to another one.
        before = recipe if isinstance(recipe, PretrainRecipe) else load(PretrainRecipe, recipe, "train")
        content = before.model_dump(mode="json", exclude_unset=True)
        own = {"kind": before.objective.kind, **before.objective.model_dump(mode="json", exclude_defaults=True)}
        content["objective"], left_out = making.convert_settings(kind, own)
        if left_out:
            notes.append(f"objective.kind is {kind}; of the recipe's objective, {', '.join(left_out)} is not used")
        resolved = validate(PretrainRecipe, content, overrides)
    elif isinstance(recipe, PretrainRecipe):
        resolved = validate(PretrainRecipe, recipe.model_dump(mode="json"), overrides)
    else:
        resolved = load(PretrainRecipe, recipe, "train", overrides)
    if not isinstance(recipe, PretrainRecipe) and resolved.name == PretrainRecipe.model_fields["name"].default:
        resolved = resolved.model_copy(update={"name": Path(recipe).stem})
    return resolved, notes


def _adapt_to_scratch(recipe: PretrainRecipe) -> tuple[PretrainRecipe, list[str]]:
    """New weights are nothing to be anchored to, and need no waiting for their heads."""
    content = recipe.model_dump(mode="json")
    notes = []
    for group, key in (
        ("objective", "anchor_gram_weight"),
        ("objective", "anchor_cls_weight"),
        ("schedule", "head_warmup_steps"),
    ):
        if content[group][key]:
            notes.append(f"init.source is none: {group}.{key} {content[group][key]:g} → 0")
            content[group][key] = 0
    if recipe.trained.part != "full":
        notes.append(f"init.source is none: with trained.part={recipe.trained.part}, most new weights stay random")
    return validate(PretrainRecipe, content), notes


def _open_store(recipe: PretrainRecipe, data: str | Path | Store | None) -> Store:
    if isinstance(data, Store):
        return data
    path = data if data is not None else recipe.data
    if path is None:
        raise UsageError("no store was given", remedy="Give --data STORE, or data: in the recipe")
    return Store.open(path)


def _run(recipe: PretrainRecipe, store: Store, folder: Path, resume: bool, quiet: bool, notes: list[str]) -> Path:
    recipe = restore_auto_settings(folder, recipe, ("precision", *running.AUTO_KEYS), resume)
    accelerator = make_accelerator(recipe.engine.precision)
    console = Console(stderr=True, quiet=quiet or not accelerator.is_main_process, highlight=False, soft_wrap=True)
    if recipe.engine.parallel == "fsdp" and accelerator.num_processes == 1:
        notes = [*notes, "engine.parallel is fsdp, but one process has nobody to share with: nothing is sharded"]
    for note in [*notes, *run_preflight_checks(recipe, store, accelerator.num_processes)]:
        console.print(note)
    recipe = _update_engine(recipe, precision=accelerator.mixed_precision)
    with lock_run_folder(folder, resume, accelerator):
        return _train(recipe, store, folder, resume, accelerator, console)


def _train(
    recipe: PretrainRecipe, store: Store, folder: Path, resume: bool, accelerator: Accelerator, console: Console
) -> Path:
    """A run in a folder that nobody else writes into."""
    checkpoint = find_resume_checkpoint(folder, recipe, store, resume, CHANGEABLE_ON_RESUME, accelerator)
    if resume and is_run_complete(folder, checkpoint, recipe.engine.steps):
        console.print(f"this run is finished; its export is {folder / run_files.EXPORT_FOLDER}")
        return folder
    model = build_model(recipe.init, store, recipe.views.global_size, recipe.seed)
    engine_recipe, found = running.resolve_auto_settings(recipe.engine, model.encoder, recipe.views, accelerator.device)
    recipe = recipe.model_copy(update={"engine": engine_recipe})
    task = _make_task(recipe, store, model, folder, accelerator)
    facts = (
        common_run_info(store, accelerator, recipe.seed)
        | found
        | {
            "num_slices": len(task.dataset),
            "effective_lr": task.effective_lr,
            "steps": recipe.engine.steps,
            "num_trained_parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        }
    )
    what = "nothing is trained"
    if recipe.engine.steps:
        what = (
            f"learning rate {recipe.optim.lr:g} at batch 128 → {task.effective_lr:.3g} at batch"
            f" {recipe.engine.batch_size}; {facts['num_trained_parameters']:,} parameters are trained;"
            f" {recipe.engine.steps * recipe.engine.batch_size / len(task.dataset):.3g} passes over the slices"
        )
    console.print(
        f"{facts['device']} ({facts['device_reason']}); {len(task.dataset)} slices of {len(store)} sessions; {what}"
    )
    engine = Engine(task, recipe.engine, folder, accelerator, recipe.seed, console.quiet)
    engine.require_space()
    ranks.run_on_main_rank(lambda: run_files.write_start(folder, recipe, facts), accelerator.is_main_process)
    if checkpoint is not None:
        engine.resume(checkpoint)
        console.print(f"going on from {checkpoint.name}")
    else:
        engine.log.truncate_after(-1)  # of a run that was killed before its first checkpoint
    accelerator.wait_for_everyone()
    stopped: TrainingError | None = None
    try:
        engine.run()
    except TrainingError as error:
        # The same on all ranks. What was learnt before the stop is still worth having.
        stopped = error
    try:
        _export_and_finish(recipe, store, folder, model, engine, task, stopped)
    except TrainingError as error:
        if stopped is None:
            raise
        what = f"{stopped.what}, and then {error.what}"
        raise TrainingError(what, where=error.where, got=error.got, remedy=error.remedy) from stopped
    if stopped is not None:
        raise stopped
    return folder


def _export_and_finish(
    recipe: PretrainRecipe,
    store: Store,
    folder: Path,
    model: BrainFoundModel,
    engine: Engine,
    task: PretrainTask,
    stopped: TrainingError | None,
) -> None:
    """Write the export and how the run ended; all ranks wait for it.

    Raises:
        TrainingError: on all ranks, if a file cannot be written.
    """
    is_main = engine.accelerator.is_main_process
    # Stopped before the first step, as by a full disk: nothing was learnt that is worth an export.
    untrained = stopped is not None and engine.step == 0
    exported_step: int | None = None
    weights: Mapping[str, Tensor] = {}
    if not untrained and (is_main or engine.sharded):
        best_step, weights = task.export_weights()
        exported_step = engine.step if best_step is None else best_step

    def write() -> None:
        if exported_step is not None:
            export(folder, recipe, store, model, weights, exported_step, task.guard.state)
        status = run_files.DONE if stopped is None else f"stopped: {stopped}"
        run_files.write_end(folder, status, exported_step, engine.step)

    ranks.run_on_main_rank(write, is_main)


def _update_engine(recipe: PretrainRecipe, **fields: Any) -> PretrainRecipe:
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=fields)})


def _make_task(
    recipe: PretrainRecipe, store: Store, model: BrainFoundModel, folder: Path, accelerator: Any
) -> PretrainTask:
    steps, seed = recipe.engine.steps, recipe.seed
    objective = make_objective(recipe.objective, recipe.trained, model.encoder, recipe.views, steps, seed)
    if recipe.engine.parallel == "fsdp" and accelerator.num_processes > 1:
        sharding.shard(objective.student, objective.frozen_modules(), accelerator.device, accelerator.mixed_precision)
    objective.to(accelerator.device)
    running.apply(objective, recipe.engine)
    # Only rank 0's scores count.
    start_file = folder / "checkpoints" / "start.safetensors" if accelerator.is_main_process else None
    return PretrainTask(
        objective,
        store,
        engine=recipe.engine,
        optim=recipe.optim,
        schedule=recipe.schedule,
        guard=Guard(recipe.guard, from_scratch=recipe.init.source == FROM_SCRATCH),
        probe=Probe(store, recipe.probe, recipe.seed, start_file) if recipe.probe.every else None,
        evaluate_every=recipe.probe.every,
        slice_margin=recipe.views.slice_margin,
        neighbour_mm=recipe.views.neighbour_mm,
        checkpoint_folder=folder / "checkpoints",
        effective_lr=effective_lr(recipe.optim.lr, recipe.engine.batch_size),
        seed=recipe.seed,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
