"""One fine-tuning many times: over the folds of a split, over seeds, and with each of the systems of an experiment.

A score of one division says little: another division of the same subjects gives another score. The folder:

    split.json      who is in which part of each fold
    fold-1/seed-0/  a run of fine-tuning, as always; fold-1/seed-1/, fold-2/seed-0/, …; of several systems, the folder
                    of each run lies in that of its system: lora-r8/fold-1/seed-0/, full/fold-1/seed-0/, …
    scores.tsv      one row per run
    summary.json    what was asked, the mean of each score and its spread, over folds and over seeds
    cases.tsv       the answers of all runs on their test sessions; subjects are numbered
    report.md       all that on one page, see `brainfound.experiments.page`

A run that has ended is not done again with `resume`; one that was cut off goes on from its checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.splits.split_file import Split
from brainfound.data.store import Store
from brainfound.data.store.withheld import restrict_contrasts
from brainfound.errors import BrainFoundError, UsageError
from brainfound.experiments import partial_input
from brainfound.experiments import results as experiment_files
from brainfound.experiments.results import EXPERIMENT_SPLIT_FILE, ExperimentSpec
from brainfound.experiments.systems import SystemSpec, make_subset_systems, parse_systems
from brainfound.finetuning.finetune import finetune, resolve_parts_and_task
from brainfound.finetuning.recipe import FinetuneRecipe, resolve_recipe
from brainfound.finetuning.splits import make_split
from brainfound.finetuning.tasks import Task
from brainfound.metrics.summaries import summarise_runs
from brainfound.models.start import read_patch_size
from brainfound.training import distributed as ranks
from brainfound.training import run_folder as run_files
from brainfound.training.engine import process_state

__all__ = ["finetune_folds", "finetune_subsets", "finetune_systems", "make_folds", "summarise_runs"]


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
    """The folds to fine-tune on: all of a split file, or made of a store with the shares and the seed of a recipe.

    Args:
        file: a split file, whose folds are all taken.
        folds, shots, num_subjects, leave_site_out: as for `brainfound.finetuning.splits.make_split`.

    Raises:
        UsageError: a file and folds to make, or as `make_split`.
    """
    if file is not None:
        if folds or shots or num_subjects or leave_site_out:
            raise UsageError(
                "a split file has its folds", where=file, remedy="Leave out the file, or the folds to make"
            )
        return Split.load(file)
    shares = recipe.split
    if abs(shares.train + shares.validation + shares.test - 1) > 1e-6:
        raise UsageError(
            "the shares of the parts do not sum to 1",
            where="split",
            got=f"{shares.train:g}, {shares.validation:g}, {shares.test:g}",
        )
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
    seeds: Sequence[int] | None = None,
    adapter: str | Path | None = None,
    resume: bool = False,
    keep_ids: bool = False,
    overrides: Iterable[str] = (),
    command: str = "",
    quiet: bool = False,
) -> pd.DataFrame:
    """Fine-tune on every fold of a split, with every seed.

    Args:
        split: the folds; `brainfound.finetuning.splits` makes them of a store.
        out: the folder of all runs.
        seeds: of new weights, order and augmentation; the split stays as it is. None: the recipe's own.
        command: what was typed, for the page.
        recipe, data, model, target, adapter, resume, keep_ids, overrides, quiet: as for `finetune`.

    Returns:
        One row per run: fold, seed, folder, sessions trained and tested on, each score, and that of each baseline.

    Raises:
        UsageError: no seed, one twice, a fold whose labels cannot be learnt, or a folder with something else. All that
            before the first run. Otherwise as `finetune`.
    """
    (system,) = parse_systems([str(model)], [] if adapter is None else [str(adapter)])
    options = _Options(seeds, resume, keep_ids, tuple(overrides), command, quiet)
    return _ExperimentRunner("repeated", split, recipe, data, [system], target, Path(out), options).run()


def finetune_systems(
    split: Split,
    recipe: FinetuneRecipe | str | Path,
    data: str | Path | Store,
    systems: Sequence[SystemSpec],
    target: str,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    resume: bool = False,
    keep_ids: bool = False,
    overrides: Iterable[str] = (),
    command: str = "",
    quiet: bool = False,
) -> pd.DataFrame:
    """Compare starting points and adaptations: each is fine-tuned on the same folds, with the same seeds and budget.

    Args:
        systems: of `brainfound.experiments.systems.parse_systems`; the others are compared with the first. One alone is
            what `finetune_folds` does.
        split, recipe, data, target, out, seeds, resume, keep_ids, overrides, command, quiet: as for `finetune_folds`.

    Returns:
        One row per run, as `finetune_folds`; ``system``, ``model`` and ``adapter`` say of which.

    Raises:
        UsageError, RecipeError: as `finetune_folds`, for all systems before the first run.
    """
    options = _Options(seeds, resume, keep_ids, tuple(overrides), command, quiet)
    kind = "comparison" if len(systems) > 1 else "repeated"
    return _ExperimentRunner(kind, split, recipe, data, systems, target, Path(out), options).run()


def finetune_subsets(
    split: Split,
    recipe: FinetuneRecipe | str | Path,
    data: str | Path | Store,
    system: SystemSpec,
    target: str,
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    resume: bool = False,
    keep_ids: bool = False,
    overrides: Iterable[str] = (),
    command: str = "",
    quiet: bool = False,
) -> pd.DataFrame:
    """Absence in training beside absence in the test: one model for every non-empty subset of the contrasts.

    The model of all contrasts is also asked with the others withheld. All are scored on the same sessions, the test
    sessions that have every contrast; `brainfound.experiments.partial_input` writes that into ``partial_input.tsv``.

    Args:
        system: what is fine-tuned; the subsets are of the recipe's ``contrasts``, or of the store's.
        split, recipe, data, target, out, seeds, resume, keep_ids, overrides, command, quiet: as for `finetune_folds`.

    Returns:
        One row per run, as `finetune_folds`, scored on its own test sessions; ``contrasts`` says what it saw.

    Raises:
        UsageError: there is one contrast only, or a fold has no test session with every contrast. Otherwise as
            `finetune_folds`.
    """
    overrides = tuple(overrides)
    store = data if isinstance(data, Store) else Store.open(data)
    content = resolve_recipe(recipe, system.adapter, (*overrides, *system.overrides))
    systems = make_subset_systems(system, restrict_contrasts(store, content.contrasts).shown)
    options = _Options(seeds, resume, keep_ids, overrides, command, quiet)
    return _ExperimentRunner("partial input", split, recipe, store, systems, target, Path(out), options).run()


@dataclass(frozen=True)
class _Options:
    seeds: Sequence[int] | None
    resume: bool
    keep_ids: bool
    overrides: tuple[str, ...]
    command: str
    quiet: bool


class _ExperimentRunner:
    """All runs of an experiment, one after the other. The systems are innermost: whatever is done is comparable."""

    def __init__(
        self,
        kind: str,
        split: Split,
        recipe: FinetuneRecipe | str | Path,
        data: str | Path | Store,
        systems: Sequence[SystemSpec],
        target: str,
        folder: Path,
        options: _Options,
    ) -> None:
        self.kind, self.split, self.recipe, self.systems = kind, split, recipe, list(systems)
        self.target, self.folder, self.options = target, folder, options
        self.contents = {
            system.name: resolve_recipe(recipe, system.adapter, (*options.overrides, *system.all_overrides))
            for system in self.systems
        }
        self.content = self.contents[self.systems[0].name]
        seeds = [self.content.seed] if options.seeds is None else list(options.seeds)
        if not seeds or len(set(seeds)) != len(seeds):
            raise UsageError("seeds must be given, and each once", where="seeds", got=seeds)
        self.seeds = seeds
        _require_folder_names(split.folds, "fold", "split")
        _require_folder_names(
            [system.name for system in self.systems if system.name], "system", "--model and --adapter"
        )
        self.store = data if isinstance(data, Store) else Store.open(data)

    def run(self) -> pd.DataFrame:
        is_main = process_state().is_main_process
        ranks.run_on_main_rank(self._prepare_folder, is_main)
        resolved = self._preflight()
        groups = _groups(self.split)
        planned = len(self.split.folds) * len(self.seeds) * len(self.systems)
        asked = ExperimentSpec(
            self.kind, self.content, self.target, resolved, self.store, self.split, self.systems, self.seeds, planned,
            self.options.command,
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        for fold in self.split.folds:
            for seed in self.seeds:
                for system in self.systems:
                    run = self._run(system, fold, seed, is_main)
                    rows.append(
                        experiment_files.make_score_row(
                            run, self.folder, system, self.contents[system.name], groups[fold], fold, seed
                        )
                    )
                    # After each run: what is done is told even if a later one fails.
                    write = partial(experiment_files.write, self.folder, pd.DataFrame(rows), asked)
                    ranks.run_on_main_rank(write, is_main)
        table = pd.DataFrame(rows)
        ranks.run_on_main_rank(
            lambda: experiment_files.write_results_page(self.folder, table, self.store, self.options.keep_ids), is_main
        )
        return table

    def _prepare_folder(self) -> None:
        """Write the split, which stays only if nothing is refused."""
        is_new = _write_or_check_split(self.folder, self.split, self.kind, self.options.resume)
        try:
            self._preflight()
        except BrainFoundError:
            if is_new:
                (self.folder / EXPERIMENT_SPLIT_FILE).unlink()
            raise

    def _preflight(self) -> Task:
        """Everything that can be refused before the first run; returns the task of the first system."""
        tasks = []
        for system in self.systems:
            content = self.contents[system.name]
            store = restrict_contrasts(self.store, content.contrasts)
            read_patch_size(system.model, store.contrasts)
            for fold in self.split.folds:
                parts, task = resolve_parts_and_task(
                    content, store, self.target, self.folder / EXPERIMENT_SPLIT_FILE, fold
                )
                tasks.append(task)
                if self.kind == "partial input" and system is self.systems[0]:
                    partial_input.complete_sessions(self.store, parts["test"], store.shown, fold)
        return tasks[0]

    def _run(self, system: SystemSpec, fold: str, seed: int, is_main: bool) -> Path:
        options = self.options
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
            resume=options.resume and run_files.is_run_folder(run),
            keep_ids=options.keep_ids,
            cache=self.folder / run_files.EMBEDDINGS_FOLDER,
            overrides=[*options.overrides, *system.all_overrides, f"seed={seed}"],
            quiet=options.quiet,
        )
        if self.kind == "partial input":
            shown = self.systems[0].contrasts or self.store.contrasts
            mine = system.contrasts if system is not self.systems[0] else None
            ranks.run_on_main_rank(
                lambda: partial_input.score_missing_contrasts(run, self.store, self.split, fold, shown, mine), is_main
            )
        return run


def _write_or_check_split(folder: Path, split: Split, kind: str, resume: bool) -> bool:
    """Write the split, or refuse a folder that holds something else; returns whether it was written now."""
    file = folder / EXPERIMENT_SPLIT_FILE
    if run_files.is_run_folder(folder):
        raise UsageError("the folder holds a single run", where=folder, remedy="Give another --out")
    if file.is_file():
        if not resume:
            raise UsageError(
                "the folder holds runs already", where=folder, remedy="Go on with --resume, or give another --out"
            )
        if Split.load(file).folds != split.folds:
            raise UsageError("the runs in the folder have another split", where=file, remedy="Give another --out")
        experiment_files.require_same_experiment_kind(folder, kind)
        return False
    split.save(file)
    return True


def _require_folder_names(names: Iterable[str], what: str, where: str) -> None:
    """Refuse names of folds and systems that would lead out of the folder, or into one that is taken."""
    for name in names:
        if re.search(r"[^\w .+=@-]", name) or name.startswith(".") or name == run_files.EMBEDDINGS_FOLDER:
            raise UsageError(
                f"the name of a {what} cannot be that of a folder",
                where=where,
                got=name,
                remedy="Rename it: letters, digits, spaces and _.+=@-",
            )


def _groups(split: Split) -> dict[str, str]:
    """Of each fold the group whose spread it belongs to; see `summarise_runs`."""
    tested = {frozenset(split.parts(fold)["test"]) for fold in split.folds}
    return {fold: fold if len(tested) == 1 else "all folds" for fold in split.folds}
