"""The folder of an experiment, read: its settings, the scores of its runs, and the paired comparison of its systems.

`brainfound finetune` with several runs and `brainfound evaluate --out` write:

    summary.json         settings, and the scores with their spread
    scores.tsv           one row per run (none of an evaluation)
    cases.tsv            the predictions on the test sessions; subjects are numbered
    partial_input.tsv    one row per run and subset, of an experiment with partial input
    comparison.tsv       every system against the first, on the same cases
    report.md, report.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from brainfound.errors import BrainFoundError, UsageError
from brainfound.metrics.comparison import compare
from brainfound.metrics.registry import TABLE_METRICS

SCHEMA = "brainfound-experiment/1"
SUMMARY_FILE, RUNS_FILE, CASES_FILE = "summary.json", "scores.tsv", "cases.tsv"
PARTIAL_FILE, COMPARISON_FILE = "partial_input.tsv", "comparison.tsv"
PAGE_FILE, FIGURE_FILE = "report.md", "report.png"
Kind = Literal["repeated", "comparison", "partial input", "evaluation"]


@dataclass(frozen=True)
class ExperimentFolder:
    """The files of an experiment.

    Attributes:
        summary: the content of summary.json.
        table: scores.tsv, one row per run; empty for an evaluation.
        cases: cases.tsv; empty until the last run is done.
    """

    path: Path
    summary: Mapping[str, Any]
    table: pd.DataFrame
    cases: pd.DataFrame

    @classmethod
    def read(cls, path: str | Path) -> ExperimentFolder:
        """Read a folder.

        Raises:
            UsageError: the folder is not that of an experiment, or of another version.
            BrainFoundError: a file cannot be read.
        """
        path = Path(path)
        file = path / SUMMARY_FILE
        if not file.is_file():
            raise UsageError(
                "not the folder of an experiment",
                where=path,
                expected=f"{SUMMARY_FILE}, as finetune with several runs and evaluate --out write it",
            )
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BrainFoundError(f"cannot be read: {error}", where=file) from error
        if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
            raise UsageError(
                "a summary of another version",
                where=file,
                got=summary.get("schema") if isinstance(summary, dict) else type(summary).__name__,
                expected=SCHEMA,
                remedy="Write it again: the same finetune command with --resume",
            )
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
        """The scores that a table has room for, with the headline of single labels and structures."""
        shown, of_part = TABLE_METRICS[self.summary["task"]], f"{self.headline}("
        return [row for row in self.summary["scores"] if row["score"] in shown or row["score"].startswith(of_part)]

    def comparison(self) -> pd.DataFrame:
        """Compare every system with the first one, by the headline score, on the runs that all of them have.

        Returns:
            The columns of `brainfound.metrics.compare` after ``group``; no rows without several systems or without
            cases.
        """
        cases, names = self.cases, self.system_names
        comparable = self.kind == "comparison" and len(names) > 1
        if not comparable or not any(name in ("truth", "dice") or name.startswith("truth(") for name in cases.columns):
            return pd.DataFrame()
        runs = [set(zip(part["fold"], part["seed"], strict=True)) for _, part in cases.groupby("system")]
        common = set.intersection(*runs)
        keys = pd.Series(list(zip(cases["fold"], cases["seed"], strict=True)), index=cases.index)
        cases = cases[keys.isin(common)]
        # A session in the test parts of several folds is one case per fold.
        cases = cases.assign(row=cases["fold"].astype(str) + " " + cases["row"].astype(str)).drop(columns="fold")
        found = []
        for group, part in cases.groupby("group", sort=False):
            # The score of a system is the mean over its seeds, as in `brainfound compare`.
            tables = {
                name: [
                    table.drop(columns=["system", "group", "seed"]).dropna(axis=1, how="all")
                    for _, table in part[part["system"] == name].groupby("seed", sort=False)
                ]
                for name in names
            }
            tables = {name: seeds for name, seeds in tables.items() if seeds}
            if len(tables) > 1:
                compared = compare(tables, next(iter(tables)), [self.headline])
                compared.insert(0, "group", group)
                found.append(compared)
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _read_table(file: Path) -> pd.DataFrame:
    if not file.is_file():
        return pd.DataFrame()
    text = {name: str for name in ("truth", "system", "fold", "group")}
    try:
        # A class may be called NA; an undefined number is an empty cell.
        return pd.read_csv(file, sep="\t", dtype=text, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        raise BrainFoundError(f"cannot be read: {error}", where=file) from error
