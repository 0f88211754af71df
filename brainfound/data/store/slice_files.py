"""The Arrow files of a store: one record batch per session, read by byte offsets.

An Arrow stream file holds the pixels of a session as one run of bytes. The table of sessions stores the offset of each
run, so a slice is read in one step, and the memory of a store does not grow with the cohort.

Axis legend: S slices, C contrasts, H rows, W columns.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import ScanError, StoreError

_one_reader = threading.Lock()
"""Lock for systems without positional reads (Windows)."""
_MAX_BATCH_BYTES = 2**31 - 1
"""Arrow's binary columns have 32-bit offsets."""


def features():
    """The columns of a store's slices, for `datasets`."""
    from datasets import Features, Value

    columns = {"subject": "string", "session": "string", "slice_index": "int32", "position_mm": "float32"}
    columns |= {"pixels": "binary", "mask": "binary"}
    return Features({name: Value(dtype) for name, dtype in columns.items()})


class SliceFileWriter:
    """Context manager that writes one Arrow stream file, with a record batch per session."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.schema = features().arrow_schema

    def __enter__(self) -> SliceFileWriter:
        self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self.schema)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._writer.close()
        self._sink.close()
        # Flushed to disk before the file gets its final name, so that a power cut leaves no half file under that name.
        with self.path.open("r+b") as handle:
            os.fsync(handle.fileno())

    def write(self, stack: Stack) -> None:
        """Append the slices of a session; ScanError if it is too large for a record batch."""
        count = len(stack.pixels)
        num_bytes = max(stack.pixels.nbytes, 0 if stack.mask is None else stack.mask.nbytes)
        if num_bytes > _MAX_BATCH_BYTES:
            got = f"{num_bytes / 2**30:.1f} GiB"
            remedy = "Lower size, or raise spacing_mm"
            raise ScanError("the session is too large for a store", got=got, expected="less than 2 GiB", remedy=remedy)
        arrays = [
            pa.array([stack.subject] * count, pa.string()),
            pa.array([stack.session] * count, pa.string()),
            pa.array(np.arange(count, dtype=np.int32)),
            pa.array(np.asarray(stack.positions_mm, dtype=np.float32)),
            _rows_of_bytes(stack.pixels),
            pa.nulls(count, pa.binary()) if stack.mask is None else _rows_of_bytes(stack.mask),
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self.schema))


def _rows_of_bytes(values: np.ndarray) -> pa.Array:
    """``(S, …)`` → S cells of bytes, without a copy."""
    values = np.ascontiguousarray(values)
    size = values[0].nbytes
    offsets = np.arange(len(values) + 1, dtype=np.int32) * np.int32(size)
    return pa.BinaryArray.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(values)])


def read_session_offsets(path: Path) -> list[dict[str, int]]:
    """Byte offsets of each session in a file: ``pixels_at`` and ``mask_at`` (−1 without a mask), in file order."""
    places = []
    try:
        with pa.memory_map(str(path)) as source:
            base = source.read_buffer().address if source.size() else 0
            source.seek(0)
            for batch in pa.ipc.open_stream(source):
                pixels, mask = batch.column("pixels"), batch.column("mask")
                mask_at = -1 if mask.null_count else mask.buffers()[2].address - base
                places.append({"pixels_at": pixels.buffers()[2].address - base, "mask_at": mask_at})
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"a file of slices is damaged: {error}", where=path.name, remedy="Prepare again") from None
    return places


class SliceFiles:
    """The slice files of one store (``STORE/slices``); a file is opened on first use.

    Bytes are read directly into arrays. A memory map is no faster, and every page read through it counts as memory
    of the process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, BinaryIO] = {}

    def __del__(self) -> None:
        for handle in self._open.values():
            handle.close()

    def read_into(self, out: np.ndarray, file: str, at: int) -> None:
        """Fill an array with the bytes at an offset of a file; safe in threads and processes."""
        handle = self._open.get(file) or self._opened(file)
        if _read_at(handle, out.data.cast("B"), at) != out.nbytes:
            raise StoreError(
                "a file of slices is shorter than the table of sessions says",
                where=file,
                got=f"{os.fstat(handle.fileno()).st_size} bytes",
                expected=f"at least {at + out.nbytes}",
                remedy="Copy the store again, or prepare it again",
            )

    def _opened(self, file: str) -> BinaryIO:
        try:
            handle = (self.folder / file).open("rb", buffering=0)
        except OSError as error:
            if error.errno != errno.EMFILE or not self._open:
                what = f"a file of slices cannot be read: {error.strerror}"
                raise StoreError(what, where=file, remedy="Prepare the store again") from None
            # A process may open about a thousand files. One that another thread is reading closes after that read.
            self._open.clear()
            gc.collect()
            return self._opened(file)
        self._open[file] = handle
        return handle


def _read_at(handle: BinaryIO, out: memoryview, at: int) -> int:
    """Read at an offset without moving the file position, which threads and forked processes share."""
    done = 0
    while done < len(out):
        # One call reads at most 2 GiB.
        if hasattr(os, "preadv"):
            count = os.preadv(handle.fileno(), [out[done:]], at + done)
        else:
            with _one_reader:
                handle.seek(at + done)
                count = handle.readinto(out[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def write_datasets_index(folder: Path, files: Sequence[str], fingerprint: str) -> None:
    """The two files that make a folder of Arrow files a saved `datasets.Dataset`."""
    from datasets import DatasetInfo

    DatasetInfo(features=features()).write_to_directory(str(folder))
    state: dict[str, Any] = {"_data_files": [{"filename": name} for name in files], "_fingerprint": fingerprint[:16]}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None}
    state |= {"_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
