"""A model's scores on sessions of a store, with one row per case and the trivial baseline beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from brainfound.data.batches import without_contrasts
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.evaluate.multi_label import multi_label_scores, trivial_multi_label_scores
from brainfound.evaluate.scores import (
    HEADLINE,
    classification_scores,
    mean_case_scores,
    regression_scores,
    segmentation_case_scores,
    trivial_scores,
)
from brainfound.models.inference import infer, infer_embedded
from brainfound.train.embedding_cache import EmbeddingCache
from brainfound.train.targets import Target

SCORES_FILE = "scores.json"
PREDICTION_STD = "prediction_std"
"""The column of `SessionScores.cases` that has the standard deviation of a regression, where the head gives one."""


def probability_column(name: str) -> str:
    """The column of `SessionScores.cases` that has the probability of a class."""
    return f"p({name})"


@dataclass(frozen=True)
class SessionScores:
    """Scores on a set of sessions.

    Attributes:
        scores: metric → value.
        trivial: the same of the baseline that never looks at an image.
        cases: one row per session: row in the store, subject, session, truth, prediction (or dice and the
            other scores of a segmentation; of one without the structure only `clean_negatives`).
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
    train_labels: Sequence[Any] = (),
    without: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    cache: EmbeddingCache | None = None,
) -> SessionScores:
    """Ask the model about every session and score the answers.

    Args:
        model: with the head of the target's task.
        store, sessions: the labelled sessions to score.
        target: how the labels are read.
        num_slices: slices to read per session; None for all.
        train_labels: class indices or values of the training part, or 0 and 1 of each of several labels; for the
            trivial baseline.
        without: contrasts to withhold. A session that has no other is left out.
        progress: called with (sessions done, sessions in all).
        cache: holds what the backbone says of the same slices; nothing is withheld then.

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
    references: list[np.ndarray] = []
    heads: list[np.ndarray] = []
    rows = []
    for done, (session, truth) in enumerate(zip(usable, truths, strict=True), start=1):
        stack = store[session]
        answer: Any
        if cache is not None:
            answer = infer_embedded(model, cache.batch([session]).inputs())
        else:
            answer = infer(model, without_contrasts(stack, without) if without else stack, num_slices)
        row: dict[str, Any] = {"row": session, "subject": stack.subject, "session": stack.session}
        if segmenting:
            reference = target.encode_mask(np.asarray(stack.mask))
            case = _segmentation_case(target, reference, answer.labels if target.regions else answer.classes)
            references.append(reference)
            heads.append(np.asarray(stack.pixels.any(axis=1)))
            answers.append(case)
            marked = reference.any(axis=1) if target.regions else reference
            row |= {"reference_pixels": int(np.count_nonzero(marked)), "dice": float("nan")} | _over_regions(case)
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
        scores, trivial = _segmentation_scores(target, answers, references, heads)
    elif target.multi_label:
        scores = multi_label_scores(truths, np.stack(answers), target.names)
        trivial = trivial_multi_label_scores(train_labels or truths, truths, target.names)
    elif target.task == "classification":
        scores = classification_scores(truths, np.stack(answers))
        trivial = trivial_scores("classification", train_labels or truths, truths)
    else:
        scores = regression_scores(truths, answers)
        trivial = trivial_scores("regression", train_labels or truths, truths)
    absent = tuple(dict.fromkeys((*store.withheld, *without)))
    return SessionScores(target.task, scores, trivial, pd.DataFrame(rows), absent)


def _segmentation_case(target: Target, reference: np.ndarray, found: np.ndarray) -> dict[str, dict[str, float]]:
    """The scores of one session by region; without overlapping labels there is one entry, without a name."""
    if not target.regions:
        return {"": segmentation_case_scores(reference, found)}
    return {name: segmentation_case_scores(reference[:, k], found[:, k]) for k, name in enumerate(target.names)}


def _segmentation_scores(
    target: Target,
    cases: Sequence[Mapping[str, Mapping[str, float]]],
    references: Sequence[np.ndarray],
    heads: Sequence[np.ndarray],
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores, and those of the trivial baseline. Overlapping labels are scored one by one; the score is their mean."""
    scores = {name: mean_case_scores([case[name] for case in cases]) for name in cases[0]}
    truths = {name: [r[:, k] for r in references] if name else references for k, name in enumerate(cases[0])}
    trivial = {name: trivial_scores("segmentation", (), truth, heads) for name, truth in truths.items()}
    return _over_regions(scores), _over_regions(trivial)


def _over_regions(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the regions that have it, and Dice of each region."""
    metrics = dict.fromkeys(metric for one in scores.values() for metric in one)
    means = {}
    for metric in metrics:
        values = np.array([one.get(metric, np.nan) for one in scores.values()])
        means[metric] = float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")
    return means | {f"dice({name})": one.get("dice", float("nan")) for name, one in scores.items() if name}
