"""A model's scores on sessions of a store, with one row per case and the trivial baseline beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from brainfound.data.batches import without_contrasts
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.evaluate.metrics import dice
from brainfound.evaluate.scores import (
    HEADLINE,
    classification_scores,
    regression_scores,
    segmentation_scores,
    trivial_scores,
)
from brainfound.models.inference import infer
from brainfound.train.targets import Target

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class SessionScores:
    """Scores on a set of sessions.

    Attributes:
        scores: metric → value.
        trivial: the same of the baseline that never looks at an image.
        cases: one row per session: row in the store, subject, session, truth, prediction (or dice).
        without: contrasts that were withheld.
    """

    task: str
    scores: dict[str, float]
    trivial: dict[str, float]
    cases: pd.DataFrame
    without: tuple[str, ...] = ()

    @property
    def headline(self) -> tuple[str, float, float]:
        """The metric by which the task is judged, its value, and the trivial baseline's."""
        metric = HEADLINE[self.task]
        return metric, self.scores[metric], self.trivial[metric]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; undefined scores become None."""

        def plain(scores: dict[str, float]) -> dict[str, float | None]:
            return {name: None if np.isnan(value) else float(value) for name, value in scores.items()}

        return {
            "task": self.task,
            "num_sessions": len(self.cases),
            "without": list(self.without),
            "scores": plain(self.scores),
            "trivial": plain(self.trivial),
        }


def write_scores(folder: Path, scored: SessionScores, *, keep_ids: bool = False, **facts: Any) -> dict[str, Any]:
    """Write ``scores.json`` and ``cases.tsv`` into a run folder; returns what the first one holds.

    Args:
        keep_ids: name subjects and sessions in ``cases.tsv``; otherwise their row in ``store.sessions`` says who it is.
    """
    content = scored.to_dict() | facts
    cases = scored.cases if keep_ids else scored.cases.drop(columns=["subject", "session"])
    cases.to_csv(folder / "cases.tsv", sep="\t", index=False)
    (folder / SCORES_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def read_scores(folder: Path) -> dict[str, Any]:
    """Read the ``scores.json`` of a run."""
    return json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))


def score_sessions(
    model: nn.Module,
    store: Store,
    sessions: Sequence[int],
    target: Target,
    num_slices: int | None,
    train_labels: Sequence[float] = (),
    without: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> SessionScores:
    """Ask the model about every session and score the answers.

    Args:
        model: with the head of the target's task.
        store, sessions: the labelled sessions to score.
        target: how the labels are read.
        num_slices: slices to read per session; None for all.
        train_labels: class indices or values of the training part, for the trivial baseline.
        without: contrasts to withhold. A session that has no other is left out.
        progress: called with (sessions done, sessions in all).

    Raises:
        UsageError: if no session is left, or a withheld contrast is not one of the store's.
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
    answers: list[Any] = []
    heads: list[np.ndarray] = []
    rows = []
    for done, (session, truth) in enumerate(zip(usable, truths, strict=True), start=1):
        stack = store[session]
        answer: Any = infer(model, without_contrasts(stack, without) if without else stack, num_slices)
        row: dict[str, Any] = {"row": session, "subject": stack.subject, "session": stack.session}
        if segmenting:
            reference = target.encode_mask(np.asarray(stack.mask))
            found = answer.labels if target.regions else answer.classes
            answers.append((reference, found))
            heads.append(np.asarray(stack.pixels.any(axis=1)))
            row |= _segmentation_case(target, reference, found)
        elif target.task == "classification":
            answers.append(answer.probabilities)
            row |= {"truth": target.names[truth]}
            row |= {f"p({name})": float(p) for name, p in zip(target.names, answer.probabilities, strict=True)}
        else:
            answers.append(answer.value)
            row |= {"truth": truth, "prediction": answer.value}
        rows.append(row)
        if progress:
            progress(done, len(usable))
    if segmenting:
        references, predictions = zip(*answers, strict=True)
        scores, trivial = _segmentation_scores(target, references, predictions, heads)
    elif target.task == "classification":
        scores = classification_scores(truths, np.stack(answers))
        trivial = trivial_scores("classification", train_labels or truths, truths)
    else:
        scores = regression_scores(truths, answers)
        trivial = trivial_scores("regression", train_labels or truths, truths)
    return SessionScores(target.task, scores, trivial, pd.DataFrame(rows), tuple(without))


def _segmentation_case(target: Target, reference: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """The row of one session: Dice of everything that is marked, and of each region where labels overlap."""
    marked, true = (found.any(axis=1), reference.any(axis=1)) if target.regions else (found > 0, reference > 0)
    row = {"reference_pixels": int(true.sum()), "dice": dice(marked, true, empty="nan")}
    for k, name in enumerate(target.names if target.regions else ()):
        row[f"dice({name})"] = dice(found[:, k], reference[:, k], empty="nan")
    return row


def _segmentation_scores(
    target: Target, references: Sequence[np.ndarray], predictions: Sequence[np.ndarray], heads: Sequence[np.ndarray]
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores, and those of the trivial baseline. Overlapping labels are scored one by one; the score is their mean."""
    if not target.regions:
        return segmentation_scores(references, predictions), trivial_scores("segmentation", (), references, heads)
    of_each, trivial_of_each = {}, {}
    for k, name in enumerate(target.names):
        true, marked = ([labels[:, k] for labels in one] for one in (references, predictions))
        of_each[name] = segmentation_scores(true, marked)
        trivial_of_each[name] = trivial_scores("segmentation", (), true, heads)
    return _mean_and_each(of_each), _mean_and_each(trivial_of_each)


def _mean_and_each(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the regions that have it, and Dice of each region."""
    metrics = dict.fromkeys(metric for one in scores.values() for metric in one)
    means = {}
    for metric in metrics:
        values = np.array([one.get(metric, np.nan) for one in scores.values()])
        means[metric] = float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")
    return means | {f"dice({name})": one["dice"] for name, one in scores.items()}
