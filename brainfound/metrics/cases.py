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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pandas as pd

from brainfound.data.splits.dividing import label_text
from brainfound.errors import UsageError
from brainfound.metrics.registry import METRICS, PRIMARY_METRIC, metric_name, task_metrics
from brainfound.metrics.scores import multi_label_scores

CaseTables: TypeAlias = pd.DataFrame | Sequence[pd.DataFrame]
"""A table of cases, or one per seed."""
Score = Callable[[np.ndarray, np.ndarray], float]
"""A metric of truth and answers."""


@dataclass(frozen=True)
class Cases:
    """The answers of one system, sorted by case."""

    task: str
    keys: pd.MultiIndex
    subjects: np.ndarray
    truth: np.ndarray
    """(n,) class indices or target values, (n, L) for several labels; for a segmentation the reference size, or 0."""
    answers: Mapping[str, np.ndarray]
    """Metric → (n,), (n, K) probabilities or (n, L); (n, R, …) of several runs."""
    num_runs: int = 1

    def metric(self, name: str) -> Score:
        """The score as a function of the truth and the answers of some of the cases."""
        score_run: Score
        if self.task == "segmentation":
            score_run = _mean_over_structures
        else:
            score_run = _mean_over_labels(METRICS[name].score) if self.truth.ndim == 2 else METRICS[name].score
        if self.num_runs == 1:
            return score_run
        return lambda truth, answers: float(np.mean([score_run(truth, answers[:, r]) for r in range(answers.shape[1])]))

    def repeat_runs(self, num_runs: int) -> Cases:
        """The same answers for each of several runs."""
        if self.num_runs == num_runs:
            return self
        answers = {name: np.stack([values] * num_runs, axis=1) for name, values in self.answers.items()}
        return replace(self, answers=answers, num_runs=num_runs)


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
    primary = METRICS[PRIMARY_METRIC[task]]
    if task == "segmentation":
        structures = [name for name in cases if str(name).startswith(f"{primary.name}(")] or [primary.name]
        means = np.array([cases[name].mean() for name in structures], dtype=float)
        return float(means[~np.isnan(means)].mean()) if not np.isnan(means).all() else float("nan")
    if task == "regression":
        return primary.score(cases["truth"].to_numpy(float), cases["prediction"].to_numpy(float))
    names = [str(name)[2:-1] for name in cases if str(name).startswith("p(")]
    probabilities = cases[[f"p({name})" for name in names]].to_numpy(float)
    if "truth" not in cases:
        truth = cases[[f"truth({name})" for name in names]].to_numpy(float)
        return multi_label_scores(truth, probabilities, names)[primary.name]
    return primary.score(_class_indices(cases, names, "cases"), probabilities)


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
    if runs[0].task == "segmentation":
        for name in common:
            first, *others = (np.isnan(run.answers[name]) for run in runs)
            if not all(np.array_equal(first, other) for other in others):
                raise mask_mismatch_error(f"{where}, {name}")
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
    if columns := [name for name in map(str, cases.columns) if name.startswith("p(") and name.endswith(")")]:
        names = [name[2:-1] for name in columns]
        several = any(str(name).startswith("truth(") for name in cases.columns)
        truth = _binary_labels(cases, names, where) if several else _class_indices(cases, names, where)
        probabilities = np.stack([_numbers(cases, name, where) for name in columns], axis=1)
        return Cases("classification", keys, subjects, truth, _answers_by_metric("classification", probabilities))
    if "prediction" in cases:
        truth, prediction = _numbers(cases, "truth", where), _numbers(cases, "prediction", where)
        return Cases("regression", keys, subjects, truth, _answers_by_metric("regression", prediction))
    found = [name for name in map(str, cases.columns) if metric_name(name) in METRICS and cases[name].notna().any()]
    if not found:
        got, expected = ", ".join(map(str, cases.columns)), "truth and p(class), truth and prediction, or dice"
        raise UsageError("the cases have no scores", where=where, got=got, expected=expected)
    scores = {name: _numbers(cases, name, where, allow_missing=True) for name in found}
    if structures := [scores[name] for name in found if name.startswith("dice(")]:
        scores = {"dice": np.stack(structures, axis=1)} | {k: v for k, v in scores.items() if k != "dice"}
    sizes = _numbers(cases, "reference_pixels", where) if "reference_pixels" in cases else np.zeros(len(cases))
    return Cases("segmentation", keys, subjects, sizes, scores)


def _answers_by_metric(task: str, answers: np.ndarray) -> dict[str, np.ndarray]:
    return {metric.name: answers for metric in task_metrics(task)}


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


def mask_mismatch_error(where: str) -> UsageError:
    what, got = "the systems were not scored against the same masks", "a case that only some of them have a score for"
    return UsageError(what, where=where, got=got, remedy="Score them on the same store")


def _mean_over_structures(truth: np.ndarray, scores: np.ndarray) -> float:
    """The mean over structures ``(n, L)`` of the mean over cases; structures that no case has are left out."""
    if scores.ndim == 1:
        return float(scores.mean())
    known = ~np.isnan(scores)
    counts, sums = known.sum(axis=0), np.where(known, scores, 0.0).sum(axis=0)
    return float((sums[counts > 0] / counts[counts > 0]).mean()) if counts.any() else float("nan")


def _mean_over_labels(score: Score) -> Score:
    """A two-class score averaged over several binary labels, without those where it is undefined."""

    def mean(truth: np.ndarray, shares: np.ndarray) -> float:
        columns = zip(truth.T, shares.T, strict=True)
        scores = [score(labels, np.stack([1 - share, share], axis=1)) for labels, share in columns]
        defined = [value for value in scores if not np.isnan(value)]
        return float(np.mean(defined)) if defined else float("nan")

    return mean
