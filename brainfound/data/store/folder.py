"""A store's folder on disk, its table of sessions, and the hashes of its content.

Covariates are a pandas table. Geometry stays in arrays on the memory map of ``sessions.arrow``, so that ten thousand
sessions take no more memory than a hundred.

Axis legend: n sessions, C contrasts.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.sources import SOURCE_LAYOUTS
from brainfound.data.sources.tables import SessionKey, is_missing
from brainfound.data.store.slice_files import SliceFiles
from brainfound.errors import CohortError, StoreError, closest_folder, describe_path, mistaken_for

SCHEMA_VERSION = 2


def session_keys(table: pd.DataFrame) -> list[SessionKey]:
    """Subject and session of each row of a table."""
    return list(zip(table["subject"], table["session"], strict=True))


class StoreFolder:
    """A complete store on disk: its facts, preprocessing, table of sessions and slice files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / "store.json"
        if not file.is_file():
            raise _no_store(path)
        try:
            self.facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version = self.facts["schema_version"]
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
        self.preprocessing = Preprocessing.load(path)
        self.table = SessionTable.read(path / "sessions.arrow")
        self.files = SliceFiles(path / "slices")

    def verify_table(self) -> None:
        """Compare the table of sessions and the preprocessing with the content hash; StoreError if they differ."""
        sound = self.preprocessing.model_dump(mode="json") == self.facts["preprocessing"]
        if not sound or content_hash(self.table, self.preprocessing) != self.facts["content_hash"]:
            what = f"the {'table of sessions' if sound else 'preprocessing'} is not the one that was written"
            raise StoreError(what, where=self.path.name, remedy="Copy the store again, or prepare it in a new folder")


def partial_path(path: Path) -> Path:
    """The folder in which a store is written. The dot distinguishes it from a user's own STORE.partial."""
    return path.with_name(f".{path.name}.partial")


def replaced_path(path: Path) -> Path:
    """The folder of the old store until the new one has its name."""
    return path.with_name(f".{path.name}.replaced")


def _no_store(path: Path) -> StoreError:
    remedy = "Make it with: brainfound prepare SOURCE STORE"
    kind, what = describe_path(path), mistaken_for(path, "a store")
    if not path.exists():
        what, close = "no such folder", closest_folder(path, lambda folder: (folder / "store.json").is_file())
        remedy = f"Did you mean {close}?" if close else remedy
    elif kind in (None, "a BIDS data set", "a file") and _is_source(path):
        remedy = f"Prepare it first: brainfound prepare {shlex.quote(str(path))} STORE"
    if (replaced_path(path) / "store.json").is_file():
        what, remedy = "an update of the store was cut off", "Repeat the brainfound prepare command: nothing is lost"
    elif partial_path(path).is_dir():
        what, remedy = "the store is not complete", "Finish it with the same brainfound prepare command"
    return StoreError(what, where=path, expected="a folder with store.json", remedy=remedy, usage=True)


def _is_source(path: Path) -> bool:
    try:
        return any(layout.can_read(path) for layout in SOURCE_LAYOUTS)
    except (CohortError, OSError):  # a source with a fault
        return True


def damaged_session_error(path: Path, sessions: Sequence[int]) -> StoreError:
    more = f" and {len(sessions) - 1} more" if len(sessions) > 1 else ""
    return StoreError(
        "the bytes of a session are not those that were written",
        where=path.name,
        got=f"session {sessions[0]}{more}",
        remedy="Copy the store again, or mend it with brainfound prepare … --overwrite",
    )


BASE_COLUMNS = ("subject", "session", "first_row", "num_slices", "mask_dtype", "image_hash", "content_hash")
"""The columns of every table; covariates follow."""
_ARRAYS = ("present", "affine", "native_shape", "native_affine", "pixels_at", "mask_at", "file")


