"""Partial input: which contrasts to withhold, and how much worse the answers get."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from brainfound.data.splits import label_text
from brainfound.evaluate.multi_label import multi_label_scores
from brainfound.evaluate.scores import HEADLINE, HIGHER_IS_BETTER, METRICS


def non_empty_subsets(contrasts: Sequence[str]) -> list[tuple[str, ...]]:
    """All 2ⁿ − 1 non-empty subsets, the full set first, then by falling size, each in the given order.

    >>> non_empty_subsets(("T1w", "FLAIR"))
    [('T1w', 'FLAIR'), ('T1w',), ('FLAIR',)]
    """
    return [subset for size in range(len(contrasts), 0, -1) for subset in combinations(contrasts, size)]


def drop(task: str, full: float, partial: float) -> float:
    """How much worse a headline score is than with full input, in its own unit; negative where it is better.

    >>> drop("regression", 5.0, 7.5), drop("classification", 0.75, 0.5)
    (2.5, 0.25)
    """
    return full - partial if HIGHER_IS_BETTER[HEADLINE[task]] else partial - full


def headline_of_cases(task: str, cases: pd.DataFrame) -> float:
    """The headline score of some of the cases that `brainfound.evaluate` returns; ``nan`` where it is not defined."""
    headline = HEADLINE[task]
    if task == "segmentation":
        structures = [name for name in cases if str(name).startswith("dice(")] or ["dice"]
        means = np.array([cases[name].mean() for name in structures], dtype=float)
        return float(means[~np.isnan(means)].mean()) if not np.isnan(means).all() else float("nan")
    if task == "regression":
        return METRICS[task][headline](cases["truth"].to_numpy(float), cases["prediction"].to_numpy(float))
    names = [str(name)[2:-1] for name in cases if str(name).startswith("p(")]
    shares = cases[[f"p({name})" for name in names]].to_numpy(float)
    if "truth" not in cases:
        truths = cases[[f"truth({name})" for name in names]].to_numpy(float)
        return multi_label_scores(truths, shares, names)[headline]
    index = {label_text(name): k for k, name in enumerate(names)}
    return METRICS[task][headline](np.array([index[label_text(label)] for label in cases["truth"]]), shares)
