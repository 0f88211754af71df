"""A trained model on a store: the scores of its own test part, or of an external cohort."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from brainfound.data.store import Store
from brainfound.errors import ModelError, UsageError
from brainfound.evaluate.partial_input import non_empty_subsets
from brainfound.predict.predictor import load
from brainfound.train.session_scores import SessionScores, score_sessions
from brainfound.train.targets import labelled_sessions


def evaluate(
    model: str | Path,
    data: str | Path | Store,
    *,
    without: Sequence[str] = (),
    partial_input: bool = False,
    part: str = "test",
    progress: Callable[[int, int], None] | None = None,
) -> list[SessionScores]:
    """Score a fine-tuned model.

    Args:
        model: a run folder (its split is used) or a bundle.
        data: a store. The one that the run was trained on: only the sessions of ``part``. Any other: all labelled
            sessions but those of subjects that the run was trained on.
        without: contrasts to withhold.
        partial_input: score every non-empty subset of the contrasts, full input first.
        part: ``"test"``, ``"validation"`` or ``"train"``.

    Returns:
        One result, or with ``partial_input`` one per subset.

    Raises:
        ModelError: the model has no head. UsageError: no session is left to score.
    """
    store = data if isinstance(data, Store) else Store.open(data)
    predictor = load(model)
    target = predictor.target
    if target is None:
        raise ModelError("an encoder has nothing to be scored on", where=model, remedy="Fine-tune it first")
    if store.preprocessing != predictor.preprocessing:
        raise UsageError(
            "the store was prepared in another way than the model's training data",
            where=store.path,
            got=_difference(store.preprocessing.model_dump(), predictor.preprocessing.model_dump()),
            remedy="Prepare it with the model's preprocessing: brainfound prepare SOURCE STORE --like MODEL",
        )
    sessions = _sessions_to_score(Path(model), store, labelled_sessions(store, target.column), part)
    train_labels = _train_labels(Path(model), store, target)
    choices: list[tuple[str, ...]] = [tuple(without)]
    if partial_input:
        choices = [
            tuple(c for c in store.contrasts if c not in subset) for subset in non_empty_subsets(store.contrasts)
        ]
    results = []
    for absent in choices:
        results.append(
            score_sessions(
                predictor.model, store, sessions, target, predictor.num_slices, train_labels, absent, progress
            )
        )
    return results


def _split_of(model: Path) -> dict | None:
    for folder in (model, model.parent):
        if (folder / "splits.json").is_file():
            return json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    return None


def _sessions_to_score(model: Path, store: Store, labelled: np.ndarray, part: str) -> np.ndarray:
    split = _split_of(model)
    if split is None:
        return labelled
    subjects = store.sessions["subject"]
    if split["data_hash"] == store.content_hash:
        members = set(split["subjects"][part])
        return np.array([i for i in labelled if subjects.iloc[int(i)] in members], dtype=int)
    seen = set(split["subjects"]["train"]) | set(split["subjects"]["validation"])
    return np.array([i for i in labelled if subjects.iloc[int(i)] not in seen], dtype=int)


def _train_labels(model: Path, store: Store, target) -> list[float]:
    """Labels of the training part, for the trivial baseline, where the run's own store is scored."""
    split = _split_of(model)
    if split is None or split["data_hash"] != store.content_hash or target.task == "segmentation":
        return []
    members = set(split["subjects"]["train"])
    labelled = labelled_sessions(store, target.column)
    train = [int(i) for i in labelled if store.sessions["subject"].iloc[int(i)] in members]
    return target.values(store, train).tolist()


def _difference(first: dict, second: dict) -> str:
    return "; ".join(f"{key} {first[key]} instead of {second[key]}" for key in first if first[key] != second[key])
