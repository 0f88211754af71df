"""The judge: out-of-fold scores of every candidate on the same inner folds, and the choice among them.

Folds divide the subjects of the training and the validation part; the test part is not read. Candidates are compared by
the mean over subjects of a loss that has paired standard errors and no ties, unlike an AUROC of forty subjects: the
absolute error, the log loss, or 1 − Dice.

The best of twenty candidates owes a part of its score to luck. The average of the better half of the linear candidates
owes little, and is linear again, so it is the default; its own score is of halves that were chosen on the other folds.
Without linear candidates the default is the first candidate. Another one takes its place only where it is better by
more than one standard error of the paired difference. A winner that is not better than the trivial answer gives way to
it, but not for a segmentation, which has none.

Axis legend: n volumes, R head outputs (of a segmentation the loss alone), M candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from brainfound.data.splits import dividing
from brainfound.data.splits.split_file import get_split_groups
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.finetuning.auto.linear import losses, mean_and_error, mean_by_subject
from brainfound.finetuning.auto.recipe import AutoRecipe
from brainfound.finetuning.linear_models import subject_group_indices
from brainfound.finetuning.splits import stratification_labels
from brainfound.finetuning.tasks import TargetColumn, Task, VolumeTask
from brainfound.finetuning.tasks.classification import MultiLabelClassification
from brainfound.training.randomness import INITIALISATION, derive_seed

TRIVIAL, AVERAGE = "trivial", "average"
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
    """Candidate → its weight; one candidate alone, or the members of the average."""
    score: float
    """Its mean loss over subjects, out of fold."""
    error: float
    trivial: float


@dataclass
class Judge:
    """Inner folds, and the results of candidates on them."""

    task: Task
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

    def score(self, loss: float) -> float:
        """A loss in terms of the task's `selection_metric`."""
        return 1 - loss if self.task.per_voxel else loss

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

    def add_average(self, linear: Sequence[str]) -> None:
        """Add the average of the better half of the linear candidates, chosen on the folds that are not scored."""
        members = [name for name in linear if name in self.finished()]
        if len(members) < 2:
            return
        scores = np.stack([self.results[name].scores for name in members])
        average = Result(np.full(scores.shape[1:], np.nan), stopped=FINISHED)
        average.folds = min(self.results[name].folds for name in members)
        for repeat, folds in enumerate(self.repeats):
            if np.isnan(scores[:, repeat]).any():
                continue
            own = np.stack([losses(self.task, self.values, one) for one in scores[:, repeat]])
            for train, test in folds:
                half = _better_half(own[:, train].mean(axis=1))
                average.scores[repeat, test] = scores[half, repeat][:, test].mean(axis=0)
        self.results[AVERAGE] = average

    def choose(self, linear: Sequence[str]) -> Choice:
        """The winner; ``linear`` are the candidates that the average is made of."""
        names = [name for name in self.finished() if name != TRIVIAL]
        own = {name: self.subject_losses(result) for name, result in self.results.items() if name in {TRIVIAL, *names}}
        default = next(name for name in (AVERAGE, *names, TRIVIAL) if name in own)
        others = [name for name in names if name not in linear]
        best = min(others, key=lambda name: own[name].mean(), default=default)
        gain, error = mean_and_error(own[default] - own[best])
        best = best if gain > error else default
        trivial = float(own[TRIVIAL].mean()) if TRIVIAL in own else float("nan")
        best = TRIVIAL if own[best].mean() >= trivial else best
        weights = {} if best == TRIVIAL else {best: 1.0}
        if best == AVERAGE:
            members = [name for name in linear if name in names]
            half = _better_half(np.array([own[name].mean() for name in members]))
            weights = {members[k]: 1 / len(half) for k in half}
        return Choice(best, weights, *mean_and_error(own[best]), trivial)

    def out_of_fold(self, name: str) -> Float[np.ndarray, "n R"]:
        """The out-of-fold scores of a candidate, averaged over repeats."""
        return np.nanmean(self.results[name].scores, axis=0)


def _better_half(scores: np.ndarray) -> np.ndarray:
    """The places of the lower half of the losses, and of one more where their number is odd."""
    return np.argsort(scores, kind="stable")[: (len(scores) + 1) // 2]


def make_judge(recipe: AutoRecipe, store: Store, column: TargetColumn, pool: np.ndarray, task: Task) -> Judge:
    """The judge with its inner folds; UsageError where there are too few subjects."""
    names = get_split_groups(store)[0]
    groups = names[pool].tolist()
    smallest = 2 * recipe.inner_folds
    if len(set(groups)) < smallest:
        raise UsageError(
            "too few subjects to choose a model by cross-validation",
            where="train and validation part",
            got=len(set(groups)),
            expected=f"at least {smallest}",
            remedy="Add subjects, lower --set inner_folds=3, or train one model with finetune-regression",
        )
    strata = {column.name: stratification_labels(store, pool, column.columns)}
    values = task.values(store, pool.tolist())
    repeats: list[list[Fold]] = []
    for repeat in range(recipe.inner_repeats):
        folds = dividing.k_folds(groups, recipe.inner_folds, derive_seed(INITIALISATION, recipe.seed) + repeat, strata)
        repeats.append([(part["train"], part["test"]) for part in folds])
    if isinstance(task, VolumeTask):
        _require_classes(task, task.values(store, pool.tolist()), repeats, column.name)
    values = np.zeros(len(pool)) if values is None else values  # the labels of a segmentation are in the stacks
    return Judge(task, values, subject_group_indices(names.tolist(), pool), repeats)


def _require_classes(task: VolumeTask, values: np.ndarray, repeats: Sequence[Sequence[Fold]], column: str) -> None:
    """Refuse a class that is not in every inner training fold."""
    for train, _ in chain.from_iterable(repeats):
        several = isinstance(task, MultiLabelClassification)
        missing = task.absent_names(values[train]) + (task.absent_names(1 - values[train]) if several else [])
        if missing:
            raise UsageError(
                f"a class has too few subjects for {len(repeats[0])} inner folds",
                where=f"column {column}",
                got=missing[0],
                remedy="Join it to another class, or leave its cells empty",
            )
