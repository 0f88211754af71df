"""Comparison of systems on the same cases: scores with intervals, and differences with intervals and tests.

`brainfound.metrics.cases` describes the tables of cases.

Axes: n cases, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from brainfound.errors import UsageError, did_you_mean
from brainfound.metrics.cases import Cases, CaseTables, Score, read_matched_systems, read_system
from brainfound.metrics.registry import METRICS, metric_name
from brainfound.metrics.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    bootstrap_interval,
    delong_test,
    holm,
    paired_permutation_test,
)

_COLUMNS = [
    *("metric", "system", "value", "low", "high", "difference", "difference_low", "difference_high"),
    *("p", "p_holm", "p_delong", "p_delong_holm", "higher_is_better", "num_cases", "num_subjects"),
]
_PAIR_COLUMNS = ["metric", "system", "against", *_COLUMNS[5:]]


def score_intervals(
    cases: CaseTables,
    metrics: Sequence[str] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> pd.DataFrame:
    """Each score of a system with its bootstrap interval over subjects, one row per metric.

    Args:
        cases: a table of cases, or one per seed.
        metrics: names of `brainfound.metrics.registry.METRICS`; by default all of the task.
        num_resamples, confidence, seed: as in `bootstrap_interval`.

    Returns:
        Columns metric, value, low, high, and num_cases and num_subjects with a score. An undefined score is ``nan``.

    Raises:
        UsageError: a column is missing, a value is invalid, a case is given twice, or the task has no such metric.
    """
    system, resampling = read_system(cases, "cases"), _Resampling(num_resamples, confidence, seed)
    rows = [_score_row(name, "", system, resampling) for name in _resolve_metrics(system, metrics)]
    return pd.DataFrame(rows, columns=["metric", "value", "low", "high", "num_cases", "num_subjects"])


def compare(
    systems: Mapping[str, CaseTables],
    against: str,
    metrics: Sequence[str] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    num_permutations: int = 5000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare systems with one of them, on the same cases.

    p comes from a permutation test that exchanges the predictions of two systems within subjects. Where only their
    order matters (AUROC, AUPRC), ranks are exchanged, since systems need not share a scale. Two-class AUROC also gets
    DeLong's p if every subject has one case. Holm's correction runs over the systems, separately for each metric.

    Args:
        systems: name → a table of cases, or one per seed. All must have the same cases, truth and number of seeds; a
            single table counts for every seed.
        against: the name of the reference system.
        metrics, num_resamples, confidence, seed: as in `score_intervals`.
        num_permutations: as in `paired_permutation_test`.

    Returns:
        One row per metric and system, the reference first: metric, system, value, low, high, difference
        (system − against), difference_low, difference_high, p, p_holm, p_delong, p_delong_holm, higher_is_better,
        num_cases, num_subjects. Undefined values are ``nan``.

    Raises:
        UsageError: as `score_intervals`; or the cases or the truth of the systems differ.

    Source: A. I. Bandos, H. E. Rockette and D. Gur, "A permutation test sensitive to differences in areas for comparing
    ROC curves from a paired design", Stat Med 2005 (exchange of ranks within cases).
    """
    if against not in systems:
        raise UsageError(f"no system is called {against!r}", where="against", remedy=did_you_mean(against, systems))
    read = read_matched_systems({against: systems[against], **systems})
    base, others = read[against], {name: system for name, system in read.items() if name != against}
    resampling = _Resampling(num_resamples, confidence, seed, num_permutations)
    rows: list[dict[str, Any]] = []
    for metric in _resolve_metrics(base, metrics, others):
        compared = [
            _score_row(metric, name, other, resampling) | _compute_difference(metric, other, base, resampling)
            for name, other in others.items()
        ]
        rows += [_score_row(metric, against, base, resampling), *_apply_holm(compared)]
    return pd.DataFrame(rows, columns=_COLUMNS)


