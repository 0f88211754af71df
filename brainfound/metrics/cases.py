"""Tables of cases: one row per session, as returned by an evaluation (``result.cases``) and stored in ``cases.tsv``.

    subject, and session or row     the case
    truth, p(A), p(B), …            classification: the class, and the probability of each class
    truth(A), truth(B), p(A), …     several labels: 0 or 1, and the probability of each; a score is their mean
    truth, prediction               regression
    dice, dice(ventricles), …       segmentation: one column per score, empty where a case has none; each of several
                                    structures (regions or classes) has its Dice, and the score is their mean

The tables of the test folds of a cross-validation may be concatenated; rank metrics such as AUROC then also compare
cases that different models scored. A system may have several tables of the same cases, one per seed: its score is the
mean over them.

Axes: n cases, K classes, L labels or structures, R runs of one system.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self, TypeAlias

import numpy as np
import pandas as pd

from brainfound.data.splits.dividing import label_text
from brainfound.errors import UsageError
from brainfound.metrics.registry import METRICS, PRIMARY_METRIC, TABLE_METRICS, metric_name, task_metrics

CaseTables: TypeAlias = pd.DataFrame | Sequence[pd.DataFrame]
"""A table of cases, or one per seed."""
Score = Callable[[np.ndarray, np.ndarray], float]
"""A metric of truth and answers."""


@dataclass(frozen=True)
class Cases(ABC):
    """The answers of one system, sorted by case; one subclass per task."""

    task: ClassVar[str]
    keys: pd.MultiIndex
    subjects: np.ndarray
    truth: np.ndarray
    """(n,) class indices or target values, (n, L) for several labels; for a segmentation the reference size, or 0."""
    answers: Mapping[str, np.ndarray]
    """Metric → (n,), (n, K) probabilities or (n, L); (n, R, …) of several runs."""
    num_runs: int = 1

    @staticmethod
    @abstractmethod
    def matches(cases: pd.DataFrame) -> bool:
        """Whether a table has the columns of this task."""

    @classmethod
    @abstractmethod
    def read_columns(cls, cases: pd.DataFrame, where: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The truth and the answers of a table."""

    @staticmethod
    def score(name: str, truth: np.ndarray, answers: np.ndarray) -> float:
        """A metric of one run."""
        return METRICS[name].score(truth, answers)

    def metric(self, name: str) -> Score:
        """The score as a function of the truth and the answers of some of the cases."""
        score = partial(self.score, name)
        if self.num_runs == 1:
            return score
        return lambda truth, answers: float(np.mean([score(truth, answers[:, r]) for r in range(answers.shape[1])]))

    def repeat_runs(self, num_runs: int) -> Self:
        """The same answers for each of several runs."""
        if self.num_runs == num_runs:
            return self
        answers = {name: np.stack([values] * num_runs, axis=1) for name, values in self.answers.items()}
        return replace(self, answers=answers, num_runs=num_runs)

    def require_same_scored(self, name: str, others: Sequence[Cases], where: str) -> None:
        """Refuse systems of which only some have a score for a case."""
        missing = [np.isnan(system.answers[name]) for system in (self, *others)]
        if any(map(np.any, missing)) and not all(np.array_equal(missing[0], other) for other in missing[1:]):
            what, got = "the systems were not scored against the same masks", "a case that only some have a score for"
            raise UsageError(what, where=where, got=got, remedy="Score them on the same store")

    def select_scored(self, name: str, *others: Cases) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Truth, answers of each system, and subjects of the cases that have the score."""
        self.require_same_scored(name, others, name)
        known = ~np.isnan(self.answers[name])
        scored = known.any(axis=tuple(range(1, known.ndim)))
        answers = [system.answers[name][scored] for system in (self, *others)]
        return self.truth[scored], answers, self.subjects[scored]


class ClassificationCases(Cases):
    task = "classification"

    @staticmethod
    def matches(cases: pd.DataFrame) -> bool:
        return bool(_probability_names(cases))

    @classmethod
    def read_columns(cls, cases: pd.DataFrame, where: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        names = _probability_names(cases)
        several = any(str(name).startswith("truth(") for name in cases.columns)
        truth = _binary_labels(cases, names, where) if several else _class_indices(cases, names, where)
        probabilities = np.stack([_numbers(cases, f"p({name})", where) for name in names], axis=1)
        return truth, {metric.name: probabilities for metric in task_metrics(cls.task)}

    @staticmethod
    def score(name: str, truth: np.ndarray, answers: np.ndarray) -> float:
        """Of several binary labels the mean over those where it is defined."""
        score = METRICS[name].score
        if truth.ndim == 1:
            return score(truth, answers)
        columns = zip(truth.T, answers.T, strict=True)
        scores = [score(labels, np.stack([1 - share, share], axis=1)) for labels, share in columns]
        defined = [value for value in scores if not np.isnan(value)]
        return float(np.mean(defined)) if defined else float("nan")


class RegressionCases(Cases):
    task = "regression"

    @staticmethod
    def matches(cases: pd.DataFrame) -> bool:
        return "prediction" in cases

    @classmethod
    def read_columns(cls, cases: pd.DataFrame, where: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        truth, prediction = _numbers(cases, "truth", where), _numbers(cases, "prediction", where)
        return truth, {metric.name: prediction for metric in task_metrics(cls.task)}


class SegmentationCases(Cases):
    task = "segmentation"

    @staticmethod
    def matches(cases: pd.DataFrame) -> bool:
        return any(metric_name(str(name)) in METRICS and cases[name].notna().any() for name in cases)

    @classmethod
    def read_columns(cls, cases: pd.DataFrame, where: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        found = [name for name in map(str, cases) if metric_name(name) in METRICS and cases[name].notna().any()]
        scores = {name: _numbers(cases, name, where, allow_missing=True) for name in found}
        if structures := [scores[name] for name in found if name.startswith("dice(")]:
            scores = {"dice": np.stack(structures, axis=1)} | {k: v for k, v in scores.items() if k != "dice"}
        sizes = _numbers(cases, "reference_pixels", where) if "reference_pixels" in cases else np.zeros(len(cases))
        return sizes, scores

    @staticmethod
    def score(name: str, truth: np.ndarray, answers: np.ndarray) -> float:
        """The mean over structures ``(n, L)`` of the mean over cases, without structures that no case has."""
        known = ~np.isnan(answers)
        counts, sums = known.sum(axis=0), np.where(known, answers, 0.0).sum(axis=0)
        means = np.atleast_1d(sums)[np.atleast_1d(counts) > 0] / counts[counts > 0]
        return float(means.mean()) if means.size else float("nan")


CASES: dict[str, type[Cases]] = {kind.task: kind for kind in (ClassificationCases, RegressionCases, SegmentationCases)}
"""Task → the reader of its tables."""


def _require_same_cases(base: Cases, other: Cases, base_name: str, name: str) -> None:
    if base.task != other.task:
        raise UsageError("the systems have different tasks", where=name, got=other.task, expected=base.task)
    known_by, expected = ", ".join(map(str, other.keys.names)), ", ".join(map(str, base.keys.names))
    if known_by != expected:
        raise UsageError(f"not the cases of {base_name}", where=name, got=f"columns {known_by}", expected=expected)
    if not base.keys.equals(other.keys):
        got = f"{len(base.keys.symmetric_difference(other.keys))} that only one of them has"
        remedy = "Score both on the same part of the same store"
        raise UsageError(f"not the cases of {base_name}", where=name, got=got, remedy=remedy)
    if not np.array_equal(base.truth, other.truth):
        raise UsageError(f"not the truth of {base_name}", where=name, remedy="Score both with the same labels")


def compute_headline_score(task: str, cases: pd.DataFrame) -> float:
    """The primary metric over a table of cases, which needs no subject column; ``nan`` if undefined."""
    primary, kind = PRIMARY_METRIC[task], CASES[task]
    truth, answers = kind.read_columns(cases, "cases")
    return kind.score(primary, truth, answers[primary]) if primary in answers else float("nan")


def list_table_metrics(task: str, tables: Sequence[pd.DataFrame]) -> list[str]:
    """The metrics that tables show and that each of some tables of cases has."""
    found = [CASES[task].read_columns(table, "cases")[1] for table in tables]
    return [name for name in TABLE_METRICS[task] if all(name in answers for answers in found)]


def read_matched_systems(systems: Mapping[str, CaseTables]) -> dict[str, Cases]:
    """Read systems that must share the cases and truth of the first; a single run is repeated for every seed."""
    read = {name: read_system(tables, name) for name, tables in systems.items()}
    first = next(iter(read))
    for name, other in read.items():
        _require_same_cases(read[first], other, first, name)
    most = max(system.num_runs for system in read.values())
    for name, system in read.items():
        if system.num_runs not in (1, most):
            what, remedy = "the systems have different numbers of seeds", "Train each with the same number of seeds"
            raise UsageError(what, where=name, got=system.num_runs, expected=f"1 or {most}", remedy=remedy)
    return {name: system.repeat_runs(most) for name, system in read.items()}


def read_system(tables: CaseTables, where: str) -> Cases:
    """Read a system from one or several tables of the same cases."""
    runs = [_read(table, where) for table in ([tables] if isinstance(tables, pd.DataFrame) else tables)]
    if not runs:
        raise UsageError("there are no cases", where=where)
    if len(runs) == 1:
        return runs[0]
    for number, run in enumerate(runs[1:], start=2):
        _require_same_cases(runs[0], run, "its first run", f"{where}, run {number}")
    common = [name for name in runs[0].answers if all(name in run.answers for run in runs)]
    for name in common:
        runs[0].require_same_scored(name, runs[1:], f"{where}, {name}")
    answers = {name: np.stack([run.answers[name] for run in runs], axis=1) for name in common}
    return replace(runs[0], answers=answers, num_runs=len(runs))


def _read(cases: pd.DataFrame, where: str) -> Cases:
    if "subject" not in cases:
        got = ", ".join(map(str, cases.columns))
        remedy = "Evaluate with --keep-ids, or look the rows up in store.sessions"
        raise UsageError("a column is missing", where=where, got=got, expected="subject", remedy=remedy)
    if cases.empty:
        raise UsageError("there are no cases", where=where)
    key = ["subject", *[name for name in ("session", "row") if name in cases][:1]]
    if cases[key].isna().any(axis=None):
        raise UsageError("a case has no name", where=where, got=f"an empty cell of {' or '.join(key)}")
    cases = cases.assign(**{name: cases[name].astype(str) for name in key}).sort_values(key, kind="stable")
    keys = pd.MultiIndex.from_frame(cases[key])
    if keys.has_duplicates:
        first = ", ".join(keys[keys.duplicated()][0])
        raise UsageError("a case is given twice", where=where, got=first, remedy="Keep one row per session")
    subjects = cases["subject"].to_numpy()
    kind = next((kind for kind in CASES.values() if kind.matches(cases)), None)
    if kind is None:
        got, expected = ", ".join(map(str, cases.columns)), "truth and p(class), truth and prediction, or dice"
        raise UsageError("the cases have no scores", where=where, got=got, expected=expected)
    truth, answers = kind.read_columns(cases, where)
    return kind(keys, subjects, truth, answers)


def _probability_names(cases: pd.DataFrame) -> list[str]:
    return [name[2:-1] for name in map(str, cases.columns) if name.startswith("p(") and name.endswith(")")]


def _class_indices(cases: pd.DataFrame, names: Sequence[str], where: str) -> np.ndarray:
    if "truth" not in cases:
        raise UsageError("a column is missing", where=where, expected="truth")
    index = {label_text(name): k for k, name in enumerate(names)}
    truth = [label_text(label) for label in cases["truth"]]
    if unknown := sorted(set(truth) - set(index)):
        got, expected = ", ".join(unknown[:4]), ", ".join(names)
        raise UsageError("a class has no column of probabilities", where=f"{where}: truth", got=got, expected=expected)
    return np.array([index[label] for label in truth])


def _binary_labels(cases: pd.DataFrame, names: Sequence[str], where: str) -> np.ndarray:
    truth = np.stack([_numbers(cases, f"truth({name})", where) for name in names], axis=1)
    if not np.isin(truth, (0, 1)).all():
        raise UsageError("several labels must be 0 or 1", where=f"{where}: truth(…)", got=np.unique(truth)[:4].tolist())
    return truth.astype(int)


def _numbers(cases: pd.DataFrame, column: str, where: str, allow_missing: bool = False) -> np.ndarray:
    if column not in cases:
        raise UsageError("a column is missing", where=where, expected=column)
    numbers = pd.to_numeric(cases[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(numbers)
    if allow_missing:
        bad &= cases[column].notna().to_numpy()
    if bad.any():
        raise UsageError("not finite numbers", where=f"{where}: {column}", got=cases[column][bad][:4].tolist())
    return numbers
