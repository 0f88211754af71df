"""A split as a file: the subjects of each part, with a proof that no subject is in two of them.

A split file is JSON:

    schema            "brainfound-split/1"
    data_hash, seed   of the divided store, and of the division
    made              kind and settings of the division
    folds             name → subjects of each part, and the proof:
        shared_subjects   of each pair of parts: 0
        num_subjects, num_sessions, counts (of chosen columns) of each part
        num_left_out      subjects of the store in no part
    sha256            of all of the above

A file has one fold (``single``) or several: ``fold-1``, …; ``shots-5``, …; ``subjects-10``, …; ``site-A``, ….
It names subjects, so it belongs next to the data and not into a publication. The digest detects changes by hand or by
accident; it is not a signature.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.data.splits.dividing import (
    label_text,
    merge_linked_subjects,
    require_disjoint_subjects,
    shared_counts,
    to_numeric_or_none,
)
from brainfound.data.store import Store
from brainfound.data.store.plan import write_json
from brainfound.errors import UsageError, did_you_mean

SCHEMA = "brainfound-split/1"
PARTS = ("train", "validation", "test")
SINGLE_FOLD = "single"
MAKE_ANEW = "To use it as it is, make a checked file of it: brainfound split STORE NEW.json --from THIS.json"
_GIVE_SPLIT = "Give the file of `brainfound split`, or the splits.json of a run"

SubjectsByPart = Mapping[str, tuple[str, ...]]
"""Part → its subjects, sorted."""


@dataclass(frozen=True)
class Split:
    """Subjects divided into disjoint parts, once (a single fold) or several times.

    Attributes:
        folds: fold → part → subjects.
        data_hash: content hash of the divided store.
        seed: None if the division was not random.
        made: settings of the division, plain values.
        counts: fold → part → ``{"num_sessions": …, column: …}``.
        num_left_out: fold → number of subjects of the store in no part.

    Raises:
        UsageError: there is no train part, or neither a validation nor a test part;
            a part is unknown or empty, or a subject is in two.
    """

    folds: Mapping[str, SubjectsByPart]
    data_hash: str = ""
    seed: int | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    num_left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folds:
            raise UsageError("a split needs at least one fold")
        for name, members in self.folds.items():
            _require_valid_parts(name, members)

    @classmethod
    def from_folds(
        cls,
        store: Store,
        folds: Mapping[str, Mapping[str, np.ndarray]],
        *,
        seed: int | None,
        made: Mapping[str, Any],
        columns: Sequence[str] = (),
    ) -> Split:
        """The split of a store's sessions, from fold → part → indices; ``columns`` are covariates to count.

        UsageError: as for the class, or two parts share an image.
        """
        names = [str(name) for name in store.sessions["subject"]]
        members, counts, left_out = {}, {}, {}
        for fold, parts in folds.items():
            require_no_shared_images(store, parts)
            members[fold] = {part: tuple(sorted({names[int(i)] for i in index})) for part, index in parts.items()}
            counts[fold] = {part: _counts(store, index, columns) for part, index in parts.items()}
            left_out[fold] = len(set(names).difference(*members[fold].values()))
        return cls(members, store.content_hash, seed, dict(made), counts, left_out)

    def parts(self, fold: str | None = None) -> SubjectsByPart:
        """Part → subjects of one fold; only a single fold needs no name."""
        if fold is None and len(self.folds) == 1:
            return next(iter(self.folds.values()))
        if fold is None:
            names = ", ".join(self.folds)
            raise UsageError("the split file holds several folds", expected=names, remedy="Name one with --fold")
        if fold not in self.folds:
            raise UsageError(f"the split has no fold {fold!r}", remedy=did_you_mean(fold, self.folds))
        return self.folds[fold]

    def sessions(self, store: Store, fold: str | None = None) -> dict[str, np.ndarray]:
        """Part → indices of its subjects' sessions in a store. Subjects may be missing on either side.

        UsageError: as `parts`, or two parts share an image.
        """
        assigned_part = {name: part for part, names in self.parts(fold).items() for name in names}
        placed = np.array([assigned_part.get(str(name), "") for name in store.sessions["subject"]], dtype=object)
        split = {part: np.flatnonzero(placed == part) for part in self.parts(fold)}
        require_no_shared_images(store, split)
        return split

    def to_dict(self) -> dict[str, Any]:
        """The content of the file, with its digest."""
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "data_hash": self.data_hash,
            "seed": self.seed,
            "made": dict(self.made),
            "folds": {name: self._fold_to_dict(name) for name in self.folds},
        }
        return content | {"sha256": _digest(content)}

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_dict(), ensure_ascii=False)

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read a split file and check it again; UsageError for a file that is not valid or was changed."""
        path = Path(path)
        content = _read_json(path)
        if content.get("schema", SCHEMA) != SCHEMA:
            got, remedy = content["schema"], "Make it again with this version: brainfound split STORE NEW.json"
            raise UsageError("a split file of another schema", where=path, got=got, expected=SCHEMA, remedy=remedy)
        folds = _read_members(content, path)  # before the digest: a shared subject is the gravest fault
        if "schema" not in content:
            raise UsageError("the split file has no digest", where=path, remedy=MAKE_ANEW)
        if content.get("sha256") != _digest({key: value for key, value in content.items() if key != "sha256"}):
            raise UsageError("the split file was changed after it was made", where=path, remedy=MAKE_ANEW)
        try:
            counts, left_out = {}, {}
            for name, entry in content["folds"].items():
                sessions = entry["num_sessions"]
                counts[name] = {part: {"num_sessions": sessions[part], **entry["counts"][part]} for part in folds[name]}
                left_out[name] = entry["num_left_out"]
            split = cls(folds, content["data_hash"], content["seed"], content["made"], counts, left_out)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"the split file lacks {error}", where=path, remedy=MAKE_ANEW) from None
        if split.to_dict() != content:
            raise UsageError("the proof of the split file does not hold", where=path, remedy=MAKE_ANEW)
        return split

    def _fold_to_dict(self, name: str) -> dict[str, Any]:
        members = self.folds[name]
        counts = {part: dict(self.counts.get(name, {}).get(part, {})) for part in members}
        sets = {part: set(names) for part, names in members.items()}
        return {
            "subjects": {part: list(names) for part, names in members.items()},
            "shared_subjects": {f"{one} and {other}": n for (one, other), n in shared_counts(sets).items()},
            "num_subjects": {part: len(names) for part, names in members.items()},
            "num_sessions": {part: part_counts.pop("num_sessions", None) for part, part_counts in counts.items()},
            "counts": counts,  # of columns only: num_sessions was popped
            "num_left_out": self.num_left_out.get(name, 0),
        }


