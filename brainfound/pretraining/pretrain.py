"""Continued self-supervised pretraining: from a recipe, a store and a starting model to a run folder.

The run folder:

    recipe.yaml   the resolved recipe
    run.json      versions, device and why, data hash, seed, world size, effective learning rate
    log.jsonl     one JSON object per line
    curves.png    the log as pictures
    checkpoints/  for --resume
    export/       the trained encoder (the teacher, if there is one) as a model folder, with preprocessing and card
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from brainfound.data.store import Store
from brainfound.errors import TrainingError, UsageError
from brainfound.models import BrainFoundModel
from brainfound.pretraining.dry_run import TargetHardware, report_dry_run
from brainfound.pretraining.execution import AUTO_KEYS, resolve_auto_settings
from brainfound.pretraining.export import export
from brainfound.pretraining.preflight import run_preflight_checks
from brainfound.pretraining.recipe import CHANGEABLE_ON_RESUME, PretrainRecipe, resolve_recipe
from brainfound.pretraining.starting_model import build_model
from brainfound.pretraining.task import PretrainTask, make_task
from brainfound.training import distributed, run_folder
from brainfound.training.engine import Engine
from brainfound.training.process import make_accelerator


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
        resume: continue from the newest whole checkpoint in `out`.
        overrides: ``"a.b=c"`` strings.
        quiet: no progress bar and no notes.
        dry_run: two real steps in a temporary folder, then a report on speed and memory; `out` is not touched.
        gpus, gpu: in a dry run, also estimate the run on this number of GPUs (None: 1) of this kind
            (`brainfound.pretraining.dry_run.gpus`).

    Returns:
        The run folder (of a dry run: the folder that a real run would use).

    Raises:
        RecipeError: a bad recipe, or one that differs from that of the run to be resumed.
        UsageError: `out` holds a run already, or other files; there is nothing to resume; or the kind of GPU is
            unknown.
        TrainingError: the guard stopped the run (the best teacher is exported), it was interrupted, or another
            process is training in `out`.
    """
    machine = TargetHardware.of(gpus, gpu)
    if machine is not None and not dry_run:
        raise UsageError("an estimate for other GPUs is part of a dry run", where="--gpu", remedy="Give --dry-run too")
    content, notes = resolve_recipe(recipe, init, overrides)
    store = _open_store(content, data)
    folder = Path(out) if out is not None else Path("runs") / content.name
    if dry_run:
        report_dry_run(content, store, machine, quiet)
        return folder
    return _run(content, store, folder, resume, quiet, notes)


def _open_store(recipe: PretrainRecipe, data: str | Path | Store | None) -> Store:
    if isinstance(data, Store):
        return data
    path = data if data is not None else recipe.data
    if path is None:
        raise UsageError("no store was given", remedy="Give --data STORE, or data: in the recipe")
    return Store.open(path)


def _run(recipe: PretrainRecipe, store: Store, folder: Path, resume: bool, quiet: bool, notes: list[str]) -> Path:
    recipe = run_folder.restore_auto_settings(folder, recipe, ("precision", *AUTO_KEYS), resume)
    accelerator = make_accelerator(recipe.engine.precision)
    console = Console(stderr=True, quiet=quiet or not accelerator.is_main_process, highlight=False, soft_wrap=True)
    if recipe.engine.parallel == "fsdp" and accelerator.num_processes == 1:
        notes = [*notes, "engine.parallel is fsdp, but one process has nobody to share with: nothing is sharded"]
    for note in [*notes, *run_preflight_checks(recipe, store, accelerator.num_processes)]:
        console.print(note)
    engine = recipe.engine.model_copy(update={"precision": accelerator.mixed_precision})
    recipe = recipe.model_copy(update={"engine": engine})
    with run_folder.lock_run_folder(folder, resume, accelerator):
        return _train(recipe, store, folder, resume, accelerator, console)


def _train(
    recipe: PretrainRecipe, store: Store, folder: Path, resume: bool, accelerator: Accelerator, console: Console
) -> Path:
    """A run in a locked folder."""
    checkpoint = run_folder.find_resume_checkpoint(folder, recipe, store, resume, CHANGEABLE_ON_RESUME, accelerator)
    if resume and run_folder.is_run_complete(folder, checkpoint, recipe.engine.steps):
        console.print(f"this run is finished; its export is {folder / run_folder.EXPORT_FOLDER}")
        return folder
    model = build_model(recipe.init, store, recipe.views.global_size, recipe.seed)
    engine_recipe, found = resolve_auto_settings(recipe.engine, model.encoder, recipe.views, accelerator.device)
    recipe = recipe.model_copy(update={"engine": engine_recipe})
    task = make_task(recipe, store, model, folder, accelerator)
    facts = run_folder.common_run_info(store, accelerator, recipe.seed) | found
    facts |= {
        "num_slices": len(task.dataset),
        "effective_lr": task.effective_lr,
        "steps": recipe.engine.steps,
        "num_trained_parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
    }
    console.print(
        f"{facts['device']} ({facts['device_reason']}); {len(task.dataset)} slices of {len(store)} sessions;"
        f" {_describe_training(recipe, task, facts['num_trained_parameters'])}"
    )
    engine = Engine(task, recipe.engine, folder, accelerator, recipe.seed, console.quiet)
    engine.require_space()
    distributed.run_on_main_rank(lambda: run_folder.write_start(folder, recipe, facts), accelerator.is_main_process)
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
        # Raised on all distributed. The best weights before the stop are still worth an export.
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


def _describe_training(recipe: PretrainRecipe, task: PretrainTask, num_trained_parameters: int) -> str:
    steps, batch_size = recipe.engine.steps, recipe.engine.batch_size
    if not steps:
        return "nothing is trained"
    return (
        f"learning rate {recipe.optim.lr:g} at batch 128 → {task.effective_lr:.3g} at batch {batch_size};"
        f" {num_trained_parameters:,} parameters are trained;"
        f" {steps * batch_size / len(task.dataset):.3g} passes over the slices"
    )


def _export_and_finish(
    recipe: PretrainRecipe,
    store: Store,
    folder: Path,
    model: BrainFoundModel,
    engine: Engine,
    task: PretrainTask,
    stopped: TrainingError | None,
) -> None:
    """Write the export and the end of the run; all ranks wait for it.

    Raises:
        TrainingError: on all distributed, if a file cannot be written.
    """
    is_main = engine.accelerator.is_main_process
    # A run that stopped before the first step, as on a full disk, has learnt nothing that is worth an export.
    untrained = stopped is not None and engine.step == 0
    exported_step: int | None = None
    weights: Mapping[str, Tensor] = {}
    if not untrained and (is_main or engine.sharded):
        best_step, weights = task.export_weights()
        exported_step = engine.step if best_step is None else best_step

    def write() -> None:
        if exported_step is not None:
            export(folder, recipe, store, model, task.objective, weights, exported_step, task.guard.state)
        status = run_folder.DONE if stopped is None else f"stopped: {stopped}"
        run_folder.write_end(folder, status, exported_step, engine.step)

    distributed.run_on_main_rank(write, is_main)
