"""Systems on the same cases: every score with its interval, and every difference with its interval and its tests.

Cases are tables with one row per session, as an evaluation gives them (``result.cases``) and ``cases.tsv`` holds them:

    subject, and session or row     who it is
    truth, p(A), p(B), …            classification: the class and the probability of each class
    truth, prediction               regression
    dice, dice(region), …           segmentation: one column per score, empty where a case has none

The tables of a cross-validation's test folds may be put one below the other: together they are one table of all
subjects. A rank metric such as AUROC then also compares cases that different models scored.

Axes: n cases, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from brainfound.data.splits import label_text
from brainfound.errors import UsageError, did_you_mean
from brainfound.evaluate.delong import delong_test
from brainfound.evaluate.scores import HIGHER_IS_BETTER, METRICS, Score
from brainfound.evaluate.statistics import bootstrap_interval, holm, paired_permutation_test

_OF_RANKS = ("auroc", "auprc")
"""Metrics to which only the order of the scores matters."""

_COLUMNS = [
    *("metric", "system", "value", "low", "high", "difference", "difference_low", "difference_high"),
    *("p", "p_holm", "p_delong", "p_delong_holm", "higher_is_better", "num_cases", "num_subjects"),
]


@dataclass(frozen=True)
class _Cases:
    """One system's answers, sorted by case."""

    task: str
    keys: pd.MultiIndex
    subjects: np.ndarray
    truth: np.ndarray
    """(n,) class indices or target values; for a segmentation the size of the reference, where it is known."""
    answers: Mapping[str, np.ndarray]
    """Metric → (n,), or (n, K) probabilities."""

    def metric(self, name: str) -> Score:
        if self.task == "segmentation":
            return lambda truth, scores: float(scores.mean())
        return METRICS[self.task][name]


