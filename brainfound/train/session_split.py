"""Which sessions a run learns from, watches and is scored on; and how a bundle remembers it.

A run folder keeps the subjects of each part by name, in a split file (``splits.json``). A bundle leaves that
folder, and may be given away: it keeps salted, slow hashes of the identifiers, by which the subjects are known
again in any store, and hashes of the images, by which they are known under another name. Nobody can read names
out of a bundle; who already has a list of names can ask which of them are in it, as `evaluate` does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from brainfound.data.split_file import PARTS, SINGLE, Split, require_no_shared_content, subjects_to_divide
from brainfound.data.splits import require_disjoint, split_by_subject
from brainfound.data.store import Store
from brainfound.errors import UsageError
from brainfound.recipes import Recipe
from brainfound.train import run_files
from brainfound.train.make_split import labels_to_stratify
from brainfound.train.targets import labelled_sessions, target_columns

SPLIT_FILE = "splits.json"
HASH_ROUNDS = 1000
"""Of PBKDF2: about half a millisecond per subject, so ten thousand are checked in seconds."""


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
    stratify_columns: tuple[str, ...] | None = None
    """More columns whose mix each part should have, after the label: [site], for one."""


def split_sessions(
    recipe: SplitRecipe,
    store: Store,
    target: str,
    file: Path | None,
    fold: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, np.ndarray]:
    """Store indices of the labelled sessions of each part.

    Args:
        target: the covariate column, or ``"mask"``.
        file: a split file, whose parts are taken; None to divide anew.
        fold: which fold of the file, where it has several.
        say: is told in one line what is left out.

    Raises:
        UsageError: too few subjects, no such labels, a file that is no split of this store, or parts that share a
            subject or an image.
    """
    labelled = labelled_sessions(store, target)
    say = say or (lambda line: None)
    if file is not None:
        parts = _follow(file, fold, store, labelled, say)
    else:
        if fold is not None:
            raise UsageError("a fold of no split", where="--fold", got=fold, remedy="Give the split file with --split")
        names, num_linked = subjects_to_divide(store)
        if unlabelled := len(store) - len(labelled):
            say(f"{unlabelled} of {len(store)} sessions have no {target}: left out")
        if num_linked:
            say(f"{num_linked} subjects have an image of another subject: kept in one part with it")
        shares = {part: getattr(recipe, part) for part in PARTS}
        split = split_by_subject(
            names[labelled].tolist(), shares, recipe.seed, _strata(recipe, store, labelled, target) or None
        )
        parts = {part: labelled[index] for part, index in split.items()}
    parts = _readable(parts, store, say)
    require_disjoint(parts, store.sessions["subject"].tolist())
    require_no_shared_content(store, parts)
    return parts


def split_to_follow(
    folder: Path, store: Store, target: str, given: str | Path | None, fold: str | None, resume: bool
) -> tuple[Path | None, str | None]:
    """The split file to follow, and its fold: of the run that goes on, else the given one, else none.

    Raises:
        UsageError: the run that goes on learns another target, or on other subjects than the given split.
    """
    own = folder / SPLIT_FILE
    if not (resume and own.is_file()):
        return (None if given is None else Path(given)), fold
    before = json.loads((folder / run_files.FACTS_FILE).read_text(encoding="utf-8"))["target"]["column"]
    if before != target:
        raise UsageError("the run learns another target", where=folder, got=target, expected=before)
    if given is not None:
        labelled = labelled_sessions(store, target)
        now = _labelled_parts(Split.load(given), fold, store, labelled, Path(given))
        then = _labelled_parts(Split.load(own), None, store, labelled, own)
        now = _readable(now, store, lambda line: None)
        if any(not np.array_equal(now[part], then[part]) for part in PARTS):
            raise UsageError(
                "the run has another split", where=folder, got=given, remedy="Leave out --split, or give another --out"
            )
    return own, None


def write_split(
    folder: Path, store: Store, parts: Mapping[str, np.ndarray], target: str, recipe: SplitRecipe, given: Path | None
) -> None:
    """Write the split file of a run into its folder; a run that goes on keeps the one that it has."""
    if given == folder / SPLIT_FILE:
        return
    if given is not None:
        made: dict[str, Any] = {"kind": "taken from a file", "target": target, "sha256": _sha256_of(given)}
    else:
        made = {"kind": "made by a run", "target": target, **recipe.model_dump(mode="json", exclude={"seed"})}
    seed = recipe.seed if given is None else None
    Split.of_store(store, {SINGLE: parts}, seed=seed, made=made, columns=target_columns(store, target)).save(
        folder / SPLIT_FILE
    )


def hashed_split(store: Store, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What a bundle remembers of a split: the data's hash, and hashes of each part's subjects and images.

    The salt is drawn anew for each bundle, so that two bundles cannot be compared and no table helps to guess.
    """
    salt = os.urandom(16).hex()
    names, images = store.sessions["subject"], store.sessions["image_hash"]
    subjects = {part: {str(names.iloc[int(i)]) for i in index} for part, index in parts.items()}
    content = {part: {str(images.iloc[int(i)]) for i in index} for part, index in parts.items()}
    return {
        "data_hash": store.content_hash,
        "hash": "pbkdf2-sha256",
        "rounds": HASH_ROUNDS,
        "salt": salt,
        "subjects": {p: sorted(subject_hash(name, salt, HASH_ROUNDS) for name in s) for p, s in subjects.items()},
        "images": {p: sorted(_image_hash(image, salt) for image in s) for p, s in content.items()},
    }


