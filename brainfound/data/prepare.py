"""Preparing a cohort: scans → stacks → a store, once, on one machine or many."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from brainfound.data.cohort import Cohort, Session
from brainfound.data.hooks import Hook, describe, load_hooks
from brainfound.data.preprocessing import Preprocessing
from brainfound.data.store import Store, StoreFolder
from brainfound.data.store.executors import Executor, run_jobs
from brainfound.data.store.plan import (
    Key,
    Shard,
    Sources,
    existing_store,
    only_one_writer,
    plan_shards,
    require_disk_space,
)
from brainfound.data.store.writer import Parts, ShardJob, assemble, put_in_place, require_sessions, write_shard
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
    """Prepare a cohort once, as a store.

    Sessions that the store has already are not prepared again: a repeated call does nothing, new sessions are added,
    changed covariates are taken over, and an unfinished run is gone on with.

    Args:
        source: a cohort, or what `Cohort.read` recognises. DICOM is converted into ``OUT.nifti`` first.
        out: the store's folder.
        preprocessing: how scans become stacks; the defaults if None.
        workers: processes of this machine.
        mask: which label-map column of the cohort becomes the stack's mask (``"mask"``, ``"dseg"``, …).
        hooks: tools that are run on each scan first, such as ``"synthstrip"``, see `brainfound.data.hooks`.
        hooks_done: the hooks that ``preprocessing`` names were run on the files before; none is run.
        overwrite: replace a store of other preprocessing, and follow a source whose sessions went or changed.
        keep_ids: name subjects on the contact sheet.
        executor: ``"processes"``, or ``"dask"`` for the workers of a dask cluster.
        scheduler: the address of dask's scheduler.
        progress: called with (sessions done, sessions in all).

    Raises:
        CohortError: the source is not recognised or holds no scans.
        UsageError: no such mask, hook or executor.
        StoreError: another store is at ``out``, the disk will not hold it, or not one session could be used.
    """
    out = Path(out)
    cohort = source if isinstance(source, Cohort) else Cohort.read(source, work=out.with_name(out.name + ".nifti"))
    loaded = load_hooks(hooks)
    preprocessing = _with_hooks(preprocessing or Preprocessing(), loaded, hooks_done)
    if mask != "mask" and mask not in cohort.mask_columns:
        raise UsageError(f"no label maps named {mask!r}", where="mask", expected=", ".join(cohort.mask_columns))
    sessions = {(session.subject, session.session): session for session in cohort.sessions()}
    with only_one_writer(out):
        sources = Sources.of(list(sessions.values()), cohort.root, preprocessing, mask, loaded)
        existing = existing_store(out, sources, overwrite)
        known = None if existing is None else Sources.read(out, sources.settings)
        if known == sources:
            return Store.open(out)
        kept = {key for key, files in sources.files.items() if known is not None and known.files.get(key) == files}
        todo = [key for key in sessions if key not in kept]
        partial = out.with_name(out.name + ".partial")
        require_disk_space(out, [sessions[key] for key in todo], preprocessing)
        shards = plan_shards(partial, sources, todo, _next_number(existing))
        jobs = _jobs(shards, sessions, partial, preprocessing, mask, cohort.root, loaded)
        total = len(sessions)
        done = total - sum(len(job.sessions) for job in jobs)
        if progress:
            progress(done, total)
        try:
            for job in run_jobs(jobs, write_shard, workers=workers, executor=executor, scheduler=scheduler):
                done += len(job.sessions)
                if progress:
                    progress(done, total)
            parts = Parts.of_shards(shards, partial) + Parts.of_source(cohort)
            if existing is not None:
                parts = Parts.kept_of(existing, kept, partial / "slices") + parts
            _finish(parts, sessions, partial, out, preprocessing, sources, loaded, cohort, keep_ids)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreError(
                "the disk is full", where=out, remedy="Free some space and repeat the command: what was done is kept"
            ) from None
    return Store.open(out)


def _with_hooks(preprocessing: Preprocessing, hooks: Sequence[Hook], hooks_done: bool) -> Preprocessing:
    """The preprocessing that remembers the hooks; one that does already (of a model) must not get others."""
    names = tuple(hook.name for hook in hooks)
    if preprocessing.hooks and not (hooks_done and not names):
        preprocessing.require_hooks(names)
    return preprocessing.model_copy(update={"hooks": names or preprocessing.hooks})


def _next_number(existing: StoreFolder | None) -> int:
    """Of the next file: names of kept files are never used again."""
    if existing is None:
        return 0
    return 1 + max(int(name.removeprefix("data-")[:5]) for name in existing.table.files)


def _jobs(
    shards: Sequence[Shard],
    sessions: Mapping[Key, Session],
    partial: Path,
    preprocessing: Preprocessing,
    mask: str,
    root: Path,
    hooks: tuple[Hook, ...],
) -> list[ShardJob]:
    run = uuid.uuid4().hex[:8]
    # Workers need to know the files; what is known of the subjects stays here.
    return [
        ShardJob(
            shard=shard,
            sessions=tuple(sessions[key] for key in shard.keys),
            partial=partial.absolute(),
            preprocessing=preprocessing,
            mask=mask,
            root=root,
            hooks=hooks,
            key=f"brainfound-{run}-{shard.number}",
        )
        for shard in shards
        if not shard.done_in(partial)
    ]


def _finish(
    parts: Parts,
    sessions: Mapping[Key, Session],
    partial: Path,
    out: Path,
    preprocessing: Preprocessing,
    sources: Sources,
    hooks: Sequence[Hook],
    cohort: Cohort,
    keep_ids: bool,
) -> None:
    if not parts.rows:
        shutil.rmtree(partial)
    require_sessions(parts, out)
    sources.write(partial)
    facts: dict[str, Any] = {
        "settings": sources.settings,
        "source": cohort.source,
        "hooks": describe(hooks) or [{"name": name, "done_before": True} for name in preprocessing.hooks],
    }
    covariates = {key: session.covariates for key, session in sessions.items()}
    assemble(parts, covariates, partial, preprocessing, facts, keep_ids=keep_ids)
    put_in_place(partial, out)
