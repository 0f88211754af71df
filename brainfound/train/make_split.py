"""A store's sessions divided for training: one division, folds, few shots, or one site left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.data.split_file import SINGLE, Members, Split, read_folds, subjects_to_divide
from brainfound.data.splits import as_numbers, few_shot, k_folds, label_text, leave_one_site_out, split_by_subject
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.train.targets import MASK, labelled_sessions, target_columns

SITE = "site"
FOLDS, SHOTS, FEW_SUBJECTS, SITES = "k-fold", "few shots per class", "few subjects", "leave one site out"
"""Kinds of division besides a single one, as a split file names them."""


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

    Subjects who share an image are divided as one. The functions of `brainfound.data.splits` say more.

    Args:
        test: share of the subjects that is tested; not used by folds and sites, which test everybody once.
        validation: share of the subjects to watch while learning; 0 for none.
        folds: make folds ``fold-1``, ``fold-2``, ….
        shots: make ``shots-1``, ``shots-5``, … with so many training subjects of each class of the target; None
            makes ``shots-all``, with all that there are.
        num_subjects: make ``subjects-10``, ``subjects-20``, … with so many training subjects; None as for shots.
        leave_site_out: make ``site-A``, ``site-B``, …, each tested on that site.
        target: only sessions that have this label (or a mask) are divided; others are in no part.
        stratify: columns (or ``"mask"``: empty or not) of which each part gets about the same mix, the most important
            first; None: the target.
        seed: of the division.

    Raises:
        UsageError: wishes that exclude each other, columns that are not there, or too few subjects or sites.
    """
    kind = _kind_of_division(folds, shots, num_subjects, leave_site_out)
    shares = _shares(test, validation)
    used = np.arange(len(store)) if target is None else labelled_sessions(store, target)
    chosen = list(stratify) if stratify is not None else [] if target is None else [target]
    columns = {name: labels_to_stratify(store, used, name) for name in chosen} or None
    divided, num_linked = subjects_to_divide(store)
    labels = _classes(store, target, used) if shots else _sites(store, used) if leave_site_out else []
    wish = folds or shots or num_subjects
    made = _divide(kind, wish, divided[used].tolist(), labels, shares, columns, seed)
    without = _sites_without_fold(store, used, made) if leave_site_out else []
    facts: dict[str, Any] = {
        "kind": kind,
        "test": None if folds or leave_site_out else test,
        "validation": validation,
        "target": target,
        "stratify": chosen,
        "num_linked_subjects": num_linked,
        **({"sites_without_fold": without} if without else {}),
    }
    counted = [name for name in dict.fromkeys([*chosen, target, SITE if leave_site_out else None]) if name]
    return Split.of_store(
        store,
        {name: {part: used[index] for part, index in fold.items()} for name, fold in made.items()},
        seed=seed,
        made=facts,
        columns=[column for name in counted for column in target_columns(store, name)],
    )


def _kind_of_division(folds: object, shots: object, num_subjects: object, leave_site_out: bool) -> str:
    wishes = {FOLDS: folds, SHOTS: shots, FEW_SUBJECTS: num_subjects, SITES: leave_site_out}
    wished = [kind for kind, wish in wishes.items() if wish]
    if len(wished) > 1:
        raise UsageError(
            "folds, shots, numbers of subjects and leaving a site out exclude each other",
            remedy="Ask for one of them, and make a file of each",
        )
    return wished[0] if wished else "single"


def _divide(
    kind: str,
    wish: Any,
    names: list[str],
    labels: list[Any],
    shares: dict[str, float],
    columns: dict[str, list[Any]] | None,
    seed: int,
) -> dict[str, dict[str, np.ndarray]]:
    """Fold → part → places among ``names``, the subjects of the sessions to divide.

    Args:
        wish: how many folds, shots or subjects.
        labels: of the sessions: classes for shots, sites to leave one out.
        columns: labels by which the subjects are stratified.
    """
    validation = shares.get("validation", 0.0)
    if kind == FOLDS:
        parts = k_folds(names, wish, seed, columns, validation)
        return {f"fold-{n}": fold for n, fold in enumerate(parts, start=1)}
    if kind in (SHOTS, FEW_SUBJECTS):
        few = few_shot(names, wish, seed, labels if kind == SHOTS else None, shares, columns)
        what = "shots" if kind == SHOTS else "subjects"
        return {f"{what}-{n or 'all'}": fold for n, fold in few.items()}
    if kind == SITES:
        left_out = leave_one_site_out(names, labels, seed, validation, columns)
        return {f"site-{site}": fold for site, fold in left_out.items()}
    return {SINGLE: split_by_subject(names, shares, seed, columns)}


def _sites(store: Store, used: np.ndarray) -> list[Any]:
    return store.covariate(SITE).iloc[used].tolist()


def _sites_without_fold(store: Store, used: np.ndarray, made: Mapping[str, Any]) -> list[str]:
    sites = {label_text(site) for site in _sites(store, used)} - {"missing"}
    return sorted(site for site in sites if f"site-{site}" not in made)


def _shares(test: float, validation: float) -> dict[str, float]:
    """Of the parts that there are to be."""
    if not 0 < test < 1 or not 0 <= validation < 1 or test + validation >= 1:
        raise UsageError(
            "the shares of test and validation must leave some to train on",
            got=f"test {test:g}, validation {validation:g}",
            expected="a sum below 1",
        )
    shares = {"train": 1 - test - validation, "validation": validation, "test": test}
    return {part: share for part, share in shares.items() if share > 0}


def labels_to_stratify(store: Store, sessions: np.ndarray, column: str) -> list[Any]:
    """The labels of sessions by which they are stratified; of masks, whether they mark anything."""
    if column != MASK:
        values = [store.covariate(name).iloc[sessions].tolist() for name in target_columns(store, column)]
        # Of several labels, which of them a session has: one stratum per combination.
        return values[0] if len(values) == 1 else [" ".join(map(str, labels)) for labels in zip(*values, strict=True)]
    masks = [store.read_masks(int(session)) for session in sessions]
    return ["empty" if mask is None or not mask.any() else "marked" for mask in masks]


def adopt_split(store: Store, file: str | Path, columns: Sequence[str] = ()) -> Split:
    """The parts of a file that a person wrote or changed, checked against a store.

    Raises:
        UsageError: it holds no parts, two parts share a subject or an image, or a part has no session in the store.
    """
    folds = read_folds(file)
    found = {name: _indices(store, members, f"{file}, fold {name}") for name, members in folds.items()}
    made = {"kind": "taken from a file", "stratify": list(columns)}
    return Split.of_store(store, found, seed=None, made=made, columns=columns)


def _indices(store: Store, members: Members, where: str) -> Mapping[str, np.ndarray]:
    sessions = Split({SINGLE: members}).sessions(store)
    for part, index in sessions.items():
        if not len(index):
            raise UsageError(
                f"no session of the store is in the part {part!r}",
                where=where,
                remedy="Write subjects as the store's table does: store.sessions['subject']",
            )
    return sessions


def _classes(store: Store, target: str | None, used: np.ndarray) -> list[Any]:
    if target is None or target == MASK or "," in target:
        raise UsageError(
            "shots are counted per class of a column",
            where="shots",
            got=f"target {target}",
            remedy="Give --target COLUMN, or ask for a number of subjects with --subjects",
        )
    labels = store.covariate(str(target)).iloc[used].tolist()
    if as_numbers(labels) is not None:
        raise UsageError(
            "the target has numbers, not classes",
            where=f"column {target}",
            remedy="Ask for a number of subjects with --subjects",
        )
    return labels
