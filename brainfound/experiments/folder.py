"""Typed reading of the folder of an experiment: what was asked, the scores of its runs, and the paired comparison.

`brainfound finetune` with several runs and `brainfound evaluate --out` leave such folders:

    summary.json         what was asked, and the scores with their spread
    scores.tsv           one row per run (not of an evaluation)
    cases.tsv            the answers on the test sessions; subjects are numbered
    partial_input.tsv    of an experiment with partial input, one row per run and subset
    comparison.tsv       every system against the first, on the same cases
    report.md, report.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.errors import BrainFoundError, UsageError
from brainfound.metrics.comparison import compare
from brainfound.metrics.scores import TABLE_METRICS

SCHEMA = "brainfound-experiment/1"
SUMMARY_FILE, TABLE_FILE, CASES_FILE = "summary.json", "scores.tsv", "cases.tsv"
PARTIAL_FILE, COMPARISON_FILE = "partial_input.tsv", "comparison.tsv"
PAGE_FILE, FIGURE_FILE = "report.md", "report.png"


@dataclass(frozen=True)
class ExperimentFolder:
    """The readable part of an experiment.

    Attributes:
        summary: what summary.json says.
        table: scores.tsv, one row per run; empty of an evaluation.
        cases: cases.tsv; empty before the last run is done.
    """

    path: Path
    summary: Mapping[str, Any]
    table: pd.DataFrame
    cases: pd.DataFrame

    @classmethod
    def read(cls, path: str | Path) -> ExperimentFolder:
        """Read a folder.

        Raises:
            UsageError: it is not that of an experiment, or was written before there were pages.
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
        return cls(path, summary, _read_table(path / TABLE_FILE), _read_table(path / CASES_FILE))

    @property
    def kind(self) -> str:
        return str(self.summary["kind"])

    @property
    def headline(self) -> str:
        """The metric by which the task is judged."""
        return str(self.summary["headline"])

    @property
    def baselines(self) -> list[str]:
        """What stands beside each score, the trivial baseline first."""
        return list(self.summary["baselines"])

    @property
    def system_names(self) -> list[str]:
        """The systems that are told apart; empty where there is one only."""
        return [entry["name"] for entry in self.summary.get("systems", ()) if entry["name"]]

    @property
    def table_rows(self) -> list[dict[str, Any]]:
        """The rows of the summary's scores that a table has room for, with those of single labels and structures."""
        shown = TABLE_METRICS[self.summary["task"]]
        headlines = tuple(f"{name}(" for name in shown[:1])
        return [r for r in self.summary["scores"] if r["score"] in shown or r["score"].startswith(headlines)]

    def comparison(self) -> pd.DataFrame:
        """Every system against the first one, by the headline score, on the cases of the runs that both have.

        Returns:
            The columns of `brainfound.evaluate.compare` and ``group``; no rows where there is one system only, or no
            cases are kept.
        """
        cases, names = self.cases, self.system_names
        comparable = self.kind == "comparison" and len(names) > 1
        if not comparable or not any(name in ("truth", "dice") or name.startswith("truth(") for name in cases.columns):
            return pd.DataFrame()
        runs = [set(zip(part["fold"], part["seed"], strict=True)) for _, part in cases.groupby("system")]
        common = set.intersection(*runs)
        keys = pd.Series(list(zip(cases["fold"], cases["seed"], strict=True)), index=cases.index)
        cases = cases[keys.isin(common)]
        # Of a session that is in the test part of several folds each answer is a case of its subject.
        cases = cases.assign(row=cases["fold"].astype(str) + " " + cases["row"].astype(str)).drop(columns="fold")
        found = []
        for group, part in cases.groupby("group", sort=False):
            # A system's score is the mean over its seeds, as `brainfound compare` has it.
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
        # A class may be called NA; numbers and scores are never written so.
        return pd.read_csv(file, sep="\t", dtype=text, keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        raise BrainFoundError(f"cannot be read: {error}", where=file) from error
