"""Splits of sessions into parts that never share a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brainfound.errors import UsageError


def split_by_subject(
    subjects: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    stratify: Sequence[Any] | None = None,
) -> dict[str, np.ndarray]:
    """Divide sessions into named parts so that all sessions of a subject stay together.

    Args:
        subjects: the subject of each session.
        fractions: part → share of the subjects; the shares sum to 1.
        seed: the same seed, subjects and fractions give the same split, whatever the order of the sessions.
        stratify: a label per session; each part gets about the same mix of labels. Numbers with many different
            values (ages) are cut at their quintiles. A subject counts with its first session's label.

    Returns:
        part → sorted indices of sessions. Every part has at least one subject.

    Raises:
        UsageError: shares that do not sum to 1, or too few subjects.
    """
    if abs(sum(fractions.values()) - 1) > 1e-6 or min(fractions.values()) <= 0:
        raise UsageError("the shares of a split must be positive and sum to 1", got=dict(fractions))
    names = sorted(set(subjects))
    if len(names) < len(fractions):
        raise UsageError(
            "too few subjects to split",
            got=len(names),
            expected=f"at least {len(fractions)}",
            remedy="Add subjects or use fewer parts",
        )
    strata = _strata(names, subjects, stratify)
    order = _line_up(names, strata, np.random.default_rng(seed))
    counts = _part_sizes(len(names), list(fractions.values()))
    assigned = _deal(order, dict(zip(fractions, counts, strict=True)))
    array = np.asarray(subjects, dtype=object)
    split = {part: np.flatnonzero(np.isin(array, members)) for part, members in assigned.items()}
    require_disjoint(split, subjects)
    return split


def k_folds(
    subjects: Sequence[str], num_folds: int, seed: int, stratify: Sequence[Any] | None = None
) -> list[dict[str, np.ndarray]]:
    """Folds by subject, each with the parts ``train`` and ``test``.

    Raises:
        UsageError: fewer than two folds, or fewer subjects than folds.
    """
    if num_folds < 2:
        raise UsageError("cross-validation needs at least two folds", got=num_folds, where="folds")
    shares = {str(fold): 1 / num_folds for fold in range(num_folds)}
    parts = split_by_subject(subjects, shares, seed, stratify)
    everything = np.arange(len(subjects))
    return [{"train": np.setdiff1d(everything, test), "test": test} for test in parts.values()]


def require_disjoint(split: Mapping[str, np.ndarray], subjects: Sequence[str]) -> None:
    """Fail if two parts share a subject.

    Raises:
        UsageError: names the parts and a subject count.
    """
    members = {part: {subjects[i] for i in index} for part, index in split.items()}
    parts = list(members)
    for n, first in enumerate(parts):
        for second in parts[n + 1 :]:
            shared = members[first] & members[second]
            if shared:
                raise UsageError(
                    f"the parts {first!r} and {second!r} of the split share subjects",
                    got=f"{len(shared)} shared",
                    expected="none",
                    remedy="Split by subject",
                )


def _strata(names: list[str], subjects: Sequence[str], stratify: Sequence[Any] | None) -> list[str]:
    if stratify is None:
        return [""] * len(names)
    first: dict[str, Any] = {}
    for subject, label in zip(subjects, stratify, strict=True):
        first.setdefault(subject, label)
    labels = [first[name] for name in names]
    numbers = [label for label in labels if isinstance(label, (int, float, np.number)) and np.isfinite(label)]
    if len(set(numbers)) > 10:
        edges = np.quantile(np.asarray(numbers, dtype=np.float64), [0.2, 0.4, 0.6, 0.8])
        return ["" if label not in numbers else str(int(np.searchsorted(edges, label))) for label in labels]
    return [str(label) for label in labels]


def _line_up(names: list[str], strata: list[str], rng: np.random.Generator) -> list[str]:
    """Stratum after stratum, shuffled within: dealt out evenly along this line, each part gets its share of each."""
    shuffled = [int(index) for index in rng.permutation(len(names))]
    return [names[index] for index in sorted(shuffled, key=lambda index: strata[index])]


def _part_sizes(count: int, shares: list[float]) -> list[int]:
    """Largest-remainder rounding, at least one subject each."""
    exact = np.asarray(shares) * count
    sizes = np.maximum(np.floor(exact + 1e-9).astype(int), 1)
    while sizes.sum() < count:
        sizes[(exact - sizes).argmax()] += 1
    while sizes.sum() > count:
        sizes[np.where(sizes > 1, sizes - exact, -np.inf).argmax()] -= 1
    return [int(size) for size in sizes]


def _deal(order: list[str], sizes: dict[str, int]) -> dict[str, list[str]]:
    """Deal the line out so that each part is spread evenly over it."""
    assigned: dict[str, list[str]] = {part: [] for part in sizes}
    total = len(order)
    for position, name in enumerate(order, start=1):
        behind = {part: sizes[part] * position / total - len(assigned[part]) for part in sizes}
        open_parts = [part for part in sizes if len(assigned[part]) < sizes[part]]
        assigned[max(open_parts, key=lambda part: behind[part])].append(name)
    return assigned
