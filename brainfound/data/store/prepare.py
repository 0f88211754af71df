"""Preparing a cohort as a store: scans → stacks → slices on disk, in this process, in several, or on a dask cluster."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from brainfound.data.cohort import Cohort, Session
from brainfound.data.hooks import Hook, describe_hooks, load_hooks
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.sources.tables import SessionKey
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
from brainfound.data.store.writer import ShardJob, StoreParts, assemble, move_into_place, require_sessions, write_shard
from brainfound.data.worker_processes import map_in_processes
from brainfound.errors import StoreError, UsageError

Progress = Callable[[int, int], None]
Executor = Literal["processes", "dask"]

_DASK_RETRIES = 3
_CONNECT_TIMEOUT_S = 30


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


def run_jobs(
    jobs: Sequence[ShardJob], *, workers: int = 1, executor: Executor = "processes", scheduler: str | None = None
) -> Iterator[ShardJob]:
    """Write shards; yields each finished one, in any order.

    A shard may be written twice if a worker is lost. Both results are equal, and a shard is renamed when complete.
    ``scheduler`` is the address of a dask scheduler, such as ``tcp://host:8786``, whose workers see the same folders.
    """
    if executor == "dask":
        yield from _on_dask(jobs, scheduler)
    else:
        yield from _in_processes(jobs, workers)


def require_executor(executor: str, scheduler: str | None) -> None:
    """Raise a UsageError for an unknown executor, or a scheduler without dask."""
    if executor not in get_args(Executor):
        raise UsageError("no such executor", where="executor", got=executor, expected=" or ".join(get_args(Executor)))
    if scheduler is not None and executor != "dask":
        raise UsageError("a scheduler is for dask", where="scheduler", got=scheduler, remedy="Add --executor dask")


def _in_processes(jobs: Sequence[ShardJob], workers: int) -> Iterator[ShardJob]:
    try:
        for job, _ in map_in_processes(write_shard, jobs, workers):
            yield job
    except BrokenProcessPool:
        raise StoreError(
            "a worker process was ended from outside, perhaps for want of memory",
            remedy="Repeat the command with fewer workers: what was done is kept",
        ) from None


def _on_dask(jobs: Sequence[ShardJob], scheduler: str | None) -> Iterator[ShardJob]:
    try:
        from dask.distributed import Client, as_completed
        from distributed.scheduler import KilledWorker
    except ImportError:
        remedy = 'Install it: pip install "brainfound[dask]"'
        raise UsageError("dask is not installed", where="executor", remedy=remedy) from None
    if not scheduler:
        remedy = "Give its address: --scheduler tcp://HOST:8786"
        raise UsageError("which dask scheduler?", where="scheduler", remedy=remedy)
    try:
        client = Client(scheduler, timeout=_CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        what = f"no dask scheduler answers: {(str(error) or type(error).__name__).splitlines()[0]}"
        remedy = "Start one with: dask scheduler"
        raise UsageError(what, where="scheduler", got=scheduler, remedy=remedy) from None
    with client:
        by_key = {job.key: job for job in jobs}
        # The cluster forgets a result whose future is gone, so all futures are kept.
        options = {"pure": False, "retries": _DASK_RETRIES}
        futures = [client.submit(write_shard, job, key=key, **options) for key, job in by_key.items()]
        try:
            for future in as_completed(futures, loop=client.loop):
                future.result()
                yield by_key[future.key]
        except CancelledError:
            remedy = "Start it and repeat: what was done is kept"
            raise StoreError("the dask scheduler is gone", where="scheduler", remedy=remedy) from None
        except KilledWorker:
            raise StoreError(
                "several dask workers were ended while they wrote the same sessions, perhaps for want of memory",
                remedy="Repeat the command with more memory per worker: what was done is kept",
            ) from None
