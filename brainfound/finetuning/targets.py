"""What is to be learnt: a covariate column or the mask of a store, as numbers.

A target is resolved on the training part alone (classes, mean, standard deviation, label codes) and then applied
to every part; a session whose label is missing is left out, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from brainfound.data.store import Store
from brainfound.errors import UsageError

Task = Literal["classification", "regression", "segmentation"]
MASK = "mask"
MAX_CLASSES = 50
_BINARY_VALUES = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}


@dataclass(frozen=True)
class Target:
    """A task's labels.

    Attributes:
        task: classification, regression or segmentation.
        column: the covariate, or ``"mask"``; several 0/1 covariates as ``"edema,lesion"``.
        names: class names in the order of their indices (classification, segmentation; 0 is background there).
        codes: segmentation: the mask's code of each class; code 0 is background.
        merge: segmentation: any code but 0 is class 1.
        regions: segmentation with overlapping labels: the codes of each label; then there is no background among the
            names, and no `codes`.
        mean, std: regression: of the training part, in the unit of the column.
        shares: classification: of the training part's sessions, in each class (or with each label); empty where it was
            made before they were remembered.
        multi_label: classification: each name is a column of its own, and a session may have any of them.
    """

    task: Task
    column: str
    names: tuple[str, ...] = ()
    codes: tuple[int, ...] = ()
    merge: bool = False
    mean: float = 0.0
    std: float = 1.0
    multi_label: bool = False
    regions: tuple[tuple[int, ...], ...] = ()
    shares: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Target:
        return cls(**{key: _as_tuples(value) for key, value in content.items()})

    def values(self, store: Store, sessions: Sequence[int]) -> np.ndarray:
        """Class indices or numbers ``(n,)`` of sessions that `labelled_sessions` kept; 0 and 1 ``(n, K)`` of labels.

        Raises:
            UsageError: a class that the training part did not have, a word in the place of a number, or a label that
                is neither 0 nor 1.
        """
        if self.multi_label:
            return np.stack([_binary_labels(store, name, sessions) for name in self.names], axis=1)
        if self.task == "regression":
            return _numbers(store, self.column, sessions)
        labels = store.covariate(self.column).iloc[list(sessions)]
        index = {name: k for k, name in enumerate(self.names)}
        unknown = sorted({_class_name(label) for label in labels} - set(index))
        if unknown:
            raise UsageError(
                f"the class {unknown[0]!r} is not among those that the model was trained on",
                where=f"column {self.column}",
                expected=", ".join(self.names),
                remedy="Leave such sessions out, or use a regression for numbers (--set task=regression)",
            )
        return np.array([index[_class_name(label)] for label in labels])

    def encode_mask(self, mask: np.ndarray) -> np.ndarray:
        """Label codes → class indices; codes that the training part did not have become background.

        With `regions`, (…, H, W) → 0 or 1 for each label, (…, K, H, W).
        """
        if self.regions:
            return np.stack([np.isin(mask, codes) for codes in self.regions], axis=-3).astype(np.uint8)
        if self.merge:
            return (mask != 0).astype(np.uint8)
        table = np.zeros(max(int(mask.max()), max(self.codes)) + 1, dtype=np.uint8)
        table[list(self.codes)] = np.arange(len(self.codes))
        return table[mask]

    def unknown_codes(self, mask: np.ndarray) -> list[int]:
        """The codes of a mask that the training part did not have; with `regions` or `merge` there are none."""
        if self.regions or self.merge:
            return []
        return np.setdiff1d(np.unique(mask), self.codes).tolist()

    def decode_mask(self, classes: np.ndarray) -> np.ndarray:
        """Class indices → label codes; not with `regions`."""
        codes = np.array(self.codes, dtype=np.uint8 if max(self.codes) <= 255 else np.uint16)
        return codes[classes]


def target_columns(store: Store, target: str) -> tuple[str, ...]:
    """The covariates that a target names: none for the mask, several for ``"edema,lesion"``."""
    if target == MASK:
        return ()
    if "," not in target or target in store.covariates:
        return (target,)
    return tuple(dict.fromkeys(name.strip() for name in target.split(",") if name.strip()))


def labelled_sessions(store: Store, column: str) -> np.ndarray:
    """Indices of the sessions that have a label (or a mask); of several columns, in each of them.

    Raises:
        UsageError: there is no such column, or it is empty.
    """
    if column == MASK:
        known = (store.sessions["mask_dtype"] != "").to_numpy()
    else:
        known = np.ones(len(store), dtype=bool)
        for name in target_columns(store, column):
            labels = store.covariate(name)
            numbers = pd.to_numeric(labels, errors="coerce")
            known &= labels.notna().to_numpy() & ~np.isinf(numbers.to_numpy(dtype=np.float64, na_value=0.0))
    if not known.any():
        what = "no session has a mask" if column == MASK else f"the column {column!r} is empty"
        if len(target_columns(store, column)) > 1:
            what = f"no session has a value in each of the columns {column!r}"
        raise UsageError(what, where=f"store {store.path.name}", remedy="Add labels to the cohort and prepare it again")
    return np.flatnonzero(known)


def infer_task(store: Store, column: str) -> Task:
    """Segmentation for the mask, regression for numbers with many values, else classification."""
    if column == MASK:
        return "segmentation"
    if len(target_columns(store, column)) > 1:
        return "classification"
    labels = store.covariate(column).dropna()
    numeric = pd.to_numeric(labels, errors="coerce").notna().all()
    return "regression" if numeric and labels.nunique() > 10 else "classification"


def resolve_target(
    store: Store,
    train: Sequence[int],
    task: Task,
    column: str,
    merge_codes: bool = False,
    regions: Mapping[str, Sequence[int]] | None = None,
) -> Target:
    """Learn a target's classes or scale from the training part.

    Args:
        store, train: the data, and the sessions of the training part.
        task, column: what is learnt.
        merge_codes: segmentation: any code but 0 is one class.
        regions: segmentation: overlapping labels, each made of one or more codes.

    Raises:
        UsageError: one class only, a constant or non-numeric regression target, no code but 0 in any mask, a region
            that no mask has.
    """
    if (task == "segmentation") != (column == MASK):
        raise UsageError(
            "only the mask can be segmented" if task == "segmentation" else "the mask can only be segmented",
            where="target",
            got=f"{column!r} for a {task}",
            remedy=f"Give the target {MASK!r} to a segmentation, and a column to any other task",
        )
    if regions and task != "segmentation":
        raise UsageError("only a segmentation has regions", where="regions", got=f"a {task}", remedy="Leave them out")
    if task == "segmentation":
        return _mask_target(store, train, merge_codes, regions or {})
    columns = target_columns(store, column)
    if len(columns) > 1:
        return _multi_label_target(store, train, task, columns)
    return (_number_target if task == "regression" else _class_target)(store, train, column)


def _numbers(store: Store, column: str, sessions: Sequence[int]) -> np.ndarray:
    """The values ``(n,)`` of a column of numbers."""
    labels = store.covariate(column).iloc[list(sessions)]
    numbers = pd.to_numeric(labels, errors="coerce")
    if numbers.isna().any():
        raise UsageError(
            "a regression target must be numeric",
            where=f"column {column}",
            got=repr(labels[numbers.isna()].iloc[0]),
            remedy="Leave such a cell empty, use --set task=classification, or another column",
        )
    return numbers.to_numpy(dtype=np.float64)


def _number_target(store: Store, train: Sequence[int], column: str) -> Target:
    numbers = _numbers(store, column, train)
    if not (std := float(numbers.std())) > 0:
        raise UsageError("the target is constant", where=f"column {column}", got=float(numbers[0]))
    return Target("regression", column, mean=float(numbers.mean()), std=std)


def _class_target(store: Store, train: Sequence[int], column: str) -> Target:
    labels = [_class_name(label) for label in store.covariate(column).iloc[list(train)]]
    names = tuple(sorted(set(labels)))
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UsageError(
            "a classification needs at least two classes in the training part",
            where=f"column {column}",
            got=f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})",
            expected=f"2 to {MAX_CLASSES}",
            remedy="Choose another column, or --set task=regression for numbers",
        )
    everything = [_class_name(label) for label in store.covariate(column).dropna()]
    if len(set(everything)) == len(everything) > 2:
        raise UsageError(
            "every session has a class of its own",
            where=f"column {column}",
            got=", ".join(names[:3]) + ", …",
            remedy="Choose another column, or --set task=regression for numbers",
        )
    return Target("classification", column, names=names, shares=tuple(labels.count(n) / len(labels) for n in names))


def _multi_label_target(store: Store, train: Sequence[int], task: Task, columns: tuple[str, ...]) -> Target:
    if task != "classification":
        raise UsageError(f"a {task} has one column", where="target", got=", ".join(columns))
    shares = tuple(float(_binary_labels(store, name, train).mean()) for name in columns)
    for name, share in zip(columns, shares, strict=True):
        if share in (0, 1):
            raise UsageError(
                "a label needs sessions with it and without it in the training part",
                where=f"column {name}",
                got="one value",
                remedy="Leave this column out of the target",
            )
    return Target("classification", ",".join(columns), names=columns, multi_label=True, shares=shares)


def _binary_labels(store: Store, column: str, sessions: Sequence[int]) -> np.ndarray:
    """A column of 0 and 1, or of true and false, as numbers ``(n,)``."""
    labels = store.covariate(column).iloc[list(sessions)]
    numbers = np.array([_BINARY_VALUES.get(_class_name(label).strip().lower(), -1.0) for label in labels])
    if (numbers < 0).any():
        raise UsageError(
            "a label among several must be 0 or 1",
            where=f"column {column}",
            got=repr(labels.iloc[int(np.argmax(numbers < 0))]),
            expected="0, 1, true or false",
            remedy="Make one column of 0 and 1 of each class",
        )
    return numbers


def _mask_target(store: Store, train: Sequence[int], merge: bool, regions: Mapping[str, Sequence[int]]) -> Target:
    codes: set[int] = set()
    for session in train:
        mask = store.read_masks(int(session))
        if mask is not None:
            codes |= set(np.unique(mask).tolist())
    codes.discard(0)
    if not codes:
        raise UsageError(
            "every mask of the training part is empty", where=f"store {store.path.name}", remedy="Check the masks"
        )
    if regions:
        _require_regions(regions, codes, merge)
        of_each = tuple(tuple(sorted(set(region))) for region in regions.values())
        return Target("segmentation", MASK, names=tuple(regions), regions=of_each)
    if merge:
        return Target("segmentation", MASK, names=("background", "foreground"), codes=(0, 1), merge=True)
    if len(codes) >= MAX_CLASSES:
        raise UsageError(
            "too many label codes",
            where="mask",
            got=len(codes),
            expected=f"fewer than {MAX_CLASSES}",
            remedy="Merge them with --set merge_codes=true, or give coarser masks",
        )
    ordered = (0, *sorted(codes))
    return Target("segmentation", MASK, names=("background", *(f"label {code}" for code in ordered[1:])), codes=ordered)


def _require_regions(regions: Mapping[str, Sequence[int]], codes: set[int], merge: bool) -> None:
    if merge:
        raise UsageError("regions or merge_codes", where="regions", got="both", remedy="Leave merge_codes out")
    for name, region in regions.items():
        where = f"regions.{name}"
        if not re.fullmatch("[A-Za-z0-9]+", name):
            raise UsageError("a region's name is part of file names", where=where, expected="letters and digits")
        if not region or min(region) < 1:
            raise UsageError(
                "a region is made of one or more codes above 0",
                where=where,
                got=list(region),
                expected="such as [1, 4]",
            )
        if not codes & set(region):
            raise UsageError(
                "no mask of the training part has a code of this region",
                where=where,
                got=list(region),
                expected=f"some of {', '.join(map(str, sorted(codes)[:10]))}",
                remedy="Check the codes, or leave the region out",
            )


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value


def class_names(labels: Iterable[Any]) -> list[str]:
    """The classes of some labels, each once, sorted."""
    return sorted({_class_name(label) for label in labels})


def _class_name(label: Any) -> str:
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        return str(int(label))
    return str(label)
