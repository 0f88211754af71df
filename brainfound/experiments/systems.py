"""The systems that an experiment compares: as specified, and as read from the folders of finished runs.

A system is a starting point, an adaptation of it, or a subset of the contrasts. All systems of an experiment share the
folds, the seeds and the recipe, except for their own overrides.

A folder holds one run; or an experiment (folds, seeds, several systems, with ``scores.tsv``); or one fold of it
(``seed-0/``, ``seed-1/``). The test parts of the folds are concatenated. Seeds stay apart, since the score of a system
is the mean over them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.errors import UsageError, mistaken_for
from brainfound.experiments.folder import RUNS_FILE, SUMMARY_FILE, ExperimentFolder
from brainfound.finetuning.scoring import (
    CASES_FILE,
    FROZEN_CASES_FILE,
    SCORES_FILE,
    SUBJECT_ROW,
    read_cases,
    read_scores,
)
from brainfound.metrics.cases import list_table_metrics
from brainfound.training.run_folder import FACTS_FILE, read_facts, short_name


@dataclass(frozen=True)
class SystemSpec:
    """One way to train a model."""

    name: str
    """Names its folder and rows; empty for a single system."""
    model: str
    adapter: str | None = None
    """An adapter recipe; None: the recipe's own."""
    overrides: tuple[str, ...] = ()
    """Recipe overrides for this system only."""
    contrasts: tuple[str, ...] | None = None
    """The contrasts that it reads; None: all."""
    start: str = ""
    """The name of the starting point."""

    @property
    def all_overrides(self) -> tuple[str, ...]:
        """The overrides, including that of the contrasts."""
        own = () if self.contrasts is None else (f"contrasts=[{', '.join(self.contrasts)}]",)
        return (*self.overrides, *own)


def parse_systems(models: Sequence[str], adapters: Sequence[str] = ()) -> list[SystemSpec]:
    """Combine each starting point with each adaptation, starting points in the outer loop.

    A single system has no name. With one starting point, systems are named after the adaptation; with one adaptation,
    after the starting point; otherwise after both, as ``dinov2-small+lora-r8``.

    Args:
        models: Hub ids or folders, optionally with a name in front: ``ours=runs/vits14/export``.
        adapters: adapter recipes by name or file, optionally with a name in front and recipe keys behind: ``full``,
            ``full,optim.lr=1e-5``, ``slow=full,optim.lr=1e-5``. Empty: the recipe's own.

    Raises:
        UsageError: there is no model, a name is given twice, or a key has no value.
    """
    starts = [_parse_start(text) for text in models]
    adaptations: list[tuple[str, str | None, tuple[str, ...]]] = [*map(_parse_adaptation, adapters)] or [("", None, ())]
    if not starts:
        raise UsageError("nothing to start from", where="--model", expected="a Hub id or a folder")
    _require_unique("--model", [name for name, _ in starts], "ours=PATH")
    _require_unique("--adapter", [name for name, _, _ in adaptations], "slow=full,optim.lr=1e-5")
    systems = []
    for (start, model), (adaptation, adapter, overrides) in product(starts, adaptations):
        parts = [start if len(starts) > 1 else "", adaptation if len(adaptations) > 1 else ""]
        systems.append(SystemSpec("+".join(filter(None, parts)), model, adapter, overrides, start=start))
    return systems


def non_empty_subsets(contrasts: Sequence[str]) -> list[tuple[str, ...]]:
    """All 2ⁿ − 1 non-empty subsets, the full set first, then by falling size, each in the given order.

    >>> non_empty_subsets(("T1w", "FLAIR"))
    [('T1w', 'FLAIR'), ('T1w',), ('FLAIR',)]
    """
    return [subset for size in range(len(contrasts), 0, -1) for subset in combinations(contrasts, size)]


def make_subset_systems(system: SystemSpec, contrasts: Sequence[str]) -> list[SystemSpec]:
    """One system per non-empty subset of two or more contrasts, the full set first, each named after its contrasts."""
    if len(contrasts) < 2:
        raise UsageError("partial input needs two contrasts or more", where="--partial-input", got=", ".join(contrasts))
    return [replace(system, name="+".join(subset), contrasts=subset) for subset in non_empty_subsets(contrasts)]


