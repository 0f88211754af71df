"""A trained model on a store: the scores of its own test part, or of an external cohort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.adapters.bundle_reader import Bundle, load_bundle
from brainfound.data.checking.contract import InputContract, absence_note
from brainfound.data.split_file import PARTS
from brainfound.data.store import Store
from brainfound.data.store.withheld import showing
from brainfound.errors import ModelError, UsageError
from brainfound.evaluate.partial_input import non_empty_subsets
from brainfound.evaluate.scores import EmptyCase
from brainfound.predict.evaluation_files import require_free, write_evaluation
from brainfound.predict.loading import bundle_folder, load, predictor_of
from brainfound.predict.predictor import Predictor, usable_device
from brainfound.recipes import validate
from brainfound.train.frozen_baseline import frozen_of, score_frozen, scoring_of
from brainfound.train.session_scores import ScoringRecipe, SessionScores, score_sessions
from brainfound.train.session_split import in_parts, learnt_from
from brainfound.train.systems import short_name
from brainfound.train.targets import labelled_sessions


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
        model: a run folder, or a bundle wherever it lies: it remembers its split.
        data: a store. The one that the run was trained on: only the sessions of ``part``. Any other: all labelled
            sessions but those of subjects that the run was trained on, and those with an image of such a subject
            under another name.
        without: contrasts to withhold.
        partial_input: score every non-empty subset of the contrasts that the model reads, full input first.
        part: ``"test"``, ``"validation"`` or ``"train"``.
        frozen: score also the linear model on the untouched backbone that the bundle remembers, on the same sessions
            with the same contrasts; it takes about as long as the model itself.
        base: the model that the run started from, for the linear model of a bundle whose weights were all trained.
        surface_mm: of a segmentation also surface Dice within so many mm, HD95, lesion-wise F1 and the volume error;
            None: as the run's recipe has it (`scoring.surface_mm`).
        empty: what Dice is where a session has not the structure: ``"left_out"``, ``"nan"``, ``"one"`` or ``"zero"``,
            see `brainfound.evaluate.scores.segmentation_case_scores`; None: as the run's recipe has it.
        out: a folder that gets the page of this evaluation with its files, see `evaluation_files`.
        command: what was typed, for the page.
        progress: called with (sessions done, sessions in all).

    Returns:
        One result, or with ``partial_input`` one per subset.

    Raises:
        ModelError: the model has no head. UsageError: no session is left to score, or ``out`` holds something else.
    """
    if out is not None:
        require_free(Path(out))
    store = data if isinstance(data, Store) else Store.open(data)
    folder = bundle_folder(model)
    bundle = load_bundle(folder) if (folder / "bundle.json").is_file() else None
    predictor = load(model) if bundle is None else predictor_of(bundle, usable_device(None))
    target = predictor.target
    if bundle is None or target is None:
        raise ModelError("an encoder has nothing to be scored on", where=model, remedy="Fine-tune it first")
    scoring = _scoring(bundle, target.task, surface_mm, empty)
    require_like(predictor, store)
    if part not in PARTS:
        raise UsageError(f"a split has no part {part!r}", expected=", ".join(PARTS))
    store = showing(store, predictor.reads)
    # None of a bundle that was not made by a run.
    split, labelled = bundle.metadata.get("split"), labelled_sessions(store, target.column)
    labelled = labelled[store.present[labelled].any(axis=1)]  # all, unless the model reads only some contrasts
    sessions = _sessions_to_score(split, store, labelled, part)
    if not sessions:
        raise UsageError(
            "no labelled session of the store may be scored",
            where=store.path,
            got="only subjects that the model was trained on",
            remedy="Give the store of the run, or a cohort of other subjects",
        )
    everybody = _sessions_to_score(split, store, np.flatnonzero(store.present.any(axis=1)), part)
    missing = len(everybody) - len(sessions)
    general = [f"{missing} of {len(everybody)} sessions have no {target.column}: not scored"] if missing else []
    baseline = None
    if frozen:
        try:
            baseline = frozen_of(bundle, target, predictor.device, base)
        except ModelError as error:
            if base is not None:
                raise
            general.append(f"{error.what}. {error.remedy}")
    choices: list[tuple[str, ...]] = [tuple(without)]
    if partial_input:
        choices = [tuple(c for c in store.shown if c not in subset) for subset in non_empty_subsets(store.shown)]
    results = []
    for absent in choices:
        scored = score_sessions(
            predictor.model, store, sessions, target, predictor.num_slices, absent, progress, scoring=scoring
        )
        notes = (*general, *scored.notes, *_absence_notes(predictor.contract, store, scored))
        beside = None if baseline is None else score_frozen(baseline, store, sessions, absent, progress, scoring).scores
        results.append(replace(scored, notes=notes, frozen=beside))
    if out is not None:
        own = split is not None and split["data_hash"] == store.content_hash
        on = f"the {part} part of its own store" if own else "another store, but for the subjects that it learnt from"
        if split is None:
            on = "all labelled sessions of a store"
        write_evaluation(Path(out), results, store, target.column, short_name(model), on, command)
    return results


def _scoring(bundle: Bundle, task: str, surface_mm: float | None, empty: EmptyCase | None) -> ScoringRecipe:
    asked = {name: value for name, value in {"surface_mm": surface_mm, "empty": empty}.items() if value is not None}
    if asked and task != "segmentation":
        raise UsageError(
            "surfaces and empty masks are of a segmentation", where=next(iter(asked)), got=f"a {task} model"
        )
    return validate(ScoringRecipe, scoring_of(bundle).model_dump() | asked, where="evaluate")


def require_like(predictor: Predictor, store: Store) -> None:
    """Refuse a store that was prepared in another way than the model's training data."""
    if store.preprocessing != predictor.preprocessing:
        raise UsageError(
            "the store was prepared in another way than the model's training data",
            where=store.path,
            got=_difference(store.preprocessing.model_dump(), predictor.preprocessing.model_dump()),
            remedy="Prepare it with the model's preprocessing: brainfound prepare SOURCE STORE --like MODEL",
        )


def _sessions_to_score(split: dict[str, Any] | None, store: Store, labelled: np.ndarray, part: str) -> list[int]:
    if split is None:
        return labelled.tolist()
    if split["data_hash"] == store.content_hash:
        return labelled[in_parts(split, store, labelled.tolist(), part)].tolist()
    return labelled[~learnt_from(split, store, labelled.tolist())].tolist()


def _absence_notes(contract: InputContract | None, store: Store, scored: SessionScores) -> tuple[str, ...]:
    """A note on each contrast that the model never learnt to do without and that a scored session lacks."""
    rows, notes = scored.cases["row"].to_numpy(), []
    for contrast in () if contract is None else contract.never_absent:
        here = store.present[rows, store.contrasts.index(contrast)] & (contrast not in scored.without)
        if lacking := int((~here).sum()):
            notes.append(absence_note(contrast, f"in {lacking} of {len(rows)} sessions"))
    return tuple(notes)


def _difference(first: dict, second: dict) -> str:
    return "; ".join(f"{key} {first[key]} instead of {second[key]}" for key in first if first[key] != second[key])
