"""The store: a prepared cohort on disk, one row per slice, read in place.

A store is a folder:

    slices/            a Hugging Face ``datasets`` folder, one row per slice, contiguous per session
    sessions.arrow     one row per session: identifiers, covariates, geometry, and the place of its bytes
    store.json         schema version, preprocessing, hooks, counts, content hash
    preprocessing.json the same preprocessing by itself
    quality.tsv        one row per scan: how it was stored, and its measurements
    rejected.tsv       files that were refused or not used, with the reason
    sources.parquet    fingerprints of each session's files, so that preparing again does only new work
    contact_sheet.png  the sessions at a glance
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.store import sharing
from brainfound.data.store.folder import SessionTable, StoreFolder, damaged_session_error
from brainfound.data.store.reader import StoreReader
from brainfound.errors import StoreError, UsageError

_QUERY_ERRORS: tuple[type[Exception], ...] = (SyntaxError, ValueError, TypeError, LookupError, AttributeError)
_QUERY_ERRORS += (NameError, NotImplementedError, ArithmeticError)


class Store(StoreReader):
    """A prepared cohort, or some sessions of one, or of several. ``len`` counts sessions; ``store[i]`` is a `Stack`.

    Attributes:
        withheld: contrasts that cannot be read, see `brainfound.data.store.withheld.restrict_contrasts`; usually none.
    """

    withheld: tuple[str, ...] = ()

    def __reduce__(self):
        # A worker process opens the store by itself: the memory map is shared, nothing is copied.
        folders = tuple((folder.path, folder.facts["content_hash"]) for folder in self.folders)
        return (_reopen, (folders, self.table.origin))

    def __repr__(self) -> str:
        names = " + ".join(repr(folder.path.name) for folder in self.folders)
        return (
            f"Store({names}: {len(self)} sessions, {self.num_slices} slices of "
            f"{'×'.join(map(str, self.preprocessing.size))}, contrasts {', '.join(self.contrasts)})"
        )

    @property
    def shown(self) -> tuple[str, ...]:
        """The contrasts that can be read: all but `withheld`."""
        return tuple(name for name in self.contrasts if name not in self.withheld)

    @cached_property
    def slices(self):
        """The `datasets.Dataset`, one row per slice."""
        from datasets import concatenate_datasets, load_from_disk

        parts = [load_from_disk(str(folder.path / "slices")) for folder in self.folders]
        joined = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])[:-1]
        first = self.table.row_on_disk + starts[self.table.origin[:, 0]]
        rows = np.concatenate([np.arange(a, a + n) for a, n in zip(first, self.table.num_slices, strict=True)])
        return joined if np.array_equal(rows, np.arange(len(joined))) else joined.select(rows)

    def filter(self, keep: str | Sequence[bool] | Callable[[pd.Series], bool]) -> Store:
        """The store of some sessions; nothing is copied.

        Args:
            keep: one bool per session, a function of a row, or a pandas query on `sessions`, such as
                ``"age_years > 60 and site == 'A'"``. Queries may use ``has_T1w`` (and so on) and ``has_mask``.

        Raises:
            UsageError: the query cannot be read, or no session is left.
        """
        has = {f"has_{name}": self.present[:, channel] for channel, name in enumerate(self.contrasts)}
        has["has_mask"] = self.sessions["mask_dtype"] != ""
        table = self.sessions.assign(**{name: values for name, values in has.items() if name not in self.sessions})
        if isinstance(keep, str):
            try:
                chosen = table.eval(keep, engine="python", parser="pandas", local_dict={}, global_dict={})
            except _QUERY_ERRORS as error:
                raise UsageError(
                    f"the query cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}",
                    where="filter",
                    got=keep,
                    expected="a pandas query on " + ", ".join(map(str, table.columns)),
                ) from None
        else:
            chosen = table.apply(keep, axis=1) if callable(keep) else keep
        chosen = np.asarray(chosen)
        if chosen.shape != (len(self),) or chosen.dtype != bool:
            raise UsageError("not one yes or no per session", where="filter", got=f"{chosen.dtype} {chosen.shape}")
        if not chosen.any():
            raise UsageError("no session is left", where="filter", remedy="Loosen the query")
        return Store(self.folders, self.table.take(np.flatnonzero(chosen)))

    @staticmethod
    def concatenate(stores: Sequence[Store]) -> Store:
        """Several stores as one; nothing is copied.

        Raises:
            UsageError: none is given, their preprocessing or masks differ, or a session is in two of them.
        """
        if not stores:
            raise UsageError("nothing to concatenate", where="concatenate")
        for other in stores[1:]:
            if other.preprocessing != stores[0].preprocessing:
                raise UsageError(
                    "the stores were prepared in different ways",
                    where="concatenate",
                    got=f"{stores[0].path.name}, {other.path.name}",
                    remedy="Prepare one like the other: brainfound prepare SOURCE STORE --like OTHER_STORE",
                )
            if other.facts.get("mask") != stores[0].facts.get("mask"):
                raise UsageError(
                    "the masks of the stores were made of different label maps",
                    where="concatenate",
                    got=f"{stores[0].facts.get('mask')}, {other.facts.get('mask')}",
                    remedy="Prepare both with the same --mask",
                )
        folders = [folder for store in stores for folder in store.folders]
        table = SessionTable.join([store.table for store in stores], [len(store.folders) for store in stores])
        repeated = table.sessions.duplicated(["subject", "session"])
        if repeated.any():
            raise UsageError(
                "a session is in two of the stores",
                where="concatenate",
                got=f"{int(repeated.sum())} sessions with the same subject and session",
                remedy="If they are different people, give the subjects of each cohort a prefix in its manifest",
            )
        return Store(folders, table)

    def verify(self) -> str:
        """Read every byte and compare it with the hashes that were computed when it was written.

        Returns:
            The content hash.

        Raises:
            StoreError: something was changed or lost; names the session by its row.
        """
        for folder in self.folders:
            folder.verify_table()
        damaged = self.damaged_sessions()
        if damaged:
            raise damaged_session_error(self.path, damaged)
        names = self.slices.select_columns(["subject", "session", "slice_index"])
        for index, first in enumerate(self.table.first_row):
            row = self.sessions.iloc[index]
            if names[int(first)] != {"subject": row["subject"], "session": row["session"], "slice_index": 0}:
                raise StoreError(
                    "the rows of slices do not follow the table of sessions",
                    where=self.path.name,
                    got=f"session {index}",
                    remedy="Copy the store again, or prepare it in a new folder",
                )
        return self.content_hash

    def save(self, folder: str | Path, *, keep_ids: bool = True) -> Store:
        """Write the sessions of this store (filtered, or of several stores) as a store of their own.

        Args:
            keep_ids: False numbers subjects and sessions in a random order, and leaves out file names.
        """
        return Store.open(sharing.copy_store(self, Path(folder), keep_ids=keep_ids))

    def push_to_hub(self, repo_id: str, *, private: bool = True, keep_ids: bool = False, **options: Any) -> str:
        """Upload the store to the Hugging Face Hub, see `brainfound.data.store.sharing.push`."""
        return sharing.push(self, repo_id, private=private, keep_ids=keep_ids, **options)

    @classmethod
    def from_hub(cls, repo_id: str, **options: Any) -> Store:
        """Download a store and open it, see `brainfound.data.store.sharing.download`."""
        return cls.open(sharing.download(repo_id, **options))

    @staticmethod
    def stream(source: str | Path, **options: Any) -> Iterator[dict[str, Any]]:
        """Yield the slices of a folder or Hub repository, see `brainfound.data.store.sharing.stream`."""
        return sharing.stream(source, **options)


def _reopen(known: tuple[tuple[Path, str], ...], origin: np.ndarray) -> Store:
    folders = [StoreFolder(path) for path, _ in known]
    for folder, (path, expected) in zip(folders, known, strict=True):
        if folder.facts["content_hash"] != expected:
            raise StoreError("the store was changed while it was in use", where=path.name, remedy="Open it again")
    table = SessionTable.join([folder.table for folder in folders], [1] * len(folders))
    index = {(int(part), int(row)): at for at, (part, row) in enumerate(table.origin)}
    return Store(folders, table.take(np.array([index[int(part), int(row)] for part, row in origin])))
