"""Dividing sessions into parts that never share a subject.

Every division depends on the seed and on the subjects, never on the order of the sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from brainfound.errors import UsageError

MAX_LABELS = 10
"""Numbers with more different values than this are grouped into quintiles."""
DEFAULT_FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}
Labels = Sequence[Any] | Mapping[str, Sequence[Any]]
"""A label per session, or several named columns of labels, the most important first."""


def split_by_subject(
    subjects: Sequence[str], fractions: Mapping[str, float], seed: int, stratify: Labels | None = None
) -> dict[str, np.ndarray]:
    """Divide sessions into named parts, each with at least one subject; all sessions of a subject stay together.

    Subjects are sorted by stratum, shuffled within, and dealt one by one to the part that is furthest behind its share:
    of all subjects and, with several columns, of the subject's label in each column and of their combination. Part
    sizes are exact; the shares of every label and combination are right within about two subjects.

    Args:
        subjects: the subject of each session.
        fractions: part → share of the subjects; the shares sum to 1.
        stratify: labels whose mix is about the same in each part. Many different numbers are grouped into quintiles;
            missing labels are a stratum. A subject counts with its most frequent label, or the smallest of these.

    Returns:
        part → sorted indices of sessions.

    Raises:
        UsageError: shares that do not sum to 1, or too few subjects.
    """
    if abs(sum(fractions.values()) - 1) > 1e-6 or min(fractions.values()) <= 0:
        raise UsageError("the shares of a split must be positive and sum to 1", got=dict(fractions))
    names = sorted(set(subjects))
    if len(names) < len(fractions):
        expected, remedy = f"at least {len(fractions)}", "Add subjects or use fewer parts"
        raise UsageError("too few subjects to split", got=len(names), expected=expected, remedy=remedy)
    sizes = _part_sizes(len(names), list(fractions.values()))
    strata = _strata(subjects, stratify)
    assigned = _divide(names, strata, dict(zip(fractions, sizes, strict=True)), np.random.default_rng(seed))
    return _as_indices(assigned, subjects)


def k_folds(
    subjects: Sequence[str], num_folds: int, seed: int, stratify: Labels | None = None, validation: float = 0.0
) -> list[dict[str, np.ndarray]]:
    """Folds by subject, each with the parts ``train`` and ``test``; every subject is tested once.

    ``validation``, a share of all subjects, moves from ``train`` to a part of its own; the tested subjects stay the
    same. Other arguments as in `split_by_subject`. UsageError: too few folds or subjects.
    """
    if num_folds < 2:
        raise UsageError("cross-validation needs at least two folds", got=num_folds, where="folds")
    shares = {str(fold): 1 / num_folds for fold in range(num_folds)}
    tested = split_by_subject(subjects, shares, seed, stratify)
    everyone, strata = set(subjects), _strata(subjects, stratify)
    folds = []
    for number, index in enumerate(tested.values()):
        test = sorted({subjects[i] for i in index})
        rng = np.random.default_rng([seed, number])
        folds.append(_as_indices(_build_fold(sorted(everyone - set(test)), test, strata, validation, rng), subjects))
    return folds


def few_shot(
    subjects: Sequence[str],
    shots: Sequence[int | None],
    seed: int,
    labels: Labels | None = None,
    fractions: Mapping[str, float] | None = None,
    stratify: Labels | None = None,
) -> dict[int | None, dict[str, np.ndarray]]:
    """Number of shots → training part of a few subjects, and the same validation and test part for every number.

    The training subjects of fewer shots are among those of more shots.

    Args:
        shots: numbers of training subjects, per class with ``labels``; None for all subjects.
        labels: the class of each session, as a list or as one named column; a subject without any is not used for
            training.
        fractions: shares of the parts, by default `DEFAULT_FRACTIONS`; ``train`` draws its shots from its share.
        stratify: as in `split_by_subject`; by default the labels.

    Raises:
        UsageError: no shots, no label, or more shots than subjects (of the smallest class) outside of validation and
            test.
    """
    numbers = sorted({number for number in shots if number is not None})
    if not shots or (numbers and numbers[0] < 1):
        raise UsageError("the numbers of shots must be positive", where="shots", got=list(shots))
    column, labels = next(iter(labels.items())) if isinstance(labels, Mapping) else ("labels", labels)
    if labels is not None and all(_missing(label) for label in labels):
        remedy = "Fill it, or give another column"
        raise UsageError("no session has a label", where=f"column {column}", remedy=remedy)
    stratify = labels if stratify is None else stratify
    rest = split_by_subject(subjects, fractions or DEFAULT_FRACTIONS, seed, stratify)
    parts = {part: sorted({subjects[i] for i in index}) for part, index in rest.items()}
    pool = parts.pop("train")
    rng = np.random.default_rng([seed, 1])
    if labels is None:
        groups = {"subjects": _stratified_order(pool, _strata(subjects, stratify), rng)}
    else:
        classes = _label_per_subject(subjects, labels)
        known = sorted({label_text(label) for label in classes.values() if not _missing(label)})
        shuffled = [pool[i] for i in rng.permutation(len(pool))]
        groups = {kind: [name for name in shuffled if label_text(classes[name]) == kind] for kind in known}
    fewest = min(groups, key=lambda kind: len(groups[kind]))
    if numbers and numbers[-1] > len(groups[fewest]):
        what = f"more shots than subjects{'' if labels is None else f' of the class {fewest}'} to draw from"
        expected = f"at most {len(groups[fewest])}"
        remedy = "Ask for fewer shots, or give smaller validation and test parts"
        raise UsageError(what, where="shots", got=numbers[-1], expected=expected, remedy=remedy)
    return {
        number: _as_indices({"train": [n for line in groups.values() for n in line[:number]], **parts}, subjects)
        for number in [*numbers, *([None] if None in shots else [])]
    }


def leave_one_site_out(
    subjects: Sequence[str], sites: Sequence[Any], seed: int, validation: float = 0.0, stratify: Labels | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Site → fold that is tested on that site and trained on all others, with arguments and errors as in `k_folds`.

    A subject with sessions at the tested site and at another one is in no part of that fold. A subject with a session
    of unknown site is in no part of any fold. A site without a subject of its own has no fold.
    """
    subject_sites: dict[str, set[str | None]] = {}
    for subject, site in zip(subjects, sites, strict=True):
        subject_sites.setdefault(subject, set()).add(None if _missing(site) else label_text(site))
    placed = {name: places for name, places in subject_sites.items() if None not in places}
    known = sorted({str(site) for places in placed.values() for site in places})
    if len(known) < 2:
        raise UsageError("leaving one site out needs at least two sites", where="site", got=len(known))
    strata = _strata(subjects, stratify)
    folds = {}
    for number, site in enumerate(known):
        test = sorted(name for name, places in placed.items() if places == {site})
        rest = sorted(name for name, places in placed.items() if site not in places)
        if test:
            rng = np.random.default_rng([seed, number])
            folds[site] = _as_indices(_build_fold(rest, test, strata, validation, rng, len(subject_sites)), subjects)
    return folds


