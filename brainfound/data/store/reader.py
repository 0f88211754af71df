"""Reading a store in place: as much as copying, drawing and updating need; `brainfound.data.store.Store` has the rest.

Axis legend: S slices, C contrasts, H rows, W columns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Num
from numpy.typing import DTypeLike

from brainfound.data.preprocessing.session import FURTHER_SCAN_REASON, NOT_IN_COHORT_REASON
from brainfound.data.preprocessing.stack import ScanQuality, Stack, positions_mm
from brainfound.data.sources.tables import SessionKey, cohort_names, is_missing
from brainfound.data.store.folder import SessionTable, StoreFolder, compute_hashes, content_hash, session_keys
from brainfound.data.store.slice_files import SliceFiles
from brainfound.errors import StoreError, UsageError, did_you_mean

_QUALITY_NUMBERS = {field.name for field in fields(ScanQuality) if field.type in ("int", "float")}


class StoreReader:
    """The sessions of a store, or of several stores. ``len`` counts sessions; ``reader[i]`` is a `Stack`.

    Attributes:
        sessions: one row per session, ordered by subject and session: ``subject``, ``session``, covariates,
            ``first_row``, ``num_slices``, ``mask_dtype`` (empty without a mask), ``image_hash`` and ``content_hash``.
        contrasts: the contrast of each channel.
        path, facts: the folder and the content of store.json; for several stores, those of the first.
    """

    def __init__(self, folders: Sequence[StoreFolder], table: SessionTable) -> None:
        self.folders = tuple(folders)
        self.table = table
        first = folders[0]
        self.path, self.facts, self.preprocessing = first.path, first.facts, first.preprocessing
        self.contrasts: tuple[str, ...] = self.preprocessing.contrasts
        self.sessions = table.sessions
        self.num_slices = int(table.num_slices.sum())

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store; StoreError if it is missing, incomplete or of another schema. Only the table is read."""
        folder = StoreFolder(Path(path))
        return cls([folder], folder.table)

    def __len__(self) -> int:
        return len(self.sessions)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of everything that training sees: pixels, masks, geometry, covariates, preprocessing."""
        if len(self.folders) == 1 and len(self) == len(self.folders[0].table):
            return str(self.facts["content_hash"])
        return content_hash(self.table, self.preprocessing)

    def __getitem__(self, index: int) -> Stack:
        if not -len(self) <= index < len(self):
            raise IndexError(f"session {index} of a store of {len(self)}")
        index = index % len(self)
        table, row = self.table, self.sessions.iloc[index]
        x, y, z = (int(size) for size in table.native_shape[index])
        return Stack(
            pixels=self._pixels(index),
            contrasts=self.contrasts,
            present=np.array(table.present[index]),
            positions_mm=self._positions(index),
            affine=np.array(table.affine[index]),
            native_shape=(x, y, z),
            native_affine=np.array(table.native_affine[index]),
            mask=self.read_masks(index),
            covariates={name: _plain_value(row[name]) for name in table.covariates},
            subject=row["subject"],
            session=row["session"],
        )

    def read_slices(self, rows: Int[np.ndarray, "n"]) -> Num[np.ndarray, "n C H W"]:
        """The pixels of the given slice rows, in the given order."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_slices):
            got, expected = f"{rows.min()}…{rows.max()}", f"0…{self.num_slices - 1}"
            raise StoreError("slice row out of range", where=self.path.name, got=got, expected=expected)
        table = self.table
        out = np.empty((len(rows), len(self.contrasts), *self.preprocessing.size), self.preprocessing.pixel_dtype)
        sessions = np.searchsorted(table.first_row, rows, side="right") - 1
        slice_bytes = math.prod(out.shape[1:]) * out.itemsize
        offsets = table.pixels_at[sessions] + (rows - table.first_row[sessions]) * slice_bytes
        for place, (session, offset) in enumerate(zip(sessions.tolist(), offsets.tolist(), strict=True)):
            self._files(session).read_into(out[place], table.file_name(session), offset)
        return out

    def read_masks(self, session: int, slices: np.ndarray | None = None) -> Num[np.ndarray, "S H W"] | None:
        """The label map of a session, or some of its slices; None for a session without one."""
        dtype = str(self.sessions["mask_dtype"].iloc[session])
        if not dtype:
            return None
        masks = self._read(session, self.table.mask_at, self.preprocessing.size, dtype)
        return masks if slices is None else masks[np.asarray(slices)]

    def mask_codes(self) -> dict[int, int]:
        """In how many sessions each nonzero code of the label maps is; reads them all."""
        masks = (self.read_masks(session) for session in range(len(self)))
        return dict(sorted(Counter(int(c) for mask in masks if mask is not None for c in np.unique(mask) if c).items()))

    def session_rows(self, session: int) -> Int[np.ndarray, "S"]:
        """The slice rows of a session, inferior → superior."""
        first = self.table.first_row[session]
        return np.arange(first, first + self.table.num_slices[session])

    @property
    def present(self) -> Bool[np.ndarray, "sessions C"]:
        """Which contrasts each session has."""
        return self.table.present

    @property
    def contrast_counts(self) -> dict[str, int]:
        """The number of sessions that have each contrast."""
        return dict(zip(self.contrasts, self.present.sum(axis=0).tolist(), strict=True))

    @cached_property
    def slice_sessions(self) -> Int[np.ndarray, "slices"]:
        """The session index of each slice row."""
        return np.repeat(np.arange(len(self), dtype=np.int32), self.table.num_slices)

    @cached_property
    def slice_positions_mm(self) -> Float[np.ndarray, "slices"]:
        """Position of each slice row along the slice axis, 0 in the middle of its stack."""
        return np.concatenate([self._positions(i) for i in range(len(self))])

    def _pixels(self, session: int) -> Num[np.ndarray, "S C H W"]:
        shape = (len(self.contrasts), *self.preprocessing.size)
        return self._read(session, self.table.pixels_at, shape, self.preprocessing.pixel_dtype)

    def _read(self, session: int, offsets: np.ndarray, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        out = np.empty((self.table.num_slices[session], *shape), dtype)
        self._files(session).read_into(out, self.table.file_name(session), int(offsets[session]))
        return out

    def _files(self, session: int) -> SliceFiles:
        return self.folders[self.table.origin[session, 0]].files

    def _positions(self, session: int) -> Float[np.ndarray, "S"]:
        spacing = float(np.linalg.norm(self.table.affine[session][:3, 0]))
        return positions_mm(int(self.table.num_slices[session]), spacing)

    @property
    def covariates(self) -> list[str]:
        """Names of the columns of `sessions` that came with the cohort."""
        return self.table.covariates

    def covariate(self, name: str) -> pd.Series:
        """One covariate of every session; the UsageError for an unknown name suggests the nearest one."""
        if name not in self.covariates:
            where, remedy = f"store {self.path.name}", did_you_mean(name, self.covariates)
            # A column of the user's table may have another name here: ``alter`` is age_years.
            if (own := cohort_names([name]).get(name)) in self.covariates:
                remedy = f"Did you mean {own}?"
            raise UsageError(f"no column {name!r}", where=where, remedy=remedy)
        return self.sessions[name]

    @cached_property
    def quality(self) -> pd.DataFrame:
        """One row per scan that is in a stack: subject, session and the columns of `ScanQuality`."""
        table = self._rows_of_sessions("quality.tsv")
        return table.assign(**{name: pd.to_numeric(table[name]) for name in table if name in _QUALITY_NUMBERS})

    @cached_property
    def rejected(self) -> pd.DataFrame:
        """Files that were refused: file, subject, session, contrast, reason."""
        return refused_files(self._files_not_used).reset_index(drop=True)

    @cached_property
    def further_scans(self) -> pd.DataFrame:
        """Files whose session has another scan of the contrast; columns as in `rejected`."""
        return self._files_unused_as(FURTHER_SCAN_REASON)

    @cached_property
    def unused_files(self) -> pd.DataFrame:
        """Files of the source that are not scans of the cohort; as in `rejected`, with an empty subject and session."""
        return self._files_unused_as(NOT_IN_COHORT_REASON)

    def _files_unused_as(self, reason: str) -> pd.DataFrame:
        files = self._files_not_used
        return files[files["reason"].str.startswith(reason)].reset_index(drop=True)

    @cached_property
    def _files_not_used(self) -> pd.DataFrame:
        return self._rows_of_sessions("rejected.tsv")

    def _rows_of_sessions(self, name: str) -> pd.DataFrame:
        """The rows of each folder's table for these sessions, as text; if a folder is complete, all its rows."""
        parts = []
        for folder in {folder.path: folder for folder in self.folders}.values():
            table = pd.read_csv(folder.path / name, sep="\t", dtype=str, keep_default_na=False)
            mine = [number for number, other in enumerate(self.folders) if other.path == folder.path]
            here = self.sessions[np.isin(self.table.origin[:, 0], mine)]
            if len(here) < len(folder.table):
                table = select_sessions(table, set(session_keys(here)))
            parts.append(table)
        return pd.concat(parts, ignore_index=True)

    @property
    def duplicates(self) -> list[list[int]]:
        """Groups of sessions with equal pixels, to the last bit: one scan under several names."""
        groups = self.sessions.groupby("image_hash", sort=False).indices.values()
        return sorted(sorted(int(i) for i in group) for group in groups if len(group) > 1)

    def damaged_sessions(self) -> list[int]:
        """Rows of the sessions whose bytes have changed since they were written, or cannot be read."""
        expected = zip(self.sessions["image_hash"], self.sessions["content_hash"], strict=True)
        return [index for index, hashes in enumerate(expected) if not self._is_sound(index, hashes)]

    def _is_sound(self, session: int, hashes: tuple[str, str]) -> bool:
        try:
            return compute_hashes(self[session]) == hashes
        except StoreError:
            return False


def _plain_value(value: Any) -> Any:
    """A value of a table as a plain Python value; None if it is missing."""
    if is_missing(value):
        return None
    return value.item() if hasattr(value, "item") else value


def refused_files(files: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``rejected.tsv`` that are faulty files: not further scans, not files outside of the cohort."""
    not_faulty = (FURTHER_SCAN_REASON, NOT_IN_COHORT_REASON)
    return files[~files["reason"].astype(str).str.startswith(not_faulty)]


def select_sessions(table: pd.DataFrame, keep: set[SessionKey]) -> pd.DataFrame:
    """The rows of a table whose subject and session are in ``keep``."""
    return table[np.array([key in keep for key in session_keys(table)], dtype=bool)]
