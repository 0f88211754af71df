"""Fine-tuning: a backbone, an adapter and a head learn one target of a store.

The run folder:

    recipe.yaml, run.json, log.jsonl, curves.png, checkpoints/   as in pretraining
    splits.json   the subjects of each part, as a split file
    scores.json   test scores with intervals, scores of the trivial baseline and of a linear model on the frozen
                  backbone, a verdict in words, the exported step, and the calibration fitted on the validation part
    cases.tsv     one row per test session; frozen-cases.tsv the same for the linear model
    reliability.png   for a classification: accuracy against confidence
    export/       the bundle: adapter, head, preprocessing and labels as one unit
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.adapters.attach import AdapterRecipe, count_parameters
from brainfound.adapters.bundle import save_bundle
from brainfound.data.checking.contract import InputContract
from brainfound.data.splits.training_history import TrainingHistory, hash_split
from brainfound.data.store import Store
from brainfound.data.store.store import restrict_contrasts
from brainfound.errors import UsageError
from brainfound.finetuning.fitted_heads import fold_standardisation
from brainfound.finetuning.recipe import (
    CHANGEABLE_ON_RESUME,
    FinetuneRecipe,
    require_effective_settings,
    resolve_recipe,
)
from brainfound.finetuning.scoring import FROZEN_CASES_FILE, SessionScores, write_cases, write_scores
from brainfound.finetuning.splits import resolve_split_file, split_sessions, write_split
from brainfound.finetuning.tasks import TargetColumn, Task, VolumeTask, resolve
from brainfound.finetuning.training_task import FinetuneTask, build_task, scored_part
from brainfound.finetuning.verdict import INNER_FOLDS, judge
from brainfound.models.loading import read_history, require_start
from brainfound.models.stack_prediction import unwrap_peft
from brainfound.recipes import load
from brainfound.report.figures import plot_reliability
from brainfound.report.run_page import write_run_page
from brainfound.training import distributed, run_folder
from brainfound.training.engine import Engine
from brainfound.training.process import describe_devices

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
        model: a Hub id or folder of a plain ViT, or a BrainFound folder (the export of a pretraining run).
        target: a covariate column of the store, ``"mask"``, or several 0/1 columns for a multi-label classification,
            such as ``"edema,lesion"``.
        out: the run folder; None: ``runs/<name of the recipe>``.
        adapter: overrides the recipe's adapter.
        split: a split file (from `brainfound split`, or the splits.json of another run) with the subjects of each part;
            parts that share a subject or an image are refused.
        fold: the fold to use, if the split file has several.
        resume: continue from the newest complete checkpoint.
        keep_ids: write the names of subjects and sessions to cases.tsv.
        cache: folder of cached embeddings, to share between runs; None: in the run folder.
        overrides: ``"a.b=c"`` strings.

    Returns:
        The run folder; its ``export/`` is the bundle that `brainfound.load` reads.

    Raises:
        RecipeError, UsageError, ModelError, TrainingError.
    """
    content = resolve_recipe(recipe, adapter, overrides)
    store = restrict_contrasts(data if isinstance(data, Store) else Store.open(data), content.contrasts)
    folder = Path(out) if out is not None else Path("runs") / content.name
    content, accelerator, console = run_folder.start_process(folder, content, (), resume, quiet)
    with run_folder.lock_run_folder(folder, resume, accelerator):
        checkpoint = run_folder.find_resume_checkpoint(
            folder, content, store, resume, CHANGEABLE_ON_RESUME, accelerator
        )
        column = TargetColumn.find(store, target)
        split_file, fold = resolve_split_file(folder, store, column, split, fold, resume)
        if resume and run_folder.is_run_complete(folder, checkpoint):
            console.print(f"this run is finished; its export is {folder / run_folder.EXPORT_FOLDER}")
            return folder
        require_start(model)
        parts, task = resolve_parts_and_task(content, store, column, split_file, fold, console.print)
        name = run_folder.short_name(model) if Path(model).exists() else str(model)
        if resume:
            _require_same_model_and_task(folder, name, task)
        # Now: the folder may be gone or hold another model by the end.
        history = read_history(model) if accelerator.is_main_process else TrainingHistory()
        caches = folder / run_folder.EMBEDDINGS_FOLDER if cache is None else Path(cache)
        if content.frozen_baseline:
            note = f"each session of the training and the {scored_part(parts)} part is read once before training"
            console.print(f"frozen baseline: {note}")
        training = build_task(content, store, parts, str(model), task, accelerator, caches, cache is not None)
        trained, everything = count_parameters(training.model)
        counts = ", ".join(f"{part} {len(index)}" for part, index in parts.items())
        console.print(f"{task.kind} of {target}: {counts}; training {trained:,} of {everything:,} parameters")
        engine = Engine(training, content.engine, folder, accelerator, content.seed, console.quiet)
        own = {"kind": "finetune", "model": name, "target": task.to_dict(), "num_trained_parameters": trained}
        facts = run_folder.common_run_info(store, accelerator, content.seed) | own

        def begin() -> None:
            # Before the recipe, so that every run that can be resumed has its split.
            write_split(folder, store, parts, column, content.split, split_file)
            run_folder.write_start(folder, content, facts)

        engine.begin(begin, checkpoint)
        engine.run()
        # In place: a model prepared for bf16 would also be scored in bf16, unlike the model loaded from the bundle.
        accelerator.unwrap_model(engine.model, keep_fp32_wrapper=False)
        if training.best is not None:
            training.best.restore()
            console.print(f"exported: {training.best.describe()}")
        fold_standardisation(training.model)
        distributed.run_on_main_rank(
            lambda: score_and_export(folder, training, str(model), history, engine.step, keep_ids),
            accelerator.is_main_process,
        )
    return folder


