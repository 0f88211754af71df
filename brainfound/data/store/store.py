"""The store: a prepared cohort on disk, one row per slice, read in place.

A store is a folder:

    slices/            a Hugging Face ``datasets`` folder, one row per slice, contiguous per session
    sessions.arrow     one row per session: identifiers, covariates, geometry, and the place of its bytes
    store.json         schema version, preprocessing, hooks, counts, content hash
    preprocessing.json the same preprocessing by itself
    quality.tsv        one row per scan: how it was stored, and its measurements
    rejected.tsv       files that were refused or not used, with the reason
    sources.parquet    fingerprints of each session's files, so that a repeated run does only new work
    contact_sheet.png  the sessions at a glance
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Num

from brainfound.contrasts import parse_contrast
from brainfound.data.store import sharing
from brainfound.data.store.folder import SessionTable, StoreFolder, damaged_session_error
from brainfound.data.store.reader import StoreReader
from brainfound.errors import StoreError, UsageError, did_you_mean


class Store(StoreReader):
    """A prepared cohort, a part of one, or several. ``len`` counts sessions; ``store[i]`` is a `Stack`."""

    withheld: tuple[str, ...] = ()
    """Contrasts that cannot be read, see `restrict_contrasts`; usually none."""

    def __reduce__(self):
        # A worker process opens the store itself: the memory map is shared, and nothing is copied.
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
        """A store of some of the sessions; nothing is copied. UsageError for a faulty query, or if no session is left.

        ``keep`` is one bool per session, a function of a row, or a pandas query on `sessions`, such as
        ``"age_years > 60 and site == 'A'"``. Queries may use ``has_T1w`` (and so on) and ``has_mask``.
        """
        has = {f"has_{name}": self.present[:, channel] for channel, name in enumerate(self.contrasts)}
        has["has_mask"] = self.sessions["mask_dtype"] != ""
        table = self.sessions.assign(**{name: values for name, values in has.items() if name not in self.sessions})
        if isinstance(keep, str):
            try:
                chosen = table.eval(keep, engine="python", parser="pandas", local_dict={}, global_dict={})
            except Exception as error:  # a faulty query may raise errors of many kinds
                what = f"the query cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
                expected = "a pandas query on " + ", ".join(map(str, table.columns))
                raise UsageError(what, where="filter", got=keep, expected=expected) from None
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

        They must have the same preprocessing, and no session in common. What all of them withhold stays withheld.
        """
        if not stores:
            raise UsageError("nothing to concatenate", where="concatenate")
        withheld = stores[0].withheld
        if any(store.withheld != withheld for store in stores):
            got = "; ".join(f"without {', '.join(store.withheld) or 'none'}" for store in stores)
            remedy = "Restrict all of them to the same contrasts"
            raise UsageError("the stores withhold different contrasts", where="concatenate", got=got, remedy=remedy)
        if withheld:
            return _RestrictedStore(Store.concatenate([_whole(store) for store in stores]), withheld)
        for other in stores[1:]:
            if other.preprocessing != stores[0].preprocessing:
                raise UsageError(
                    "the stores were prepared in different ways",
                    where="concatenate",
                    got=f"{stores[0].path.name}, {other.path.name}",
                    remedy="Prepare one like the other: brainfound prepare SOURCE STORE --like OTHER_STORE",
                )
            if other.facts.get("mask") != stores[0].facts.get("mask"):
                what = "the masks of the stores were made of different label maps"
                got = f"{stores[0].facts.get('mask')}, {other.facts.get('mask')}"
                raise UsageError(what, where="concatenate", got=got, remedy="Prepare both with the same --mask")
        folders = [folder for store in stores for folder in store.folders]
        table = SessionTable.join([store.table for store in stores], [len(store.folders) for store in stores])
        repeated = table.sessions.duplicated(["subject", "session"])
        if repeated.any():
            got = f"{int(repeated.sum())} sessions with the same subject and session"
            remedy = "If they are different people, give the subjects of each cohort a prefix in its manifest"
            raise UsageError("a session is in two of the stores", where="concatenate", got=got, remedy=remedy)
        return Store(folders, table)

    def verify(self) -> str:
        """Compare every byte with its hash, and return the content hash. StoreError names a damaged session's row."""
        for folder in self.folders:
            folder.verify_table()
        if damaged := self.damaged_sessions():
            raise damaged_session_error(self.path, damaged)
        names = self.slices.select_columns(["subject", "session", "slice_index"])
        for index, (subject, session) in enumerate(self.table.keys):
            first = names[int(self.table.first_row[index])]
            if first != {"subject": subject, "session": session, "slice_index": 0}:
                what = "the rows of slices do not follow the table of sessions"
                remedy = "Copy the store again, or prepare it in a new folder"
                raise StoreError(what, where=self.path.name, got=f"session {index}", remedy=remedy)
        return self.content_hash

    def save(self, folder: str | Path, *, keep_ids: bool = True) -> Store:
        """Write the sessions as a new store, see `brainfound.data.store.sharing.copy_store`."""
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


