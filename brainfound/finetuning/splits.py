"""The sessions that a run is trained, validated and tested on.

`make_split` divides a store: once, into folds, with few training subjects, or with one site left out. `split_sessions`
gives a run its parts, from its recipe or a split file; ``splits.json`` in the run folder names the subjects of each.
A bundle may be shared, so it keeps hashes, see `brainfound.data.splits.training_history`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from brainfound.data.splits import dividing, split_file
from brainfound.data.splits.split_file import PARTS, SINGLE_FOLD, Split
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.finetuning.tasks.base import MASK, Notify, Parts, TargetColumn, target_columns
from brainfound.recipes import Recipe
from brainfound.training import run_folder

SITE = "site"
FOLDS, SHOTS, FEW_SUBJECTS, SITES = "k-fold", "few shots per class", "few subjects", "leave one site out"
"""Kinds of split other than a single one, as named in a split file."""
RUN_SPLIT_FILE = "splits.json"


class SplitRecipe(Recipe):
    """How subjects are divided. Nothing is ever chosen on the test part."""

    train: float = Field(0.7, gt=0, lt=1)
    """Share of the subjects to train on."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share to evaluate on during training."""
    test: float = Field(0.2, ge=0, lt=1)
    """Share that is scored once, at the end; 0 where another cohort is tested."""
    seed: int = Field(0, ge=0)
    """The same seed divides the same subjects in the same way in every run."""
    stratify: bool = True
    """Give each part about the same mix of labels."""
    stratify_columns: tuple[str, ...] | None = None
    """Further columns to stratify by, after the label, for example [site]."""


def make_split(
    store: Store,
    *,
    test: float = 0.2,
    validation: float = 0.1,
    folds: int | None = None,
    shots: Sequence[int | None] = (),
    num_subjects: Sequence[int | None] = (),
    leave_site_out: bool = False,
    target: str | None = None,
    stratify: Sequence[str] | None = None,
    seed: int = 0,
) -> Split:
    """Divide the subjects of a store. At most one of ``folds``, ``shots``, ``num_subjects``, ``leave_site_out``.

    Subjects who share an image are divided as one; see `brainfound.data.splits.dividing`.

    Args:
        test: share of the subjects to test on, 0 where another cohort is tested; ignored for folds and sites, which
            test every subject once.
        validation: share of the subjects to evaluate on during training; 0 for none.
        folds: make folds ``fold-1``, ``fold-2``, ….
        shots: make ``shots-1``, ``shots-5``, … with that many training subjects per class of the target; None
            makes ``shots-all``, with all of them.
        num_subjects: make ``subjects-10``, ``subjects-20``, … with that many training subjects; None as for shots.
        leave_site_out: make ``site-A``, ``site-B``, …, each tested on that site.
        target: only sessions that have this label (or a mask) are divided; others belong to no part.
        stratify: columns (or ``"mask"``: empty or not) of which each part gets about the same mix, the most important
            first; None: the target.

    Raises:
        UsageError: options that exclude each other, unknown columns, or too few subjects or sites.
    """
    options = {FOLDS: folds, SHOTS: shots, FEW_SUBJECTS: num_subjects, SITES: leave_site_out}
    kinds = [kind for kind, requested in options.items() if requested or (kind == FOLDS and folds is not None)]
    if len(kinds) > 1:
        raise UsageError(
            "folds, shots, numbers of subjects and leaving a site out exclude each other",
            remedy="Ask for one of them, and make a file of each",
        )
    kind = kinds[0] if kinds else SINGLE_FOLD
    is_whole = test + validation == 0 and kind not in (FOLDS, SITES)
    if test < 0 or validation < 0 or test + validation >= 1 or is_whole:
        what = "the shares of test and validation must leave some to train on"
        got = f"test {test:g}, validation {validation:g}"
        raise UsageError(what, got=got, expected="a sum above 0 and below 1")
    parts = {"train": 1 - test - validation, "validation": validation, "test": test}
    shares = {part: share for part, share in parts.items() if share > 0}
    used = np.arange(len(store)) if target is None else TargetColumn.find(store, target).labelled
    chosen = list(stratify) if stratify is not None else [] if target is None else [target]
    columns = {name: stratification_labels(store, used, target_columns(store, name)) for name in chosen} or None
    groups, num_linked = split_file.get_split_groups(store)
    sites = store.covariate(SITE).iloc[used].tolist() if kind == SITES else []
    labels = _classes(store, target, used) if kind == SHOTS else sites
    made = _divide(kind, options.get(kind), groups[used].tolist(), labels, shares, columns, seed, target)
    without = (
        {dividing.label_text(site) for site in sites} - {"missing"} - {name.removeprefix("site-") for name in made}
    )
    facts: dict[str, Any] = {
        "kind": kind,
        "test": None if kind in (FOLDS, SITES) else test,
        "validation": validation,
        "target": target,
        "stratify": chosen,
        "num_linked_subjects": num_linked,
        **({"sites_without_fold": sorted(without)} if without else {}),
    }
    counted = [name for name in dict.fromkeys([*chosen, target, SITE if kind == SITES else None]) if name]
    parts_of_folds = {name: {part: used[index] for part, index in fold.items()} for name, fold in made.items()}
    counted_columns = [column for name in counted for column in target_columns(store, name)]
    return Split.from_folds(store, parts_of_folds, seed=seed, made=facts, columns=counted_columns)