def merge_linked_subjects(subjects: Sequence[str], content_hashes: Sequence[str]) -> list[str]:
    """The name by which each session's subject is divided: subjects who share an image get the same name.

    They are one person under two names, or a file was copied to the wrong place; either way they stay in one part.
    """
    names, rows = np.unique(list(subjects), return_inverse=True)
    images, columns = np.unique(list(content_hashes), return_inverse=True)
    # A graph of subjects and images, each joined to those that it shares a session with.
    size = len(names) + len(images)
    links = coo_array((np.ones(len(rows)), (rows, len(names) + columns)), shape=(size, size))
    _, person = connected_components(links, directed=False)
    _, first = np.unique(person[: len(names)], return_index=True)
    return names[first][np.unique(person[rows], return_inverse=True)[1]].tolist()


def require_disjoint(split: Mapping[str, np.ndarray], subjects: Sequence[str]) -> None:
    """Raise a UsageError for parts of session indices that share a subject."""
    require_disjoint_subjects({part: {subjects[i] for i in index} for part, index in split.items()}, "Split by subject")


def require_disjoint_subjects(members: Mapping[str, set[str]], remedy: str, where: object = None) -> None:
    """Raise a UsageError for parts that share a subject; it names the parts, not the subjects."""
    for (first, second), shared in shared_counts(members).items():
        if shared:
            what = f"the parts {first!r} and {second!r} of the split share subjects"
            raise UsageError(what, where=where, got=f"{shared} shared", expected="none", remedy=remedy)


def shared_counts(members: Mapping[str, set[str]]) -> dict[tuple[str, str], int]:
    """The number of common subjects of each pair of parts."""
    return {(one, other): len(members[one] & members[other]) for one, other in combinations(members, 2)}


def _as_indices(assigned: Mapping[str, Sequence[str]], subjects: Sequence[str]) -> dict[str, np.ndarray]:
    assigned_part = {name: part for part, members in assigned.items() for name in members}
    parts = np.array([assigned_part.get(subject, "") for subject in subjects], dtype=object)
    return {part: np.flatnonzero(parts == part) for part in assigned}


def _build_fold(
    rest: list[str],
    test: list[str],
    strata: Mapping[str, tuple[str, ...]],
    validation: float,
    rng: np.random.Generator,
    num_subjects: int | None = None,
) -> dict[str, list[str]]:
    """The parts of a fold with this test part; a share of all subjects moves from the rest to validation."""
    count = max(1, round(validation * (num_subjects or len(rest) + len(test)))) if validation else 0
    if count >= len(rest) or not 0 <= validation < 1:
        what, remedy = "no subject is left to train on", "Ask for a smaller share"
        raise UsageError(what, where="validation", got=validation, remedy=remedy)
    if not count:
        return {"train": rest, "test": test}
    return {**_divide(rest, strata, {"train": len(rest) - count, "validation": count}, rng), "test": test}


