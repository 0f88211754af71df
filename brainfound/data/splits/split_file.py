"""A split as a file: who is in which part, with a proof that nobody is in two.

A split file is JSON:

    schema            "brainfound-split/1"
    data_hash, seed   of the store that was divided, and of the division
    made              how: the kind, and what was asked for
    folds             name → subjects of each part, and the proof:
        shared_subjects   of each pair of parts: 0
        num_subjects, num_sessions, counts (of the asked columns) of each part
        num_left_out      subjects of the store that are in no part
    sha256            of all of the above

A file has one fold (``single``) or several: ``fold-1``, …; ``shots-5``, …; ``subjects-10``, …; ``site-A``, ….
It names subjects, so it belongs beside the data and not into a publication. The digest finds a change by hand or by
accident; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.data.splits.dividing import (
    label_text,
    merge_linked_subjects,
    require_disjoint,
    shared_counts,
    to_numeric_or_none,
)
from brainfound.data.store import Store
from brainfound.errors import UsageError, did_you_mean

SCHEMA = "brainfound-split/1"
PARTS = ("train", "validation", "test")
REQUIRED_PARTS = ("train", "test")
SINGLE_FOLD = "single"
MAKE_ANEW = "To use it as it is, make a checked file of it: brainfound split STORE NEW.json --from THIS.json"

SubjectsByPart = Mapping[str, tuple[str, ...]]
"""Part → its subjects, sorted."""


@dataclass(frozen=True)
class Split:
    """Subjects divided into parts that share nobody, in one way (a single fold) or in several.

    Attributes:
        folds: name → part → subjects.
        data_hash: content hash of the store that was divided.
        seed: of the division; None where it was not drawn here.
        made: how it was made, plain values.
        counts: name → part → ``{"num_sessions": …, column: …}``.
        num_left_out: name → subjects of the store that are in no part.

    Raises:
        UsageError: a fold without a required part, an unknown or empty part, or a subject in two parts.
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
        """The split of a store's sessions.

        Args:
            folds: name → part → indices of sessions.
            columns: covariates to count in each part.

        Raises:
            UsageError: as above, or two parts share an image.
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
        """Part → subjects of one fold; the name may be left out where there is one only.

        Raises:
            UsageError: there is no such fold, or there are several and none was named.
        """
        if fold is None and len(self.folds) == 1:
            return next(iter(self.folds.values()))
        if fold is None:
            raise UsageError(
                "the split file holds several folds", expected=", ".join(self.folds), remedy="Name one with --fold"
            )
        if fold not in self.folds:
            raise UsageError(f"the split has no fold {fold!r}", remedy=did_you_mean(fold, self.folds))
        return self.folds[fold]

    def sessions(self, store: Store, fold: str | None = None) -> dict[str, np.ndarray]:
        """Part → indices of the sessions of a store whose subject is in it.

        Subjects that the store does not have are passed over, and its other subjects are in no part.

        Raises:
            UsageError: as `parts`, or two parts share an image.
        """
        part_of = {name: part for part, names in self.parts(fold).items() for name in names}
        placed = np.array([part_of.get(str(name), "") for name in store.sessions["subject"]], dtype=object)
        split = {part: np.flatnonzero(placed == part) for part in self.parts(fold)}
        require_disjoint(split, store.sessions["subject"].tolist())
        require_no_shared_images(store, split)
        return split

    def to_dict(self) -> dict[str, Any]:
        """What the file holds, the digest included."""
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "data_hash": self.data_hash,
            "seed": self.seed,
            "made": dict(self.made),
            "folds": {name: self._fold_to_dict(name) for name in self.folds},
        }
        return content | {"sha256": _digest(content)}

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read a split file and prove it again.

        The ``splits.json`` of runs made before split files had a digest are read too, if nobody is in two parts.

        Raises:
            UsageError: not a split file, another schema, a part is missing, two parts share a subject, or the file
                was changed since it was made.
        """
        path = Path(path)
        content = _read_json(path)
        if "schema" not in content:
            return cls(_folds_of(content, path), str(content.get("data_hash", "")))
        if content["schema"] != SCHEMA:
            raise UsageError(
                "a split file of another schema",
                where=path,
                got=content["schema"],
                expected=SCHEMA,
                remedy="Make it again with this version: brainfound split STORE NEW.json",
            )
        folds = _folds_of(content, path)  # before the digest: that nobody is in two parts matters most
        if content.get("sha256") != _digest({key: value for key, value in content.items() if key != "sha256"}):
            raise UsageError("the split file was changed after it was made", where=path, remedy=MAKE_ANEW)
        try:
            split = cls(
                folds,
                content["data_hash"],
                content["seed"],
                content["made"],
                {name: _counts_of(entry, folds[name]) for name, entry in content["folds"].items()},
                {name: entry["num_left_out"] for name, entry in content["folds"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"the split file lacks {error}", where=path, remedy=MAKE_ANEW) from None
        if split.to_dict() != content:
            raise UsageError("the proof of the split file does not hold", where=path, remedy=MAKE_ANEW)
        return split

    def _fold_to_dict(self, name: str) -> dict[str, Any]:
        members, counts = self.folds[name], self.counts.get(name, {})
        sets = {part: set(names) for part, names in members.items()}
        return {
            "subjects": {part: list(names) for part, names in members.items()},
            "shared_subjects": {f"{one} and {other}": n for (one, other), n in shared_counts(sets).items()},
            "num_subjects": {part: len(names) for part, names in members.items()},
            "num_sessions": {part: counts.get(part, {}).get("num_sessions") for part in members},
            "counts": {
                part: {column: value for column, value in counts.get(part, {}).items() if column != "num_sessions"}
                for part in members
            },
            "num_left_out": self.num_left_out.get(name, 0),
        }


def read_folds(path: str | Path) -> dict[str, SubjectsByPart]:
    """The parts of a file that a person wrote or changed: a split file, an old one, or ``{"train": […], …}``.

    Raises:
        UsageError: it is none of these, a part is missing, or two parts share a subject.
    """
    return _folds_of(_read_json(Path(path)), Path(path))


def require_no_shared_images(store: Store, parts: Mapping[str, Sequence[int] | np.ndarray]) -> None:
    """Fail if the same image lies in two parts, under whatever name of its subject.

    Args:
        parts: part → indices of sessions.

    Raises:
        UsageError: names the rows of ``store.sessions``, not the subjects.
    """
    hashes = store.sessions["image_hash"].tolist()
    first: dict[str, tuple[str, int]] = {}
    for part, index in parts.items():
        for row in map(int, index):
            other, twin = first.setdefault(hashes[row], (part, row))
            if other != part:
                raise UsageError(
                    f"the parts {other!r} and {part!r} of the split share an image",
                    where=f"store {store.path.name}",
                    got=f"sessions of rows {twin} and {row}",
                    expected="none",
                    remedy="Take one out of the cohort, or divide anew: brainfound split keeps the two together",
                )


def get_split_groups(store: Store) -> tuple[np.ndarray, int]:
    """For each session the name by which its subject is divided, and how many subjects go by the name of another.

    Those are subjects who share an image: they stay in one part.
    """
    subjects = [str(name) for name in store.sessions["subject"]]
    names = merge_linked_subjects(subjects, store.sessions["image_hash"].tolist())
    return np.array(names, dtype=object), len(set(subjects)) - len(set(names))


def _require_valid_parts(fold: str, members: SubjectsByPart, where: object = None) -> None:
    unknown = [part for part in members if part not in PARTS]
    if unknown:
        raise UsageError(
            f"unknown part {unknown[0]!r}", where=where or f"fold {fold}", remedy=did_you_mean(unknown[0], PARTS)
        )
    missing = [part for part in REQUIRED_PARTS if part not in members]
    missing += [part for part, names in members.items() if not names]
    if missing:
        raise UsageError(
            f"the part {missing[0]!r} of the split is missing or empty",
            where=where or f"fold {fold}",
            remedy="Give every part at least one subject",
        )
    for (one, other), shared in shared_counts({part: set(names) for part, names in members.items()}).items():
        if shared:
            raise UsageError(
                f"the parts {one!r} and {other!r} of the split share subjects",
                where=where or f"fold {fold}",
                got=f"{shared} shared",
                expected="none",
                remedy="Take each subject out of one of them, or divide anew: brainfound split STORE NEW.json",
            )


def _read_json(path: Path) -> dict[str, Any]:
    remedy = "Give the file of `brainfound split`, or the splits.json of a run"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0][:100]
        raise UsageError(f"not a split file: {reason}", where=path, remedy=remedy) from None
    if not isinstance(content, dict):
        raise UsageError("not a split file: no JSON object", where=path, remedy=remedy)
    return content


def _folds_of(content: Mapping[str, Any], path: Path) -> dict[str, SubjectsByPart]:
    folds: dict[str, Any] = {SINGLE_FOLD: content.get("subjects", content)}
    if "schema" in content:
        found = content.get("folds")
        found = found if isinstance(found, dict) else {}
        folds = {name: entry.get("subjects") if isinstance(entry, dict) else None for name, entry in found.items()}
    if not folds:
        remedy = "Make it again: brainfound split STORE NEW.json"
        raise UsageError("a split file without folds", where=path, remedy=remedy)
    checked: dict[str, SubjectsByPart] = {}
    for name, members in folds.items():
        lists = members.values() if isinstance(members, dict) else [None]
        if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists):
            raise UsageError(
                "not a split file: the parts must be lists of subjects",
                where=path,
                remedy="Give the file of `brainfound split`, or the splits.json of a run",
            )
        checked[name] = {part: tuple(sorted(set(names))) for part, names in members.items()}
        _require_valid_parts(name, checked[name], where=path if name == SINGLE_FOLD else f"{path}, fold {name}")
    return checked


def _counts_of(entry: Mapping[str, Any], members: SubjectsByPart) -> dict[str, dict[str, Any]]:
    return {part: {"num_sessions": entry["num_sessions"][part], **entry["counts"][part]} for part in members}


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _counts(store: Store, index: Sequence[int] | np.ndarray, columns: Sequence[str]) -> dict[str, Any]:
    """Sessions of a part; of each column the sessions per value, or the range where it has many numbers."""
    counts: dict[str, Any] = {"num_sessions": len(index)}
    for column in columns:
        everything = to_numeric_or_none(store.covariate(column).tolist())
        if everything is None:
            values = Counter(label_text(value) for value in store.covariate(column).iloc[list(index)])
            counts[column] = dict(sorted(values.items()))
            continue
        numbers = everything[list(index)]
        known = numbers[~np.isnan(numbers)]
        counts[column] = {"missing": int(np.isnan(numbers).sum())}
        if known.size:
            range_ = {"min": known.min(), "median": np.median(known), "max": known.max()}
            counts[column] |= {name: round(float(value), 4) for name, value in range_.items()}
    return counts
