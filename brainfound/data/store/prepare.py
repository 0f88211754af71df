"""Preparing a cohort as a store: scans → stacks → slices on disk, on one machine or many."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from brainfound.data.cohort import Cohort, Session
from brainfound.data.hooks import Hook, describe_hooks, load_hooks
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.sources.tables import SessionKey
from brainfound.data.store.executors import Executor, require_executor, run_jobs
from brainfound.data.store.folder import StoreFolder, partial_path, session_keys
from brainfound.data.store.plan import (
    SourceFingerprints,
    find_existing_store,
    next_file_number,
    plan_shards,
    remove_folder,
    require_disk_space,
    resolve_store_path,
    session_key,
    writer_lock,
)
from brainfound.data.store.store import Store
from brainfound.data.store.writer import ShardJob, StoreParts, assemble, move_into_place, require_sessions
from brainfound.errors import StoreError, UsageError

Progress = Callable[[int, int], None]


def prepare(
    source: str | Path | Cohort,
    out: str | Path,
    preprocessing: Preprocessing | None = None,
    workers: int = 1,
    *,
    mask: str = "mask",
    hooks: Sequence[str | Path | Hook] = (),
    hooks_done: bool = False,
    overwrite: bool = False,
    keep_ids: bool = False,
    executor: Executor = "processes",
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> Store:
    """Prepare a cohort as a store.

    Sessions of an existing store are not prepared again: a repeated call does nothing, new sessions are added,
    covariates are updated, and an unfinished run is continued.

    Args:
        source: a cohort, or a source that `Cohort.read` recognises. DICOM is converted into ``OUT.nifti`` first.
        preprocessing: how scans become stacks; the defaults if None.
        workers: number of processes on this machine.
        mask: the column of label maps that becomes the stack's mask (``"mask"``, ``"dseg"``, …).
        hooks: tools that run on each scan first, such as ``"synthstrip"``, see `brainfound.data.hooks`.
        hooks_done: the hooks of ``preprocessing`` have already run on the files; none is run.
        overwrite: replace a store with other preprocessing; follow a source with removed or changed sessions; prepare
            sessions with damaged bytes or rejected files again.
        keep_ids: write subjects and sessions on the contact sheet.
        executor, scheduler: ``"processes"``, or ``"dask"`` with the address of its scheduler.
        progress: called with (finished sessions, all sessions).

    Raises:
        CohortError, UsageError, StoreError: the source or an option is faulty, or no store can be written at ``out``.
    """
    require_executor(executor, scheduler)
    out = resolve_store_path(out)
    cohort = source if isinstance(source, Cohort) else Cohort.read(source, work=out.with_name(out.name + ".nifti"))
    loaded = load_hooks(hooks)
    preprocessing = _with_hooks(preprocessing or Preprocessing(), loaded, hooks_done)
    if mask != "mask" and mask not in cohort.mask_columns:
        raise UsageError(f"no label maps named {mask!r}", where="mask", expected=", ".join(cohort.mask_columns))
    sessions = {session_key(session): _absolute(session) for session in cohort.sessions()}
    partial = partial_path(out)
    with writer_lock(out):
        sources = SourceFingerprints.of(list(sessions.values()), cohort.root.absolute(), preprocessing, mask, loaded)
        existing = find_existing_store(out, sources, overwrite)
        if existing is None and _is_finished(partial, sources):
            # The last run ended before it could rename the finished store.
            move_into_place(partial, out)
            return Store.open(out)
        kept: set[SessionKey] = set()
        if existing is not None:
            known = SourceFingerprints.read(out, sources.settings)
            kept = {key for key, files in sources.files.items() if known.files.get(key) == files}
            if overwrite:
                kept -= _sessions_to_repair(existing)
            if known == sources and len(kept) == len(sessions):
                remove_folder(partial)
                return Store.open(out)
        todo = [key for key in sessions if key not in kept]
        shards = plan_shards(partial, sources, todo, next_file_number(out))
        run = uuid.uuid4().hex[:8]
        jobs = [
            ShardJob(
                shard=shard,
                sessions=tuple(sessions[key] for key in shard.keys),
                partial=partial,
                preprocessing=preprocessing,
                mask=mask,
                root=cohort.root.absolute(),
                hooks=loaded,
                settings=sources.settings,
                key=f"brainfound-{run}-{shard.number}",
            )
            for shard in shards
            if not shard.is_complete(partial)
        ]
        try:
            require_disk_space(out, [session for job in jobs for session in job.sessions], preprocessing)
        except StoreError:
            if len(jobs) == len(shards):
                remove_folder(partial)
            raise
        done = len(sessions) - sum(len(job.sessions) for job in jobs)
        report = progress or (lambda done, total: None)
        report(done, len(sessions))
        try:
            for job in run_jobs(jobs, workers=workers, executor=executor, scheduler=scheduler):
                done += len(job.sessions)
                report(done, len(sessions))
            parts = StoreParts.from_shards(shards, partial) + StoreParts.from_source(cohort)
            if existing is not None:
                number = max([next_file_number(out), *(shard.number + 1 for shard in shards)])
                parts = StoreParts.from_existing(existing, kept, partial / "slices", number) + parts
            if not parts.rows:
                remove_folder(partial)
            require_sessions(parts, out, keep_ids)
            sources.write(partial)
            facts: dict[str, Any] = {"settings": sources.settings, "source": cohort.source}
            facts |= {"source_notes": list(cohort.notes), "mask": mask}
            done_before = [{"name": name, "done_before": True} for name in preprocessing.hooks]
            facts["hooks"] = describe_hooks(loaded) or done_before
            covariates = {key: session.covariates for key, session in sessions.items()}
            assemble(parts, covariates, partial, preprocessing, facts, keep_ids=keep_ids)
            move_into_place(partial, out)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = "Free some space and repeat the command: what was done is kept"
            raise StoreError("the disk is full", where=out, remedy=remedy) from None
    return Store.open(out)


def _absolute(session: Session) -> Session:
    """The session with absolute paths, which do not depend on a worker's current folder."""
    return replace(
        session,
        scans={name: file.absolute() for name, file in session.scans.items()},
        masks={name: file.absolute() for name, file in session.masks.items()},
        extra_scans=tuple((name, file.absolute()) for name, file in session.extra_scans),
    )


def _is_finished(partial: Path, sources: SourceFingerprints) -> bool:
    if not (partial / "store.json").is_file():
        return False
    try:
        settings = StoreFolder(partial).facts["settings"]
        return SourceFingerprints.read(partial, settings) == sources
    except (StoreError, OSError, ValueError):
        return False


def _sessions_to_repair(folder: StoreFolder) -> set[SessionKey]:
    """Sessions with changed or lost bytes, and sessions with a refused file, which may be readable now."""
    store = Store([folder], folder.table)
    tables = store.sessions.iloc[store.damaged_sessions()], store.rejected
    return {key for table in tables for key in session_keys(table)}


def _with_hooks(preprocessing: Preprocessing, hooks: Sequence[Hook], hooks_done: bool) -> Preprocessing:
    """The preprocessing with the hooks' names; if it has names already, as a model's does, they must be the same."""
    names = tuple(hook.name for hook in hooks)
    if preprocessing.hooks and not (hooks_done and not names):
        preprocessing.require_hooks(names)
    return preprocessing.model_copy(update={"hooks": names or preprocessing.hooks})