def _parse_start(text: str) -> tuple[str, str]:
    """``[NAME=]MODEL`` → name, model."""
    name, equals, model = text.partition("=")
    if equals and "/" not in name and not Path(text).exists():
        return _require_non_empty("--model", name, text), _require_non_empty("--model", model, text)
    return short_name(text), text


def _parse_adaptation(text: str) -> tuple[str, str, tuple[str, ...]]:
    """``[NAME=]ADAPTER[,KEY=VALUE…]`` → name, adapter, overrides."""
    first, *overrides = (part.strip() for part in text.split(","))
    for override in overrides:
        if not re.fullmatch(r"[\w.]+=.+", override):
            raise UsageError("not a key with its value", where="--adapter", got=text, expected="full,optim.lr=1e-5")
    name, equals, adapter = first.partition("=")
    if not equals:
        name, adapter = Path(first).stem, first
    return _require_non_empty("--adapter", name, text), _require_non_empty("--adapter", adapter, text), tuple(overrides)


def _require_non_empty(option: str, part: str, text: str) -> str:
    if not part:
        raise UsageError("a name or its value is missing", where=option, got=text, expected="NAME=VALUE")
    return part


def _require_unique(option: str, names: Sequence[str], example: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two are called {twice[0]}", where=option, remedy=f"Give each a name: {option} {example}")


@dataclass(frozen=True)
class ComparedRuns:
    """Systems of one task and target, and the metrics that tables show."""

    systems: dict[str, list[pd.DataFrame]]
    """Name → one table of cases per seed, in the order given; the input of `brainfound.metrics.compare`."""
    task: str
    target: str
    metrics: list[str]


def read_compared_runs(folders: Sequence[Path], *, frozen: bool = False) -> ComparedRuns:
    """Read the runs, and the evaluations (``evaluate --out``), of several folders.

    Runs on one store are matched by the rows of their sessions; runs on several stores by names, which they must have
    recorded (``--keep-ids``).

    Args:
        frozen: also put the frozen baseline of the first system in front.

    Raises:
        UsageError: a folder has no finished run, is given twice or is the only system; or the runs do not match.
    """
    places = [folder.resolve() for folder in folders]
    twice = [folder for k, folder in enumerate(folders) if places[k] in places[:k]]
    if twice:
        raise UsageError("the same runs twice", where=twice[0], remedy="Give each folder once")
    found = {name: seeds for folder in folders for name, seeds in _find_systems(folder).items()}
    if len(found) + frozen < 2:
        remedy = "Give two runs or more, or --frozen for the frozen baseline"
        raise UsageError("there is no run to compare with", where=folders[0] if folders else None, remedy=remedy)
    runs = {name: [run for seed in seeds for run in seed] for name, seeds in found.items()}
    facts = {name: [_read_facts(run) for run in of_system] for name, of_system in runs.items()}
    _require_same_task_and_target(facts)
    match_by_name = len({fact["data_hash"] for of_system in facts.values() for fact in of_system}) > 1
    first = next(iter(found))
    requested = [(f"{first}, frozen", found[first], FROZEN_CASES_FILE)] if frozen else []
    requested += [(name, seeds, CASES_FILE) for name, seeds in found.items()]
    systems = {
        name: [_read_seed([run / file for run in seed], match_by_name) for seed in seeds]
        for name, seeds, file in requested
    }
    target = facts[first][0]["target"]
    tables = [table for seeds in systems.values() for table in seeds]
    return ComparedRuns(systems, target["task"], target["column"], list_table_metrics(target["task"], tables))


def _find_systems(folder: Path) -> dict[str, list[list[Path]]]:
    """Name → for each seed the runs of all folds."""
    if (folder / RUNS_FILE).is_file():
        return _read_experiment_systems(folder)
    if (folder / CASES_FILE).is_file() and ((folder / FACTS_FILE).is_file() or (folder / SUMMARY_FILE).is_file()):
        return {str(folder): [[folder]]}
    seeds = sorted(path.parent for path in folder.glob(f"seed-*/{CASES_FILE}"))
    if not seeds:
        expected = f"a folder with {CASES_FILE}, or with {RUNS_FILE} of many runs"
        remedy = "Give the folder that finetune wrote, and end the run with --resume if it was cut off"
        what = mistaken_for(folder, "a finished fine-tuning run").replace("this is a run, ", "")
        raise UsageError(what, where=folder, expected=expected, remedy=remedy)
    return {str(folder): [[run] for run in seeds]}


def _read_experiment_systems(folder: Path) -> dict[str, list[list[Path]]]:
    table = pd.read_csv(folder / RUNS_FILE, sep="\t", dtype={"system": str, "group": str, "fold": str, "run": str})
    several = "system" in table and table["system"].nunique() > 1
    systems = {}
    for name, of_system in table.groupby("system", sort=False) if several else [("", table)]:
        where = f"{folder}: {name}" if name else str(folder)
        groups = of_system["group"].unique()
        if len(groups) > 1:
            what = "the runs were trained on different numbers of subjects"
            remedy = f"Give {(folder / of_system['run'].iloc[0]).parent}"
            raise UsageError(what, where=where, got=", ".join(groups), expected="one of them", remedy=remedy)
        seeds = {seed: part.sort_values("fold") for seed, part in of_system.groupby("seed")}
        folds = {tuple(part["fold"]) for part in seeds.values()}
        if len(folds) > 1:
            remedy = "End them: the same finetune command with --resume"
            raise UsageError("not every seed has all folds", where=where, remedy=remedy)
        systems[where] = [[folder / run for run in part["run"]] for part in seeds.values()]
    return systems


def _read_facts(run: Path) -> dict[str, Any]:
    """Data hash and target of a run, or of the folder of an evaluation."""
    if (run / SUMMARY_FILE).is_file():
        summary = ExperimentFolder.read(run).summary
        target = {"task": summary["task"], "column": summary["target"]}
        return {"data_hash": summary["data"]["data_hash"], "target": target}
    facts = read_facts(run, "data_hash")
    if facts.get("kind") != "finetune":
        remedy = "Give a folder that finetune wrote"
        raise UsageError("not a run of fine-tuning", where=run, got=facts.get("kind"), remedy=remedy)
    part = read_scores(run).get("part", "test") if (run / SCORES_FILE).is_file() else "test"
    if part != "test":
        what = "the run has no test part: its own subjects took part in choosing it"
        remedy = "Compare tests on another cohort: brainfound evaluate RUN --data STORE --out FOLDER"
        raise UsageError(what, where=run, got=f"scores of the {part}", remedy=remedy)
    return read_facts(run, "data_hash", "target")


def _require_same_task_and_target(facts: dict[str, list[dict[str, Any]]]) -> None:
    first, *_ = facts
    expected = facts[first][0]["target"]
    for name, of_system in facts.items():
        for key, what in (("task", "another task"), ("column", "another target")):
            if other := [fact["target"][key] for fact in of_system if fact["target"][key] != expected[key]]:
                remedy = "Compare runs of one task and target"
                raise UsageError(
                    f"{what} than {first}", where=name, got=other[0], expected=expected[key], remedy=remedy
                )


def _read_seed(files: Sequence[Path], match_by_name: bool) -> pd.DataFrame:
    """The cases of one seed over all folds, identified by subject and session."""
    cases = pd.concat([_read_cases(file) for file in files], ignore_index=True)
    where = files[0]
    if match_by_name:
        if not {"subject", "session"} <= set(cases.columns):
            what = "the runs are of different stores, whose rows do not correspond"
            expected, remedy = "the names of subjects and sessions", "Fine-tune with --keep-ids"
            raise UsageError(what, where=where, expected=expected, remedy=remedy)
        return cases.drop(columns=["row", SUBJECT_ROW], errors="ignore")
    # Number the subjects by their first row, so that tables of the same cases agree whether or not they name subjects.
    subjects = cases.groupby(cases[SUBJECT_ROW].to_numpy())["row"].transform("min")
    return cases.drop(columns=["session", SUBJECT_ROW], errors="ignore").assign(subject=subjects)


def _read_cases(file: Path) -> pd.DataFrame:
    if not file.is_file():
        what, remedy = "the run has not ended", "End it with --resume"
        if file.name == FROZEN_CASES_FILE:
            what, remedy = "the run has no frozen baseline", "Fine-tune with frozen_baseline=true"
        raise UsageError(what, where=file.parent, expected=file.name, remedy=remedy)
    return read_cases(file)