def _divide(
    kind: str,
    requested: Any,
    names: list[str],
    labels: list[Any],
    shares: dict[str, float],
    columns: dict[str, list[Any]] | None,
    seed: int,
    target: str | None,
) -> dict[str, dict[str, np.ndarray]]:
    """Fold → part → positions in ``names``, the subjects of the sessions to divide.

    ``requested`` is the number of folds, or the numbers of shots or subjects; ``labels`` are classes or sites.
    """
    validation = shares.get("validation", 0.0)
    if kind == FOLDS:
        parts = dividing.k_folds(names, requested, seed, columns, validation)
        return {f"fold-{n}": fold for n, fold in enumerate(parts, start=1)}
    if kind in (SHOTS, FEW_SUBJECTS):
        classes = {target: labels} if kind == SHOTS and target is not None else None
        few = dividing.few_shot(names, requested, seed, classes, shares, columns)
        what = "shots" if kind == SHOTS else "subjects"
        return {f"{what}-{n or 'all'}": fold for n, fold in few.items()}
    if kind == SITES:
        left_out = dividing.leave_one_site_out(names, labels, seed, validation, columns)
        return {f"site-{site}": fold for site, fold in left_out.items()}
    return {SINGLE_FOLD: dividing.split_by_subject(names, shares, seed, columns)}


def _classes(store: Store, target: str | None, used: np.ndarray) -> list[Any]:
    if target is None or target == MASK or "," in target:
        raise UsageError(
            "shots are counted per class of a column",
            where="shots",
            got=f"target {target}",
            remedy="Give --target COLUMN, or ask for a number of subjects with --subjects",
        )
    labels = store.covariate(target).iloc[used].tolist()
    if dividing.to_numeric_or_none(labels) is not None:
        remedy = "Ask for a number of subjects with --subjects"
        raise UsageError("the target has numbers, not classes", where=f"column {target}", remedy=remedy)
    return labels


def stratification_labels(store: Store, sessions: np.ndarray, columns: Sequence[str]) -> list[Any]:
    """The labels by which sessions are stratified; without columns, whether their masks are empty."""
    if not columns:
        masks = [store.read_masks(int(session)) for session in sessions]
        return ["empty" if mask is None or not mask.any() else "marked" for mask in masks]
    values = [store.covariate(name).iloc[sessions].tolist() for name in columns]
    # For several labels, the combination that a session has.
    return values[0] if len(values) == 1 else [" ".join(map(str, labels)) for labels in zip(*values, strict=True)]


def split_from_file(store: Store, file: str | Path, columns: Sequence[str] = ()) -> Split:
    """A hand-written or edited split file, checked against a store.

    Raises:
        UsageError: the file has no parts, two parts share a subject or an image, or a part has no session in the store.
    """
    folds = split_file.read_folds(file)
    indices = {name: Split({SINGLE_FOLD: members}).sessions(store) for name, members in folds.items()}
    for name, sessions in indices.items():
        for part, index in sessions.items():
            if not len(index):
                what, where = f"no session of the store is in the part {part!r}", f"{file}, fold {name}"
                remedy = "Write subjects as the store's table does: store.sessions['subject']"
                raise UsageError(what, where=where, remedy=remedy)
    made = {"kind": "taken from a file", "stratify": list(columns)}
    return Split.from_folds(store, indices, seed=None, made=made, columns=columns)


def split_sessions(
    recipe: SplitRecipe,
    store: Store,
    target: TargetColumn,
    file: Path | None,
    fold: str | None = None,
    notify: Notify | None = None,
) -> dict[str, np.ndarray]:
    """Store indices of the labelled sessions of each part: from a split file (and fold), or newly divided.

    Raises:
        UsageError: too few subjects, a file that is not a split of this store, or parts that share a subject or image.
    """
    notify = notify or (lambda line: None)
    if file is not None:
        parts = _parts_from_file(file, fold, store, target.labelled, notify)
    elif fold is not None:
        raise UsageError("a fold needs a split file", where="--fold", got=fold, remedy="Give it with --split")
    else:
        parts = _divide_anew(recipe, store, target, notify)
    parts = _drop_unreadable_sessions(parts, store, notify)
    dividing.require_disjoint(parts, store.sessions["subject"].tolist())
    split_file.require_no_shared_images(store, parts)
    return parts


