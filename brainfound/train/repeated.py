"""One fine-tuning many times: over the folds of a split, and over seeds.

A score of one division says little: another division of the same subjects gives another score. The folder:

    split.json      who is in which part of each fold
    fold-1/seed-0/  a run of fine-tuning, as always; fold-1/seed-1/, fold-2/seed-0/, …
    scores.tsv      one row per run
    summary.json    the mean of each score and its spread, over folds and over seeds

A run that has ended is not done again with `resume`; one that was cut off goes on from its checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.split_file import Split
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.evaluate.scores import HEADLINE
from brainfound.train import ranks, run_files
from brainfound.train.checkpoint import write_atomically
from brainfound.train.engine import process_state
from brainfound.train.finetune import finetune, what_is_learnt
from brainfound.train.finetune_recipe import FinetuneRecipe, resolve_recipe
from brainfound.train.make_split import make_split
from brainfound.train.session_scores import read_scores

SPLIT_FILE, TABLE_FILE, SUMMARY_FILE = "split.json", "scores.tsv", "summary.json"
TRIVIAL = "trivial "
"""Stands before the name of a score of the baseline that never looks at an image."""


def folds_for(
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
        folds, shots, num_subjects, leave_site_out: as for `brainfound.train.make_split.make_split`.

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


def finetune_over(
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
    quiet: bool = False,
) -> pd.DataFrame:
    """Fine-tune on every fold of a split, with every seed.

    Args:
        split: the folds; `brainfound.train.make_split` makes them of a store.
        out: the folder of all runs.
        seeds: of new weights, order and augmentation; the split stays as it is. None: the recipe's own.
        recipe, data, model, target, adapter, resume, keep_ids, overrides, quiet: as for `finetune`.

    Returns:
        One row per run: fold, seed, folder, sessions trained and tested on, each score, and that of the trivial
        baseline.

    Raises:
        UsageError: no seed, one twice, a fold whose labels cannot be learnt, or a folder with something else. All that
            before the first run. Otherwise as `finetune`.
    """
    overrides = list(overrides)
    content = resolve_recipe(recipe, adapter, overrides)
    seeds = [content.seed] if seeds is None else list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError("seeds must be given, and each once", where="seeds", got=seeds)
    _require_names(split)
    store = data if isinstance(data, Store) else Store.open(data)
    folder, is_main = Path(out), process_state().is_main_process
    ranks.on_main_rank(lambda: _keep_split(folder, split, resume), is_main)
    for fold in split.folds:
        what_is_learnt(content, store, target, folder / SPLIT_FILE, fold)
    groups = _groups(split)
    rows = []
    for fold in split.folds:
        for seed in seeds:
            run = folder / fold / f"seed-{seed}"
            finetune(
                recipe,
                store,
                model,
                target,
                run,
                adapter=adapter,
                split=folder / SPLIT_FILE,
                fold=fold,
                resume=resume and run_files.holds_run(run),
                keep_ids=keep_ids,
                cache=folder / run_files.EMBEDDINGS_FOLDER,
                overrides=[*overrides, f"seed={seed}"],
                quiet=quiet,
            )
            rows.append(_row(run, groups[fold], fold, seed, run.relative_to(folder)))
            # After each run: what is done is told even if a later one fails.
            ranks.on_main_rank(partial(_write, folder, pd.DataFrame(rows), split), is_main)
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """The spread of each score.

    Where the test part differs from fold to fold (k folds, sites) all folds are one group; where only what is
    learnt from differs (shots) each fold is a group of its own. Runs whose score is undefined are left out of it.

    Returns:
        One row per group and score: group, score, mean over runs, ``std_folds`` (standard deviation of the means over
        seeds of each fold), ``std_seeds`` (mean over folds of that over seeds), lowest, highest, the trivial
        baseline's mean, and how many folds and seeds there are. A spread of one is NaN.
    """
    names = [name for name in table.columns if TRIVIAL + name in table.columns]
    rows = []
    for group, part in table.groupby("group", sort=False):
        for name in names:
            defined = part[part[name].notna()]
            by_fold = defined.groupby("fold", sort=False)[name]
            rows.append(
                {
                    "group": group,
                    "score": name,
                    "mean": part[name].mean(),
                    "std_folds": by_fold.mean().std(ddof=1),
                    "std_seeds": by_fold.std(ddof=1).mean(),
                    "lowest": part[name].min(),
                    "highest": part[name].max(),
                    "trivial": part[TRIVIAL + name].mean(),
                    "num_folds": by_fold.ngroups,
                    "num_seeds": defined["seed"].nunique(),
                }
            )
    return pd.DataFrame(rows)


def _keep_split(folder: Path, split: Split, resume: bool) -> None:
    file = folder / SPLIT_FILE
    if run_files.holds_run(folder):
        raise UsageError("the folder holds a single run", where=folder, remedy="Give another --out")
    if file.is_file():
        if not resume:
            raise UsageError(
                "the folder holds runs already", where=folder, remedy="Go on with --resume, or give another --out"
            )
        if Split.load(file).folds != split.folds:
            raise UsageError("the runs in the folder have another split", where=file, remedy="Give another --out")
        return
    split.save(file)


def _require_names(split: Split) -> None:
    """Refuse names of folds that would lead out of the folder, or into one that is taken."""
    for fold in split.folds:
        if re.search(r"[^\w .+=@-]", fold) or fold.startswith(".") or fold == run_files.EMBEDDINGS_FOLDER:
            raise UsageError(
                "the name of a fold cannot be that of a folder",
                where="split",
                got=fold,
                remedy="Rename it: letters, digits, spaces and _.+=@-",
            )


def _groups(split: Split) -> dict[str, str]:
    """Of each fold the group whose spread it belongs to; see `summarise`."""
    tested = {frozenset(split.parts(fold)["test"]) for fold in split.folds}
    return {fold: fold if len(tested) == 1 else "all folds" for fold in split.folds}


def _row(run: Path, group: str, fold: str, seed: int, name: Path) -> dict[str, Any]:
    content = read_scores(run)
    parts = Split.load(run / "splits.json").counts["single"]
    scores = {key: _number(value) for key, value in content["scores"].items()}
    trivial = {TRIVIAL + key: _number(content["trivial"].get(key)) for key in scores}
    return {
        "group": group,
        "fold": fold,
        "seed": seed,
        "run": name.as_posix(),
        "task": content["task"],
        "num_train": parts["train"]["num_sessions"],
        "num_test": content["num_sessions"],
        **scores,
        **trivial,
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _write(folder: Path, table: pd.DataFrame, split: Split) -> None:
    write_atomically(folder / TABLE_FILE, table.to_csv(sep="\t", index=False))
    spread = summarise(table).to_dict(orient="records")
    content = {
        "task": table["task"].iloc[0],
        "headline": HEADLINE[table["task"].iloc[0]],
        "split": {"kind": split.made.get("kind"), "sha256": split.to_dict()["sha256"]},
        "num_runs": len(table),
        "scores": [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in spread
        ],
    }
    write_atomically(folder / SUMMARY_FILE, json.dumps(content, indent=1) + "\n")
