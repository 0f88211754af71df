"""Evaluation of a fine-tuned model on a store: the test part of its own store, or an external cohort.

The folder of an evaluation:

    summary.json   data, model and scores
    cases.tsv      one row per session (for partial input, the answers with full input); subjects are numbered
    report.md      the page; report.png where there is more than one score
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.adapters.bundle_reader import Bundle
from brainfound.data.batches import remove_contrasts
from brainfound.data.checking.contract import InputContract, missing_contrast_note
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.splits.split_file import PARTS
from brainfound.data.splits.training_history import TrainingHistory, image_in_training, is_in_parts, seen_in_training
from brainfound.data.store import Store
from brainfound.data.store.store import restrict_contrasts
from brainfound.errors import ModelError, UsageError
from brainfound.experiments.folder import (
    CASES_FILE,
    SCHEMA,
    SUMMARY_FILE,
    compute_spread,
    describe_data,
    get_score_columns,
    make_score_columns,
    summarise_runs,
    to_json_records,
)
from brainfound.experiments.page import write_experiment_page
from brainfound.experiments.systems import non_empty_subsets
from brainfound.files import nan_as_none, require_json
from brainfound.finetuning.frozen_baseline import NoFrozenBaselineError, load_frozen_baseline, scoring_from_bundle
from brainfound.finetuning.scoring import SessionScores, score_predictions
from brainfound.finetuning.tasks import ScoringRecipe, TargetColumn, Task, from_dict
from brainfound.finetuning.verdict import judge
from brainfound.inference.ensemble import EnsemblePredictor
from brainfound.inference.loading import load_with_bundles
from brainfound.inference.predictor import Predictor
from brainfound.metrics.cases import compute_headline_score
from brainfound.metrics.registry import METRICS, PRIMARY_METRIC, EmptyCase
from brainfound.models.stack_prediction import StackPrediction
from brainfound.recipes import validate
from brainfound.training.run_folder import short_name

_KIND = "evaluation"


def compute_drops(results: Sequence[SessionScores]) -> list[float]:
    """For each result, the drop of its primary metric relative to full input on the same sessions.

    Args:
        results: from `evaluate` with partial input, full input first. A session with none of a subset's contrasts is
            not scored for it, so sessions may differ between rows.
    """
    full, primary = results[0].cases.set_index("row", drop=False), METRICS[PRIMARY_METRIC[results[0].task]]
    drops = []
    for result in results:
        same = compute_headline_score(result.task, full.loc[result.cases["row"]])
        drops.append(primary.drop(same, compute_headline_score(result.task, result.cases)))
    return drops


def require_writable(folder: Path) -> None:
    """Accept an empty folder or an earlier evaluation, which is replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    file = folder / SUMMARY_FILE
    if not file.is_file() or require_json(file, "Give another --out").get("kind") != _KIND:
        raise UsageError("the folder holds something else", where=folder, remedy="Give another --out")


