"""What the score files of runs say, whichever baselines stand beside the scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from brainfound.evaluate.scores import HEADLINE

TRIVIAL = "trivial"
"""The baseline that never looks at an image; every score file has it."""


def baselines_of(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The baselines of a ``scores.json``: name → metric → value, each entry that has the task's headline metric.

    >>> baselines_of({"task": "regression", "scores": {"mae": 5.0}, "trivial": {"mae": 9.0}, "without": []})
    {'trivial': {'mae': 9.0}}
    """
    headline = HEADLINE[content["task"]]
    return {
        name: numbers_of(entry)
        for name, entry in content.items()
        if name != "scores" and isinstance(entry, Mapping) and headline in entry
    }


def numbers_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores as a file has them, where an undefined one is null, as numbers."""
    return {
        name: math.nan if value is None else float(value)
        for name, value in scores.items()
        if value is None or isinstance(value, int | float)
    }


def beside(baselines: Mapping[str, Mapping[str, float]], names: list[str]) -> dict[str, float]:
    """Baselines as columns of a table: ``trivial mae``, ….

    >>> beside({"trivial": {"mae": 9.0}}, ["mae"])
    {'trivial mae': 9.0}
    """
    return {f"{name} {metric}": scores.get(metric, math.nan) for name, scores in baselines.items() for metric in names}


def columns_of(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The metrics of a table of runs, and its baselines, the trivial one first."""
    metrics = [str(name) for name in table.columns if f"{TRIVIAL} {name}" in table.columns]
    first = metrics[0] if metrics else ""
    found = [str(name).removesuffix(f" {first}") for name in table.columns if str(name).endswith(f" {first}")]
    return metrics, [TRIVIAL, *(name for name in found if name != TRIVIAL)] if metrics else []


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table for JSON: what is not defined becomes null."""
    return [{key: _plain(value) for key, value in row.items()} for row in table.to_dict(orient="records")]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
