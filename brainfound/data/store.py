"""The store: a prepared cohort on disk, one row per slice, memory-mapped.

A store is a folder:

    slices/            a Hugging Face ``datasets`` folder, one row per slice, contiguous per session
    sessions.parquet   one row per session: identifiers, covariates, geometry, first row, number of slices
    store.json         schema version, preprocessing, contrasts, counts, content hash
    preprocessing.json the same preprocessing by itself
    rejected.tsv       files that were refused or not used, with the reason

Axis legend: S slices, C contrasts, H rows, W columns.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import UInt8

from brainfound.data.preprocessing import Preprocessing
from brainfound.data.stack import Stack
from brainfound.errors import StoreError

SCHEMA_VERSION = 1
FURTHER_SCAN = "another scan of this contrast"
"""The reason of a file that is not refused, but comes second in its session, begins so."""
_GEOMETRY = (
    "first_row",
    "num_slices",
    "present",
    "affine",
    "native_shape",
    "native_affine",
    "mask_dtype",
    "content_hash",
)


class Store:
    """A prepared cohort. ``len`` counts sessions; ``store[i]`` is a `Stack`."""

    def __init__(self, path: Path, facts: dict[str, Any], sessions: pd.DataFrame) -> None:
        self.path = path
        self.facts = facts
        self.sessions = sessions
        self.preprocessing = Preprocessing.load(path)
        self.contrasts: tuple[str, ...] = self.preprocessing.contrasts
        self.content_hash: str = facts["content_hash"]
        self.num_slices = int(sessions["num_slices"].sum())

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store; nothing is read into memory but the table of sessions.

        Raises:
            StoreError: there is no complete store at the path, or it is of another schema.
        """
        path = Path(path)
        file = path / "store.json"
        if not file.is_file():
            unfinished = path.with_name(path.name + ".partial").is_dir()
            what = "the store is not complete" if unfinished else "not a store"
            raise StoreError(
                what,
                where=path,
                expected="a folder with store.json",
                remedy="Make it with: brainfound prepare SOURCE STORE",
            )
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            version = facts["schema_version"]
            sessions = pd.read_parquet(path / "sessions.parquet")
        except (ValueError, KeyError, OSError) as error:
            raise StoreError(f"damaged: {error}", where=path, remedy="Prepare the store again") from error
        if version != SCHEMA_VERSION:
            raise StoreError(
                "the store has another schema",
                where=path,
                got=f"version {version}",
                expected=f"version {SCHEMA_VERSION}",
                remedy="Prepare the store again",
            )
        return cls(path, facts, sessions)

    def __reduce__(self):
        # A worker process opens the store by itself: the memory map is shared, nothing is copied.
        return (Store.open, (self.path,))

    def __len__(self) -> int:
        return len(self.sessions)

    def __repr__(self) -> str:
        return (
            f"Store({str(self.path.name)!r}: {len(self)} sessions, {self.num_slices} slices of "
            f"{'×'.join(map(str, self.preprocessing.size))}, contrasts {', '.join(self.contrasts)})"
        )

    @cached_property
    def slices(self):
        """The `datasets.Dataset`, one row per slice."""
        from datasets import load_from_disk

        return load_from_disk(str(self.path / "slices"))

    @cached_property
    def rejected(self) -> pd.DataFrame:
        """Files that were refused: file, subject, session, contrast, reason."""
        files = self._files_not_used
        return files[~files["reason"].str.startswith(FURTHER_SCAN)].reset_index(drop=True)

    @cached_property
    def further_scans(self) -> pd.DataFrame:
        """Files that were not used because their session has another scan of the contrast; columns as of `rejected`."""
        files = self._files_not_used
        return files[files["reason"].str.startswith(FURTHER_SCAN)].reset_index(drop=True)

    @cached_property
    def _files_not_used(self) -> pd.DataFrame:
        return pd.read_csv(self.path / "rejected.tsv", sep="\t", dtype=str, keep_default_na=False)

    @cached_property
    def present(self) -> np.ndarray:
        """``(sessions, C)`` bool: which contrasts each session has."""
        return np.stack(self.sessions["present"].to_list()).astype(bool)

    @cached_property
    def slice_sessions(self) -> np.ndarray:
        """``(num_slices,)`` the session index of each slice row."""
        return np.repeat(np.arange(len(self)), self.sessions["num_slices"].to_numpy())

    @cached_property
    def slice_positions_mm(self) -> np.ndarray:
        """``(num_slices,)`` position along the slice axis, 0 in the middle of each stack."""
        return np.concatenate([self._positions(i) for i in range(len(self))])

    @cached_property
    def _blocks(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """First row of each Arrow chunk, and its pixels as a ``(rows, C, H, W)`` view on the memory map."""
        views: list[np.ndarray] = []
        firsts = [0]
        shape = (len(self.contrasts), *self.preprocessing.size)
        for chunk in self.slices.data.column("pixels").chunks:
            offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            data = np.frombuffer(chunk.buffers()[2], dtype=np.uint8)[offsets[0] : offsets[-1]]
            views.append(data.reshape(len(chunk), *shape))
            firsts.append(firsts[-1] + len(chunk))
        return np.array(firsts[:-1]), views

    def read_slices(self, rows: np.ndarray) -> UInt8[np.ndarray, "n C H W"]:
        """The pixels of the given slice rows, in the given order."""
        firsts, views = self._blocks
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_slices):
            raise StoreError(
                "slice row out of range",
                where=self.path,
                got=f"{rows.min()}…{rows.max()}",
                expected=f"0…{self.num_slices - 1}",
            )
        out = np.empty((len(rows), len(self.contrasts), *self.preprocessing.size), dtype=np.uint8)
        blocks = np.searchsorted(firsts, rows, side="right") - 1
        for position, (row, block) in enumerate(zip(rows, blocks, strict=True)):
            out[position] = views[block][row - firsts[block]]
        return out

    def read_masks(self, session: int, slices: np.ndarray | None = None) -> np.ndarray | None:
        """The label map of a session ``(S, H, W)``, or of some of its slices; None where the session has none."""
        row = self.sessions.iloc[session]
        if not row["mask_dtype"]:
            return None
        index = np.arange(row["num_slices"]) if slices is None else np.asarray(slices)
        cells = self.slices.data.column("mask").take((row["first_row"] + index).tolist())
        return np.stack(
            [np.frombuffer(cell.as_py(), dtype=row["mask_dtype"]).reshape(self.preprocessing.size) for cell in cells]
        )

    def session_rows(self, session: int) -> np.ndarray:
        """The slice rows of a session, inferior → superior."""
        row = self.sessions.iloc[session]
        return np.arange(row["first_row"], row["first_row"] + row["num_slices"])

    def __getitem__(self, index: int) -> Stack:
        if not -len(self) <= index < len(self):
            raise IndexError(f"session {index} of a store of {len(self)}")
        index = index % len(self)
        row = self.sessions.iloc[index]
        geometry = {"subject", "session", *_GEOMETRY}
        return Stack(
            pixels=self.read_slices(self.session_rows(index)),
            contrasts=self.contrasts,
            present=np.asarray(row["present"], dtype=bool),
            positions_mm=self._positions(index),
            affine=np.asarray(row["affine"], dtype=np.float64).reshape(4, 4),
            native_shape=_shape_3d(row["native_shape"]),
            native_affine=np.asarray(row["native_affine"], dtype=np.float64).reshape(4, 4),
            mask=self.read_masks(index),
            covariates={name: _plain(row[name]) for name in self.sessions.columns if name not in geometry},
            subject=row["subject"],
            session=row["session"],
        )

    def covariate(self, name: str) -> pd.Series:
        """One covariate of every session.

        Raises:
            UsageError: if there is no such column; says the nearest one.
        """
        from brainfound.data.cohort import require_column

        known = [c for c in self.sessions.columns if c not in {"subject", "session", *_GEOMETRY}]
        require_column(known, name, where=f"store {self.path.name}")
        return self.sessions[name]

    def _positions(self, index: int) -> np.ndarray:
        row = self.sessions.iloc[index]
        spacing = float(np.linalg.norm(np.asarray(row["affine"]).reshape(4, 4)[:3, 0]))
        count = int(row["num_slices"])
        return ((np.arange(count) - (count - 1) / 2) * spacing).astype(np.float32)


def _shape_3d(values: Any) -> tuple[int, int, int]:
    first, second, third = (int(n) for n in values)
    return (first, second, third)


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA:
        return None
    return value.item() if hasattr(value, "item") else value