@dataclass(frozen=True)
class SessionTable:
    """One row per session, ordered by subject and session."""

    sessions: pd.DataFrame
    """The columns of `BASE_COLUMNS` and the covariates; ``first_row`` counts the slices of this table."""
    origin: np.ndarray  # (n, 2), index of the session's folder, and its row in the table of that folder
    row_on_disk: np.ndarray  # (n,), the session's first row in the ``slices`` of its folder
    present: np.ndarray  # (n, C) bool
    affine: np.ndarray  # (n, 4, 4)
    native_shape: np.ndarray  # (n, 3)
    native_affine: np.ndarray  # (n, 4, 4)
    pixels_at: np.ndarray  # (n,), byte offset in the session's file
    mask_at: np.ndarray  # (n,), byte offset; −1 without a mask
    file: np.ndarray  # (n,), index in ``files``
    files: tuple[str, ...]  # names in the folder ``slices``

    @classmethod
    def read(cls, path: Path) -> SessionTable:
        """Read ``sessions.arrow``; StoreError if it is missing or damaged."""
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            arrays = {name: _array(table.column(name)) for name in _ARRAYS}
            sessions = table.drop_columns(list(_ARRAYS)).to_pandas(use_threads=False)
        except (OSError, KeyError, pa.ArrowInvalid, ValueError) as error:
            raise StoreError(f"damaged: {error}", where=path.name, remedy="Prepare the store again") from error
        files, file = np.unique(arrays["file"], return_inverse=True)
        count = len(sessions)
        table = cls(
            sessions=sessions,
            origin=np.stack([np.zeros(count, np.int64), np.arange(count)], axis=1),
            row_on_disk=sessions["first_row"].to_numpy(np.int64),
            present=arrays["present"].astype(bool),
            affine=arrays["affine"].reshape(-1, 4, 4),
            native_shape=arrays["native_shape"],
            native_affine=arrays["native_affine"].reshape(-1, 4, 4),
            pixels_at=arrays["pixels_at"],
            mask_at=arrays["mask_at"],
            file=file.astype(np.int32),
            files=tuple(str(name) for name in files),
        )
        return table._in_order()

    def __len__(self) -> int:
        return len(self.sessions)

    @cached_property
    def num_slices(self) -> Int[np.ndarray, "n"]:
        return self.sessions["num_slices"].to_numpy(np.int64)

    @cached_property
    def first_row(self) -> Int[np.ndarray, "n"]:
        return self.sessions["first_row"].to_numpy(np.int64)

    @property
    def covariates(self) -> list[str]:
        """Names of the columns that came with the cohort."""
        return [name for name in self.sessions.columns if name not in BASE_COLUMNS]

    def file_name(self, session: int) -> str:
        return self.files[self.file[session]]

    def take(self, index: np.ndarray) -> SessionTable:
        """Some sessions, in the given order; ``first_row`` is recomputed."""
        sessions = self.sessions.iloc[index].reset_index(drop=True)
        counts = sessions["num_slices"].to_numpy(np.int64)
        sessions["first_row"] = np.cumsum(counts) - counts
        arrays = {name: getattr(self, name)[index] for name in ("origin", "row_on_disk", *_ARRAYS)}
        return replace(self, sessions=sessions, **arrays)

    def _in_order(self) -> SessionTable:
        keys = self.keys
        counted = np.cumsum(self.num_slices) - self.num_slices
        if np.array_equal(self.first_row, counted) and all(a <= b for a, b in pairwise(keys)):
            return self
        return self.take(np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64))

    @property
    def keys(self) -> list[SessionKey]:
        """Subject and session of each row."""
        return session_keys(self.sessions)

    @staticmethod
    def join(tables: Sequence[SessionTable], num_folders: Sequence[int]) -> SessionTable:
        """Join tables, each of one or more folders, into one, ordered by subject and session."""
        first_file = [sum(len(table.files) for table in tables[:place]) for place in range(len(tables))]
        first_folder = [sum(num_folders[:place]) for place in range(len(tables))]
        sessions = pd.concat([table.sessions for table in tables], ignore_index=True)
        for name in set(sessions.columns) - set(BASE_COLUMNS):
            sessions[name] = _one_type(sessions[name])
        arrays = {
            name: np.concatenate([getattr(table, name) for table in tables]) for name in ("row_on_disk", *_ARRAYS)
        }
        arrays["file"] = np.concatenate([table.file + n for table, n in zip(tables, first_file, strict=True)])
        origins = [table.origin + np.array([n, 0]) for table, n in zip(tables, first_folder, strict=True)]
        files = tuple(file for table in tables for file in table.files)
        return SessionTable(sessions, np.concatenate(origins), **arrays, files=files)._in_order()


