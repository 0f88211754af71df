"""Which sessions a run learns from, watches and is scored on; and how a bundle remembers it.

A run folder keeps the subjects of each part by name (``splits.json``). A bundle leaves that folder, and may be
given away: it keeps the SHA-256 of every subject's identifier, by which the subjects are known again in any
store. The hash keeps names out of sight; identifiers that can be guessed (``sub-01``) can be found again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from brainfound.data.splits import require_disjoint, split_by_subject
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.recipes import Recipe
from brainfound.train.checkpoint import write_atomically
from brainfound.train.targets import MASK, labelled_sessions

SPLIT_FILE = "splits.json"
PARTS = ("train", "validation", "test")


class SplitRecipe(Recipe):
    """How subjects are divided. Nothing is ever chosen on the test part."""

    train: float = Field(0.7, gt=0, lt=1)
    """Share of the subjects to learn from."""
    validation: float = Field(0.1, gt=0, lt=1)
    """Share to watch while learning."""
    test: float = Field(0.2, gt=0, lt=1)
    """Share that is scored once, at the end."""
    seed: int = Field(0, ge=0)
    """Of the division; the same seed divides the same subjects alike in every run."""
    stratify: bool = True
    """Give each part about the same mix of labels."""


def split_sessions(recipe: SplitRecipe, store: Store, target: str, file: Path | None) -> dict[str, np.ndarray]:
    """Store indices of the labelled sessions of each part.

    Args:
        target: the covariate column, or ``"mask"``.
        file: the splits.json of a run, whose parts are taken; None to divide anew.

    Raises:
        UsageError: too few subjects, no such labels, or a file that is no split of this store.
    """
    labelled = labelled_sessions(store, target)
    if file is not None:
        parts = _read_split(file, store, labelled)
    else:
        subjects = store.sessions["subject"].iloc[labelled].tolist()
        shares = {part: getattr(recipe, part) for part in PARTS}
        strata = _strata(store, labelled, target) if recipe.stratify else None
        split = split_by_subject(subjects, shares, recipe.seed, strata)
        parts = {part: labelled[index] for part, index in split.items()}
    require_disjoint(parts, store.sessions["subject"].tolist())
    return parts


def split_subjects(file: Path) -> dict[str, set[str]]:
    """The subjects of each part, from a ``splits.json``.

    Raises:
        UsageError: it is none.
    """
    try:
        members = json.loads(file.read_text(encoding="utf-8"))["subjects"]
        return {part: set(members.get(part, ())) for part in PARTS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"not a splits.json: {error}", where=file, remedy="Give the splits.json of a run") from None


def write_split(folder: Path, store: Store, parts: Mapping[str, np.ndarray]) -> None:
    """Write ``splits.json`` into a run folder."""
    content = {"data_hash": store.content_hash, "subjects": _subjects(store, parts)}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SPLIT_FILE, json.dumps(content, indent=1) + "\n")


def hashed_split(store: Store, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a bundle remembers of a split: the data's hash, and each part's subjects as sorted SHA-256 hashes."""
    hashes = {part: sorted(map(subject_hash, names)) for part, names in _subjects(store, parts).items()}
    return {"data_hash": store.content_hash, "subjects_sha256": hashes}


def in_parts(split: Mapping[str, Any], store: Store, sessions: Sequence[int], *parts: str) -> np.ndarray:
    """Whether the subject of each session of a store is in one of the parts of a `hashed_split`; ``(n,)`` bool."""
    members = {digest for part in parts for digest in split["subjects_sha256"][part]}
    subjects = store.sessions["subject"]
    return np.array([subject_hash(subjects.iloc[int(i)]) in members for i in sessions], dtype=bool)


def subject_hash(subject: str) -> str:
    """The SHA-256 of a subject's identifier."""
    return hashlib.sha256(str(subject).encode()).hexdigest()


def _subjects(store: Store, parts: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    names = store.sessions["subject"]
    return {part: sorted({str(names.iloc[int(i)]) for i in index}) for part, index in parts.items()}


def _strata(store: Store, labelled: np.ndarray, target: str) -> list[Any]:
    if target != MASK:
        return store.covariate(target).iloc[labelled].tolist()
    masks = [store.read_masks(int(session)) for session in labelled]
    return ["empty" if mask is None or not mask.any() else "marked" for mask in masks]


def _read_split(file: Path, store: Store, labelled: np.ndarray) -> dict[str, np.ndarray]:
    members = split_subjects(file)
    of = store.sessions["subject"]
    parts = {part: np.array([i for i in labelled if of.iloc[int(i)] in members[part]], dtype=int) for part in PARTS}
    for part, index in parts.items():
        if not len(index):
            raise UsageError(f"no labelled session of the store is in the part {part!r}", where=file)
    return parts
