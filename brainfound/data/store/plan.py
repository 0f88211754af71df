"""Planning a store, so that a repeated run does only new work: fingerprints, shards, lock, disk space."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from brainfound.data.cohort import Session
from brainfound.data.hooks import Hook
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.reading.archives import size_and_mtime
from brainfound.data.reading.image_names import other_half
from brainfound.data.reading.scan import read_header
from brainfound.data.sources.tables import SessionKey, read_json
from brainfound.data.store.folder import SCHEMA_VERSION, StoreFolder, replaced_path, session_keys
from brainfound.data.worker_processes import require_main_guard
from brainfound.errors import BrainFoundError, ScanError, StoreError, mistaken_for
from brainfound.files import PARTIAL_PREFIX, write_atomically

_SOURCES_FILE = "sources.parquet"
MIN_SESSIONS_PER_SHARD = 8
MAX_SHARDS = 400
"""Readers keep one open file per shard; many systems allow about a thousand per process."""
_SAMPLED_SESSIONS = 64

log = logging.getLogger("brainfound")


@dataclass(frozen=True)
class SourceFingerprints:
    """Hashes of the inputs of a store."""

    settings: str
    """Hash of the preprocessing, the mask column and the hooks."""
    files: dict[SessionKey, str]
    """Hash of the names, sizes and times of each session's files."""
    covariates: dict[SessionKey, str]

    @classmethod
    def of(
        cls, sessions: Sequence[Session], root: Path, preprocessing: Preprocessing, mask: str, hooks: Sequence[Hook]
    ) -> SourceFingerprints:
        """The fingerprints of a cohort with these settings."""
        settings = [SCHEMA_VERSION, preprocessing.model_dump_json(), mask, [hook.model_dump_json() for hook in hooks]]
        files, covariates = {}, {}
        for session in sessions:
            key = session_key(session)
            files[key] = _hash(_file_facts(session, root, preprocessing.contrasts, mask))
            covariates[key] = _hash(sorted((name, str(value)) for name, value in session.covariates.items()))
        return cls(_hash(settings), files, covariates)

    def write(self, folder: Path) -> None:
        rows = [(*key, self.files[key], self.covariates[key]) for key in sorted(self.files)]
        pd.DataFrame(rows, columns=["subject", "session", "files", "covariates"]).to_parquet(folder / _SOURCES_FILE)

    @classmethod
    def read(cls, folder: Path, settings: str) -> SourceFingerprints:
        """The fingerprints of a store with these settings."""
        table = pd.read_parquet(folder / _SOURCES_FILE)
        keys = session_keys(table)
        files, covariates = (dict(zip(keys, table[column], strict=True)) for column in ("files", "covariates"))
        return cls(settings, files, covariates)


def session_key(session: Session) -> SessionKey:
    return (session.subject, session.session)


def _file_facts(session: Session, root: Path, contrasts: Sequence[str], mask: str) -> list[Any]:
    """The files on which a session's slices depend: the wanted scans and the mask, or else the names of all scans."""
    files = [(name, file) for name, file in (*sorted(session.scans.items()), *session.extra_scans)]
    used = [(name, file) for name, file in files if name in contrasts]
    used += [(mask, session.masks[mask])] if mask in session.masks else []
    facts: list[Any] = []
    for name, file in used:
        parts = [part for part in (file, other_half(file)) if part is not None]
        facts.append((name, os.path.relpath(file, root), [size_and_mtime(part) for part in parts]))
    return [facts, sorted(name for name, _ in files if name not in contrasts and not used)]


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def find_existing_store(out: Path, sources: SourceFingerprints, overwrite: bool) -> StoreFolder | None:
    """The store at a path that can be updated; None if there is none, or it is to be replaced."""
    _recover_interrupted_update(out)
    if not out.exists():
        return None
    if not (out / "store.json").is_file():
        if not out.is_dir() or any(out.iterdir()):
            what = mistaken_for(out, "a store, and not empty")
            raise StoreError(what, where=out, remedy="Give another folder for the store", usage=True)
        return None
    try:
        folder = StoreFolder(out)
        known = SourceFingerprints.read(out, folder.facts["settings"])
        if known.settings != sources.settings:
            remedy = "Give another folder, or --overwrite to replace it"
            raise StoreError("a store with other preprocessing is there", where=out, remedy=remedy, usage=True)
    except (BrainFoundError, OSError, KeyError, ValueError) as error:
        if overwrite:
            return None
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"damaged: {error}", where=out, remedy="Replace it with --overwrite") from error
    gone = len(known.files.keys() - sources.files.keys())
    changed = sum(known.files[key] != sources.files[key] for key in known.files.keys() & sources.files.keys())
    if (gone or changed) and not overwrite:
        what = "the source is not the one that the store was made of"
        got = f"{gone} sessions gone, {changed} with other files"
        remedy = "Give another folder, or --overwrite to follow the source"
        raise StoreError(what, where=out, got=got, remedy=remedy, usage=True)
    return folder


def _recover_interrupted_update(out: Path) -> None:
    """Clean up after a run that was killed while it replaced a store."""
    replaced = replaced_path(out)
    if not replaced.is_dir():
        return
    if not out.exists() and (replaced / "store.json").is_file():
        replaced.rename(out)
    else:
        remove_folder(replaced)


def remove_folder(folder: Path) -> None:
    """Remove a store's folder; ``store.json`` first, so that the rest is never taken for a store."""
    if folder.is_dir():
        (folder / "store.json").unlink(missing_ok=True)
        shutil.rmtree(folder)


