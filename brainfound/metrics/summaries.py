"""What the score files of runs say, whichever baselines stand beside the scores.

Partial input: which contrasts to withhold, and how much worse the answers get.

The spread of scores over runs: over the folds of a division, and over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.splits.dividing import label_text
from brainfound.metrics.scores import HIGHER_IS_BETTER, METRICS, PRIMARY_METRIC, multi_label_scores


def non_empty_subsets(contrasts: Sequence[str]) -> list[tuple[str, ...]]:
    """All 2ⁿ − 1 non-empty subsets, the full set first, then by falling size, each in the given order.

    >>> non_empty_subsets(("T1w", "FLAIR"))
    [('T1w', 'FLAIR'), ('T1w',), ('FLAIR',)]
    """
    return [subset for size in range(len(contrasts), 0, -1) for subset in combinations(contrasts, size)]


def compute_drop(task: str, full: float, partial: float) -> float:
    """How much worse a headline score is than with full input, in its own unit; negative where it is better.

    >>> compute_drop("regression", 5.0, 7.5), compute_drop("classification", 0.75, 0.5)
    (2.5, 0.25)
    """
    return full - partial if HIGHER_IS_BETTER[PRIMARY_METRIC[task]] else partial - full


def compute_headline_score(task: str, cases: pd.DataFrame) -> float:
    """The headline score of some of the cases that `brainfound.evaluate` returns; ``nan`` where it is not defined."""
    headline = PRIMARY_METRIC[task]
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


GROUP_COLUMNS = ("system", "group")
"""What makes a group of runs whose spread is told; where a table has no such column it is all one."""


def summarise_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The spread of each score.

    Where the test part differs from fold to fold (k folds, sites) all folds are one group; where only what is
    learnt from differs (shots) each fold is a group of its own. Runs whose score is undefined are left out of it.

    Returns:
        One row per system (where there are several), group and score: mean over runs, ``std_folds`` (standard
        deviation of the means over seeds of each fold), ``std_seeds`` (mean over folds of that over seeds), lowest,
        highest, the mean of each baseline under its name, how many folds and seeds there are, and the mean of the
        sessions trained and tested on, where the table says them. A spread of one is NaN.
    """
    metrics, baselines = get_score_columns(table)
    by = [name for name in GROUP_COLUMNS if name in table]
    rows = []
    for keys, part in table.groupby(by, sort=False):
        for name in metrics:
            rows.append(
                dict(zip(by, keys, strict=True))
                | {"score": name}
                | compute_spread(part, name, baselines)
                | compute_mean_sizes(part)
            )
    return pd.DataFrame(rows)


def compute_spread(part: pd.DataFrame, name: str, baselines: Sequence[str]) -> dict[str, Any]:
    """Mean and spread of one score over runs; see `summarise_runs`."""
    defined = part[part[name].notna()]
    by_fold = defined.groupby("fold", sort=False)[name]
    return {
        "mean": part[name].mean(),
        "std_folds": by_fold.mean().std(ddof=1),
        "std_seeds": by_fold.std(ddof=1).mean(),
        "lowest": part[name].min(),
        "highest": part[name].max(),
        **{baseline: part[f"{baseline} {name}"].mean() for baseline in baselines},
        "num_folds": by_fold.ngroups,
        "num_seeds": defined["seed"].nunique(),
    }


def compute_mean_sizes(part: pd.DataFrame) -> dict[str, float]:
    """Mean numbers of sessions trained and tested on, where a table says them."""
    return {name: float(np.mean(part[name])) for name in ("num_train", "num_test") if name in part}


TRIVIAL = "trivial"
"""The baseline that never looks at an image; every score file has it."""


def get_baselines(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The baselines of a ``scores.json``: name → metric → value, each entry that has the task's headline metric.

    >>> get_baselines({"task": "regression", "scores": {"mae": 5.0}, "trivial": {"mae": 9.0}, "without": []})
    {'trivial': {'mae': 9.0}}
    """
    headline = PRIMARY_METRIC[content["task"]]
    return {
        name: parse_scores(entry)
        for name, entry in content.items()
        if name != "scores" and isinstance(entry, Mapping) and headline in entry
    }


def parse_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores as a file has them, where an undefined one is null, as numbers."""
    return {
        name: math.nan if value is None else float(value)
        for name, value in scores.items()
        if value is None or isinstance(value, int | float)
    }


def make_baseline_columns(baselines: Mapping[str, Mapping[str, float]], names: list[str]) -> dict[str, float]:
    """Baselines as columns of a table: ``trivial mae``, ….

    >>> make_baseline_columns({"trivial": {"mae": 9.0}}, ["mae"])
    {'trivial mae': 9.0}
    """
    return {f"{name} {metric}": scores.get(metric, math.nan) for name, scores in baselines.items() for metric in names}


def get_score_columns(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The metrics of a table of runs, and its baselines, the trivial one first."""
    metrics = [str(name) for name in table.columns if f"{TRIVIAL} {name}" in table.columns]
    first = metrics[0] if metrics else ""
    found = [str(name).removesuffix(f" {first}") for name in table.columns if str(name).endswith(f" {first}")]
    return metrics, [TRIVIAL, *(name for name in found if name != TRIVIAL)] if metrics else []


def to_json_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON: what is not defined becomes null."""
    return [{key: _plain(value) for key, value in row.items()} for row in table.to_dict(orient="records")]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
