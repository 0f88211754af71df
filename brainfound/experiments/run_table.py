"""Tables of runs: one row per run with its scores and those of its baselines, and their spread over folds and seeds.

Where the runs are scored on other subjects in every fold (k folds, sites), all folds are one group. Where the folds
differ only in what is trained on (shots), each fold is a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from brainfound.metrics.registry import PRIMARY_METRIC

TRIVIAL = "trivial"
"""The baseline that never reads an image; every score file has it."""
GROUP_COLUMNS = ("system", "group")
"""The runs that agree in these columns are summarised together; a table may lack the columns."""


def get_baselines(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The baselines of a ``scores.json``, name → metric → value: the entries that have the primary metric of the task.

    >>> get_baselines({"task": "regression", "scores": {"mae": 5.0}, "trivial": {"mae": 9.0}, "without": []})
    {'trivial': {'mae': 9.0}}
    """
    primary = PRIMARY_METRIC[content["task"]]
    return {
        name: parse_scores(entry)
        for name, entry in content.items()
        if name != "scores" and isinstance(entry, Mapping) and primary in entry
    }


def parse_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a score file, whose undefined scores are null."""
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


def summarise_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of each score; runs whose score is undefined are left out.

    Returns:
        One row per system (where there are several), group and score: mean over runs, ``std_folds`` (standard
        deviation over folds of the mean over seeds), ``std_seeds`` (mean over folds of the standard deviation over
        seeds), lowest, highest, the mean of each baseline under its name, the numbers of folds and seeds, and the mean
        numbers of sessions trained and tested on, where the table has them. The spread of a single value is NaN.
    """
    metrics, baselines = get_score_columns(table)
    by = [name for name in GROUP_COLUMNS if name in table]
    rows = []
    for keys, part in table.groupby(by, sort=False):
        for name in metrics:
            row = dict(zip(by, keys, strict=True)) | {"score": name}
            rows.append(row | compute_spread(part, name, baselines) | compute_mean_sizes(part))
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
    """Mean numbers of sessions trained and tested on, where a table has them."""
    return {name: float(np.mean(part[name])) for name in ("num_train", "num_test") if name in part}


def to_json_records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON; an undefined value becomes null."""
    return [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in table.to_dict(orient="records")
    ]
