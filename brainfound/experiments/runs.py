"""Experiments of many fine-tuning runs: over the folds of a split, over seeds, and for each of several systems.

A score depends on how the subjects are divided: another division of the same subjects gives another. The folder:

    split.json      the subjects of each part, fold by fold
    fold-1/seed-0/  a fine-tuning run; then fold-1/seed-1/, fold-2/seed-0/, …; with several systems, each run is in the
                    folder of its system: lora-r8/fold-1/seed-0/, full/fold-1/seed-0/, …
    scores.tsv, summary.json, cases.tsv, report.md   see `brainfound.experiments.folder`

With `resume` a finished run is kept, and one that was cut off continues from its checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pandas as pd

from brainfound.data.splits.split_file import Split
from brainfound.data.store import Store
from brainfound.data.store.store import restrict_contrasts
from brainfound.errors import BrainFoundError, UsageError
from brainfound.experiments.folder import SUMMARY_FILE, Kind
from brainfound.experiments.results import (
    EXPERIMENT_SPLIT_FILE,
    ExperimentSpec,
    complete_sessions,
    make_score_row,
    score_missing_contrasts,
    write_cases_and_page,
    write_results,
)
from brainfound.experiments.systems import SystemSpec, make_subset_systems, parse_systems
from brainfound.files import require_json
from brainfound.finetuning.finetune import finetune, resolve_parts_and_task
from brainfound.finetuning.recipe import FinetuneRecipe, resolve_recipe
from brainfound.finetuning.splits import make_split
from brainfound.finetuning.tasks import Task
from brainfound.models.loading import read_patch_size
from brainfound.training.distributed import run_on_main_rank
from brainfound.training.process import process_state
from brainfound.training.run_folder import EMBEDDINGS_FOLDER, is_run_folder


class RunOptions(TypedDict, total=False):
    """Options for the runs of an experiment; `resume`, `keep_ids`, `overrides` and `quiet` are those of `finetune`."""

    seeds: Sequence[int] | None
    """Seeds of new weights, data order and augmentation; all share the split. None: the seed of the recipe."""
    resume: bool
    keep_ids: bool
    overrides: Iterable[str]
    command: str
    """The command line, for the page."""
    quiet: bool


def make_folds(
    recipe: FinetuneRecipe,
    store: Store,
    target: str,
    *,
    file: str | Path | None = None,
    folds: int | None = None,
    shots: Sequence[int | None] = (),
    num_subjects: Sequence[int | None] = (),
    leave_site_out: bool = False,
) -> Split:
    """Make the folds of an experiment: all folds of a split file, or new ones with the shares and seed of a recipe.

    The arguments after `file` are those of `brainfound.finetuning.splits.make_split`. Raises `UsageError` if
    both a file and new folds are given, or as `make_split`.
    """
    if file is not None:
        if folds is not None or shots or num_subjects or leave_site_out:
            remedy = "Leave out the file, or the folds to make"
            raise UsageError("a split file already has folds", where=file, remedy=remedy)
        return Split.load(file)
    shares = recipe.split
    if abs(shares.train + shares.validation + shares.test - 1) > 1e-6:
        got = f"{shares.train:g}, {shares.validation:g}, {shares.test:g}"
        raise UsageError("the shares of the parts do not sum to 1", where="split", got=got)
    return make_split(
        store,
        test=shares.test,
        validation=shares.validation,
        folds=folds,
        shots=shots,
        num_subjects=num_subjects,
        leave_site_out=leave_site_out,
        target=target,
        stratify=[*([target] if shares.stratify else []), *(shares.stratify_columns or ())],
        seed=shares.seed,
    )


def finetune_folds(
    split: Split,
    recipe: FinetuneRecipe | str | Path,
    data: str | Path | Store,
    model: str | Path,
    target: str,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    **options: Unpack[RunOptions],
) -> pd.DataFrame:
    """Fine-tune on every fold of a split with every seed.

    Args:
        split: the folds, from `make_folds` or `brainfound.finetuning.splits.make_split`.
        recipe, data, model, target, adapter: as for `brainfound.finetuning.finetune.finetune`.
        out: the folder of all runs.
        options: see `RunOptions`.

    Returns:
        One row per run: fold, seed, folder, numbers of sessions trained and tested on, each score, and that of each
        baseline.

    Raises:
        UsageError: before the first run, if seeds, labels or the folder are unusable. Otherwise as `finetune`.
    """
    systems = parse_systems([str(model)], [] if adapter is None else [str(adapter)])
    return _Experiment("repeated", split, recipe, data, systems, target, Path(out), **options).run()


def finetune_systems(
    split: Split,
    recipe: FinetuneRecipe | str | Path,
    data: str | Path | Store,
    systems: Sequence[SystemSpec],
    target: str,
    out: str | Path,
    **options: Unpack[RunOptions],
) -> pd.DataFrame:
    """Compare starting points and adaptations: fine-tune each on the same folds, with the same seeds and budget.

    All systems, from `brainfound.experiments.systems.parse_systems`, are compared with the first; a single one runs as
    in `finetune_folds`. The table has the columns of `finetune_folds`, and ``system``, ``model`` and ``adapter``.
    """
    kind: Kind = "comparison" if len(systems) > 1 else "repeated"
    return _Experiment(kind, split, recipe, data, systems, target, Path(out), **options).run()


def finetune_subsets(
    split: Split,
    recipe: FinetuneRecipe | str | Path,
    data: str | Path | Store,
    system: SystemSpec,
    target: str,
    out: str | Path,
    **options: Unpack[RunOptions],
) -> pd.DataFrame:
    """Compare contrasts absent in training with contrasts absent in the test: one model per subset of the contrasts.

    The subsets are of the recipe's ``contrasts``, or of the store's. The model of all contrasts is also scored with the
    others withheld. All are scored on the test sessions that have every contrast; ``partial_input.tsv`` holds these
    scores, see `brainfound.experiments.results`. Returns and raises as `finetune_folds`: a run is scored on its
    own test sessions, and ``contrasts`` names those that it read.
    """
    overrides = options["overrides"] = tuple(options.get("overrides", ()))
    store = data if isinstance(data, Store) else Store.open(data)
    content = resolve_recipe(recipe, system.adapter, (*overrides, *system.overrides))
    systems = make_subset_systems(system, restrict_contrasts(store, content.contrasts).shown)
    return _Experiment("partial input", split, recipe, store, systems, target, Path(out), **options).run()


@dataclass
class _Experiment:
    """Does one run after another, systems in the inner loop, so that an unfinished experiment compares them too."""

    kind: Kind
    split: Split
    recipe: FinetuneRecipe | str | Path
    data: InitVar[str | Path | Store]
    systems: Sequence[SystemSpec]
    target: str
    folder: Path
    seeds: Sequence[int] | None = None
    resume: bool = False
    keep_ids: bool = False
    overrides: Iterable[str] = ()
    command: str = ""
    quiet: bool = False

    def __post_init__(self, data: str | Path | Store) -> None:
        self.overrides = tuple(self.overrides)
        self.recipes = {
            system.name: resolve_recipe(self.recipe, system.adapter, (*self.overrides, *system.all_overrides))
            for system in self.systems
        }
        self.first_recipe = self.recipes[self.systems[0].name]
        self.all_seeds = [self.first_recipe.seed] if self.seeds is None else list(self.seeds)
        if not self.all_seeds or len(set(self.all_seeds)) != len(self.all_seeds):
            raise UsageError("seeds must be given once each", where="seeds", got=self.all_seeds)
        for fold in self.split.folds:
            if "test" not in self.split.parts(fold):
                what, remedy = "runs are compared on a test part, and the split has none", "Start one run at a time"
                raise UsageError(what, where=f"fold {fold}", got="train and validation", remedy=remedy)
        _require_folder_names(self.split.folds, "fold", "split")
        _require_folder_names([s.name for s in self.systems if s.name], "system", "--model and --adapter")
        self.store = data if isinstance(data, Store) else Store.open(data)

    def run(self) -> pd.DataFrame:
        is_main = process_state().is_main_process
        run_on_main_rank(self._prepare_folder, is_main)
        task = self._preflight()
        groups = _group_folds(self.split)
        num_planned = len(self.split.folds) * len(self.all_seeds) * len(self.systems)
        spec = ExperimentSpec(
            self.kind, self.first_recipe, self.target, task, self.store, self.split, self.systems, self.all_seeds,
            num_planned, self.command,
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        for fold, seed, system in product(self.split.folds, self.all_seeds, self.systems):
            run = self._run(system, fold, seed, is_main)
            recipe = self.recipes[system.name]
            rows.append(make_score_row(run, self.folder, system, recipe, groups[fold], fold, seed))
            # After each run, so that the results of finished runs survive the failure of a later one.
            run_on_main_rank(partial(write_results, self.folder, pd.DataFrame(rows), spec), is_main)
        table = pd.DataFrame(rows)
        run_on_main_rank(partial(write_cases_and_page, self.folder, table, self.store, self.keep_ids), is_main)
        return table

    def _prepare_folder(self) -> None:
        """Write the split, and remove it again if the experiment is refused."""
        is_new = _write_or_check_split(self.folder, self.split, self.kind, self.resume)
        try:
            self._preflight()
        except BrainFoundError:
            if is_new:
                (self.folder / EXPERIMENT_SPLIT_FILE).unlink()
            raise

    def _preflight(self) -> Task:
        """Check all systems and folds before the first run; returns the task of the first system."""
        tasks = []
        for system in self.systems:
            recipe = self.recipes[system.name]
            store = restrict_contrasts(self.store, recipe.contrasts)
            read_patch_size(system.model, store.contrasts)
            for fold in self.split.folds:
                split_file = self.folder / EXPERIMENT_SPLIT_FILE
                parts, task = resolve_parts_and_task(recipe, store, self.target, split_file, fold)
                tasks.append(task)
                if self.kind == "partial input" and system is self.systems[0]:
                    complete_sessions(self.store, parts["test"], store.shown, fold)
        return tasks[0]

    def _run(self, system: SystemSpec, fold: str, seed: int, is_main: bool) -> Path:
        run = self.folder / system.name / fold / f"seed-{seed}"
        finetune(
            self.recipe,
            self.store,
            system.model,
            self.target,
            run,
            adapter=system.adapter,
            split=self.folder / EXPERIMENT_SPLIT_FILE,
            fold=fold,
            resume=self.resume and is_run_folder(run),
            keep_ids=self.keep_ids,
            cache=self.folder / EMBEDDINGS_FOLDER,
            overrides=[*self.overrides, *system.all_overrides, f"seed={seed}"],
            quiet=self.quiet,
        )
        if self.kind == "partial input":
            contrasts = self.systems[0].contrasts or self.store.contrasts
            subset = None if system is self.systems[0] else system.contrasts
            score = partial(score_missing_contrasts, run, self.store, self.split, fold, contrasts, subset)
            run_on_main_rank(score, is_main)
        return run


def _write_or_check_split(folder: Path, split: Split, kind: Kind, resume: bool) -> bool:
    """Write the split, or refuse a folder that holds something else; returns whether the split is new."""
    file = folder / EXPERIMENT_SPLIT_FILE
    if is_run_folder(folder):
        raise UsageError("the folder holds a single run", where=folder, remedy="Give another --out")
    if file.is_file():
        if not resume:
            remedy = "Go on with --resume, or give another --out"
            raise UsageError("the folder holds runs already", where=folder, remedy=remedy)
        if Split.load(file).folds != split.folds:
            raise UsageError("the runs in the folder have another split", where=file, remedy="Give another --out")
        # The runs of an experiment of another kind lie in other subfolders.
        summary = folder / SUMMARY_FILE
        before = require_json(summary, "Give another --out").get("kind") if summary.is_file() else kind
        if before != kind:
            what, remedy = "the folder holds another experiment", "Give another --out"
            raise UsageError(what, where=folder, got=kind, expected=before, remedy=remedy)
        return False
    split.save(file)
    return True


def _require_folder_names(names: Iterable[str], what: str, where: str) -> None:
    """Refuse names of folds and systems that would escape the folder, or that are reserved."""
    for name in names:
        if re.search(r"[^\w .+=@-]", name) or name.startswith(".") or name == EMBEDDINGS_FOLDER:
            remedy = "Rename it: letters, digits, spaces and _.+=@-"
            raise UsageError(f"the name of a {what} cannot be a folder name", where=where, got=name, remedy=remedy)


def _group_folds(split: Split) -> dict[str, str]:
    """Fold → the group whose spread it belongs to, see `brainfound.experiments.folder`."""
    tested = {frozenset(split.parts(fold)["test"]) for fold in split.folds}
    return {fold: fold if len(tested) == 1 else "all folds" for fold in split.folds}
