"""The store: a prepared cohort on disk, one row per slice, read in place.

A store is a folder:

    slices/            a Hugging Face ``datasets`` folder, one row per slice, contiguous per session
    sessions.arrow   one row per session: identifiers, covariates, geometry, and where its bytes are
    store.json         schema version, preprocessing, what was done before it, counts, content hash
    preprocessing.json the same preprocessing by itself
    quality.tsv        one row per scan: how it was stored, and what was found in it
    rejected.tsv       files that were refused or not used, with the reason
    sources.parquet    what each session was made of, so that preparing again does only what is new
    contact_sheet.png  the sessions at a glance

Axis legend: S slices, C contrasts, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Num

from brainfound.data.preprocessing.session import FURTHER_SCAN_REASON, NOT_IN_COHORT_REASON
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.preprocessing.stack_builder import positions_mm
from brainfound.data.store.folder import SessionTable, StoreFolder, compute_hashes, content_hash
from brainfound.data.store.slice_files import SliceFiles
from brainfound.errors import StoreError, UsageError

_QUERY_ERRORS = (
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    NotImplementedError,
    ArithmeticError,
)
_QUALITY_NUMBERS = (
    "foreground_ml",
    "intensity_low",
    "intensity_high",
    "minimum",
    "maximum",
    "overlap",
    "cropped",
    "num_slices",
)


class Store:
    """A prepared cohort, or some sessions of one, or of several. ``len`` counts sessions; ``store[i]`` is a `Stack`.

    Attributes:
        sessions: one row per session, ordered by subject and session: ``subject``, ``session``, covariates,
            ``first_row``, ``num_slices``, ``mask_dtype`` (empty without a mask), ``image_hash`` and ``content_hash``.
        preprocessing: how the stacks were made.
        contrasts: the contrast of each channel.
        content_hash: SHA-256 of everything that training sees: pixels, masks, geometry, covariates, preprocessing.
        facts: what store.json says; of several stores, of the first.
        path: the folder; of several stores, the first one.
        withheld: contrasts that are not shown, see `brainfound.data.store.withheld.restrict_contrasts`; of a plain store none.
    """

    withheld: tuple[str, ...] = ()

    def __init__(self, folders: Sequence[StoreFolder], table: SessionTable) -> None:
        self.folders = tuple(folders)
        self.table = table
        first = folders[0]
        self.path, self.facts, self.preprocessing = first.path, first.facts, first.preprocessing
        self.contrasts: tuple[str, ...] = self.preprocessing.contrasts
        self.sessions = table.sessions
        self.num_slices = int(table.num_slices.sum())

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store; nothing is read into memory but the table of sessions.

        Raises:
            StoreError: there is no complete store at the path, or it is of another schema.
        """
        folder = StoreFolder(Path(path))
        return cls([folder], folder.table)

    def __reduce__(self):
        # A worker process opens the store by itself: the memory map is shared, nothing is copied.
        folders = tuple((folder.path, folder.facts["content_hash"]) for folder in self.folders)
        return (_reopen, (folders, self.table.origin))

    def __len__(self) -> int:
        return len(self.sessions)

    @property
    def shown(self) -> tuple[str, ...]:
        """The contrasts that can be read: all but those that are withheld."""
        return tuple(name for name in self.contrasts if name not in self.withheld)

    def __repr__(self) -> str:
        names = " + ".join(repr(folder.path.name) for folder in self.folders)
        return (
            f"Store({names}: {len(self)} sessions, {self.num_slices} slices of "
            f"{'×'.join(map(str, self.preprocessing.size))}, contrasts {', '.join(self.contrasts)})"
        )

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of everything that training sees."""
        if self._is_whole:
            return str(self.facts["content_hash"])
        return content_hash(self.table, self.preprocessing)

    @property
    def _is_whole(self) -> bool:
        return len(self.folders) == 1 and len(self) == len(self.folders[0].table)

    def filter(self, keep: str | Sequence[bool] | Callable[[pd.Series], bool]) -> Store:
        """The store of some sessions; nothing is copied.

        Args:
            keep: a pandas query on `sessions` (``"age_years > 60 and site == 'A'"``; the columns ``has_T1w`` and so
                on say which contrasts are there, and ``has_mask``), one bool per session, or a function of a row.

        Raises:
            UsageError: the query cannot be read, or no session is left.
        """
        table = self.sessions.assign(
            **{
                name: values
                for name, values in {
                    **{f"has_{name}": self.present[:, channel] for channel, name in enumerate(self.contrasts)},
                    "has_mask": self.sessions["mask_dtype"] != "",
                }.items()
                if name not in self.sessions
            }
        )
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
            UsageError: none is given, they were prepared in different ways, or a session is in two of them.
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

    @cached_property
    def quality(self) -> pd.DataFrame:
        """One row per scan that is in a stack: subject, session and the columns of `ScanQuality`."""
        table = self._rows_of_sessions("quality.tsv")
        numbers = [name for name in table.columns if name in _QUALITY_NUMBERS]
        return table.assign(**{name: pd.to_numeric(table[name]) for name in numbers})

    @cached_property
    def rejected(self) -> pd.DataFrame:
        """Files that were refused: file, subject, session, contrast, reason."""
        files = self._files_not_used
        return files[~files["reason"].str.startswith((FURTHER_SCAN_REASON, NOT_IN_COHORT_REASON))].reset_index(
            drop=True
        )

    @cached_property
    def further_scans(self) -> pd.DataFrame:
        """Files that were not used because their session has another scan of the contrast; columns as of `rejected`."""
        files = self._files_not_used
        return files[files["reason"].str.startswith(FURTHER_SCAN_REASON)].reset_index(drop=True)

    @cached_property
    def unused_files(self) -> pd.DataFrame:
        """Files of the source that are no scans of the cohort; columns as of `rejected`, those of the session empty."""
        files = self._files_not_used
        return files[files["reason"].str.startswith(NOT_IN_COHORT_REASON)].reset_index(drop=True)

    @cached_property
    def _files_not_used(self) -> pd.DataFrame:
        return self._rows_of_sessions("rejected.tsv")

    def _rows_of_sessions(self, name: str) -> pd.DataFrame:
        """The rows of a table of each folder that belong to these sessions; of a whole folder all rows, as text."""
        parts = []
        for folder in {folder.path: folder for folder in self.folders}.values():
            table = pd.read_csv(folder.path / name, sep="\t", dtype=str, keep_default_na=False)
            mine = [number for number, other in enumerate(self.folders) if other.path == folder.path]
            here = self.sessions[np.isin(self.table.origin[:, 0], mine)]
            if len(here) < len(folder.table):
                keys = set(zip(here["subject"], here["session"], strict=True))
                named = zip(table["subject"], table["session"], strict=True)
                table = table[np.array([key in keys for key in named], dtype=bool)]
            parts.append(table)
        return pd.concat(parts, ignore_index=True)

    @property
    def duplicates(self) -> list[list[int]]:
        """Groups of sessions whose pixels are the same to the last bit: one scan under several names."""
        groups = self.sessions.groupby("image_hash", sort=False).indices.values()
        return sorted(sorted(int(i) for i in group) for group in groups if len(group) > 1)

    @property
    def present(self) -> np.ndarray:
        """``(sessions, C)`` bool: which contrasts each session has."""
        return self.table.present

    @cached_property
    def slice_sessions(self) -> np.ndarray:
        """``(num_slices,)`` the session index of each slice row."""
        return np.repeat(np.arange(len(self), dtype=np.int32), self.table.num_slices)

    @cached_property
    def slice_positions_mm(self) -> np.ndarray:
        """``(num_slices,)`` position along the slice axis, 0 in the middle of each stack."""
        return np.concatenate([self._positions(i) for i in range(len(self))])

    def read_slices(self, rows: np.ndarray) -> Num[np.ndarray, "n C H W"]:
        """The pixels of the given slice rows, in the given order."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_slices):
            raise StoreError(
                "slice row out of range",
                where=self.path.name,
                got=f"{rows.min()}…{rows.max()}",
                expected=f"0…{self.num_slices - 1}",
            )
        table = self.table
        out = np.empty((len(rows), len(self.contrasts), *self.preprocessing.size), self.preprocessing.pixel_dtype)
        sessions = np.searchsorted(table.first_row, rows, side="right") - 1
        slice_bytes = self.folders[0].files.slice_bytes
        places = table.pixels_at[sessions] + (rows - table.first_row[sessions]) * slice_bytes
        for position, (session, place) in enumerate(zip(sessions.tolist(), places.tolist(), strict=True)):
            self._files(session).read_into(out[position], table.file_of(session), place)
        return out

    def read_masks(self, session: int, slices: np.ndarray | None = None) -> np.ndarray | None:
        """The label map of a session ``(S, H, W)``, or of some of its slices; None where the session has none."""
        table = self.table
        dtype = str(self.sessions["mask_dtype"].iloc[session])
        if not dtype:
            return None
        masks = self._files(session).masks(
            table.file_of(session), int(table.mask_at[session]), int(table.num_slices[session]), dtype
        )
        return masks if slices is None else masks[np.asarray(slices)]

    def session_rows(self, session: int) -> np.ndarray:
        """The slice rows of a session, inferior → superior."""
        first = self.table.first_row[session]
        return np.arange(first, first + self.table.num_slices[session])

    def __getitem__(self, index: int) -> Stack:
        if not -len(self) <= index < len(self):
            raise IndexError(f"session {index} of a store of {len(self)}")
        index = index % len(self)
        table = self.table
        row = self.sessions.iloc[index]
        return Stack(
            pixels=self._pixels(index),
            contrasts=self.contrasts,
            present=np.array(table.present[index]),
            positions_mm=self._positions(index),
            affine=np.array(table.affine[index]),
            native_shape=_shape_3d(table.native_shape[index]),
            native_affine=np.array(table.native_affine[index]),
            mask=self.read_masks(index),
            covariates={name: _plain(row[name]) for name in table.covariates},
            subject=row["subject"],
            session=row["session"],
        )

    @property
    def covariates(self) -> list[str]:
        """Names of the columns of `sessions` that came with the cohort."""
        return self.table.covariates

    def covariate(self, name: str) -> pd.Series:
        """One covariate of every session.

        Raises:
            UsageError: if there is no such column; says the nearest one.
        """
        from brainfound.data.cohort import require_column

        require_column(self.covariates, name, where=f"store {self.path.name}")
        return self.sessions[name]

    def verify(self) -> str:
        """Read every byte and compare it with the hashes that were taken when it was written.

        Returns:
            The content hash.

        Raises:
            StoreError: something was changed or lost; names the session by its row.
        """
        for folder in self.folders:
            folder.verify_table()
        damaged = self.damaged_sessions()
        if damaged:
            raise StoreError(
                "the bytes of a session are not those that were written",
                where=self.path.name,
                got=f"session {damaged[0]}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""),
                remedy="Copy the store again, or mend it with brainfound prepare … --overwrite",
            )
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

    def damaged_sessions(self) -> list[int]:
        """Rows of the sessions whose bytes are not those that were written, or cannot be read."""
        expected = list(zip(self.sessions["image_hash"], self.sessions["content_hash"], strict=True))
        damaged = []
        for index in range(len(self)):
            try:
                sound = compute_hashes(self[index]) == expected[index]
            except StoreError:
                sound = False
            if not sound:
                damaged.append(index)
        return damaged

    def save(self, folder: str | Path, *, keep_ids: bool = True) -> Store:
        """Write the sessions of this store (filtered, or of several stores) as a store of their own.

        Args:
            keep_ids: False numbers the subjects and sessions in a random order, and leaves out file names.
        """
        from brainfound.data.store.sharing import copy_store

        return copy_store(self, Path(folder), keep_ids=keep_ids)

    def push_to_hub(self, repo_id: str, *, private: bool = True, keep_ids: bool = False, **options: Any) -> str:
        """Put the store on the Hugging Face Hub, see `brainfound.data.store.sharing.push`."""
        from brainfound.data.store.sharing import push

        return push(self, repo_id, private=private, keep_ids=keep_ids, **options)

    @classmethod
    def from_hub(cls, repo_id: str, **options: Any) -> Store:
        """Download a store that was pushed and open it, see `brainfound.data.store.sharing.download`."""
        from brainfound.data.store.sharing import download

        return cls.open(download(repo_id, **options))

    @staticmethod
    def stream(source: str | Path, **options: Any) -> Iterator[dict[str, Any]]:
        """Slices one after the other, from a folder or the Hub, see `brainfound.data.store.sharing.stream`."""
        from brainfound.data.store.sharing import stream

        return stream(source, **options)

    def _pixels(self, session: int) -> np.ndarray:
        table = self.table
        return self._files(session).pixels(
            table.file_of(session), int(table.pixels_at[session]), int(table.num_slices[session])
        )

    def _files(self, session: int) -> SliceFiles:
        return self.folders[self.table.origin[session, 0]].files

    def _positions(self, index: int) -> np.ndarray:
        spacing = float(np.linalg.norm(self.table.affine[index][:3, 0]))
        return positions_mm(int(self.table.num_slices[index]), spacing)


def _reopen(known: tuple[tuple[Path, str], ...], origin: np.ndarray) -> Store:
    folders = [StoreFolder(path) for path, _ in known]
    for folder, (path, expected) in zip(folders, known, strict=True):
        if folder.facts["content_hash"] != expected:
            raise StoreError("the store was changed while it was in use", where=path.name, remedy="Open it again")
    table = SessionTable.join([folder.table for folder in folders], [1] * len(folders))
    index = {(int(part), int(row)): at for at, (part, row) in enumerate(table.origin)}
    return Store(folders, table.take(np.array([index[int(part), int(row)] for part, row in origin])))


def _shape_3d(values: np.ndarray) -> tuple[int, int, int]:
    first, second, third = (int(n) for n in values)
    return (first, second, third)


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA:
        return None
    return value.item() if hasattr(value, "item") else value