def in_parts(split: Mapping[str, Any], store: Store, sessions: Sequence[int], *parts: str) -> np.ndarray:
    """Whether the subject of each session of a store is in one of the parts of a `hashed_split`; ``(n,)`` bool."""
    hashes = split.get("subjects_sha256") or split["subjects"]
    members = {digest for part in parts for digest in hashes[part]}
    of = store.sessions["subject"]
    return np.array([_hash_as(split, str(of.iloc[int(i)])) in members for i in sessions], dtype=bool)


def learnt_from(split: Mapping[str, Any], store: Store, sessions: Sequence[int]) -> np.ndarray:
    """Whether a model may have learnt from or been watched on each session of a store, ``(n,)`` bool.

    That is one of a subject of its train or validation part, by name, or by an image under any name.
    """
    known = in_parts(split, store, sessions, "train", "validation")
    images = {digest for part in ("train", "validation") for digest in split.get("images", {}).get(part, ())}
    if not images:  # a bundle made before images were remembered
        return known
    hashes = store.sessions["image_hash"]
    return known | np.array([_image_hash(str(hashes.iloc[int(i)]), split["salt"]) in images for i in sessions])


@lru_cache(maxsize=100_000)
def subject_hash(subject: str, salt: str, rounds: int = HASH_ROUNDS) -> str:
    """The salted, slow hash of a subject's identifier."""
    return hashlib.pbkdf2_hmac("sha256", subject.encode(), bytes.fromhex(salt), rounds, 16).hex()


def _hash_as(split: Mapping[str, Any], subject: str) -> str:
    if "subjects_sha256" in split:  # bundles made before hashes were salted
        return hashlib.sha256(subject.encode()).hexdigest()
    return subject_hash(subject, split["salt"], split["rounds"])


def _image_hash(image_hash: str, salt: str) -> str:
    return hashlib.sha256(f"{salt} {image_hash}".encode()).hexdigest()[:32]


def _sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _strata(recipe: SplitRecipe, store: Store, labelled: np.ndarray, target: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    if recipe.stratify:
        columns[target] = labels_to_stratify(store, labelled, target)
    for name in recipe.stratify_columns or ():
        columns[name] = labels_to_stratify(store, labelled, name)
    return columns


def _readable(parts: Mapping[str, np.ndarray], store: Store, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """The sessions that have a contrast which the store shows. Parts are made before, so that they are the same
    whichever contrasts are withheld.

    Raises:
        UsageError: a part has none.
    """
    if not store.withheld:
        return dict(parts)
    kept = {part: index[store.present[index].any(axis=1)] for part, index in parts.items()}
    for part, index in kept.items():
        if not len(index):
            raise UsageError(
                f"no session of the part {part!r} has one of the contrasts",
                where="contrasts",
                got=", ".join(store.shown),
                remedy="Show another contrast, or divide the subjects otherwise",
            )
    placed, num_kept = (sum(map(len, found.values())) for found in (parts, kept))
    if placed > num_kept:
        say(f"{placed - num_kept} of {placed} sessions have none of {', '.join(store.shown)}: left out")
    return kept


def _labelled_parts(
    split: Split, fold: str | None, store: Store, labelled: np.ndarray, where: Path
) -> dict[str, np.ndarray]:
    """The labelled sessions of each part; each part has some.

    Raises:
        UsageError: as `split_sessions`.
    """
    parts = split.sessions(store, fold)
    for part in PARTS:
        if part not in parts:
            remedy = "Make it with a validation part: brainfound split STORE NEW.json --validation 0.1"
            raise UsageError(f"training needs the part {part!r}, and the split has none", where=where, remedy=remedy)
        parts[part] = np.intersect1d(parts[part], labelled)
        if not len(parts[part]):
            raise UsageError(f"no labelled session of the store is in the part {part!r}", where=where)
    return parts


def _follow(
    file: Path, fold: str | None, store: Store, labelled: np.ndarray, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    split = Split.load(file)
    parts = _labelled_parts(split, fold, store, labelled, file)
    listed = {name for names in split.parts(fold).values() for name in names}
    there = {str(name) for name in store.sessions["subject"]}
    if absent := len(listed - there):
        say(f"{absent} of {len(listed)} subjects of the split are not in the store")
    if left_out := len(there - listed):
        say(f"{left_out} of {len(there)} subjects of the store are in no part of the split: left out")
    placed = sum(map(len, split.sessions(store, fold).values()))
    if unlabelled := placed - sum(map(len, parts.values())):
        say(f"{unlabelled} of {placed} sessions of the split have no label: left out")
    return parts
