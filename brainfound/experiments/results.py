"""The files of an experiment, written as its runs end: scores, summary, cases and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.splits.split_file import Split
from brainfound.data.store import Store
from brainfound.experiments.folder import (
    CASES_FILE,
    GROUP_COLUMNS,
    PARTIAL_FILE,
    RUNS_FILE,
    SCHEMA,
    SUMMARY_FILE,
    Kind,
    describe_data,
    get_score_columns,
    make_score_columns,
    summarise_runs,
    to_json_records,
)
from brainfound.experiments.page import write_experiment_page
from brainfound.experiments.partial_input import missing_contrast_rows, summarise_missing_contrasts
from brainfound.experiments.systems import SystemSpec
from brainfound.files import write_atomically
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.scoring import read_cases, read_scores
from brainfound.finetuning.tasks import Task
from brainfound.metrics.registry import PRIMARY_METRIC
from brainfound.training.run_folder import versions

EXPERIMENT_SPLIT_FILE = "split.json"


@dataclass(frozen=True)
class ExperimentSpec:
    """The settings of an experiment: everything in the summary except the scores."""

    kind: Kind
    recipe: FinetuneRecipe
    """The recipe of the first system."""
    target: str
    task: Task
    store: Store
    split: Split
    systems: Sequence[SystemSpec]
    seeds: Sequence[int]
    num_planned: int
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        recipe, store = self.recipe, self.store
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "target": self.target,
            "task": self.task.kind,
            "headline": PRIMARY_METRIC[self.task.kind],
            "command": self.command,
            "recipe": {
                "name": recipe.name,
                "steps": recipe.engine.steps,
                "batch_size": recipe.engine.batch_size,
                "num_slices": recipe.num_slices,
                "aggregator": None if self.task.per_voxel else recipe.aggregator,
                "decoder": getattr(self.task.settings, "decoder", None),
                "lr": recipe.optim.lr,
                "head_lr": recipe.optim.head_lr,
                "contrast_dropout": recipe.augmentation.contrast_dropout,
                "cached_embeddings": recipe.cached_embeddings,
            },
            "systems": [
                {
                    "name": system.name,
                    "model": system.start,
                    "adapter": recipe.adapter if system.adapter is None else Path(system.adapter).stem,
                    "overrides": list(system.overrides),
                    "contrasts": None if system.contrasts is None else list(system.contrasts),
                }
                for system in self.systems
            ],
            "seeds": list(self.seeds),
            "data": describe_data(store),
            "split": {
                "kind": self.split.made.get("kind"),
                "sha256": self.split.to_dict()["sha256"],
                "num_folds": len(self.split.folds),
                "seed": self.split.seed,
            },
            "num_planned": self.num_planned,
            "versions": versions(),
        }


def make_score_row(
    run: Path, folder: Path, system: SystemSpec, recipe: FinetuneRecipe, group: str, fold: str, seed: int
) -> dict[str, Any]:
    """One run as a row of ``scores.tsv``."""
    content = read_scores(run)
    parts = Split.load(run / "splits.json").counts["single"]
    return {
        **({"system": system.name} if system.name else {}),
        "model": system.start,
        "adapter": Path(recipe.adapter).stem,
        **({} if system.contrasts is None else {"contrasts": ", ".join(system.contrasts)}),
        "group": group,
        "fold": fold,
        "seed": seed,
        "run": run.relative_to(folder).as_posix(),
        "task": content["task"],
        "num_train": parts["train"]["num_sessions"],
        "num_test": content["num_sessions"],
        **make_score_columns(content),
    }


def write_results(folder: Path, table: pd.DataFrame, spec: ExperimentSpec) -> None:
    """Write scores.tsv and summary.json of the finished runs."""
    write_atomically(folder / RUNS_FILE, table.to_csv(sep="\t", index=False))
    content = spec.to_dict() | {"num_runs": len(table), "baselines": get_score_columns(table)[1]}
    content["scores"] = to_json_records(summarise_runs(table))
    if spec.kind == "partial input":
        partial_rows = missing_contrast_rows(folder, table)
        write_atomically(folder / PARTIAL_FILE, partial_rows.to_csv(sep="\t", index=False))
        content["partial_input"] = to_json_records(summarise_missing_contrasts(partial_rows))
    write_atomically(folder / SUMMARY_FILE, json.dumps(content, indent=1) + "\n")


def write_cases_and_page(folder: Path, table: pd.DataFrame, store: Store, keep_ids: bool) -> None:
    """Write cases.tsv of all runs and the page; subjects are numbered unless `keep_ids`."""
    names = store.sessions["subject"].astype(str)
    subjects = names if keep_ids else pd.Series(pd.factorize(names)[0], index=names.index)
    parts = []
    for run in table.itertuples():
        cases = read_cases(folder / str(run.run) / CASES_FILE)
        cases = cases.drop(columns=[name for name in ("subject", "session") if name in cases])
        cases.insert(0, "subject", subjects.iloc[cases["row"]].to_numpy())
        keys = {name: getattr(run, name) for name in (*GROUP_COLUMNS, "fold", "seed") if name in table}
        parts.append(pd.concat([pd.DataFrame([keys] * len(cases)), cases], axis=1))
    write_atomically(folder / CASES_FILE, pd.concat(parts, ignore_index=True).to_csv(sep="\t", index=False))
    write_experiment_page(folder)
