"""A model's scores on sessions of a store, with one row per case, intervals, and the baselines beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import Field
from torch import nn

from brainfound.data.batches import remove_contrasts
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.finetuning.targets import Target
from brainfound.metrics.comparison import score_intervals
from brainfound.metrics.registry import PRIMARY_METRIC, TABLE_METRICS
from brainfound.metrics.scores import (
    EmptyCase,
    classification_scores,
    mean_case_scores,
    multi_label_scores,
    regression_scores,
    segmentation_case_scores,
    trivial_multi_label_scores,
    trivial_scores,
)
from brainfound.models.infer import StackPrediction, infer, infer_embedded
from brainfound.recipes import Recipe
from brainfound.training.checkpoint import write_atomically

SCORES_FILE, CASES_FILE = "scores.json", "cases.tsv"
FROZEN_CASES_FILE = "frozen-cases.tsv"
"""The cases as a linear model on the untouched backbone answers them."""
CONFIDENCE, NUM_RESAMPLES = 0.95, 2000
"""Of the intervals that stand beside the scores."""
SUBJECT_ROW = "subject_row"
"""The column of `SessionScores.cases` that says which cases are of one subject, without a name: the row of the store
that has the subject's first session."""
PREDICTION_STD = "prediction_std"
"""The column of `SessionScores.cases` that has the standard deviation of a regression, where the head gives one."""


def probability_column(name: str) -> str:
    """The column of `SessionScores.cases` that has the probability of a class."""
    return f"p({name})"


class ScoringRecipe(Recipe):
    """How a segmentation is scored."""

    surface_mm: float | None = Field(None, ge=0)
    """With a tolerance in mm also normalised surface distance (surface Dice), HD95, lesion-wise F1 and volume error,
    which take many times as long; null: Dice and the relative volume error."""
    empty: EmptyCase = "left_out"
    """What Dice (surface Dice, lesion-wise F1) is where a session has not the structure: left_out (only clean_negatives
    tells); otherwise 0 where something was marked, and where nothing was nan (left out), one or zero."""


class ScoreInterval(NamedTuple):
    """The ends of a score's interval, and how many subjects it is over; the ends are nan where it is undefined."""

    low: float
    high: float
    num_subjects: int


