"""A model's scores on sessions of a store: one row per case, intervals over subjects, and the baselines.

Tasks score their own answers (`brainfound.finetuning.tasks`); this module goes over the sessions and writes files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from torch import nn

from brainfound.data.batches import remove_contrasts
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.files import nan_as_none, require_json, write_atomically
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.finetuning.tasks import ScoringRecipe, Task
from brainfound.metrics.comparison import score_intervals
from brainfound.metrics.registry import PRIMARY_METRIC, TABLE_METRICS
from brainfound.metrics.statistics import CONFIDENCE, NUM_RESAMPLES, explain_missing_interval
from brainfound.models.stack_prediction import StackPrediction, infer, infer_embedded

SCORES_FILE, CASES_FILE = "scores.json", "cases.tsv"
FROZEN_CASES_FILE = "frozen-cases.tsv"
"""The cases as predicted by a linear model on the untouched backbone."""
SUBJECT_ROW = "subject_row"
"""The column of the cases that identifies a subject without a name: the store row of the subject's first session."""


class ScoreInterval(NamedTuple):
    """The ends of a score's interval (nan where it is undefined)."""

    low: float
    high: float
    num_subjects: int


@dataclass(frozen=True)
class SessionScores:
    """Scores on a set of sessions: metric → value."""

    task: str
    scores: dict[str, float]
    trivial: dict[str, float]
    """Scores of the baseline that never looks at an image."""
    cases: pd.DataFrame
    """One row per session: row in the store, `SUBJECT_ROW`, subject, session, and the task's columns (`Scorer.add`)."""
    without: tuple[str, ...] = ()
    """Contrasts that were withheld."""
    frozen: dict[str, float] | None = None
    """Scores of a linear model on the untouched backbone, if it was scored."""
    intervals: dict[str, ScoreInterval] | None = None
    """Intervals of the scores that tables show; None before `with_intervals`."""
    notes: tuple[str, ...] = ()
    verdict: dict[str, str] | None = None
    """``label`` and ``text`` of `brainfound.finetuning.verdict`, of the first input of an evaluation."""

    @property
    def headline(self) -> tuple[str, float, float]:
        """The metric by which the task is judged, its value, and the trivial baseline's."""
        metric = PRIMARY_METRIC[self.task]
        return metric, self.scores[metric], self.trivial[metric]

    def with_intervals(self) -> Self:
        """A copy with bootstrap intervals over subjects for the scores that tables show."""
        defined = [name for name in TABLE_METRICS[self.task] if np.isfinite(self.scores.get(name, np.nan))]
        table = score_intervals(self.cases, defined, num_resamples=NUM_RESAMPLES, confidence=CONFIDENCE)
        intervals = {}
        for row in table.to_dict(orient="records"):
            # With overlapping labels that some cases lack, a score may differ from the mean over the cases.
            same = np.isclose(row["value"], self.scores[row["metric"]], rtol=1e-6, atol=1e-9)
            low, high = (row["low"], row["high"]) if same else (float("nan"), float("nan"))
            intervals[row["metric"]] = ScoreInterval(low, high, row["num_subjects"])
        return replace(self, intervals=intervals)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; undefined scores become None."""
        content: dict[str, Any] = {
            "task": self.task,
            "num_sessions": len(self.cases),
            "without": list(self.without),
            "scores": nan_as_none(self.scores),
            "trivial": nan_as_none(self.trivial),
        }
        if self.notes:
            content["notes"] = list(self.notes)
        if self.verdict is not None:
            content["verdict"] = self.verdict
        if self.frozen is not None:
            content["frozen"] = nan_as_none(self.frozen)
        if self.intervals is not None:
            scores = {
                name: {**nan_as_none({"low": own.low, "high": own.high}), "num_subjects": own.num_subjects}
                for name, own in self.intervals.items()
            }
            content["intervals"] = {"confidence": CONFIDENCE, "num_resamples": NUM_RESAMPLES, "scores": scores}
            if missing := [own.num_subjects for own in self.intervals.values() if np.isnan(own.low)]:
                content["intervals"]["missing"] = explain_missing_interval(min(missing))
        return content


def write_scores(folder: Path, scored: SessionScores, *, keep_ids: bool = False, **facts: Any) -> dict[str, Any]:
    """Write ``scores.json`` and ``cases.tsv`` (`write_cases`) into a run folder; returns the content of the former."""
    content = scored.to_dict() | facts
    write_cases(folder / CASES_FILE, scored.cases, keep_ids)
    write_atomically(folder / SCORES_FILE, json.dumps(content, indent=1) + "\n")
    return content


def write_cases(file: Path, cases: pd.DataFrame, keep_ids: bool) -> None:
    """Write a table of cases; without ids, only their row in ``store.sessions`` identifies subjects and sessions."""
    table = cases if keep_ids else cases.drop(columns=["subject", "session"])
    write_atomically(file, table.to_csv(sep="\t", index=False))


def read_cases(file: Path) -> pd.DataFrame:
    """Read a table of `write_cases`."""
    # A class may be called NA, and 01 is not 1.
    dtypes = {"truth": str, "subject": str, "session": str}
    return pd.read_csv(file, sep="\t", dtype=dtypes, keep_default_na=False, na_values=[""])


def read_scores(folder: Path) -> dict[str, Any]:
    """The content of a run's scores.json; BrainFoundError if it cannot be read."""
    return require_json(folder / SCORES_FILE, "Remove the export folder of the run, then continue with --resume")


