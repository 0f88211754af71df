"""Writing a store: shards of sessions, and their assembly into a store.

A shard is renamed into place when it is complete, and so is the store: a killed run continues where it stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.cohort import Cohort, Session
from brainfound.data.hooks import Hook
from brainfound.data.preprocessing.session import NOT_IN_COHORT_REASON, PreparedSession, UnusedFile, prepare_session
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import ScanQuality, Stack
from brainfound.data.sources.tables import SessionKey, read_json
from brainfound.data.store.contact_sheet import write_contact_sheet
from brainfound.data.store.folder import (
    BASE_COLUMNS,
    SCHEMA_VERSION,
    SessionTable,
    StoreFolder,
    compute_hashes,
    content_hash,
    damaged_session_error,
    replaced_path,
    session_row,
    write_sessions,
)
from brainfound.data.store.plan import Shard, next_file_number, remove_folder, write_json
from brainfound.data.store.reader import StoreReader, refused_files, select_sessions
from brainfound.data.store.slice_files import SliceFileWriter, read_session_offsets, write_datasets_index
from brainfound.errors import ScanError, StoreError
from brainfound.files import PARTIAL_PREFIX

REJECTED_COLUMNS = ["file", "subject", "session", "contrast", "reason"]
QUALITY_COLUMNS = ["subject", "session", *(field.name for field in fields(ScanQuality))]


@dataclass(frozen=True)
class ShardJob:
    """The inputs of the worker that writes a shard."""

    shard: Shard
    sessions: tuple[Session, ...]
    partial: Path
    preprocessing: Preprocessing
    mask: str
    root: Path
    hooks: tuple[Hook, ...]
    settings: str
    """Hash of the settings, so that a worker that outlived its run does not write into another."""
    key: str
    """Unique to the run."""


def write_shard(job: ShardJob) -> None:
    """Prepare the sessions of a shard and write them; its report lists the files that cannot be used."""
    if not (job.partial / "slices").is_dir():
        remedy = "Use a folder that all workers share under the same path"
        raise StoreError("the worker does not see the store's folder", where=job.partial, remedy=remedy)
    rows: list[dict[str, Any]] = []
    not_used: list[dict[str, str]] = []
    quality: list[dict[str, Any]] = []
    # Two workers may write the same shard, if the first seemed dead: each has its own file.
    unfinished = job.partial / "slices" / f"{job.shard.file}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        with SliceFileWriter(unfinished) as writer:
            for session in job.sessions:
                identity = {"subject": session.subject, "session": session.session}
                prepared = prepare_session(session, job.preprocessing, job.mask, job.hooks, refuse_label_maps=True)
                if prepared.stack is not None:
                    prepared = _write_stack(writer, session, prepared, prepared.stack)
                for entry in prepared.not_used:
                    file = printable(os.path.relpath(entry.file, job.root))
                    reason = {"contrast": entry.contrast, "reason": printable(entry.reason)}
                    not_used.append({"file": file, **identity, **reason})
                if prepared.stack is not None:
                    rows.append(session_row(prepared.stack))
                    quality += [{**identity, **scan.to_row()} for scan in prepared.quality]
        for row, place in zip(rows, read_session_offsets(unfinished), strict=True):
            row |= {"file": job.shard.file, **place}
        num_bytes = unfinished.stat().st_size if rows else 0
        if read_json(job.partial / "plan.json").get("settings") != job.settings:
            raise StoreError("the run that this worker belongs to is over", where=job.partial.name)
        if rows:
            unfinished.replace(job.partial / "slices" / job.shard.file)
    finally:
        unfinished.unlink(missing_ok=True)
    report = {"num_bytes": num_bytes, "sessions": rows, "not_used": not_used, "quality": quality}
    write_json(job.shard.report(job.partial), report)


def _write_stack(writer: SliceFileWriter, session: Session, prepared: PreparedSession, stack: Stack) -> PreparedSession:
    try:
        writer.write(stack)
    except ScanError as error:
        refused = [UnusedFile(file, contrast, error.reason) for contrast, file in session.scans.items()]
        return PreparedSession(None, [*prepared.not_used, *refused])
    return prepared


@dataclass
class StoreParts:
    """The tables from which a store is assembled; their slices are in its folder already."""

    rows: list[dict[str, Any]]
    """`session_row` of each session, with its place on disk."""
    not_used: pd.DataFrame
    quality: pd.DataFrame

    @classmethod
    def from_shards(cls, shards: Iterable[Shard], partial: Path) -> StoreParts:
        """Read the reports of shards."""
        reports = [json.loads(shard.report(partial).read_text(encoding="utf-8")) for shard in shards]
        rows, not_used, quality = (
            [row for report in reports for row in report[name]] for name in ("sessions", "not_used", "quality")
        )
        return cls(
            rows, pd.DataFrame(not_used, columns=REJECTED_COLUMNS), pd.DataFrame(quality, columns=QUALITY_COLUMNS)
        )

    @classmethod
    def from_source(cls, cohort: Cohort) -> StoreParts:
        """The files of a source that are not scans of its cohort, and its data sets that cannot be read."""
        files = [(file, f"{NOT_IN_COHORT_REASON}: {why}") for file, why in cohort.unused] + list(cohort.rejected)
        rows = [
            (printable(os.path.relpath(file, cohort.root)), "", "", "", printable(reason)) for file, reason in files
        ]
        return cls([], pd.DataFrame(rows, columns=REJECTED_COLUMNS), pd.DataFrame(columns=QUALITY_COLUMNS))

    @classmethod
    def from_existing(cls, folder: StoreFolder, keep: set[SessionKey], slices: Path, next_number: int) -> StoreParts:
        """The sessions of a store that are kept. Files are linked; one that holds others too is rewritten."""
        store = StoreReader([folder], folder.table)
        is_kept = np.array([key in keep for key in folder.table.keys], dtype=bool)
        rows: list[dict[str, Any]] = []
        for number, file in enumerate(folder.table.files):
            inside = np.flatnonzero(folder.table.file == number)
            chosen = inside[is_kept[inside]]
            if len(chosen) == len(inside):
                _link_or_copy(folder.path / "slices" / file, slices / file)
                rows += [_stored_row(store, int(index)) for index in chosen]
            elif len(chosen):
                in_file_order = chosen[np.argsort(folder.table.pixels_at[chosen])]
                rows += write_blocks(slices / f"data-{next_number:05d}.arrow", store, in_file_order.tolist())
                next_number += 1
        text = {"dtype": str, "keep_default_na": False, "sep": "\t"}
        not_used = pd.read_csv(folder.path / "rejected.tsv", **text)
        quality = pd.read_csv(folder.path / "quality.tsv", **text)
        return cls(rows, select_sessions(not_used, keep), select_sessions(quality, keep))

    def __add__(self, other: StoreParts) -> StoreParts:
        not_used, quality = _joined(self.not_used, other.not_used), _joined(self.quality, other.quality)
        return StoreParts(self.rows + other.rows, not_used, quality)


def _joined(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table for table in (one, other) if len(table)] or [one], ignore_index=True)


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # some file systems have no links
        shutil.copyfile(source, target)


def _stored_row(store: StoreReader, index: int) -> dict[str, Any]:
    """A session's row with its place on disk, without reading its slices."""
    table, row = store.table, store.sessions.iloc[index]
    columns = [name for name in BASE_COLUMNS if name != "first_row"]
    arrays = ("present", "affine", "native_shape", "native_affine")
    return {
        **{name: row[name] for name in columns},
        **{name: getattr(table, name)[index].ravel().tolist() for name in arrays},
        **{"file": table.file_name(index), "pixels_at": int(table.pixels_at[index])},
        "mask_at": int(table.mask_at[index]),
    }


