"""The files of an experiment, written as its runs end: scores, summary, partial input, cases and the page.

Partial input compares contrasts that are absent in training with contrasts that are absent in the test only. The model
of all contrasts is scored with some of them withheld (absent in the test); another model never read those (absent in
training). Both are scored on the test sessions that have every contrast: a session that lacks one would count for some
subsets only, and scores on different sessions are not comparable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.adapters.bundle_reader import Bundle, load_bundle
from brainfound.data.splits.split_file import Split
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.experiments.folder import (
    CASES_FILE,
    GROUP_COLUMNS,
    PARTIAL_FILE,
    RUNS_FILE,
    SCHEMA,
    SUMMARY_FILE,
    VERDICT,
    Kind,
    compute_mean_sizes,
    compute_spread,
    describe_data,
    get_score_columns,
    make_score_columns,
    summarise_runs,
    to_json_records,
)
from brainfound.experiments.page import write_experiment_page
from brainfound.experiments.systems import SystemSpec, non_empty_subsets
from brainfound.files import nan_as_none, require_json, write_atomically
from brainfound.finetuning.frozen_baseline import (
    FrozenBaseline,
    NoFrozenBaselineError,
    load_frozen_baseline,
    score_frozen_baseline,
    scoring_from_bundle,
)
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.scoring import FROZEN_CASES_FILE, read_cases, read_scores, score_sessions
from brainfound.finetuning.tasks import TargetColumn, Task, from_dict
from brainfound.metrics.cases import compute_headline_score
from brainfound.metrics.registry import METRICS, PRIMARY_METRIC
from brainfound.training.process import process_state
from brainfound.training.run_folder import EXPORT_FOLDER, versions

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
        VERDICT: content["verdict"]["label"],
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


MISSING_CONTRASTS_FILE = "partial_input.json"
"""In the folder of a run: its scores on the sessions that have every contrast."""
NONE, TEST, TRAINING = "none", "test", "training"
"""Values of the column ``absence``: where the unlisted contrasts are absent."""


def complete_sessions(store: Store, sessions: np.ndarray, contrasts: Sequence[str], fold: str) -> np.ndarray:
    """The sessions that have every contrast; raises `UsageError` if there is none."""
    complete = sessions[store.present[sessions][:, np.isin(store.contrasts, list(contrasts))].all(axis=1)]
    if not len(complete):
        got, expected = f"{len(sessions)} test sessions", f"one with {', '.join(contrasts)}"
        remedy = "Leave a contrast out: --set 'contrasts=[…]'"
        what = "no test session has every contrast"
        raise UsageError(what, where=f"fold {fold}", got=got, expected=expected, remedy=remedy)
    return complete


def score_missing_contrasts(
    run: Path, store: Store, split: Split, fold: str, contrasts: Sequence[str], subset: Sequence[str] | None
) -> None:
    """Score the model of a finished run on the test sessions that have every contrast, unless already done.

    Writes ``partial_input.json`` into the run. `subset` names the contrasts that the model reads; None is the model of
    all contrasts, which is scored with every subset.
    """
    if (run / MISSING_CONTRASTS_FILE).is_file():
        return
    bundle = load_bundle(run / EXPORT_FOLDER)
    target = from_dict(bundle.labels)
    labelled = TargetColumn.find(store, target.column).labelled
    test = np.intersect1d(split.sessions(store, fold)["test"], labelled)
    sessions = complete_sessions(store, test, contrasts, fold).tolist()
    model = bundle.model.to(process_state().device)
    num_slices, scoring = bundle.metadata["num_slices"], scoring_from_bundle(bundle)
    frozen = None if subset is not None else _load_frozen_baseline(bundle, target)
    results = []
    for read in non_empty_subsets(contrasts) if subset is None else [tuple(subset)]:
        without = [name for name in store.contrasts if name not in read]
        scored = score_sessions(model, store, sessions, target, num_slices, without, scoring=scoring)
        absence = TRAINING if subset is not None else NONE if len(read) == len(contrasts) else TEST
        result = {"contrasts": list(read), "absence": absence, "num_left_out": len(test) - len(sessions)}
        if absence != TEST and (run / FROZEN_CASES_FILE).is_file():
            result |= scored.to_dict() | {"frozen": _read_frozen_score(run, target.kind, sessions)}
        elif frozen is not None:
            baseline = score_frozen_baseline(frozen, store, sessions, without, scoring=scoring)
            result = replace(scored, frozen=baseline.scores).to_dict() | result
        else:
            result |= scored.to_dict()
        results.append(result)
    write_atomically(run / MISSING_CONTRASTS_FILE, json.dumps(results, indent=1) + "\n")


def _load_frozen_baseline(bundle: Bundle, target: Task) -> FrozenBaseline | None:
    """The frozen baseline; None where the bundle has none, or lacks its backbone."""
    try:
        return load_frozen_baseline(bundle, target, process_state().device)
    except NoFrozenBaselineError:
        return None  # after full fine-tuning; the page leaves these cells empty


def _read_frozen_score(run: Path, task: str, sessions: Sequence[int]) -> dict[str, float | None]:
    """The headline score of the frozen baseline of a run on some of its test sessions."""
    cases = read_cases(run / FROZEN_CASES_FILE)
    score = compute_headline_score(task, cases[cases["row"].isin(sessions)])
    return {PRIMARY_METRIC[task]: nan_as_none(score)}


def missing_contrast_rows(folder: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The scores that `score_missing_contrasts` wrote for the runs of a table: one row per run and subset.

    ``drop`` is how much worse the headline score is than with full input in the same fold and seed.
    """
    rows: list[dict[str, Any]] = []
    full: dict[tuple[str, int], float] = {}
    for run in table.to_dict(orient="records"):
        file = folder / run["run"] / MISSING_CONTRASTS_FILE
        for content in require_json(file, "Remove it and continue with --resume", content_type=list):
            scores, key = make_score_columns(content), (run["fold"], run["seed"])
            primary = METRICS[PRIMARY_METRIC[content["task"]]]
            if content["absence"] == NONE:
                full[key] = scores[primary.name]  # written first for its fold and seed
            row = {
                "contrasts": ", ".join(content["contrasts"]),
                "absence": content["absence"],
                "task": content["task"],
                **{name: run[name] for name in ("group", "fold", "seed", "num_train")},
                "num_test": content["num_sessions"],
                "num_left_out": content["num_left_out"],
                "drop": primary.drop(full[key], scores[primary.name]),
            }
            rows.append(row | scores)
    return pd.DataFrame(rows)


def summarise_missing_contrasts(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread of the headline score of each subset and kind of absence, with the mean drop and its spread."""
    _, baselines = get_score_columns(rows)
    headline = PRIMARY_METRIC[rows["task"].iloc[0]]
    found = []
    for (contrasts, absence), part in rows.groupby(["contrasts", "absence"], sort=False):
        found.append(
            {"contrasts": contrasts, "absence": absence, "score": headline}
            | compute_spread(part, headline, baselines)
            | {"drop": part["drop"].mean(), "std_drop": part["drop"].std(ddof=1), "num_runs": len(part)}
            | {**compute_mean_sizes(part), "num_left_out": float(part["num_left_out"].mean())}
        )
    # Both kinds of absence of a subset go in adjacent rows.
    order = {name: place for place, name in enumerate(dict.fromkeys(rows["contrasts"]))}
    return pd.DataFrame(sorted(found, key=lambda row: order[row["contrasts"]]))