@dataclass(frozen=True)
class SessionScores:
    """Scores on a set of sessions.

    Attributes:
        scores: metric → value.
        trivial: the same of the baseline that never looks at an image.
        cases: one row per session: row in the store, row of the subject's first session in the store, subject,
            session, truth, prediction (or dice and the other scores of a segmentation; of one without the structure
            only `clean_negatives`).
        without: contrasts that were withheld.
        frozen: metric → value of a linear model on the untouched backbone; None where it was not asked for.
        intervals: metric → interval of the scores that tables show; None before `with_intervals`.
        notes: what to know about them.
    """

    task: str
    scores: dict[str, float]
    trivial: dict[str, float]
    cases: pd.DataFrame
    without: tuple[str, ...] = ()
    frozen: dict[str, float] | None = None
    intervals: dict[str, ScoreInterval] | None = None
    notes: tuple[str, ...] = ()

    @property
    def headline(self) -> tuple[str, float, float]:
        """The metric by which the task is judged, its value, and the trivial baseline's."""
        metric = PRIMARY_METRIC[self.task]
        return metric, self.scores[metric], self.trivial[metric]

    def with_intervals(self) -> Self:
        """The same with bootstrap intervals over subjects, of the scores that tables show."""
        defined = [name for name in TABLE_METRICS[self.task] if np.isfinite(self.scores.get(name, np.nan))]
        found = score_intervals(self.cases, defined, num_resamples=NUM_RESAMPLES, confidence=CONFIDENCE)
        intervals = {}
        for row in found.to_dict(orient="records"):
            # With overlapping labels that some cases lack, a score may be none of the table of cases.
            same = np.isclose(row["value"], self.scores[row["metric"]], rtol=1e-6, atol=1e-9)
            low, high = (row["low"], row["high"]) if same else (float("nan"), float("nan"))
            intervals[row["metric"]] = ScoreInterval(low, high, row["num_subjects"])
        return replace(self, intervals=intervals)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; undefined scores become None."""

        def plain(scores: dict[str, float]) -> dict[str, float | None]:
            return {name: None if np.isnan(value) else float(value) for name, value in scores.items()}

        content: dict[str, Any] = {
            "task": self.task,
            "num_sessions": len(self.cases),
            "without": list(self.without),
            "scores": plain(self.scores),
            "trivial": plain(self.trivial),
        }
        if self.notes:
            content["notes"] = list(self.notes)
        if self.frozen is not None:
            content["frozen"] = plain(self.frozen)
        if self.intervals is not None:
            content["intervals"] = {
                "confidence": CONFIDENCE,
                "num_resamples": NUM_RESAMPLES,
                "scores": {
                    name: {**plain({"low": found.low, "high": found.high}), "num_subjects": found.num_subjects}
                    for name, found in self.intervals.items()
                },
            }
        return content


def write_scores(folder: Path, scored: SessionScores, *, keep_ids: bool = False, **facts: Any) -> dict[str, Any]:
    """Write ``scores.json`` and ``cases.tsv`` into a run folder; returns what the first one holds.

    Args:
        keep_ids: name subjects and sessions in ``cases.tsv``; otherwise their row in ``store.sessions`` says who it is.
    """
    content = scored.to_dict() | facts
    write_cases(folder / CASES_FILE, scored.cases, keep_ids)
    write_atomically(folder / SCORES_FILE, json.dumps(content, indent=1) + "\n")
    return content


def write_cases(file: Path, cases: pd.DataFrame, keep_ids: bool) -> None:
    """Write a table of cases, with the names of subjects and sessions or without."""
    shown = cases if keep_ids else cases.drop(columns=["subject", "session"])
    write_atomically(file, shown.to_csv(sep="\t", index=False))


def read_scores(folder: Path) -> dict[str, Any]:
    """Read the ``scores.json`` of a run."""
    return json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))


def score_sessions(
    model: nn.Module,
    store: Store,
    sessions: Sequence[int],
    target: Target,
    num_slices: int | None,
    without: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    cache: EmbeddingCache | None = None,
    scoring: ScoringRecipe = ScoringRecipe(),
) -> SessionScores:
    """Ask the model about every session and score the answers.

    Args:
        model: with the head of the target's task.
        store, sessions: the labelled sessions to score.
        target: how the labels are read; the trivial baseline answers what it says of the training part.
        num_slices: slices to read per session; None for all.
        without: contrasts to withhold. A session that has no other is left out.
        progress: called with (sessions done, sessions in all).
        cache: holds what the backbone says of the same slices; nothing is withheld then.
        scoring: of a segmentation.

    Raises:
        UsageError: if no session is left, or a withheld contrast is not one of the store's.
    """

    def predict_fn(session: int, stack: Stack) -> StackPrediction:
        if cache is not None:
            return infer_embedded(model, cache.batch([session]).inputs())
        return infer(model, remove_contrasts(stack, without) if without else stack, num_slices)

    return score_predictions(predict_fn, store, sessions, target, without, progress, scoring)


def score_predictions(
    predict_fn: Callable[[int, Stack], StackPrediction],
    store: Store,
    sessions: Sequence[int],
    target: Target,
    without: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    scoring: ScoringRecipe = ScoringRecipe(),
) -> SessionScores:
    """Score whatever answers about sessions: a model, or a baseline.

    Args:
        ask: answers about a session, given its index and its stack with all contrasts.
        store, sessions, target, without, progress, scoring: as for `score_sessions`.

    Raises:
        UsageError: as `score_sessions`.
    """
    unknown = [contrast for contrast in without if contrast not in store.contrasts]
    if unknown:
        raise UsageError(f"{unknown[0]} is not a contrast of the store", expected=", ".join(store.contrasts))
    withheld = np.isin(store.contrasts, list(without))
    usable = [int(i) for i in sessions if (store.present[int(i)] & ~withheld).any()]
    if not usable:
        raise UsageError(
            "no session is left to score", where=f"store {store.path.name}", got=f"without {', '.join(without)}"
        )
    segmenting = target.task == "segmentation"
    truths: list[Any] = [None] * len(usable) if segmenting else target.values(store, usable).tolist()

    def scored(reference: np.ndarray, found: np.ndarray, spacing_mm: np.ndarray | None = None) -> dict[str, float]:
        if scoring.surface_mm is None or spacing_mm is None:
            return segmentation_case_scores(reference, found, empty=scoring.empty)
        spacing = [float(step) for step in spacing_mm]
        return segmentation_case_scores(reference, found, spacing, scoring.surface_mm, scoring.empty)

    answers: list[Any] = []
    guesses: list[Mapping[str, Mapping[str, float]]] = []
    rows = []
    strange: dict[int, int] = {}
    names = store.sessions["subject"].tolist()
    first_rows = dict(zip(reversed(names), reversed(range(len(names))), strict=True))
    for done, (session, truth) in enumerate(zip(usable, truths, strict=True), start=1):
        stack = store[session]
        answer: Any = predict_fn(session, stack)
        row: dict[str, Any] = {"row": session, SUBJECT_ROW: first_rows[stack.subject]}
        row |= {"subject": stack.subject, "session": stack.session}
        if segmenting:
            reference = target.encode_mask(np.asarray(stack.mask))
            for code in target.unknown_codes(np.asarray(stack.mask)):
                strange[code] = strange.get(code, 0) + 1
            found, head = answer.labels if target.regions else answer.classes, np.asarray(stack.pixels.any(axis=1))
            structures = _structures(target).items()
            case = {name: scored(of(reference), of(found), stack.spacing_mm) for name, of in structures}
            answers.append(case)
            # Without an image everything inside the head is the structure; its surface, the head's, is not asked for.
            # Masks of a whole cohort are not kept.
            guesses.append({name: scored(of(reference), head) for name, of in structures})
            marked = reference.any(axis=1) if target.regions else reference
            row |= {"reference_pixels": int(np.count_nonzero(marked)), "dice": float("nan")} | _over_structures(case)
        elif target.task == "classification":
            answers.append(answer.probabilities)
            if target.multi_label:
                row |= {f"truth({name})": int(label) for name, label in zip(target.names, truth, strict=True)}
            else:
                row |= {"truth": target.names[truth]}
            shares = zip(target.names, answer.probabilities, strict=True)
            row |= {probability_column(name): float(share) for name, share in shares}
        else:
            answers.append(answer.value)
            row |= {"truth": truth, "prediction": answer.value}
            row |= {} if answer.value_std is None else {PREDICTION_STD: answer.value_std}
        rows.append(row)
        if progress:
            progress(done, len(usable))
    if segmenting:
        scores, trivial = _segmentation_scores(answers), _segmentation_scores(guesses)
    elif target.multi_label:
        scores = multi_label_scores(truths, np.stack(answers), target.names)
    elif target.task == "classification":
        scores = classification_scores(truths, np.stack(answers))
    else:
        scores = regression_scores(truths, answers)
    if not segmenting:
        trivial = _trivial_baseline_scores(target, truths) or dict.fromkeys(scores, float("nan"))
    absent = tuple(dict.fromkeys((*store.withheld, *without)))
    notes = tuple(
        f"mask code {code}, in {n} sessions, was not learnt: counted as background" for code, n in strange.items()
    )
    return SessionScores(target.task, scores, trivial, pd.DataFrame(rows), absent, notes=notes)


def _trivial_baseline_scores(target: Target, truths: Sequence[Any]) -> dict[str, float]:
    """The scores of what the training part says of everybody; none where the target does not remember it."""
    if target.task == "regression":
        return trivial_scores("regression", target.mean, truths)
    if not target.shares:
        return {}
    if target.multi_label:
        return trivial_multi_label_scores(target.shares, truths, target.names)
    return trivial_scores("classification", target.shares, truths)


def _structures(target: Target) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """How to find in masks what is scored by itself: each overlapping label, or each class; one class has no name."""
    if target.regions:
        return {name: partial(np.take, indices=k, axis=1) for k, name in enumerate(target.names)}
    if len(target.names) > 2:
        return {name: partial(np.equal, k) for k, name in enumerate(target.names) if k}
    return {"": np.asarray}


def _segmentation_scores(cases: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Of the scores by structure of each session: each structure over the sessions, and their mean."""
    return _over_structures({name: mean_case_scores([case[name] for case in cases]) for name in cases[0]})


def _over_structures(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the structures that have it, and Dice of each."""
    metrics = dict.fromkeys(metric for one in scores.values() for metric in one)
    means = {}
    for metric in metrics:
        values = np.array([one.get(metric, np.nan) for one in scores.values()])
        means[metric] = float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")
    return means | {f"dice({name})": one.get("dice", float("nan")) for name, one in scores.items() if name}
