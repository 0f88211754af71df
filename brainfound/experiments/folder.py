"""Reading of an experiment folder, and the tables of its runs: scores, baselines, and their spread.

`brainfound finetune` with several runs and `brainfound evaluate --out` write:

    summary.json         settings, and the scores with their spread
    scores.tsv           one row per run with its scores and those of its baselines (not written by evaluate)
    cases.tsv            the predictions on the test sessions; subjects are numbered
    partial_input.tsv    one row per run and subset, for experiments with partial input
    comparison.tsv       every system against the first, on the same cases
    report.md, report.png

Where every fold scores different subjects (k folds, sites), all folds are one group. Where the folds differ only in
their training subjects (shots), each fold is a group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from brainfound.data.store import Store
from brainfound.errors import BrainFoundError, UsageError, mistaken_for
from brainfound.files import nan_as_none
from brainfound.metrics.comparison import compare
from brainfound.metrics.registry import PRIMARY_METRIC, TABLE_METRICS

SCHEMA = "brainfound-experiment/1"
SUMMARY_FILE, RUNS_FILE, CASES_FILE = "summary.json", "scores.tsv", "cases.tsv"
PARTIAL_FILE, COMPARISON_FILE = "partial_input.tsv", "comparison.tsv"
PAGE_FILE, FIGURE_FILE = "report.md", "report.png"
Kind = Literal["repeated", "comparison", "partial input", "evaluation"]
TRIVIAL = "trivial"
"""The baseline that never reads an image; every score file has it."""
VERDICT = "verdict"
"""The column of scores.tsv with the verdict of each run, see `brainfound.finetuning.verdict`."""
GROUP_COLUMNS = ("system", "group")
"""Runs that agree in these columns are summarised together; a table may lack the columns."""


def describe_data(store: Store) -> dict[str, Any]:
    """The data block of a summary: hash and counts."""
    return {
        "data_hash": store.content_hash,
        "num_sessions": len(store),
        "num_subjects": int(store.sessions["subject"].nunique()),
        "contrasts": store.contrast_counts,
    }


@dataclass(frozen=True)
class ExperimentFolder:
    """The files of an experiment."""

    path: Path
    summary: Mapping[str, Any]
    table: pd.DataFrame
    """scores.tsv; empty for an evaluation."""
    cases: pd.DataFrame
    """cases.tsv; empty until the last run is done."""

    @classmethod
    def read(cls, path: str | Path) -> ExperimentFolder:
        """Read a folder; raises `UsageError` if no experiment of this version wrote it."""
        path = Path(path)
        file = path / SUMMARY_FILE
        if not file.is_file():
            expected = f"a folder with {SUMMARY_FILE}"
            remedy = "Give the folder of finetune with several runs, or that of evaluate --out"
            raise UsageError(
                mistaken_for(path, "the folder of an experiment"), where=path, expected=expected, remedy=remedy
            )
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BrainFoundError(f"cannot be read: {error}", where=file) from error
        found = summary.get("schema") if isinstance(summary, dict) else type(summary).__name__
        if found != SCHEMA:
            remedy = "Write it again: the same finetune command with --resume"
            raise UsageError("a summary of another version", where=file, got=found, expected=SCHEMA, remedy=remedy)
        return cls(path, summary, _read_table(path / RUNS_FILE), _read_table(path / CASES_FILE))

    @property
    def kind(self) -> Kind:
        return self.summary["kind"]

    @property
    def headline(self) -> str:
        """The primary metric of the task."""
        return str(self.summary["headline"])

    @property
    def baselines(self) -> list[str]:
        """The baselines of each score, the trivial one first."""
        return list(self.summary["baselines"])

    @property
    def system_names(self) -> list[str]:
        """The names of the systems; empty for a single one, which has no name."""
        return [entry["name"] for entry in self.summary.get("systems", ()) if entry["name"]]

    @property
    def table_rows(self) -> list[dict[str, Any]]:
        """The scores that tables show, including the headline metric of single labels and structures."""
        names, prefix = TABLE_METRICS[self.summary["task"]], f"{self.headline}("
        return [row for row in self.summary["scores"] if row["score"] in names or row["score"].startswith(prefix)]

    def comparison(self) -> pd.DataFrame:
        """Compare every system with the first one, by the headline score, on the runs that all of them have.

        Returns the columns of `brainfound.metrics.compare` after ``group``; no rows without several systems or cases.
        """
        cases, names = self.cases, self.system_names
        comparable = self.kind == "comparison" and len(names) > 1
        if not comparable or not any(name in ("truth", "dice") or name.startswith("truth(") for name in cases.columns):
            return pd.DataFrame()
        systems_with_run = cases.groupby(["fold", "seed"])["system"].transform("nunique")
        cases = cases[systems_with_run == cases["system"].nunique()]
        # A session in the test parts of several folds is one case per fold.
        cases = cases.assign(row=cases["fold"].astype(str) + " " + cases["row"].astype(str)).drop(columns="fold")
        found = []
        for group, part in cases.groupby("group", sort=False):
            # The score of a system is the mean over its seeds, as in `brainfound compare`.
            tables: dict[str, list[pd.DataFrame]] = {name: [] for name in names if name in set(part["system"])}
            for (name, _), table in part.groupby(["system", "seed"], sort=False):
                tables[name].append(table.drop(columns=["system", "group", "seed"]).dropna(axis=1, how="all"))
            if len(tables) > 1:
                compared = compare(tables, next(iter(tables)), [self.headline])
                compared.insert(0, "group", group)
                found.append(compared)
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _read_table(file: Path) -> pd.DataFrame:
    if not file.is_file():
        return pd.DataFrame()
    dtypes = {name: str for name in ("truth", "system", "fold", "group")}
    try:
        # A class may be called NA; an undefined number is an empty cell.
        return pd.read_csv(file, sep="\t", dtype=dtypes, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        raise BrainFoundError(f"cannot be read: {error}", where=file) from error


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


def make_score_columns(content: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a ``scores.json`` as columns of a table, and after them those of its baselines.

    >>> make_score_columns({"task": "regression", "scores": {"mae": 5.0}, "trivial": {"mae": 9.0}})
    {'mae': 5.0, 'trivial mae': 9.0}
    """
    scores = parse_scores(content["scores"])
    return scores | {
        f"{name} {metric}": baseline.get(metric, math.nan)
        for name, baseline in get_baselines(content).items()
        for metric in scores
    }


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
    return [nan_as_none(row) for row in table.to_dict(orient="records")]
