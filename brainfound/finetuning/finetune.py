"""Fine-tuning: a backbone, an adapter and a head learn one target of a store.

The run folder:

    recipe.yaml, run.json, log.jsonl, curves.png, checkpoints/   as in pretraining
    splits.json   the subjects of each part, as a split file
    scores.json   the scores on the test part with intervals, beside the trivial baseline and a linear model on the
                  frozen backbone, and what the validation part calibrates
    cases.tsv     one row per test session; frozen-cases.tsv the same of the linear model
    reliability.png   of a classification: how often it is right, over how sure it is
    export/       the bundle: adapter, head, preprocessing and labels as one unit

Axis legend: B volumes, S slices, C contrasts, H W pixels.

What the model card of a fine-tuned model says, from what its run knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
from rich.console import Console

from brainfound.adapters.attach import AdapterRecipe
from brainfound.adapters.bundle import save_bundle
from brainfound.data.checking.contract import InputContract
from brainfound.data.store import Store
from brainfound.data.store.withheld import restrict_contrasts
from brainfound.errors import UsageError
from brainfound.finetuning.calibration import AnswerCalibration
from brainfound.finetuning.recipe import (
    CHANGEABLE_ON_RESUME,
    FinetuneRecipe,
    describe_loss,
    require_effective_settings,
    resolve_recipe,
)
from brainfound.finetuning.scoring import FROZEN_CASES_FILE, SessionScores, write_cases, write_scores
from brainfound.finetuning.splits import hash_split, resolve_split_file, split_sessions, write_split
from brainfound.finetuning.targets import Target, class_names, infer_task, resolve_target
from brainfound.finetuning.training_task import FinetuneTask, FrozenBaselineResult, build_training_setup
from brainfound.models import BrainFoundConfig
from brainfound.models.infer import unwrap_peft
from brainfound.recipes import load
from brainfound.report.figures import plot_reliability
from brainfound.training import distributed as ranks
from brainfound.training import run_folder as run_files
from brainfound.training.engine import Engine
from brainfound.training.process import make_accelerator
from brainfound.training.run_folder import (
    common_run_info,
    find_resume_checkpoint,
    is_run_complete,
    lock_run_folder,
    restore_auto_settings,
    versions,
)


def finetuned_card(
    recipe: Any,
    store: Store,
    parts: Mapping[str, np.ndarray],
    target: Target,
    config: BrainFoundConfig,
    source: str,
    scores: Mapping[str, Any],
    step: int,
) -> dict[str, Any]:
    """Facts for `brainfound.report.cards.write_model_card`.

    Args:
        recipe: of the run.
        parts: the split, as store indices.
        config: of the model.
        source: what the run started from: Hub id or folder.
        scores: as `brainfound.finetuning.scoring.write_scores` returns them.
        step: steps that were trained.
    """
    subjects = store.sessions["subject"]
    used = np.concatenate(list(parts.values()))
    sizes = {
        part: f"{len(index)} sessions of {subjects.iloc[index].nunique()} subjects" for part, index in parts.items()
    }
    where = f"test part ({sizes['test']})"
    method = load(AdapterRecipe, recipe.adapter, "adapters").method
    baselines = [name for name in ("trivial", "frozen") if name in scores]
    return {
        "name": recipe.name,
        "summary": f"Fine-tuned for {target.task} of {target.column}; its scores are of subjects that it never saw.",
        "kind": f"fine-tuned for {target.task}",
        "base_model": source,
        "base_model_relation": "finetune" if method in ("full", "last_blocks") else "adapter",
        "backbone": config.backbone_config.model_type,
        **({} if config.slice_features == "cls" else {"slice features": config.slice_features}),
        "stem": config.stem,
        "aggregator": None if target.task == "segmentation" else config.aggregator,
        "adapter": recipe.adapter,
        "objective": describe_loss(target.task, config),
        "labels": list(target.names) or f"{target.column}, {target.mean:.4g} ± {target.std:.4g} in the training part",
        "contrasts": list(store.shown),
        "preprocessing": store.preprocessing.model_dump(mode="json"),
        "recipe": recipe.name,
        "steps": step,
        "data_hash": store.content_hash,
        "num_sessions": len(used),
        "num_subjects": int(subjects.iloc[used].nunique()),
        "seed": recipe.seed,
        "versions": versions(),
        "metrics": [
            {"metric": name, "value": value, **{f"{b} baseline": scores[b].get(name) for b in baselines}, "data": where}
            for name, value in scores["scores"].items()
        ],
        "target": target.column,
        "split": sizes,
        "split seed": recipe.split.seed,
        "model_code": (
            'from brainfound.adapters import load_bundle\n\nmodel = load_bundle("path/to/this/folder").model'
        ),
    }


RELIABILITY_FILE = "reliability.png"


def finetune(
    recipe: FinetuneRecipe | str | Path,
    data: str | Path | Store,
    model: str | Path,
    target: str,
    out: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    split: str | Path | None = None,
    fold: str | None = None,
    resume: bool = False,
    keep_ids: bool = False,
    cache: str | Path | None = None,
    overrides: Iterable[str] = (),
    quiet: bool = False,
) -> Path:
    """Fine-tune a model on a target of a store.

    Args:
        recipe: a recipe, its name or its file.
        data: a store or its folder.
        model: a Hub id or folder of a plain ViT, or a BrainFound folder (the export of a pretraining run).
        target: a covariate column of the store, ``"mask"``, or several columns of 0 and 1 that a session may have any
            of: ``"edema,lesion"``.
        out: the run folder; None: ``runs/<name of the recipe>``.
        adapter: overrides the recipe's adapter.
        split: a split file (of `brainfound split`, or the splits.json of another run), to learn and test on the
            subjects that it names; any overlap of its parts, by subject or image, is refused.
        fold: which fold of a split file that holds several.
        resume: go on from the newest whole checkpoint.
        keep_ids: name subjects and sessions in cases.tsv.
        cache: where embeddings lie if the recipe keeps them, for several runs together; None: in the run folder.
        overrides: ``"a.b=c"`` strings.
        quiet: no progress bar and no notes.

    Returns:
        The run folder; its ``export/`` is the bundle that `brainfound.load` reads.

    Raises:
        RecipeError, UsageError, ModelError, TrainingError.
    """
    content = resolve_recipe(recipe, adapter, overrides)
    store = restrict_contrasts(data if isinstance(data, Store) else Store.open(data), content.contrasts)
    folder = Path(out) if out is not None else Path("runs") / content.name
    content = restore_auto_settings(folder, content, ("precision",), resume)
    accelerator = make_accelerator(content.engine.precision)
    console = Console(stderr=True, quiet=quiet or not accelerator.is_main_process, highlight=False, soft_wrap=True)
    engine_recipe = content.engine.model_copy(update={"precision": accelerator.mixed_precision})
    content = content.model_copy(update={"engine": engine_recipe})
    with lock_run_folder(folder, resume, accelerator):
        return _train(
            content, store, str(model), target, folder, split, fold, resume, keep_ids, cache, accelerator, console
        )


def _train(
    content: FinetuneRecipe,
    store: Store,
    model: str,
    target: str,
    folder: Path,
    split: str | Path | None,
    fold: str | None,
    resume: bool,
    keep_ids: bool,
    cache: str | Path | None,
    accelerator: accelerate.Accelerator,
    console: Console,
) -> Path:
    """A run in a folder that nobody else writes into."""
    checkpoint = find_resume_checkpoint(folder, content, store, resume, CHANGEABLE_ON_RESUME, accelerator)
    split_file, fold = resolve_split_file(folder, store, target, split, fold, resume)
    if resume and is_run_complete(folder, checkpoint, content.engine.steps):
        console.print(f"this run is finished; its export is {folder / run_files.EXPORT_FOLDER}")
        return folder
    parts, resolved = resolve_parts_and_target(content, store, target, split_file, fold, console.print)
    name = Path(model).name if Path(model).exists() else model
    if resume:
        _require_same_model_and_target(folder, name, resolved)
    caches = folder / run_files.EMBEDDINGS_FOLDER if cache is None else Path(cache)
    if content.frozen_baseline:
        console.print("frozen baseline: each session of the training and the test part is read once before training")
    network, embedded, frozen = build_training_setup(
        content, store, parts, model, resolved, accelerator, caches, cache is not None
    )
    task = FinetuneTask(network, store, parts, resolved, content, accelerator, embedded)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in network.parameters())
    counts = ", ".join(f"{part} {len(index)}" for part, index in parts.items())
    console.print(f"{resolved.task} of {target}: {counts}; training {trained:,} of {everything:,} parameters")
    engine = Engine(task, content.engine, folder, accelerator, content.seed, console.quiet)
    facts = common_run_info(store, accelerator, content.seed) | {
        "kind": "finetune",
        "model": name,
        "target": resolved.to_dict(),
        "num_trained_parameters": trained,
    }
    engine.require_space()

    def begin() -> None:
        # Before the recipe: a run that can be resumed has its split.
        write_split(folder, store, parts, target, content.split, split_file)
        run_files.write_start(folder, content, facts)

    ranks.run_on_main_rank(begin, accelerator.is_main_process)
    if checkpoint is not None:
        engine.resume(checkpoint)
        console.print(f"going on from {checkpoint.name}")
    else:
        engine.log.truncate_after(-1)  # of a run that was killed before its first checkpoint
    accelerator.wait_for_everyone()
    engine.run()
    # In place: prepared for bf16 the model would go on answering in it; scored and saved, it answers as when loaded.
    accelerator.unwrap_model(engine.model, keep_fp32_wrapper=False)
    ranks.run_on_main_rank(
        lambda: _score_and_export(folder, task, frozen, model, engine.step, keep_ids), accelerator.is_main_process
    )
    return folder


def resolve_parts_and_target(
    recipe: FinetuneRecipe,
    store: Store,
    target: str,
    split: Path | None = None,
    fold: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> tuple[dict[str, np.ndarray], Target]:
    """The sessions of each part, and the target with what the training part says of it.

    Args:
        say: is told in one line what is left out, and in one per part which classes it lacks.

    Raises:
        UsageError: no such target or split, too few labels, or a label in any part that the training part has not.
        RecipeError: settings of another task.
    """
    parts = split_sessions(recipe.split, store, target, split, fold, notify)
    task = infer_task(store, target) if recipe.task == "auto" else recipe.task
    resolved = resolve_target(store, parts["train"].tolist(), task, target, recipe.merge_codes, recipe.regions)
    require_effective_settings(recipe, resolved)
    if task == "classification" and not resolved.multi_label:
        _require_classes_in_training(store, parts, resolved)
    if task == "segmentation" and notify:
        for part in ("validation", "test"):
            masks = (store.read_masks(int(session)) for session in parts[part])
            strange = sorted({code for mask in masks if mask is not None for code in resolved.unknown_codes(mask)})
            if strange:
                codes = ", ".join(map(str, strange))
                notify(
                    f"masks of the {part} part have codes that the training part has not: {codes}. They are background"
                )
    if task != "segmentation":
        for part, index in parts.items():
            values = resolved.values(store, index.tolist())  # refused now, and not after training
            if notify and task == "classification" and (absent := _absent_classes(resolved, values)):
                notify(
                    f"no session of the {part} part is {', '.join(absent)}: scores that need it are not defined there"
                )
    return parts, resolved


def _require_classes_in_training(store: Store, parts: Mapping[str, np.ndarray], target: Target) -> None:
    """Refuse a class that somebody has and nobody of the training part."""
    labels = store.covariate(target.column)
    for part, index in parts.items():
        for name in class_names(labels.iloc[index]):
            if name not in target.names:
                placed = np.concatenate(list(parts.values()))
                has_it = np.array([class_names([label]) == [name] for label in labels.iloc[placed]])
                subjects = store.sessions["subject"].iloc[placed[has_it]].nunique()
                raise UsageError(
                    f"the class {name!r} is in the {part} part and not in the training part",
                    where=f"column {target.column}",
                    got=f"{subjects} subjects have it" if subjects > 1 else "one subject has it",
                    remedy="Leave its cells empty, join it to another class, or divide the subjects otherwise",
                )


def _absent_classes(target: Target, values: np.ndarray) -> list[str]:
    """The classes, or the labels of several, that nobody has."""
    if target.multi_label:
        return [name for name, column in zip(target.names, values.T, strict=True) if not column.any()]
    return [name for k, name in enumerate(target.names) if not (values == k).any()]


def _require_same_model_and_target(folder: Path, model: str, target: Target) -> None:
    """Refuse to go on with a run that learns from another model, or reads its labels otherwise."""
    before = json.loads((folder / run_files.FACTS_FILE).read_text(encoding="utf-8"))
    if before["model"] != model:
        raise UsageError("the run has another model", where=folder, got=model, expected=before["model"])
    now = json.loads(json.dumps(target.to_dict()))
    if other := [key for key, value in before["target"].items() if now.get(key) != value]:
        raise UsageError(
            "the run reads its labels otherwise",
            where=f"{folder}, {other[0]}",
            got=now.get(other[0]),
            expected=before["target"][other[0]],
            remedy="Give the recipe that the run was begun with, or another --out",
        )


def _score_and_export(
    folder: Path, task: FinetuneTask, frozen: FrozenBaselineResult | None, source: str, step: int, keep_ids: bool
) -> None:
    """Score the test part once, and leave bundle, scores and curves behind."""
    store, parts, target = task.store, task.parts, task.target
    test = task.score("test").with_intervals()
    if frozen is not None:
        test = replace(test, frozen=frozen.scores.scores)
        write_cases(folder / FROZEN_CASES_FILE, frozen.scores.cases, keep_ids)
    calibration = None if target.task == "segmentation" else _calibrate(folder, task, test)
    facts = {} if calibration is None else {"calibration": calibration.report(test, target)}
    scores = write_scores(folder, test, keep_ids=keep_ids, part="test", step=step, **facts)
    save_bundle(
        folder / run_files.EXPORT_FOLDER,
        task.model,
        preprocessing=store.preprocessing,
        labels=target.to_dict(),
        contract=InputContract.of(store, parts["train"], withheld_in_training=task.withholds_contrasts),
        metadata={
            "num_slices": task.eval_slices,
            "withheld": list(store.withheld),
            "scoring": task.recipe.scoring.model_dump(),
            "test": scores,
            "data_hash": store.content_hash,
            "split": hash_split(store, parts),
            "calibration": None if calibration is None else calibration.to_dict(),
            "frozen_encoder": None if frozen is None else frozen.encoder,
        },
        card=finetuned_card(task.recipe, store, parts, target, unwrap_peft(task.model).config, source, scores, step),
        baseline=None if frozen is None else frozen.tensors,
        overwrite=True,  # a run that goes on after its end writes it again
    )
    run_files.write_end(folder, run_files.DONE, step, step)


def _calibrate(folder: Path, task: FinetuneTask, test: SessionScores) -> AnswerCalibration:
    """Fit on the validation part how far answers can be believed, and draw what that does on the test part."""
    confidence = task.recipe.regression.interval_confidence
    fitted = AnswerCalibration.fit(task.score("validation"), task.target, confidence)
    if task.target.task == "classification":
        curves = fitted.reliability(test, task.target)
        plot_reliability(curves, path=folder / RELIABILITY_FILE, title="test part")
    return fitted