def write_blocks(
    path: Path, store: StoreReader, sessions: Sequence[int], names: Sequence[SessionKey] | None = None
) -> list[dict[str, Any]]:
    """Copy sessions of a store into one file, under new ``names`` if given; returns their rows, with places."""
    rows = []
    with SliceFileWriter(path) as writer:
        for index in sessions:
            stack = store[index]
            row = store.sessions.iloc[index]
            if compute_hashes(stack) != (row["image_hash"], row["content_hash"]):
                raise damaged_session_error(store.path, [index])
            if names is not None:
                stack = replace(stack, subject=names[index][0], session=names[index][1])
            writer.write(stack)
            rows.append(session_row(stack))
    return [row | {"file": path.name, **place} for row, place in zip(rows, read_session_offsets(path), strict=True)]


def assemble(
    parts: StoreParts,
    covariates: Mapping[SessionKey, Mapping[str, Any]],
    partial: Path,
    preprocessing: Preprocessing,
    facts: Mapping[str, Any],
    *,
    keep_ids: bool = False,
) -> None:
    """Turn a folder of slice files into a complete store; ``facts`` are further keys of store.json."""
    rows = sorted(parts.rows, key=lambda row: (row["file"], row["pixels_at"]))
    counts = np.array([row["num_slices"] for row in rows], dtype=np.int64)
    for row, first in zip(rows, np.cumsum(counts) - counts, strict=True):
        row["first_row"] = int(first)
    write_sessions(partial / "sessions.arrow", rows, [dict(covariates[row["subject"], row["session"]]) for row in rows])
    files = sorted({row["file"] for row in rows})
    for leftover in set(os.listdir(partial / "slices")) - set(files):
        (partial / "slices" / leftover).unlink()
    order = ["subject", "session", "contrast"]
    parts.not_used.sort_values([*order, "file"]).to_csv(partial / "rejected.tsv", sep="\t", index=False)
    parts.quality.sort_values(order).to_csv(partial / "quality.tsv", sep="\t", index=False)
    preprocessing.save(partial)
    table = SessionTable.read(partial / "sessions.arrow")
    digest = content_hash(table, preprocessing)
    write_datasets_index(partial / "slices", files, digest)
    content = {
        "schema_version": SCHEMA_VERSION,
        "contrasts": list(preprocessing.contrasts),
        "preprocessing": preprocessing.model_dump(mode="json"),
        "num_sessions": len(table),
        "num_subjects": int(table.sessions["subject"].nunique()),
        "num_slices": int(table.num_slices.sum()),
        "num_rejected_files": len(refused_files(parts.not_used)),
        "content_hash": digest,
        "next_file_number": next_file_number(partial),
    }
    write_json(partial / "store.json", content | dict(facts))
    write_contact_sheet(StoreReader.open(partial), partial / "contact_sheet.png", keep_ids=keep_ids)


def move_into_place(partial: Path, out: Path) -> None:
    """Give a finished store its name; the store that it replaces is removed last."""
    replaced = replaced_path(out)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    for leftover in [*out.glob("shard-*.json"), *out.glob(f"{PARTIAL_PREFIX}*"), out / "plan.json"]:
        leftover.unlink(missing_ok=True)
    remove_folder(replaced)


def printable(text: str) -> str:
    """A file name as valid UTF-8; other bytes become escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def require_sessions(parts: StoreParts, out: Path, keep_ids: bool) -> None:
    """Refuse a store without sessions; the error quotes the first reason."""
    if parts.rows:
        return
    refused = refused_files(parts.not_used)
    first = refused["reason"].iloc[0] if len(refused) else "no scans"
    if keep_ids and len(refused):
        first += f" [{refused['file'].iloc[0]}]"
    remedy = "Check the files, or choose other contrasts with --set contrasts=[…]"
    raise StoreError(f"not one session could be used; first reason: {first}", where=out, remedy=remedy)