def restrict_contrasts(store: Store, contrasts: Sequence[str] | None) -> Store:
    """The store as if only some contrasts had been scanned; None leaves it as it is.

    What the given store withholds stays withheld.

    Experiments with and without a contrast must use the same sessions, labels and split. So sessions, hash and order of
    channels stay, and a withheld contrast is absent and reads as zeros. A session without any of the shown contrasts
    stays, with no contrast present; training and scoring leave it out.
    """
    if contrasts is None:
        return store
    whole = _whole(store)
    given = [parse_contrast(name) for name in contrasts]
    expected = ", ".join(whole.contrasts)
    for name in given:
        if name not in whole.contrasts:
            what, remedy = f"{name} is not a contrast of the store", did_you_mean(name, whole.contrasts)
            raise UsageError(what, where="contrasts", expected=expected, remedy=remedy)
    shown = [name for name in given if name not in store.withheld]
    if not shown:
        expected = ", ".join(store.shown)
        raise UsageError("no contrast would be shown", where="contrasts", got=", ".join(given), expected=expected)
    withheld = tuple(name for name in whole.contrasts if name not in shown)
    return _RestrictedStore(whole, withheld) if withheld else whole


def _whole(store: Store) -> Store:
    return store.whole if isinstance(store, _RestrictedStore) else store


class _RestrictedStore(Store):
    def __init__(self, whole: Store, withheld: tuple[str, ...]) -> None:
        is_shown = ~np.isin(whole.contrasts, withheld)
        super().__init__(whole.folders, replace(whole.table, present=whole.table.present & is_shown))
        self.whole, self.withheld, self._is_hidden = whole, withheld, ~is_shown

    def __reduce__(self):
        return (_RestrictedStore, (self.whole, self.withheld))

    def __repr__(self) -> str:
        return f"{self.whole!r} without {', '.join(self.withheld)}"

    @cached_property
    def content_hash(self) -> str:
        """Hash of the whole store: the data is the same."""
        return self.whole.content_hash

    def filter(self, keep: str | Sequence[bool] | Callable[[pd.Series], bool]) -> Store:
        return _RestrictedStore(self.whole.filter(keep), self.withheld)

    def read_slices(self, rows: np.ndarray) -> Num[np.ndarray, "n C H W"]:
        return self._blank_withheld(super().read_slices(rows))

    def damaged_sessions(self) -> list[int]:
        return self.whole.damaged_sessions()

    @cached_property
    def slices(self) -> Any:
        raise self._withheld_error("its rows hold all contrasts")

    def save(self, folder: str | Path, *, keep_ids: bool = True) -> Store:
        raise self._withheld_error("a copy would hold all contrasts")

    def push_to_hub(self, repo_id: str, *, private: bool = True, keep_ids: bool = False, **options: Any) -> str:
        raise self._withheld_error("a copy would hold all contrasts")

    def _pixels(self, session: int) -> np.ndarray:
        return self._blank_withheld(super()._pixels(session))

    def _blank_withheld(self, pixels: np.ndarray) -> np.ndarray:
        return np.where(self._is_hidden[:, None, None], pixels.dtype.type(0), pixels)

    def _withheld_error(self, why: str) -> UsageError:
        return UsageError(
            f"contrasts are withheld, and {why}",
            where=self.path.name,
            got=f"without {', '.join(self.withheld)}",
            remedy="Take the whole store, or prepare one with --contrasts",
        )
