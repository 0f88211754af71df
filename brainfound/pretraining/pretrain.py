"""Continued self-supervised pretraining: from a recipe, a store and a starting model to a run folder.

The run folder:

    recipe.yaml   the resolved recipe
    run.json      versions, device and reason, data hash, seed, world size, effective learning rate
    log.jsonl     one JSON object per line
    curves.png    plots of the log
    checkpoints/  for --resume
    export/       the trained encoder (the teacher, if there is one) as a model folder, with preprocessing and card
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from brainfound.adapters.attach import count_parameters
from brainfound.data.checking.contract import InputContract
from brainfound.data.splits.training_history import TrainingHistory
from brainfound.data.store import Store
from brainfound.errors import TrainingError, UsageError
from brainfound.models import BrainFoundModel
from brainfound.models.loading import read_history, require_start
from brainfound.models.model_folder import make_draft_name, recover_folder, replace_folder, silence_transformers
from brainfound.pretraining.dry_run import TargetHardware, report_dry_run
from brainfound.pretraining.preflight import run_preflight_checks
from brainfound.pretraining.recipe import (
    AUTO_KEYS,
    CHANGEABLE_ON_RESUME,
    PretrainRecipe,
    resolve_auto_settings,
    resolve_recipe,
)
from brainfound.pretraining.starting_model import FROM_SCRATCH, build_model
from brainfound.pretraining.training_task import PretrainTask, make_task
from brainfound.report.cards import write_model_card
from brainfound.training import distributed, run_folder
from brainfound.training.checkpoint import wrap_write_errors
from brainfound.training.engine import Engine
from brainfound.training.process import describe_devices
from brainfound.training.run_folder import EXPORT_FOLDER, versions


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
        data: a store or its folder; None takes the recipe's ``data``.
        init: overrides ``init.source``: a Hub id, a folder, or "none".
        out: the run folder; None: ``runs/<name of the recipe>``.
        resume: continue from the newest intact checkpoint in `out`.
        overrides: ``"a.b=c"`` strings.
        dry_run: two real steps in a temporary folder, then a report on speed and memory; `out` is not touched.
        gpus, gpu: in a dry run, also estimate the run on this number of GPUs (None: 1) of this kind.

    Returns:
        The run folder (of a dry run: the folder that a real run would use).

    Raises:
        RecipeError: a bad recipe, or one that differs from that of the run to be resumed.
        UsageError: `out` holds a run or other files, there is nothing to resume, or the kind of GPU is unknown.
        TrainingError: the guard stopped the run (the best teacher is exported), or it was interrupted.
    """
    machine = TargetHardware.of(gpus, gpu)
    if machine is not None and not dry_run:
        raise UsageError("an estimate for other GPUs is part of a dry run", where="--gpu", remedy="Give --dry-run too")
    content, notes = resolve_recipe(recipe, init, overrides)
    data = data if data is not None else content.data
    if data is None:
        raise UsageError("no store was given", remedy="Give --data STORE, or data: in the recipe")
    store = data if isinstance(data, Store) else Store.open(data)
    folder = Path(out) if out is not None else Path("runs") / content.name
    if dry_run:
        report_dry_run(content, store, machine, quiet)
        return folder
    return _run(content, store, folder, resume, quiet, notes)


def _run(recipe: PretrainRecipe, store: Store, folder: Path, resume: bool, quiet: bool, notes: list[str]) -> Path:
    recipe, accelerator, console = run_folder.start_process(folder, recipe, AUTO_KEYS, resume, quiet)
    if recipe.engine.parallel == "fsdp" and accelerator.num_processes == 1:
        notes = [*notes, "engine.parallel is fsdp, but there is a single process: nothing is sharded"]
    with run_folder.lock_run_folder(folder, resume, accelerator):
        if recipe.init.source != FROM_SCRATCH and not resume:
            require_start(recipe.init.source)
        for note in [*notes, *run_preflight_checks(recipe, store, accelerator.num_processes)]:
            console.print(note)
        return _train(recipe, store, folder, resume, accelerator, console)