def resolve_parts_and_task(
    recipe: FinetuneRecipe,
    store: Store,
    target: TargetColumn | str,
    split: Path | None = None,
    fold: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> tuple[dict[str, np.ndarray], Task]:
    """The sessions of each part, and the task as the training part defines it.

    ``notify`` receives a line about the sessions left out, and one per part about labels missing from it.

    Raises:
        UsageError: no such target or split, too few labels, or a label that is missing from the training part.
        RecipeError: settings that have no effect.
    """
    column = TargetColumn.find(store, target) if isinstance(target, str) else target
    parts = split_sessions(recipe.split, store, column, split, fold, notify)
    task = resolve(store, parts["train"].tolist(), column, recipe.task)
    require_effective_settings(recipe, task)
    task.check_parts(store, parts, notify)
    return parts, task


def _require_same_model_and_task(folder: Path, model: str, task: Task) -> None:
    """Refuse to resume a run that started from another model, or whose labels mean something else."""
    before = run_folder.read_facts(folder, "model", "target")
    if before["model"] != model:
        raise UsageError("the run has another model", where=folder, got=model, expected=before["model"])
    now = json.loads(json.dumps(task.to_dict()))
    if other := [key for key, value in before["target"].items() if now.get(key) != value]:
        remedy = "Give the recipe that the run was begun with, or another --out"
        where, expected = f"{folder}, {other[0]}", before["target"][other[0]]
        what = "the run has other labels"
        raise UsageError(what, where=where, got=now.get(other[0]), expected=expected, remedy=remedy)


def score_and_export(
    folder: Path,
    training: FinetuneTask,
    source: str,
    history: TrainingHistory,
    step: int,
    keep_ids: bool,
    *,
    out_of_fold: SessionScores | None = None,
    facts: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Score the test part once, and write scores, bundle and curves; ``step`` is the last one.

    Without a test part the scores are those of ``out_of_fold``, or else of the validation part.

    Args:
        out_of_fold: answers to fit the calibration to; None: the answers on the validation part.
        facts: more entries of scores.json.
        card: facts of the model card that differ from those of a training.
    """
    store, parts, task, frozen, best = training.store, training.parts, training.task, training.frozen, training.best
    exported_step = step if best is None or best.step is None else best.step
    part = INNER_FOLDS if "test" not in parts and out_of_fold is not None else scored_part(parts)
    scored = out_of_fold if part == INNER_FOLDS and out_of_fold is not None else training.score_finally()
    test = scored.with_intervals()
    baseline = None if frozen is None else frozen.scores
    verdict = judge(task, test, baseline, best, part)
    if baseline is not None:
        test = replace(test, frozen=baseline.scores)
        write_cases(folder / FROZEN_CASES_FILE, baseline.cases, keep_ids)
    facts = {**(facts or {}), "verdict": verdict._asdict(), "last_step": step}
    if best is not None:
        facts["validation"] = best.to_dict()
    calibration = None
    if isinstance(task, VolumeTask):
        fitted_on = "validation" if out_of_fold is None else INNER_FOLDS
        cases = training.score("validation").cases if out_of_fold is None else out_of_fold.cases
        calibration = task.fit_calibration(cases)
        # On the answers that it was fitted to it would always have the best effect.
        effect = task.calibration_effect(calibration, test.cases) if part == "test" else {}
        facts["calibration"] = calibration.report(effect, fitted_on)
        if part == "test" and (curves := task.reliability(calibration, test.cases)):
            plot_reliability(curves, path=folder / RELIABILITY_FILE, title="test part")
    scores = write_scores(folder, test, keep_ids=keep_ids, part=part, step=exported_step, **facts)
    save_bundle(
        folder / run_folder.EXPORT_FOLDER,
        training.model,
        preprocessing=store.preprocessing,
        labels=task.to_dict(),
        contract=InputContract.of(store, parts["train"], withheld_in_training=training.withholds_contrasts),
        metadata={
            "num_slices": training.eval_slices,
            "withheld": list(store.withheld),
            "scoring": task.scoring.model_dump(),
            "test": scores,
            "data_hash": store.content_hash,
            "split": hash_split(store, parts),
            "calibration": None if calibration is None else calibration.to_dict(),
            "frozen_encoder": None if frozen is None else frozen.encoder,
        },
        card=finetuned_card(training, source, history, scores) | dict(card or {}),
        history=history.extended(store, parts),
        baseline=None if frozen is None else frozen.tensors,
        overwrite=True,  # a run that is resumed after its last step writes it again
    )
    run_folder.write_end(folder, run_folder.DONE, exported_step, step)
    write_run_page(folder)


def finetuned_card(
    training: FinetuneTask, source: str, history: TrainingHistory, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """Facts for `brainfound.report.cards.write_model_card`; ``source`` is the starting model, with its ``history``."""
    recipe, store, parts, task = training.recipe, training.store, training.parts, training.task
    config = unwrap_peft(training.model).config
    subjects = store.sessions["subject"]
    used = np.concatenate(list(parts.values()))
    sizes = {part: f"{len(own)} sessions of {subjects.iloc[own].nunique()} subjects" for part, own in parts.items()}
    where = f"{scores['part']} part ({sizes[scores['part']]})" if scores["part"] in sizes else scores["part"]
    method = load(AdapterRecipe, recipe.adapter, "adapters").method
    per_session = min(recipe.num_slices, int(store.sessions["num_slices"].iloc[parts["train"]].max()))
    columns = {"value": scores["scores"]}
    columns |= {f"{name} baseline": scores[name] for name in ("trivial", "frozen") if name in scores}
    return {
        "name": recipe.name,
        "summary": f"Fine-tuned for {task.kind} of {task.column}. {_describe_test_subjects(history, store, parts)}\n\n"
        f"**{scores['verdict']['text']}**",
        "kind": f"fine-tuned for {task.kind}",
        "base_model": source,
        "base_model_relation": "finetune" if method in ("full", "last_blocks") else "adapter",
        "backbone": config.backbone_config.model_type,
        **({} if config.describe_features() == "cls" else {"features": config.describe_features()}),
        "stem": config.stem,
        "aggregator": "none" if task.per_voxel else config.aggregator,
        "adapter": recipe.adapter,
        "objective": task.describe_loss(config),
        "labels": task.describe_labels(),
        "contrasts": list(store.shown),
        "preprocessing": store.preprocessing.model_dump(mode="json"),
        "recipe": recipe.name,
        "steps": f"{scores['step']} of {scores['last_step']}; chosen on the validation part",
        "data_hash": store.content_hash,
        "num_sessions": len(used),
        "num_subjects": int(subjects.iloc[used].nunique()),
        "num_slices": f"{store.sessions['num_slices'].iloc[used].sum()} ({per_session} of a session at a time)",
        "seed": recipe.seed,
        "device": describe_devices(training.device, training.world_size),
        "versions": run_folder.versions(),
        "metrics": [
            {
                "metric": name,
                **{column: _defined(values.get(name)) for column, values in columns.items()},
                "data": where,
            }
            for name in scores["scores"]
        ],
        "target": task.column,
        "split": sizes,
        "split seed": recipe.split.seed,
        "model_code": 'from brainfound.adapters import load_bundle\n\nmodel = load_bundle("path/to/this/folder").model',
    }


def _defined(score: float | None) -> float | str:
    """A score for a card; None is an undefined score, such as the correlation with a constant."""
    return "undefined" if score is None else score


def _describe_test_subjects(history: TrainingHistory, store: Store, parts: Mapping[str, np.ndarray]) -> str:
    """Whether the tested subjects are new to the model, as far as that is recorded in its starting model's history."""
    if "test" not in parts:
        return "No subject was kept back for a test: its scores are of subjects that took part in choosing it."
    names, test = store.sessions["subject"].to_numpy(), parts["test"]
    seen = names[test[history.seen(store, test.tolist())]]
    if len(seen):
        count = f"{len(set(seen))} of the {len(set(names[test]))} tested subjects"
        known = f"but {count} were, by name or image, in the training data of the model that it started from"
        return f"Its scores are of subjects that the fine-tuning did not see, {known}."
    if history.complete:
        return "Its scores are of subjects that it never saw."
    if not history.trainings:
        known = "that the fine-tuning did not see; the subjects in the training of its starting model are not recorded"
    else:
        known = "that neither the fine-tuning nor the recorded training before it saw; earlier training is not recorded"
    return f"Its scores are of subjects {known}."