def compute_hashes(stack: Stack) -> tuple[str, str]:
    """SHA-256 of a stack's pixels alone, and of everything from its files: pixels, mask, presence, geometry."""
    images = hashlib.sha256(np.ascontiguousarray(stack.pixels).data)
    content = hashlib.sha256(images.digest())
    content.update(b"" if stack.mask is None else str(stack.mask.dtype).encode())
    content.update(b"" if stack.mask is None else np.ascontiguousarray(stack.mask).data)
    content.update(stack.present.tobytes() + np.ascontiguousarray(stack.affine, dtype=np.float64).tobytes())
    content.update(np.array(stack.native_shape, dtype=np.int64).tobytes())
    content.update(np.ascontiguousarray(stack.native_affine, dtype=np.float64).tobytes())
    return images.hexdigest(), content.hexdigest()


def session_row(stack: Stack) -> dict[str, Any]:
    """A stack's row of the table, without its place on disk."""
    image_hash, content = compute_hashes(stack)
    return {
        "subject": stack.subject,
        "session": stack.session,
        "num_slices": len(stack.pixels),
        "mask_dtype": "" if stack.mask is None else str(stack.mask.dtype),
        "image_hash": image_hash,
        "content_hash": content,
        "present": stack.present.tolist(),
        "affine": stack.affine.ravel().tolist(),
        "native_shape": list(stack.native_shape),
        "native_affine": stack.native_affine.ravel().tolist(),
    }


def content_hash(table: SessionTable, preprocessing: Preprocessing) -> str:
    """SHA-256 of everything that training sees of some sessions, no matter which files hold them."""
    digest = hashlib.sha256(preprocessing.model_dump_json().encode())
    columns = ["subject", "session", "content_hash", *sorted(table.covariates)]
    for row in table.sessions[columns].itertuples(index=False, name=None):
        digest.update(json.dumps([_canonical(value) for value in row]).encode())
    return digest.hexdigest()


def write_sessions(path: Path, rows: Sequence[dict[str, Any]], covariates: Sequence[dict[str, Any]]) -> None:
    """Write ``sessions.arrow`` from rows of `session_row` with their places, and the covariates of each."""
    known, extra = pd.DataFrame(list(rows)), pd.DataFrame(list(covariates))
    # A covariate that is named like one of these columns gets another name.
    extra = extra.rename(columns={name: f"{name}_" for name in extra.columns if name in (*BASE_COLUMNS, *_ARRAYS)})
    for name in extra.columns:
        extra[name] = _one_type(extra[name])
    plain = [name for name in BASE_COLUMNS if name in known]
    arrays = [name for name in known.columns if name not in plain]
    joined = pd.concat([known[plain], extra, known[arrays]], axis=1)
    table = pa.Table.from_pandas(joined, preserve_index=False).combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _one_type(values: pd.Series) -> pd.Series:
    """A column of mixed types as text; tables on disk hold one type per column."""
    if values.dtype != object:
        return values
    kinds = {type(value) for value in values.dropna()}
    if kinds <= {int, float} or len(kinds) <= 1:
        return values
    return values.map(lambda value: None if is_missing(value) else str(value))


def _canonical(value: Any) -> Any:
    """A form that is equal for values that differ only in the type a table gave them: 3 and 3.0, None and NaN."""
    if is_missing(value):
        return None
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, float, np.number)):
        return float(value)
    return str(value)


def _array(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers, or of lists of one length, as an array."""
    (column,) = column.chunks or [pa.array([], column.type)]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return column.to_numpy(zero_copy_only=False)