def _train(
    recipe: PretrainRecipe, store: Store, folder: Path, resume: bool, accelerator: Accelerator, console: Console
) -> Path:
    checkpoint = run_folder.find_resume_checkpoint(folder, recipe, store, resume, CHANGEABLE_ON_RESUME, accelerator)
    if resume and run_folder.is_run_complete(folder, checkpoint):
        console.print(f"this run is finished; its export is {folder / EXPORT_FOLDER}")
        return folder
    model = build_model(recipe.init, store, recipe.views.global_size, recipe.seed)
    engine_recipe, auto_facts = resolve_auto_settings(recipe.engine, model.encoder, recipe.views, accelerator.device)
    recipe = recipe.model_copy(update={"engine": engine_recipe})
    task = make_task(recipe, store, model, folder, accelerator)
    history = TrainingHistory(complete=True)
    if recipe.init.source != FROM_SCRATCH:
        history = read_history(recipe.init.source)
    facts = run_folder.common_run_info(store, accelerator, recipe.seed) | auto_facts
    facts |= {
        "num_slices": len(task.dataset),
        "effective_lr": task.effective_lr,
        "steps": recipe.engine.steps,
        "num_trained_parameters": count_parameters(task.model).trainable,
    }
    console.print(
        f"{facts['device']} ({facts['device_reason']}); {len(task.dataset)} slices of {len(store)} sessions;"
        f" {_describe_training(recipe, task, facts['num_trained_parameters'])}"
    )
    engine = Engine(task, recipe.engine, folder, accelerator, recipe.seed, console.quiet)
    engine.begin(lambda: run_folder.write_start(folder, recipe, facts), checkpoint)
    stopped: TrainingError | None = None
    try:
        engine.run()
    except TrainingError as error:
        # Raised on all ranks. The best weights before the stop are still worth exporting.
        stopped = error
    try:
        _export_and_finish(folder, model, engine, task, stopped, history)
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
    folder: Path,
    model: BrainFoundModel,
    engine: Engine,
    task: PretrainTask,
    stopped: TrainingError | None,
    history: TrainingHistory,
) -> None:
    """Write the export and the run's final status; all ranks wait for it, and all raise if it fails."""
    is_main = engine.accelerator.is_main_process
    # A run that stopped before the first step, as on a full disk, has learnt nothing worth exporting.
    untrained = stopped is not None and engine.step == 0
    exported_step: int | None = None
    weights: Mapping[str, Tensor] = {}
    if not untrained and (is_main or engine.sharded):
        best_step, weights = task.export_weights()
        exported_step = engine.step if best_step is None else best_step

    def write() -> None:
        if exported_step is not None:
            export(folder, model, task, weights, exported_step, history)
        status = run_folder.DONE if stopped is None else f"stopped: {stopped}"
        run_folder.write_end(folder, status, exported_step, engine.step)

    distributed.run_on_main_rank(write, is_main)


def export(
    folder: Path,
    model: BrainFoundModel,
    task: PretrainTask,
    weights: Mapping[str, Tensor],
    step: int,
    history: TrainingHistory,
) -> Path:
    """Write export/: `weights` of the encoder, reached at `step`, with preprocessing, input contract and card.

    `history` is that of the starting model; with the store it is written next to the weights.

    It is written under another name and then renamed, so that export/ is always complete or absent.

    Raises:
        TrainingError: if it cannot be written.
    """
    model.encoder.load_state_dict(weights)
    target, recipe = folder / EXPORT_FOLDER, task.recipe
    recover_folder(target)
    temporary = make_draft_name(target)
    card = _card_facts(model, task, step)
    withholds = not step or recipe.views.contrast_dropout > 0 or recipe.views.split_contrasts > 0
    contract = InputContract.of(task.store, withheld_in_training=withholds)
    if step:
        history = history.extended(task.store, {"train": np.arange(len(task.store))})
    state = {name: tensor.detach().cpu() for name, tensor in model.eval().state_dict().items()}
    try:
        with wrap_write_errors("the export", target):
            with silence_transformers():
                model.save_pretrained(temporary, state_dict=state)
            task.store.preprocessing.save(temporary)
            contract.save(temporary)
            history.save(temporary)
            write_model_card(temporary, card)
            replace_folder(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a failure; a full disk needs the room
    return target


def _card_facts(model: BrainFoundModel, task: PretrainTask, step: int) -> dict[str, Any]:
    recipe, store, objective, guard = task.recipe, task.store, task.objective, task.guard.state
    source = recipe.init.source
    new_weights = source == FROM_SCRATCH
    scores = {"first": guard.first_score, "best": guard.best_score, "last": guard.last_score}
    untouched = recipe.engine.steps == 0
    described, exported = objective.describe(), objective.exported_name
    probe = f"probe of the {exported.removeprefix('EMA ')}"
    summary = f"The {exported} of {described} on brain MRI slices"
    if untouched:
        summary = "The starting checkpoint, untouched, as a BrainFound encoder"
    return {
        "name": recipe.name,
        "summary": f"{summary} (it has no task head).",
        "kind": "encoder as it was before any training here" if untouched else "self-supervised encoder",
        "base_model": None if new_weights else source,
        "start": "new weights" if new_weights else None,
        "backbone": model.config.backbone_config.model_type,
        "stem": model.config.stem,
        "aggregator": model.config.aggregator,
        "adapter": "none",
        "objective": "none" if untouched else described,
        "labels": "none",
        "trained part": None if untouched else recipe.trained.describe(model.encoder.num_layers),
        "contrasts": list(store.contrasts),
        "preprocessing": store.preprocessing.model_dump(mode="json"),
        "recipe": recipe.name,
        "steps": step,
        "data_hash": store.content_hash,
        "num_sessions": len(store),
        "num_subjects": int(store.sessions["subject"].nunique()),
        "num_slices": len(task.dataset),
        "seed": recipe.seed,
        "device": describe_devices(task.device, task.world_size),
        "versions": versions(),
        "metrics": [
            {"metric": f"{name} {probe}", "value": value, "data": "the pretraining store, split by subject"}
            for name, value in scores.items()
            if value is not None
        ],
        "guard": {key: value for key, value in asdict(guard).items() if value is not None and "step" in key}
        | ({"rollbacks": guard.rollbacks, "lr_scale": guard.lr_scale} if guard.rollbacks else {}),
    }
