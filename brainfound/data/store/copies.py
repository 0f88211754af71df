"""A store as a store of its own: some sessions, sessions of several stores, or all without identifiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.store.folder import partial_of
from brainfound.data.store.plan import (
    MAX_SHARDS,
    MIN_SESSIONS_PER_SHARD,
    Key,
    Sources,
    remove_folder,
    require_free_space,
    require_place,
)
from brainfound.data.store.store import Store
from brainfound.data.store.writer import (
    QUALITY_COLUMNS,
    REJECTED_COLUMNS,
    Parts,
    assemble,
    put_in_place,
    write_blocks,
)
from brainfound.errors import StoreError

SAFE_COVARIATES = ("age_years", "sex", "site", "diagnosis")
"""What a copy without identifiers keeps of the covariates, unless it is told to keep more."""


def copy_store(store: Store, out: Path, *, keep_ids: bool = True, columns: Sequence[str] | None = None) -> Store:
    """Write the sessions of a store as a store of its own.

    Args:
        keep_ids: False numbers subjects and sessions anew in a random order, keeps no file names and no rejected
            files, and of the covariates only ``age_years``, ``sex``, ``site`` and ``diagnosis``.
        columns: the covariates to keep.

    Raises:
        StoreError: something is there.
        UsageError: no such column.
    """
    out = require_place(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError("something is there", where=out, remedy="Give another folder")
    _require_space_for_copy(store, out)
    if columns is None:
        columns = store.covariates if keep_ids else [name for name in SAFE_COVARIATES if name in store.covariates]
    for name in columns:
        store.covariate(name)
    names = _same_names(store) if keep_ids else _new_names(store)
    partial = partial_of(out)
    remove_folder(partial)
    (partial / "slices").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    # In the order of the new names, so that the old order does not show.
    order = sorted(range(len(store)), key=names.__getitem__)
    size = max(MIN_SESSIONS_PER_SHARD, -(-len(store) // MAX_SHARDS))
    for number, chosen in enumerate(_chunks(order, size)):
        rows += write_blocks(partial / "slices" / f"data-{number:05d}.arrow", store, chosen, names)
    covariates = {
        names[index]: {name: store.sessions[name].iloc[index] for name in columns} for index in range(len(store))
    }
    parts = Parts(rows, _files_of_sessions(store, keep_ids), _quality_of_sessions(store, names, keep_ids))
    facts = {key: value for key, value in store.facts.items() if key in ("hooks", "mask")}
    # It was not made of files, so preparing into it is refused.
    facts |= {"settings": "copy", "copied_from": store.content_hash if keep_ids else None}
    Sources("copy", {}, {}).write(partial)
    assemble(parts, covariates, partial, store.preprocessing, facts, keep_ids=False)
    if out.exists():
        out.rmdir()
    put_in_place(partial, out)
    return Store.open(out)


def _require_space_for_copy(store: Store, out: Path) -> None:
    height, width = store.preprocessing.size
    pixel_bytes = len(store.contrasts) * store.preprocessing.bits // 8 + 1
    out.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(out, store.num_slices * height * width * pixel_bytes, "for the copy")


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _same_names(store: Store) -> dict[int, Key]:
    keys = zip(store.sessions["subject"], store.sessions["session"], strict=True)
    return {index: (str(subject), str(session)) for index, (subject, session) in enumerate(keys)}


def _new_names(store: Store) -> dict[int, Key]:
    """Numbers in place of identifiers: subjects in an order of chance, the visits of a subject in theirs."""
    subjects = store.sessions["subject"].astype(str)
    unique = sorted(set(subjects))
    width = len(str(len(unique)))
    shuffled = np.random.default_rng().permutation(len(unique))
    number = {name: int(place) + 1 for name, place in zip(unique, shuffled, strict=True)}
    visits = subjects.groupby(subjects).cumcount() + 1
    return {
        index: (f"subject-{number[name]:0{width}d}", f"{visits.iloc[index]:02d}") for index, name in enumerate(subjects)
    }


def _files_of_sessions(store: Store, keep_ids: bool) -> pd.DataFrame:
    if not keep_ids:
        return pd.DataFrame(columns=REJECTED_COLUMNS)
    return pd.concat([store.rejected, store.further_scans, store.unused_files], ignore_index=True)[REJECTED_COLUMNS]


def _quality_of_sessions(store: Store, names: Mapping[int, Key], keep_ids: bool) -> pd.DataFrame:
    quality = store.quality.copy()
    new = {key: names[index] for index, key in _same_names(store).items()}
    renamed = [new[key] for key in zip(quality["subject"], quality["session"], strict=True)]
    quality["subject"] = [subject for subject, _ in renamed]
    quality["session"] = [session for _, session in renamed]
    if not keep_ids:
        quality["file"] = ""
    return quality[QUALITY_COLUMNS]