def score_intervals(
    cases: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Each score of a system with its bootstrap interval over subjects.

    Args:
        cases: a table of cases, see above.
        metrics: names of `brainfound.evaluate.scores.HIGHER_IS_BETTER`; by default all that the task has.
        num_resamples, confidence, seed: as in `bootstrap_interval`.

    Returns:
        One row per metric: metric, value, low, high, num_cases, num_subjects (those that the metric is over). What
        has no defined score is ``nan``.

    Raises:
        UsageError: if a column is missing or a value cannot be used, a case is there twice, or a metric is not one of
            the task.
    """
    system, drawing = _read(cases, "cases"), _Drawing(num_resamples, confidence, seed)
    rows = []
    for name in _chosen(system, metrics):
        truth, (answers,), subjects = _of_metric(name, system)
        interval = drawing.interval(system.metric(name), subjects, truth, answers)
        rows.append([name, *interval, len(subjects), len(set(subjects))])
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "num_cases", "num_subjects"])


def compare(
    systems: Mapping[str, pd.DataFrame],
    against: str,
    metrics: Sequence[str] | None = None,
    *,
    num_resamples: int = 2000,
    num_permutations: int = 5000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare systems with one of them, on the same cases.

    p is of a permutation test that exchanges the two systems' answers within subjects. Where only their order matters
    (AUROC, AUPRC) the scores become ranks first, since systems need not share a scale. AUROC of two classes also has
    DeLong's p, if every subject has one case. Holm's correction is over the systems that are compared, metric by
    metric: a reader who picks the best of several metrics has to correct for that as well.

    Args:
        systems: name → a table of cases, see above. All must have the same cases with the same truth.
        against: the name of the system that the others are compared with.
        metrics, num_resamples, confidence, seed: as in `score_intervals`.
        num_permutations: as in `paired_permutation_test`.

    Returns:
        One row per metric and system, the one that is compared with first: metric, system, value, low, high,
        difference (system − against), difference_low, difference_high, p, p_holm, p_delong, p_delong_holm,
        higher_is_better, num_cases, num_subjects. What is not defined is ``nan``.

    Raises:
        UsageError: as `score_intervals`, and if the systems do not have the same cases or truth.

    Source: A. I. Bandos, H. E. Rockette and D. Gur, "A permutation test sensitive to differences in areas for comparing
    ROC curves from a paired design", Stat Med 2005 (exchange of ranks within cases).
    """
    if against not in systems:
        raise UsageError(f"no system is called {against!r}", where="against", remedy=did_you_mean(against, systems))
    base = _read(systems[against], against)
    others = {name: _read(table, name) for name, table in systems.items() if name != against}
    for name, other in others.items():
        _require_same_cases(base, other, against, name)
    drawing = _Drawing(num_resamples, confidence, seed, num_permutations)
    rows: list[dict[str, Any]] = []
    for metric in _chosen(base, metrics, others):
        compared = [_against(metric, name, other, base, drawing) for name, other in others.items()]
        for column in ("p", "p_delong"):
            for row, adjusted in zip(compared, holm([row[column] for row in compared]), strict=True):
                row[f"{column}_holm"] = float(adjusted)
        rows += [_alone(metric, against, base, drawing), *compared]
    return pd.DataFrame(rows, columns=_COLUMNS)


@dataclass(frozen=True)
class _Drawing:
    """How resamples and permutations are drawn."""

    num_resamples: int
    confidence: float
    seed: int
    num_permutations: int = 0

    def interval(
        self, metric: Callable[..., float], subjects: np.ndarray, *values: np.ndarray
    ) -> tuple[float, float, float]:
        """Value, low and high; the ends are nan where the metric has no finite value on the cases themselves."""
        value = float(metric(*values)) if len(subjects) else float("nan")
        if not np.isfinite(value):
            return value, float("nan"), float("nan")
        found = bootstrap_interval(
            metric,
            *values,
            subjects=subjects,
            num_resamples=self.num_resamples,
            confidence=self.confidence,
            seed=self.seed,
        )
        return found.estimate, found.low, found.high

    def p(self, metric: Score, subjects: np.ndarray, truth: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
        return float(
            paired_permutation_test(a, b, lambda x: metric(truth, x), self.num_permutations, self.seed, subjects)
        )


def _alone(metric: str, name: str, system: _Cases, drawing: _Drawing) -> dict[str, Any]:
    truth, (answers,), subjects = _of_metric(metric, system)
    interval = drawing.interval(system.metric(metric), subjects, truth, answers)
    return {
        "metric": metric,
        "system": name,
        **dict(zip(("value", "low", "high"), interval, strict=True)),
        "higher_is_better": HIGHER_IS_BETTER[_kind(metric)],
        "num_cases": len(subjects),
        "num_subjects": len(set(subjects)),
    }


def _against(metric: str, name: str, system: _Cases, base: _Cases, drawing: _Drawing) -> dict[str, Any]:
    truth, (a, b), subjects = _of_metric(metric, system, base)
    score = base.metric(metric)
    difference = drawing.interval(lambda t, x, y: score(t, x) - score(t, y), subjects, truth, a, b)
    row = _alone(metric, name, system, drawing) | {"p": float("nan"), "p_delong": float("nan")}
    row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
    if not np.isfinite(difference[0]):
        return row
    if metric == "auroc" and a.shape[1] == 2 and len(set(subjects)) == len(subjects):
        row["p_delong"] = delong_test(truth, a, b).p
    if metric in _OF_RANKS:
        a, b = stats.rankdata(a, axis=0), stats.rankdata(b, axis=0)
    row["p"] = drawing.p(score, subjects, truth, a, b)
    return row


def _of_metric(name: str, *systems: _Cases) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Truth, each system's answers and subjects of the cases that the metric is over."""
    answers = [system.answers[name] for system in systems]
    if systems[0].task != "segmentation":
        return systems[0].truth, answers, systems[0].subjects
    scored = ~np.isnan(answers[0])
    if any((np.isnan(other) == scored).any() for other in answers[1:]):
        raise UsageError(
            "the systems were not scored against the same masks",
            where=name,
            got="a case that one of them has a score for and another has none",
            remedy="Score them on the same store",
        )
    return systems[0].truth[scored], [of_system[scored] for of_system in answers], systems[0].subjects[scored]


def _chosen(system: _Cases, metrics: Sequence[str] | None, others: Mapping[str, _Cases] | None = None) -> list[str]:
    known = [name for name in system.answers if all(name in other.answers for other in (others or {}).values())]
    for name in metrics or ():
        if name not in known:
            raise UsageError(
                f"no metric {name!r} of a {system.task}", where="metrics", remedy=did_you_mean(name, known)
            )
    return list(known if metrics is None else metrics)


def _require_same_cases(base: _Cases, other: _Cases, base_name: str, name: str) -> None:
    if base.task != other.task:
        raise UsageError("the systems have different tasks", where=name, got=other.task, expected=base.task)
    known_by, expected = ", ".join(map(str, other.keys.names)), ", ".join(map(str, base.keys.names))
    if known_by != expected:
        raise UsageError(f"not the cases of {base_name}", where=name, got=f"columns {known_by}", expected=expected)
    if not base.keys.equals(other.keys):
        raise UsageError(
            f"not the cases of {base_name}",
            where=name,
            got=f"{len(base.keys.symmetric_difference(other.keys))} that only one of them has",
            remedy="Score both on the same part of the same store",
        )
    if not np.array_equal(base.truth, other.truth):
        raise UsageError(f"not the truth of {base_name}", where=name, remedy="Score both with the same labels")


def _read(cases: pd.DataFrame, where: str) -> _Cases:
    if "subject" not in cases:
        raise UsageError(
            "a column is missing",
            where=where,
            got=", ".join(map(str, cases.columns)),
            expected="subject",
            remedy="Evaluate with --keep-ids, or look the rows up in store.sessions",
        )
    if cases.empty:
        raise UsageError("there are no cases", where=where)
    key = ["subject", *[name for name in ("session", "row") if name in cases][:1]]
    if cases[key].isna().any(axis=None):
        raise UsageError("a case has no name", where=where, got=f"an empty cell of {' or '.join(key)}")
    cases = cases.assign(**{name: cases[name].astype(str) for name in key}).sort_values(key, kind="stable")
    keys = pd.MultiIndex.from_frame(cases[key])
    if keys.has_duplicates:
        first = ", ".join(keys[keys.duplicated()][0])
        raise UsageError("a case is there twice", where=where, got=first, remedy="Keep one row per session")
    subjects = cases["subject"].to_numpy()
    columns = [name for name in map(str, cases.columns) if name.startswith("p(") and name.endswith(")")]
    if columns:
        names = [name[2:-1] for name in columns]
        truth = _class_indices(cases, names, where)
        probabilities = np.stack([_numbers(cases, name, where) for name in columns], axis=1)
        return _Cases("classification", keys, subjects, truth, dict.fromkeys(METRICS["classification"], probabilities))
    if "prediction" in cases:
        truth, prediction = _numbers(cases, "truth", where), _numbers(cases, "prediction", where)
        return _Cases("regression", keys, subjects, truth, dict.fromkeys(METRICS["regression"], prediction))
    found = [name for name in map(str, cases.columns) if _kind(name) in HIGHER_IS_BETTER and cases[name].notna().any()]
    if not found:
        expected = "truth and p(class), truth and prediction, or dice"
        got = ", ".join(map(str, cases.columns))
        raise UsageError("nothing of the cases is scored", where=where, got=got, expected=expected)
    scores = {name: _numbers(cases, name, where, may_lack=True) for name in found}
    sizes = _numbers(cases, "reference_pixels", where) if "reference_pixels" in cases else np.zeros(len(cases))
    return _Cases("segmentation", keys, subjects, sizes, scores)


def _kind(column: str) -> str:
    """The metric of a column: ``dice(ventricles)`` is Dice."""
    return column.partition("(")[0]


def _class_indices(cases: pd.DataFrame, names: Sequence[str], where: str) -> np.ndarray:
    if "truth" not in cases:
        one_by_one = "Of several labels per case compare one at a time: make the columns truth, p(0) and p(1) of it"
        several = any(str(name).startswith("truth(") for name in cases.columns)
        raise UsageError("a column is missing", where=where, expected="truth", remedy=one_by_one if several else None)
    index = {label_text(name): k for k, name in enumerate(names)}
    truth = [label_text(label) for label in cases["truth"]]
    unknown = sorted(set(truth) - set(index))
    if unknown:
        got, expected = ", ".join(unknown[:4]), ", ".join(names)
        raise UsageError("a class has no probability", where=f"{where}: truth", got=got, expected=expected)
    return np.array([index[label] for label in truth])


def _numbers(cases: pd.DataFrame, column: str, where: str, may_lack: bool = False) -> np.ndarray:
    if column not in cases:
        raise UsageError("a column is missing", where=where, expected=column)
    numbers = pd.to_numeric(cases[column], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(numbers)
    if may_lack:
        bad &= cases[column].notna().to_numpy()
    if bad.any():
        got = cases[column].to_numpy()[bad][:4].tolist()
        raise UsageError("not finite numbers", where=f"{where}: {column}", got=got)
    return numbers