def score_sessions(
    model: nn.Module,
    store: Store,
    sessions: Sequence[int],
    task: Task,
    num_slices: int | None,
    without: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    cache: EmbeddingCache | None = None,
    scoring: ScoringRecipe = ScoringRecipe(),
) -> SessionScores:
    """Score a model's answers on sessions.

    Args:
        model: with the task's head.
        task: reads the labels, and holds the mean or class shares of its training part for the trivial baseline.
        num_slices: slices to read per session; None for all.
        without: contrasts to withhold. A session without any other contrast is left out.
        progress: called with (sessions done, number of sessions).
        cache: embeddings of the same slices; with a cache nothing is withheld.
        scoring: settings for a segmentation.

    Raises:
        UsageError: no session is left, or a withheld contrast is not in the store.
    """

    def predict_fn(session: int, stack: Stack) -> StackPrediction:
        if cache is not None:
            return infer_embedded(model, cache.batch([session]).inputs())
        return infer(model, remove_contrasts(stack, without) if without else stack, num_slices)

    return score_predictions(predict_fn, store, sessions, task, without, progress, scoring)


def score_predictions(
    predict_fn: Callable[[int, Stack], StackPrediction],
    store: Store,
    sessions: Sequence[int],
    task: Task,
    without: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    scoring: ScoringRecipe = ScoringRecipe(),
) -> SessionScores:
    """Score any function that predicts a session from its index and its stack; see `score_sessions`."""
    if unknown := [contrast for contrast in without if contrast not in store.contrasts]:
        raise UsageError(f"{unknown[0]} is not a contrast of the store", expected=", ".join(store.contrasts))
    withheld = np.isin(store.contrasts, list(without))
    usable = [int(i) for i in sessions if (store.present[int(i)] & ~withheld).any()]
    if not usable:
        where, got = f"store {store.path.name}", f"without {', '.join(without)}"
        raise UsageError("no session is left to score", where=where, got=got)
    scorer = task.make_scorer(store, usable, scoring)
    names = store.sessions["subject"].tolist()
    first_rows = dict(zip(reversed(names), reversed(range(len(names))), strict=True))
    rows = []
    for done, session in enumerate(usable, start=1):
        stack = store[session]
        who = {"row": session, SUBJECT_ROW: first_rows[stack.subject], "subject": stack.subject}
        rows.append({**who, "session": stack.session, **scorer.add(stack, predict_fn(session, stack))})
        if progress:
            progress(done, len(usable))
    total = scorer.result()
    absent = tuple(dict.fromkeys((*store.withheld, *without)))
    return SessionScores(task.kind, total.scores, total.trivial, pd.DataFrame(rows), absent, notes=total.notes)