def next_file_number(out: Path) -> int:
    """The number of the next file of slices. No number is used twice: a reader may have the old file open."""
    found = [re.match(r"data-(\d+)", file.name) for file in (out / "slices").glob("data-*.arrow")]
    used = max((int(match[1]) + 1 for match in found if match), default=0)
    return max(used, int(read_json(out / "store.json").get("next_file_number", 0)))


@dataclass(frozen=True)
class Shard:
    """Sessions that are written to one file, atomically."""

    number: int
    keys: tuple[SessionKey, ...]

    def is_complete(self, partial: Path) -> bool:
        """Whether the shard was written, and its file is complete."""
        size, file = read_json(self.report(partial)).get("num_bytes"), partial / "slices" / self.file
        return size == 0 or (file.is_file() and file.stat().st_size == size)

    def report(self, partial: Path) -> Path:
        """The file with the outcome of its sessions."""
        return partial / f"shard-{self.number:05d}.json"

    @property
    def file(self) -> str:
        return f"data-{self.number:05d}.arrow"


def plan_shards(
    partial: Path, sources: SourceFingerprints, todo: Sequence[SessionKey], first_number: int
) -> list[Shard]:
    """Divide the sessions to prepare into shards; valid shards of an unfinished run are kept."""
    earlier = read_json(partial / "plan.json")
    shards: list[Shard] = []
    next_number = first_number
    if earlier.get("settings") == sources.settings and earlier.get("first_number") == first_number:
        wanted = set(todo)
        for number, keys, files in earlier["shards"]:
            shard = Shard(number, tuple((subject, session) for subject, session in keys))
            same = [key in wanted and sources.files[key] == file for key, file in zip(shard.keys, files, strict=True)]
            if all(same):
                shards.append(shard)
            else:
                shard.report(partial).unlink(missing_ok=True)
                (partial / "slices" / shard.file).unlink(missing_ok=True)
        next_number = max([first_number, *(number + 1 for number, _, _ in earlier["shards"])])
    else:
        remove_folder(partial)
    (partial / "slices").mkdir(parents=True, exist_ok=True)
    for leftover in [*(partial / "slices").glob("*.unfinished"), *partial.glob(f"{PARTIAL_PREFIX}*")]:
        leftover.unlink(missing_ok=True)
    planned = {key for shard in shards for key in shard.keys}
    rest = [key for key in todo if key not in planned]
    size = max(MIN_SESSIONS_PER_SHARD, -(-len(rest) // MAX_SHARDS))
    for start in range(0, len(rest), size):
        shards.append(Shard(next_number + start // size, tuple(rest[start : start + size])))
    rows = [[shard.number, shard.keys, [sources.files[key] for key in shard.keys]] for shard in shards]
    write_json(partial / "plan.json", {"settings": sources.settings, "first_number": first_number, "shards": rows})
    return shards


def resolve_store_path(out: str | Path) -> Path:
    """The real path of a store, without links; StoreError for a mount point, which cannot be renamed."""
    place = Path(out).resolve()
    if os.path.ismount(place):
        raise StoreError("a disk is mounted there", where=out, remedy="Give a folder on it")
    return place


@contextmanager
def writer_lock(out: Path) -> Iterator[None]:
    """Let one process write a store while others wait; the operating system frees the lock of a dead process."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StoreError(
            "a file is in the way of the folder", where=out, remedy="Give another folder", usage=True
        ) from None
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        require_main_guard()
        log.warning("another process is preparing %s: waiting for it", out.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_disk_space(out: Path, sessions: Sequence[Session], preprocessing: Preprocessing) -> None:
    """Compare the free disk space with an estimate from the headers of up to 64 sessions."""
    sample = sessions[:: max(len(sessions) // _SAMPLED_SESSIONS, 1)]
    sizes = [size for size in (_estimate_bytes(session, preprocessing) for session in sample) if size]
    if sizes:
        require_free_space(out, sum(sizes) / len(sizes) * len(sessions), f"for {len(sessions)} sessions")


def require_free_space(out: Path, num_bytes: float, what_for: str) -> None:
    free = shutil.disk_usage(out.parent).free
    if num_bytes > free:
        raise StoreError(
            "the disk will not hold the store",
            where=out,
            got=f"{free / 1e9:.1f} GB free",
            expected=f"about {num_bytes / 1e9:.1f} GB {what_for}",
            remedy="Free some space, give a folder on another disk, or take fewer contrasts or a smaller size",
        )


def _estimate_bytes(session: Session, preprocessing: Preprocessing) -> int:
    """Size of a session's slices, if the foreground spans the whole reference scan; 0 if it is unreadable."""
    for contrast in preprocessing.contrasts:
        if contrast in session.scans:
            try:
                header = read_header(session.scans[contrast])
            except ScanError:
                continue
            upward = int(abs(header.affine[2, :3] / header.spacing_mm).argmax())
            own_mm = header.spacing_mm[upward]
            slices = header.shape[upward] * own_mm / (preprocessing.spacing_mm[2] or own_mm)
            pixel_bytes = len(preprocessing.contrasts) * preprocessing.bits // 8 + bool(session.masks)
            return int(slices * preprocessing.size[0] * preprocessing.size[1] * pixel_bytes)
    return 0


def write_json(path: Path, content: Mapping[str, Any], ensure_ascii: bool = True) -> None:
    """Write JSON atomically."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=ensure_ascii, default=_json_value) + "\n")


def _json_value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