def compare_pairs(
    systems: Mapping[str, CaseTables],
    metrics: Sequence[str] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    num_permutations: int = 5000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare all pairs of systems on the same cases, as `compare` does, with Holm's correction over the pairs.

    Returns one row per metric and pair, in the order given, with the columns of `compare` except those of a single
    system (value, low, high), and ``against`` after ``system``.
    """
    read = read_matched_systems(systems)
    resampling = _Resampling(num_resamples, confidence, seed, num_permutations)
    rows: list[dict[str, Any]] = []
    for metric in _resolve_metrics(next(iter(read.values())), metrics, read):
        pairs = [
            {"metric": metric, "system": name, "against": against}
            | _compute_difference(metric, read[name], read[against], resampling)
            | _counts(metric, read[name].select_scored(metric)[2])
            for against, name in itertools.combinations(read, 2)
        ]
        rows += _apply_holm(pairs)
    return pd.DataFrame(rows, columns=_PAIR_COLUMNS)


@dataclass(frozen=True)
class _Resampling:
    """Settings of the bootstrap and of the permutation test."""

    num_resamples: int
    confidence: float
    seed: int
    num_permutations: int = 0

    def interval(
        self, metric: Callable[..., float], subjects: np.ndarray, *values: np.ndarray
    ) -> tuple[float, float, float]:
        """Value, low and high; the ends are nan where the value is, or where the cases cannot give an interval."""
        value = float(metric(*values)) if len(subjects) else float("nan")
        if not np.isfinite(value):
            return value, float("nan"), float("nan")
        interval = bootstrap_interval(
            metric, *values, subjects=subjects, num_resamples=self.num_resamples, confidence=self.confidence,
            seed=self.seed,
        )  # fmt: skip
        return interval.estimate, interval.low, interval.high

    def p(self, metric: Score, subjects: np.ndarray, truth: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
        return paired_permutation_test(a, b, lambda x: metric(truth, x), self.num_permutations, self.seed, subjects)


def _score_row(metric: str, name: str, system: Cases, resampling: _Resampling) -> dict[str, Any]:
    truth, (answers,), subjects = system.select_scored(metric)
    value, low, high = resampling.interval(system.metric(metric), subjects, truth, answers)
    return {"metric": metric, "system": name, "value": value, "low": low, "high": high} | _counts(metric, subjects)


def _counts(metric: str, subjects: np.ndarray) -> dict[str, Any]:
    higher_is_better = METRICS[metric_name(metric)].higher_is_better
    return {"higher_is_better": higher_is_better, "num_cases": len(subjects), "num_subjects": len(set(subjects))}


def _compute_difference(metric: str, system: Cases, base: Cases, resampling: _Resampling) -> dict[str, float]:
    """System − base with its interval and its uncorrected p values."""
    truth, (a, b), subjects = system.select_scored(metric, base)
    score = base.metric(metric)
    difference = resampling.interval(lambda t, x, y: score(t, x) - score(t, y), subjects, truth, a, b)
    row = dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
    row |= {"p": float("nan"), "p_delong": float("nan")}
    if not np.isfinite(difference[0]):
        return row
    two_classes = truth.ndim == 1 and a.ndim == 2 and a.shape[1] == 2 and base.num_runs == 1
    if metric == "auroc" and two_classes and len(set(subjects)) == len(subjects):
        row["p_delong"] = delong_test(truth, a, b).p
    if METRICS[metric_name(metric)].order_only:
        a, b = stats.rankdata(a, axis=0), stats.rankdata(b, axis=0)
    return row | {"p": resampling.p(score, subjects, truth, a, b)}


def _apply_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add Holm's correction over the rows of one metric."""
    for column in ("p", "p_delong"):
        for row, adjusted in zip(rows, holm([row[column] for row in rows]), strict=True):
            row[f"{column}_holm"] = float(adjusted)
    return rows


def _resolve_metrics(
    system: Cases, metrics: Sequence[str] | None, others: Mapping[str, Cases] | None = None
) -> list[str]:
    known = [name for name in system.answers if all(name in other.answers for other in (others or {}).values())]
    for name in metrics or ():
        if name not in known:
            what, remedy = f"no metric {name!r} of a {system.task}", did_you_mean(name, known)
            raise UsageError(what, where="metrics", remedy=remedy)
    return list(known if metrics is None else metrics)