def read_folds(path: str | Path) -> dict[str, SubjectsByPart]:
    """The checked parts of a file written or changed by hand: a split file, or ``{"train": […], "test": […]}``."""
    return _read_members(_read_json(Path(path)), Path(path))


def require_no_shared_images(store: Store, parts: Mapping[str, Sequence[int] | np.ndarray]) -> None:
    """Raise a UsageError if parts (session indices) share an image; it names rows of ``store.sessions``."""
    hashes = store.sessions["image_hash"].tolist()
    first: dict[str, tuple[str, int]] = {}
    for part, index in parts.items():
        for row in map(int, index):
            other, twin = first.setdefault(hashes[row], (part, row))
            if other != part:
                what = f"the parts {other!r} and {part!r} of the split share an image"
                where, got = f"store {store.path.name}", f"sessions of rows {twin} and {row}"
                remedy = "Take one out of the cohort, or divide anew: brainfound split keeps the two together"
                raise UsageError(what, where=where, got=got, expected="none", remedy=remedy)


def get_split_groups(store: Store) -> tuple[np.ndarray, int]:
    """The names by which sessions are divided, see `merge_linked_subjects`, and the number of subjects merged away."""
    subjects = [str(name) for name in store.sessions["subject"]]
    names = merge_linked_subjects(subjects, store.sessions["image_hash"].tolist())
    return np.array(names, dtype=object), len(set(subjects)) - len(set(names))


def _require_valid_parts(fold: str, members: SubjectsByPart, where: object = None) -> None:
    where = where or f"fold {fold}"
    unknown = [part for part in members if part not in PARTS]
    if unknown:
        raise UsageError(f"unknown part {unknown[0]!r}", where=where, remedy=did_you_mean(unknown[0], PARTS))
    missing = [] if "train" in members else ["train"]
    # A cohort that is tested elsewhere has no test part, and one without validation needs no part for it.
    missing += [] if {"validation", "test"} & set(members) else ["test"]
    missing += [part for part, names in members.items() if not names]
    if missing:
        what = f"the part {missing[0]!r} of the split is missing or empty"
        raise UsageError(what, where=where, remedy="Give every part at least one subject")
    remedy = "Take each subject out of one of them, or divide anew: brainfound split STORE NEW.json"
    require_disjoint_subjects({part: set(names) for part, names in members.items()}, remedy, where)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error.strerror) if isinstance(error, OSError) else "no valid JSON"
        reason += f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError(f"not a split file: {reason}", where=path, remedy=_GIVE_SPLIT) from None
    if not isinstance(content, dict):
        raise UsageError("not a split file: no JSON object", where=path, remedy=_GIVE_SPLIT)
    return content


def _read_members(content: Mapping[str, Any], path: Path) -> dict[str, SubjectsByPart]:
    """Fold → part → subjects, checked; a file without schema holds the parts of a single fold."""
    folds: dict[str, Any] = {SINGLE_FOLD: content}
    if "schema" in content:
        entries = content.get("folds")
        entries = entries if isinstance(entries, dict) else {}
        folds = {name: entry.get("subjects") if isinstance(entry, dict) else None for name, entry in entries.items()}
    if not folds:
        remedy = "Make it again: brainfound split STORE NEW.json"
        raise UsageError("a split file without folds", where=path, remedy=remedy)
    checked: dict[str, SubjectsByPart] = {}
    for name, members in folds.items():
        lists = members.values() if isinstance(members, dict) else [None]
        if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
            raise UsageError("not a split file: the parts must be lists of subjects", where=path, remedy=_GIVE_SPLIT)
        checked[name] = {part: tuple(sorted(set(names))) for part, names in members.items()}
        _require_valid_parts(name, checked[name], where=path if name == SINGLE_FOLD else f"{path}, fold {name}")
    return checked


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _counts(store: Store, index: Sequence[int] | np.ndarray, columns: Sequence[str]) -> dict[str, Any]:
    """The sessions of a part; for each column the sessions per value, or the range of a column of numbers."""
    counts: dict[str, Any] = {"num_sessions": len(index)}
    for column in columns:
        column_values = store.covariate(column)
        all_numbers = to_numeric_or_none(column_values.tolist())
        if all_numbers is None:
            counts[column] = dict(sorted(Counter(map(label_text, column_values.iloc[list(index)])).items()))
            continue
        numbers = all_numbers[list(index)]
        known = numbers[~np.isnan(numbers)]
        counts[column] = {"missing": int(np.isnan(numbers).sum())}
        if known.size:
            range_ = {"min": known.min(), "median": np.median(known), "max": known.max()}
            counts[column] |= {name: round(float(value), 4) for name, value in range_.items()}
    return counts
