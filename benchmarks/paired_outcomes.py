"""Two encoders on the same subjects: the difference of their frozen probes, its interval, and a paired test.

Axes: N subjects, R runs (seeds of the continued pretraining).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from frozen_probes import Outcome
from rounds import ends_of, figure

from brainfound.metrics import auroc
from brainfound.metrics.statistics import bootstrap_interval, paired_permutation_test

MEASURES = {"age MAE, years": "age_error_years", "diagnosis AUROC": "diagnosis_score",
            "tissue patch accuracy": "patch_accuracy"}  # fmt: skip
LOWER_IS_BETTER = ("age MAE, years",)


def _per_subject(outcomes: Sequence[Outcome], measure: str) -> np.ndarray:
    """(N, R); scores become ranks within their run, since runs need not agree on the scale of a score."""
    columns = np.stack([getattr(outcome, MEASURES[measure]) for outcome in outcomes], axis=1)
    if measure == "diagnosis AUROC":
        return np.apply_along_axis(lambda c: np.searchsorted(np.sort(c), c, "left") / len(c), 0, columns)
    return columns


def _metric(measure: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """Of (labels, values (N, R)): the mean over runs. A mean of scores over runs first would flatter several runs."""
    if measure != "diagnosis AUROC":
        return lambda labels, values: float(values.mean())
    return lambda labels, values: float(np.mean([auroc(labels, column) for column in values.T]))


def score(outcomes: Sequence[Outcome], ill: np.ndarray) -> dict[str, Any]:
    """Each measure: the mean over runs, its bootstrap interval over subjects, and the runs one by one."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        values, metric = _per_subject(outcomes, measure), _metric(measure)
        interval = bootstrap_interval(metric, ill, values, num_resamples=1000)
        runs = [figure(metric(ill, values[:, [run]])) for run in range(values.shape[1])]
        found[measure] = {"mean": figure(interval.estimate), "interval": ends_of(interval), "runs": runs}
    return found


def compare(
    after: Sequence[Outcome], before: Sequence[Outcome], ill: np.ndarray, permutations: int = 10_000
) -> dict[str, Any]:
    """Each measure: the gain of `after` over `before` (positive is better), its interval, and a two-sided p.

    A single outcome before is compared with each run after it. Subjects are exchanged and resampled.
    """
    found: dict[str, Any] = {}
    for measure in MEASURES:
        metric = _metric(measure)
        new, old = _per_subject(after, measure), _per_subject(before, measure)
        if old.shape[1] == 1:
            old = np.repeat(old, new.shape[1], axis=1)
        sign = -1.0 if measure in LOWER_IS_BETTER else 1.0
        interval = bootstrap_interval(
            lambda labels, a, b, metric=metric, sign=sign: sign * (metric(labels, a) - metric(labels, b)),
            ill, new, old, num_resamples=1000,
        )  # fmt: skip
        p = paired_permutation_test(new, old, lambda values, metric=metric: metric(ill, values), permutations)
        found[measure] = {"gain": figure(interval.estimate), "interval": ends_of(interval), "p": figure(p)}
    return found
