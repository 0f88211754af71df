"""The judge: out-of-fold scores of every candidate on the same inner folds, and the choice among them.

Folds divide the subjects of the training and the validation part; the test part is not read. Candidates are compared by
the mean over subjects of the task's `selection_metric` (absolute error, log loss), which has paired standard errors and
no ties, unlike an AUROC of forty subjects.

The best of twenty candidates owes a part of its score to luck. The average of all linear candidates owes none, and is
linear again, so it is the default. Another one takes its place only where it is better by more than one standard error
of the paired difference. By the same margin the winner must be better than the trivial answer, or that is exported.

Axis legend: n volumes, R head outputs, M candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from brainfound.finetuning.auto.linear import fit_stack, losses, mean_and_error, mean_by_subject
from brainfound.finetuning.tasks import VolumeTask

TRIVIAL, AVERAGE, STACK = "trivial", "average", "stack"
FINISHED = "finished"
MAX_DEFICIT = 1.0
"""A trained candidate is stopped once it is worse than the best by more than this many standard errors of the paired
difference."""
Fold = tuple[np.ndarray, np.ndarray]
"""Positions of the volumes to fit to, and of those to score."""


@dataclass
class Result:
    """What is known of a candidate."""

    scores: Float[np.ndarray, "repeats n R"]
    """Out-of-fold head outputs; nan where a fold was not run."""
    seconds: float = 0.0
    folds: int = 0
    stopped: str = ""
    """Why it was stopped, or `FINISHED`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; nan becomes None."""
        scores = [[[None if value != value else value for value in row] for row in own] for own in self.scores.tolist()]
        return {"scores": scores, "seconds": self.seconds, "folds": self.folds, "stopped": self.stopped}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Result:
        return cls(**{**content, "scores": np.array(content["scores"], dtype=np.float64)})


class Choice(NamedTuple):
    """The winner."""

    name: str
    weights: dict[str, float]
    """Candidate → its weight; one candidate alone, or the members of an average or a stack."""
    score: float
    """Its mean loss over subjects, out of fold."""
    error: float
    trivial: float


@dataclass
class Judge:
    """Inner folds, and the results of candidates on them."""

    task: VolumeTask
    values: np.ndarray
    groups: np.ndarray
    """A number per volume, shared by the sessions of a subject."""
    repeats: Sequence[Sequence[Fold]]
    results: dict[str, Result] = field(default_factory=dict)

    def new_result(self, num_outputs: int) -> Result:
        return Result(np.full((len(self.repeats), len(self.values), num_outputs), np.nan))

    def subject_losses(self, result: Result) -> Float[np.ndarray, "subjects"]:
        """The loss of each subject, averaged over the repeats in which it was scored; nan where it was not."""
        per_repeat = [losses(self.task, self.values, scores) for scores in result.scores if not np.isnan(scores).all()]
        if not per_repeat:
            return np.full(len(np.unique(self.groups)), np.nan)
        stacked = np.stack(per_repeat)
        known = ~np.isnan(stacked)
        mean = np.where(known, stacked, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        return mean_by_subject(np.where(known.any(axis=0), mean, np.nan), self.groups)

    def mean(self, name: str) -> tuple[float, float]:
        """The mean loss of a candidate over the subjects that it was scored on, and its standard error."""
        own = self.subject_losses(self.results[name])
        return mean_and_error(own[~np.isnan(own)]) if (~np.isnan(own)).any() else (float("nan"), float("nan"))

    def is_hopeless(self, name: str) -> bool:
        """Whether a candidate is worse than the best finished one by more than `MAX_DEFICIT` standard errors."""
        own = self.subject_losses(self.results[name])
        known = ~np.isnan(own)
        finished = [one for one in self.finished() if one != name]
        if not finished or known.sum() < 3:
            return False
        best = min(finished, key=lambda one: self.mean(one)[0])
        difference, error = mean_and_error((own - self.subject_losses(self.results[best]))[known])
        return difference > MAX_DEFICIT * error

    def finished(self) -> list[str]:
        """The candidates with a score for every subject."""
        return [name for name, result in self.results.items() if not np.isnan(result.scores[0]).any()]

    def add_mixtures(self, members: Sequence[str]) -> None:
        """Add the average of linear candidates, and their stack with weights fitted on the other folds."""
        members = [name for name in members if name in self.finished()]
        if len(members) < 2:
            return
        scores = np.stack([self.results[name].scores for name in members])
        self.results[AVERAGE] = Result(scores.mean(axis=0), folds=min(self.results[name].folds for name in members))
        stacked = np.full(scores.shape[1:], np.nan)
        for repeat, folds in enumerate(self.repeats):
            if np.isnan(scores[:, repeat]).any():
                continue
            for train, test in folds:
                weights = fit_stack(self.task, self.values[train], scores[:, repeat][:, train])
                stacked[repeat, test] = np.tensordot(weights, scores[:, repeat][:, test], axes=1)
        self.results[STACK] = Result(stacked, folds=self.results[AVERAGE].folds)
        for name in (AVERAGE, STACK):
            self.results[name].stopped = FINISHED

    def choose(self, members: Sequence[str]) -> Choice:
        """The winner; ``members`` are the linear candidates, which an average or a stack may hold."""
        names = [name for name in self.finished() if name != TRIVIAL]
        own = {name: self.subject_losses(self.results[name]) for name in [TRIVIAL, *names]}
        best = min(names, key=lambda name: own[name].mean(), default=TRIVIAL)
        if AVERAGE in names:
            gain, error = mean_and_error(own[AVERAGE] - own[best])
            best = best if gain > error else AVERAGE
        gain, error = mean_and_error(own[TRIVIAL] - own[best])
        best = best if gain > error else TRIVIAL
        members = [name for name in members if name in names]
        weights = {} if best == TRIVIAL else {best: 1.0}
        if best == AVERAGE:
            weights = dict.fromkeys(members, 1 / len(members))
        elif best == STACK:
            scores = np.stack([np.nanmean(self.results[name].scores, axis=0) for name in members])
            weights = dict(zip(members, fit_stack(self.task, self.values, scores).tolist(), strict=True))
        return Choice(best, weights, *mean_and_error(own[best]), float(own[TRIVIAL].mean()))

    def out_of_fold(self, choice: Choice) -> Float[np.ndarray, "n R"]:
        """The out-of-fold scores of the winner, averaged over repeats."""
        return np.nanmean(self.results[choice.name].scores, axis=0)