def write_evaluation(
    folder: Path, results: Sequence[SessionScores], store: Store, target: str, model: str, on: str, command: str = ""
) -> Path:
    """Write the folder of an evaluation and return its page.

    Args:
        results: one result, or those of partial input with full input first.
        target, model, on: target column, model and scored sessions, in words.
    """
    task = results[0].task
    rows = [_row(result, store) for result in results]
    table = pd.DataFrame(rows)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": _KIND,
        "target": target,
        "task": task,
        "headline": PRIMARY_METRIC[task],
        "model": model,
        "on": on,
        "command": command,
        "data": describe_data(store),
        "baselines": get_score_columns(table)[1],
        "scores": to_json_records(summarise_runs(table[:1])),
    }
    intervals = results[0].with_intervals().intervals or {}
    for row in content["scores"]:
        if (own := intervals.get(row["score"])) is not None:
            row["interval"] = nan_as_none({"low": own.low, "high": own.high}) | {"num_subjects": own.num_subjects}
    if results[0].verdict is not None:
        content["verdict"] = results[0].verdict
    if notes := list(dict.fromkeys(line for result in results for line in result.notes)):
        content["notes"] = notes
    if len(results) > 1:
        content["partial_input"] = to_json_records(_partial_rows(table, PRIMARY_METRIC[task], compute_drops(results)))
    folder.mkdir(parents=True, exist_ok=True)
    cases = results[0].cases.drop(columns=["subject", "session"])
    who = pd.factorize(store.sessions["subject"].astype(str))[0]
    cases.insert(0, "subject", who[cases["row"]])
    cases.to_csv(folder / CASES_FILE, sep="\t", index=False)
    (folder / SUMMARY_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return write_experiment_page(folder)


def _row(result: SessionScores, store: Store) -> dict[str, Any]:
    content = result.to_dict()
    contrasts = [name for name in store.shown if name not in result.without]
    return {
        "contrasts": ", ".join(contrasts),
        "group": "all contrasts" if len(contrasts) == len(store.contrasts) else ", ".join(contrasts),
        "fold": "",
        "seed": 0,
        "num_test": content["num_sessions"],
        **make_score_columns(content),
    }


def _partial_rows(table: pd.DataFrame, headline: str, drops: Sequence[float]) -> pd.DataFrame:
    _, baselines = get_score_columns(table)
    rows = []
    for k, drop in enumerate(drops):
        part = table[k : k + 1]
        first = {"contrasts": part["contrasts"].iloc[0], "absence": "test" if k else "none", "score": headline}
        rows.append(
            first | compute_spread(part, headline, baselines) | {"drop": drop, "num_test": part["num_test"].iloc[0]}
        )
    return pd.DataFrame(rows)


def evaluate(
    model: str | Path,
    data: str | Path | Store,
    *,
    without: Sequence[str] = (),
    partial_input: bool = False,
    part: str = "test",
    frozen: bool = True,
    base: str | Path | None = None,
    surface_mm: float | None = None,
    empty: EmptyCase | None = None,
    out: str | Path | None = None,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[SessionScores]:
    """Score a fine-tuned model.

    Args:
        model: a run folder or a bundle, which know their split, or an experiment over folds and seeds, whose mean is
            scored on the sessions that no run was trained on.
        data: a store. On the store of the run, the sessions of ``part``; on any other, all labelled sessions except
            those of training subjects and those with an image of such a subject under another name.
        without: contrasts to withhold; not with ``partial_input``.
        partial_input: score every non-empty subset of the contrasts that the model reads, full input first.
        part: ``"test"``, ``"validation"`` or ``"train"``.
        frozen: also score the bundle's linear model on the frozen backbone, on the same sessions and contrasts; doubles
            the time.
        base: the starting model of the run, for the linear model of a bundle from full fine-tuning.
        surface_mm: for a segmentation, also surface Dice at this tolerance, HD95, lesion-wise F1 and the volume error;
            None: as in the run's recipe (`scoring.surface_mm`).
        empty: Dice of a session without the structure: ``"left_out"``, ``"nan"``, ``"one"`` or ``"zero"``,
            see `brainfound.metrics.registry.segmentation_case_scores`; None: as in the run's recipe.
        out: a folder for the page of this evaluation and its files.
        command: the command line, for the page.

    Returns:
        One result, or with ``partial_input`` one per subset.

    Raises:
        ModelError: the model has no head. UsageError: no session is left to score, or ``out`` holds something else.
    """
    if partial_input and without:
        what, remedy = "partial input scores every subset of the contrasts already", "Leave one of the two out"
        raise UsageError(what, where="--without with --partial-input", got=", ".join(without), remedy=remedy)
    if part not in PARTS:
        raise UsageError("a split has no such part", where="--part", got=part, expected=", ".join(PARTS))
    if out is not None:
        require_writable(Path(out))
    store = data if isinstance(data, Store) else Store.open(data)
    predictor, bundles = load_with_bundles(model)
    target = predictor.target
    if not bundles or target is None:
        raise ModelError("an encoder has no answers to score", where=model, remedy="Fine-tune it first", usage=True)
    scoring = _scoring(bundles[0], target, surface_mm, empty)
    require_same_preprocessing(predictor, store)
    store = restrict_contrasts(store, predictor.input_contrasts)
    # A bundle that was not made by a run has no split.
    splits = [split for bundle in bundles if (split := bundle.metadata.get("split")) is not None]
    labelled = TargetColumn.find(store, target.column).labelled
    labelled = labelled[store.present[labelled].any(axis=1)]  # all, unless the model reads only some contrasts
    sessions = _select_sessions(splits, store, labelled, part)
    own = any(split["data_hash"] == store.content_hash for split in splits)
    if not sessions:
        raise _nobody_to_score(splits, store, labelled, own)
    candidates = _select_sessions(splits, store, np.flatnonzero(store.present.any(axis=1)), part)
    missing = len(candidates) - len(sessions)
    general = [f"{missing} of {len(candidates)} sessions have no {target.column}: not scored"] if missing else []
    seen = np.any([TrainingHistory.load(bundle.folder).seen(store, sessions) for bundle in bundles], axis=0).sum()
    if part == "test" and seen:
        what = "by name or image, of subjects in the training data of the model that the fine-tuning started from"
        general.append(f"{seen} of {len(sessions)} sessions are, {what}")
    if splits and not own:
        general += _notes_on_left_out(splits, store, labelled)
    baseline = None
    if frozen:
        try:
            baseline = _load_baseline(predictor, bundles, target, base)
        except NoFrozenBaselineError as error:
            if base is not None:
                raise
            general.append(f"{error.what}. {error.remedy}")
    choices: list[tuple[str, ...]] = [tuple(without)]
    if partial_input:
        choices = [tuple(c for c in store.shown if c not in subset) for subset in non_empty_subsets(store.shown)]
    results: list[SessionScores] = []
    for absent in choices:
        answer = partial(_answer, predictor, without=absent)
        scored = score_predictions(answer, store, sessions, target, absent, progress, scoring)
        notes = (*general, *scored.notes, *_absence_notes(predictor.contract, store, scored))
        linear = None
        if baseline is not None:
            answer = partial(baseline, without=absent)
            linear = score_predictions(answer, store, sessions, target, absent, progress, scoring)
        verdict = None if results else judge(target, scored, linear, None, part)._asdict()  # of the first input
        frozen_scores = None if linear is None else linear.scores
        results.append(replace(scored, notes=notes, frozen=frozen_scores, verdict=verdict))
    if out is not None:
        on = f"the {part} part of its own store" if own else "another store, without the subjects of its fine-tuning"
        if not splits:
            on = "all labelled sessions of a store"
        write_evaluation(Path(out), results, store, target.column, short_name(model), on, command)
    return results


def _scoring(bundle: Bundle, task: Task, surface_mm: float | None, empty: EmptyCase | None) -> ScoringRecipe:
    given = {name: value for name, value in {"surface_mm": surface_mm, "empty": empty}.items() if value is not None}
    if given and not task.per_voxel:
        raise UsageError(
            "surfaces and empty masks are for segmentations", where=next(iter(given)), got=f"a {task.kind} model"
        )
    return validate(ScoringRecipe, scoring_from_bundle(bundle).model_dump() | given, where="evaluate")


def require_same_preprocessing(predictor: Predictor, store: Store) -> None:
    """Require that the store was prepared in the same way as the model's training data."""
    if store.preprocessing != predictor.preprocessing:
        own, models = store.preprocessing.model_dump(), predictor.preprocessing.model_dump()
        raise UsageError(
            "the store was prepared in another way than the model's training data",
            where=store.path,
            got="; ".join(f"{key} {own[key]} instead of {models[key]}" for key in own if own[key] != models[key]),
            remedy="Prepare it with the model's preprocessing: brainfound prepare SOURCE STORE --like MODEL",
        )


def _nobody_to_score(splits: Sequence[dict[str, Any]], store: Store, labelled: np.ndarray, own: bool) -> UsageError:
    members, remedy = len(splits) > 1, "Give the store of the run, or a cohort of other subjects"
    if not own and not any(image_in_training(split, store, labelled.tolist()).any() for split in splits):
        remedy = "They agree by name only: if they are other people, prepare them from a manifest with other names"
    elif members:
        remedy = "Give a cohort of other subjects; scores of each fold are in the experiment's report.md"
    return UsageError(
        "no labelled session of the store may be scored",
        where=store.path,
        got=f"only subjects that {'a member' if members else 'the model'} was trained on",
        remedy=remedy,
    )


def _answer(predictor: Predictor, session: int, stack: Stack, without: Sequence[str]) -> StackPrediction:
    return predictor.infer_stack(remove_contrasts(stack, without) if without else stack)


def _load_baseline(
    predictor: Predictor, bundles: Sequence[Bundle], task: Task, base: str | Path | None
) -> Callable[..., StackPrediction]:
    """The frozen baseline of a bundle, or the mean of those of an experiment: (session, stack, without) → answer."""
    if not isinstance(predictor, EnsemblePredictor):
        return load_frozen_baseline(bundles[0], task, predictor.device, base).answer
    if task.per_voxel:
        what, remedy = "linear masks of several folds have no mean", "Evaluate one run for its frozen baseline"
        raise NoFrozenBaselineError(what, remedy=remedy)
    # A member's own task: the scale of a regression differs between folds.
    tasks = [from_dict(bundle.labels) for bundle in bundles]
    each = [load_frozen_baseline(b, own, predictor.device, base) for b, own in zip(bundles, tasks, strict=True)]
    return lambda session, stack, without: predictor.mean([b.answer(session, stack, without) for b in each])


def _select_sessions(splits: Sequence[dict[str, Any]], store: Store, labelled: np.ndarray, part: str) -> list[int]:
    """The sessions that every member of a model may be scored on."""
    for split in splits:
        if split["data_hash"] == store.content_hash:
            labelled = labelled[is_in_parts(split, store, labelled.tolist(), part)]
        else:
            labelled = labelled[~seen_in_training(split, store, labelled.tolist())]
    return labelled.tolist()


def _notes_on_left_out(splits: Sequence[dict[str, Any]], store: Store, labelled: np.ndarray) -> list[str]:
    """A note on the sessions of another store whose subjects the fine-tuning saw."""
    sessions = labelled.tolist()
    num_seen = int(np.any([seen_in_training(split, store, sessions) for split in splits], axis=0).sum())
    by_image = np.any([image_in_training(split, store, sessions) for split in splits], axis=0)
    if not num_seen:
        return []
    note = f"{num_seen} of {len(sessions)} labelled sessions are left out: their subjects are in the fine-tuning"
    if by_image.any():
        return [f"{note} ({int(by_image.sum())} by image, the others by name)"]
    return [f"{note}, by name only. If they are other people, prepare the store from a manifest with other names"]


def _absence_notes(contract: InputContract | None, store: Store, scored: SessionScores) -> tuple[str, ...]:
    """A note on each contrast that was never absent in training but is missing from a scored session."""
    rows, notes = scored.cases["row"].to_numpy(), []
    for contrast in () if contract is None else contract.never_absent:
        here = store.present[rows, store.contrasts.index(contrast)] & (contrast not in scored.without)
        if lacking := int((~here).sum()):
            notes.append(missing_contrast_note(contrast, f"in {lacking} of {len(rows)} sessions"))
    return tuple(notes)