def _divide_anew(recipe: SplitRecipe, store: Store, target: TargetColumn, notify: Notify) -> dict[str, np.ndarray]:
    labelled = target.labelled
    groups, num_linked = split_file.get_split_groups(store)
    if unlabelled := len(store) - len(labelled):
        notify(f"{unlabelled} of {len(store)} sessions have no {target.name}: left out")
    if num_linked:
        notify(f"{num_linked} subjects have an image of another subject: kept in one part with it")
    columns = {target.name: target.columns} if recipe.stratify else {}
    columns |= {name: target_columns(store, name) for name in recipe.stratify_columns or ()}
    strata = {name: stratification_labels(store, labelled, group) for name, group in columns.items()} or None
    shares = {part: share for part in PARTS if (share := getattr(recipe, part))}
    split = dividing.split_by_subject(groups[labelled].tolist(), shares, recipe.seed, strata)
    return {part: labelled[index] for part, index in split.items()}


def _parts_from_file(
    file: Path, fold: str | None, store: Store, labelled: np.ndarray, notify: Notify
) -> dict[str, np.ndarray]:
    split = Split.load(file)
    parts = _labelled_parts(split, fold, store, labelled, file)
    listed = {name for names in split.parts(fold).values() for name in names}
    in_store = {str(name) for name in store.sessions["subject"]}
    if absent := len(listed - in_store):
        notify(f"{absent} of {len(listed)} subjects of the split are not in the store")
    if left_out := len(in_store - listed):
        notify(f"{left_out} of {len(in_store)} subjects of the store are in no part of the split: left out")
    placed = sum(map(len, split.sessions(store, fold).values()))
    if unlabelled := placed - sum(map(len, parts.values())):
        notify(f"{unlabelled} of {placed} sessions of the split have no label: left out")
    return parts


def _labelled_parts(
    split: Split, fold: str | None, store: Store, labelled: np.ndarray, where: Path
) -> dict[str, np.ndarray]:
    """The labelled sessions of each part; UsageError where a part has none, or there is no validation part."""
    parts = split.sessions(store, fold)
    if "validation" not in parts:
        remedy = "Create it with one: brainfound split STORE NEW.json --validation 0.1"
        raise UsageError("training needs a validation part, and the split has none", where=where, remedy=remedy)
    for part in parts:
        parts[part] = np.intersect1d(parts[part], labelled)
        if not len(parts[part]):
            raise UsageError(f"no labelled session of the store is in the part {part!r}", where=where)
    return parts


def _drop_unreadable_sessions(parts: Parts, store: Store, notify: Notify) -> dict[str, np.ndarray]:
    """Drop sessions without a readable contrast; the division itself does not depend on withheld contrasts."""
    if not store.withheld:
        return dict(parts)
    kept = {part: index[store.present[index].any(axis=1)] for part, index in parts.items()}
    for part, index in kept.items():
        if not len(index):
            what, got = f"no session of the part {part!r} has one of the contrasts", ", ".join(store.shown)
            remedy = "Show another contrast, or divide the subjects otherwise"
            raise UsageError(what, where="contrasts", got=got, remedy=remedy)
    placed, num_kept = (sum(map(len, some.values())) for some in (parts, kept))
    if placed > num_kept:
        notify(f"{placed - num_kept} of {placed} sessions have none of {', '.join(store.shown)}: left out")
    return kept


def resolve_split_file(
    folder: Path, store: Store, target: TargetColumn, given: str | Path | None, fold: str | None, resume: bool
) -> tuple[Path | None, str | None]:
    """The split file of a run and its fold: its own when resuming, else the given one, if any.

    UsageError where the resumed run has another target, or other subjects than the given split.
    """
    own = folder / RUN_SPLIT_FILE
    if not (resume and own.is_file()):
        return (None if given is None else Path(given)), fold
    before = run_folder.read_facts(folder, "target")["target"]["column"]
    if before != target.name:
        raise UsageError("the run learns another target", where=folder, got=target.name, expected=before)
    if given is not None:
        now = _labelled_parts(Split.load(given), fold, store, target.labelled, Path(given))
        then = _labelled_parts(Split.load(own), None, store, target.labelled, own)
        now = _drop_unreadable_sessions(now, store, lambda line: None)
        if now.keys() != then.keys() or any(not np.array_equal(now[part], then[part]) for part in now):
            remedy = "Leave out --split, or give another --out"
            raise UsageError("the run has another split", where=folder, got=given, remedy=remedy)
    return own, None


def write_split(
    folder: Path, store: Store, parts: Parts, target: TargetColumn, recipe: SplitRecipe, given: Path | None
) -> None:
    """Write the split file of a run into its folder; a resumed run keeps its own."""
    if given == folder / RUN_SPLIT_FILE:
        return
    if given is not None:
        digest = hashlib.sha256(given.read_bytes()).hexdigest()
        made: dict[str, Any] = {"kind": "taken from a file", "target": target.name, "sha256": digest}
    else:
        made = {"kind": "made by a run", "target": target.name, **recipe.model_dump(mode="json", exclude={"seed"})}
    seed = recipe.seed if given is None else None
    split = Split.from_folds(store, {SINGLE_FOLD: parts}, seed=seed, made=made, columns=target.columns)
    split.save(folder / RUN_SPLIT_FILE)