def _strata(subjects: Sequence[str], stratify: Labels | None) -> dict[str, tuple[str, ...]]:
    """Subject → its stratum, one label per column."""
    columns = stratify if isinstance(stratify, Mapping) else {"": stratify}
    texts = [_stratum_labels(_label_per_subject(subjects, labels)) for labels in columns.values() if labels is not None]
    return {name: tuple(text[name] for text in texts) for name in sorted(set(subjects))}


def _label_per_subject(subjects: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
    """Subject → its most frequent label, or the smallest of these; None if all are missing."""
    counts: dict[str, Counter] = {subject: Counter() for subject in subjects}
    for subject, label in zip(subjects, labels, strict=True):
        if not _missing(label):
            counts[subject][label] += 1
    chosen: dict[str, Any] = {}
    for subject, label_counts in counts.items():
        most = max(label_counts.values(), default=0)
        frequent = [label for label, count in label_counts.items() if count == most]
        numbers = all(isinstance(label, (int, float, np.number)) for label in frequent)
        chosen[subject] = min(frequent, key=None if numbers else str) if frequent else None
    return chosen


def _stratum_labels(labels: Mapping[str, Any]) -> dict[str, str]:
    numbers = to_numeric_or_none(list(labels.values()))
    if numbers is None:
        return {name: "" if _missing(label) else str(label) for name, label in labels.items()}
    edges = np.quantile(np.sort(numbers[~np.isnan(numbers)]), [0.2, 0.4, 0.6, 0.8])
    return {
        name: "" if np.isnan(number) else str(int(np.searchsorted(edges, number)))
        for name, number in zip(labels, numbers, strict=True)
    }


def to_numeric_or_none(labels: Sequence[Any]) -> np.ndarray | None:
    """A column as numbers, missing ones NaN; None if it has other values, or at most `MAX_LABELS` different ones."""
    series = pd.Series(list(labels), dtype=object)
    numbers = pd.to_numeric(series, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    numbers = np.where(np.isfinite(numbers), numbers, np.nan)
    not_numeric = np.isnan(numbers) & ~np.array([_missing(label) for label in labels], dtype=bool)
    return None if not_numeric.any() or len(set(numbers[~np.isnan(numbers)])) <= MAX_LABELS else numbers


def _missing(label: Any) -> bool:
    return label is None or label is pd.NA or label == "" or label != label or label in (np.inf, -np.inf)


def label_text(label: Any) -> str:
    """A label as text: 1.0 as "1", a missing one as "missing"."""
    if _missing(label):
        return "missing"
    if isinstance(label, (float, np.floating)) and float(label).is_integer():
        return str(int(label))
    return str(label)


def _divide(
    names: list[str], strata: Mapping[str, tuple[str, ...]], sizes: dict[str, int], rng: np.random.Generator
) -> dict[str, list[str]]:
    """Deal subjects, sorted by stratum and shuffled within, to parts of these sizes."""
    shuffled = [names[int(index)] for index in rng.permutation(len(names))]
    return _deal(sorted(shuffled, key=lambda name: strata[name]), sizes, strata)


def _stratified_order(names: list[str], strata: Mapping[str, tuple[str, ...]], rng: np.random.Generator) -> list[str]:
    """An order in which every prefix has about the mix of the whole."""
    members: dict[tuple[str, ...], list[str]] = {}
    for index in rng.permutation(len(names)):
        members.setdefault(strata[names[int(index)]], []).append(names[int(index)])
    place: dict[str, tuple[float, tuple[str, ...]]] = {}
    for stratum, line in members.items():
        place |= {name: ((rank + 0.5) / len(line), stratum) for rank, name in enumerate(line)}
    return sorted(place, key=place.__getitem__)


def _part_sizes(count: int, shares: list[float]) -> list[int]:
    """Largest-remainder rounding, at least one subject each."""
    exact = np.asarray(shares) * count
    sizes = np.maximum(np.floor(exact + 1e-9).astype(int), 1)
    while sizes.sum() < count:
        sizes[(exact - sizes).argmax()] += 1
    while sizes.sum() > count:
        sizes[np.where(sizes > 1, sizes - exact, -np.inf).argmax()] -= 1
    return [int(size) for size in sizes]


def _deal(order: list[str], sizes: dict[str, int], strata: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Deal subjects in order, each to the open part that is furthest behind its share.

    For a single column the count of all subjects is enough, since its strata follow each other. With several columns a
    part can also be behind in each label of the subject and in their combination.
    """
    assigned: dict[str, list[str]] = {part: [] for part in sizes}
    seen, dealt = Counter[Any](), Counter[Any]()
    for name in order:
        stratum = strata[name]
        groups: list[Any] = [()]
        if len(stratum) > 1:
            groups += [*enumerate(stratum), ("all", *stratum)]
        seen.update(groups)
        behind = {
            part: sum(size * seen[group] / len(order) - dealt[part, group] for group in groups)
            for part, size in sizes.items()
            if len(assigned[part]) < size
        }
        part = max(behind, key=lambda part: behind[part])
        assigned[part].append(name)
        dealt.update((part, group) for group in groups)
    return assigned
