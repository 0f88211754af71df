"""Preparing a cohort: scans → stacks → a store.

The work is cut into shards of a few sessions. A finished shard is renamed into place, so a run that was killed
goes on where it stopped; the finished store is renamed from its temporary name, so a store is complete or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.contrasts import CONTRASTS, parse_contrast
from brainfound.data.cohort import Cohort, Session
from brainfound.data.preprocessing import Preprocessing
from brainfound.data.scan import Scan, load_scan
from brainfound.data.stack import Stack
from brainfound.data.store import FURTHER_SCAN, SCHEMA_VERSION, Store
from brainfound.errors import ScanError, StoreError, UsageError

SESSIONS_PER_SHARD = 8
REJECTED_COLUMNS = ["file", "subject", "session", "contrast", "reason"]

Progress = Callable[[int, int], None]


def prepare(
    source: str | Path | Cohort,
    out: str | Path,
    preprocessing: Preprocessing | None = None,
    workers: int = 1,
    *,
    mask: str = "mask",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Prepare a cohort once, as a store.

    Args:
        source: a cohort, or what `Cohort.read` recognises.
        out: the store's folder. A finished store of the same source and preprocessing is returned as it is;
            an unfinished one is gone on with.
        preprocessing: how scans become stacks; the defaults if None.
        workers: processes.
        mask: which label-map column of the cohort becomes the stack's mask (``"mask"``, ``"dseg"``, …).
        overwrite: replace a store made of something else.
        progress: called with (sessions done, sessions in all).

    Raises:
        CohortError: the source is not recognised or holds no scans.
        StoreError: another store is at ``out``, or not one session could be used.
    """
    cohort = source if isinstance(source, Cohort) else Cohort.read(source)
    preprocessing = preprocessing or Preprocessing()
    out = Path(out)
    sessions = list(cohort.sessions())
    if mask != "mask" and mask not in cohort.mask_columns:
        raise UsageError(f"no label maps named {mask!r}", where="mask", expected=", ".join(cohort.mask_columns))
    fingerprint = _fingerprint(cohort, sessions, preprocessing, mask)
    existing = _existing(out, fingerprint, overwrite)
    if existing is not None:
        return existing
    partial = out.with_name(out.name + ".partial")
    _start_or_continue(partial, fingerprint)
    shards = [sessions[i : i + SESSIONS_PER_SHARD] for i in range(0, len(sessions), SESSIONS_PER_SHARD)]
    _run(shards, partial, preprocessing, mask, cohort.root, max(int(workers), 1), progress)
    _finish(partial, out, len(shards), preprocessing, fingerprint)
    return Store.open(out)


def prepare_session(
    session: Session, preprocessing: Preprocessing, mask: str = "mask"
) -> tuple[Stack | None, list[tuple[Path, str, str]]]:
    """Load and prepare one session.

    Returns:
        The stack, or None if nothing of the session can be used; and the files that are refused or not used, as
        (file, contrast, reason).
    """
    stack, refused = _prepare_first_scans(session, preprocessing, mask)
    bad = {file for file, _, _ in refused}
    further = []
    for contrast, file in session.extra_scans:
        if contrast in preprocessing.contrasts:
            first = session.scans[contrast]
            fate = "was first, and refused" if first in bad else "is used"
            further.append((file, contrast, f"{FURTHER_SCAN} {fate}: {first.name}"))
    return stack, refused + further


def _prepare_first_scans(
    session: Session, preprocessing: Preprocessing, mask: str
) -> tuple[Stack | None, list[tuple[Path, str, str]]]:
    scans: dict[str, Scan] = {}
    refused = _unknown_contrasts(session)
    for contrast in preprocessing.contrasts:
        if contrast in session.scans:
            same = [other for other in scans if session.scans[other] == session.scans[contrast]]
            if same:
                file = session.scans[contrast]
                refused.append((file, contrast, f"{file.name}: the same file is listed as {same[0]}"))
                continue
            try:
                scans[contrast] = load_scan(session.scans[contrast])
            except ScanError as error:
                refused.append((session.scans[contrast], contrast, str(error)))
    labels = None
    if mask in session.masks:
        try:
            labels = load_scan(session.masks[mask], labels=True)
        except ScanError as error:
            refused.append((session.masks[mask], "mask", str(error)))
    if not scans:
        if not any(contrast in preprocessing.contrasts for contrast in session.scans):
            wanted = ", ".join(preprocessing.contrasts)
            refused += [
                (file, contrast, f"the session has none of the wanted contrasts ({wanted})")
                for contrast, file in session.scans.items()
                if contrast in CONTRASTS
            ]
        return None, refused
    while scans:
        late: dict[str, ScanError] = {}
        try:
            stack = preprocessing.apply(
                scans,
                labels,
                covariates=session.covariates,
                subject=session.subject,
                session=session.session,
                refused=late,
            )
        except ScanError as error:
            # The reference scan cannot be used: the next contrast gives the grid.
            contrast = preprocessing.reference_contrast(scans)
            refused.append((session.scans[contrast], contrast, str(error)))
            del scans[contrast]
            continue
        for contrast, reason in late.items():
            file = session.masks[mask] if contrast == "mask" else session.scans[contrast]
            refused.append((file, contrast, str(reason)))
        return stack, refused
    return None, refused


def _unknown_contrasts(session: Session) -> list[tuple[Path, str, str]]:
    refused = []
    for contrast, file in [*session.scans.items(), *session.extra_scans]:
        if contrast not in CONTRASTS:
            try:
                parse_contrast(contrast)
            except UsageError as error:
                refused.append((file, contrast, f"{file.name}: {error}"))
    return refused


def _existing(out: Path, fingerprint: str, overwrite: bool) -> Store | None:
    if not out.exists():
        return None
    if (out / "store.json").is_file():
        store = Store.open(out)
        if store.facts["source_fingerprint"] == fingerprint:
            return store
        if overwrite:
            shutil.rmtree(out)
            return None
        raise StoreError(
            "a store of another source or preprocessing is there",
            where=out,
            remedy="Give another folder, or --overwrite to replace it",
        )
    if not out.is_dir() or any(out.iterdir()):
        raise StoreError("not a store, and not empty", where=out, remedy="Give another folder")
    out.rmdir()
    return None


def _fingerprint(cohort: Cohort, sessions: list[Session], preprocessing: Preprocessing, mask: str) -> str:
    """What the store depends on: the preprocessing and, per session, its files' sizes and times and its covariates."""
    digest = hashlib.sha256(preprocessing.model_dump_json().encode())
    digest.update(f"{SCHEMA_VERSION} {mask}".encode())
    for session in sessions:
        files = [*sorted(session.scans.items()), *sorted(session.masks.items()), *session.extra_scans]
        facts: list[Any] = [
            session.subject,
            session.session,
            sorted((k, str(v)) for k, v in session.covariates.items()),
        ]
        for name, file in files:
            stat = file.stat() if file.is_file() else None
            facts.append((name, os.path.relpath(file, cohort.root), stat and stat.st_size, stat and stat.st_mtime_ns))
        digest.update(json.dumps(facts, default=str).encode())
    return digest.hexdigest()


def _start_or_continue(partial: Path, fingerprint: str) -> None:
    plan = partial / "plan.json"
    if plan.is_file() and json.loads(plan.read_text())["source_fingerprint"] == fingerprint:
        return
    if partial.exists():
        shutil.rmtree(partial)
    (partial / "slices").mkdir(parents=True)
    plan.write_text(json.dumps({"source_fingerprint": fingerprint}))


def _run(
    shards: list[list[Session]],
    partial: Path,
    preprocessing: Preprocessing,
    mask: str,
    root: Path,
    workers: int,
    progress: Progress | None,
) -> None:
    total = sum(map(len, shards))
    todo = [n for n in range(len(shards)) if not (partial / f"shard-{n:05d}.json").is_file()]
    done = total - sum(len(shards[n]) for n in todo)
    if progress:
        progress(done, total)

    def advance(number: int) -> None:
        nonlocal done
        done += len(shards[number])
        if progress:
            progress(done, total)

    if workers == 1 or len(todo) <= 1:
        for number in todo:
            _write_shard(number, shards[number], partial, preprocessing, mask, root)
            advance(number)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(_write_shard, number, shards[number], partial, preprocessing, mask, root): number
            for number in todo
        }
        for job in as_completed(jobs):
            job.result()
            advance(jobs[job])


def _write_shard(
    number: int, sessions: list[Session], partial: Path, preprocessing: Preprocessing, mask: str, root: Path
) -> None:
    from datasets.arrow_writer import ArrowWriter

    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, str]] = []
    file = partial / "slices" / f"data-{number:05d}.arrow"
    unfinished = file.with_suffix(".unfinished")
    writer = ArrowWriter(path=str(unfinished), features=_features())
    for session in sessions:
        stack, refused = prepare_session(session, preprocessing, mask)
        rejected += [
            dict(
                zip(
                    REJECTED_COLUMNS,
                    (os.path.relpath(path, root), session.subject, session.session, contrast, reason),
                    strict=True,
                )
            )
            for path, contrast, reason in refused
        ]
        if stack is not None:
            writer.write_batch(_slice_columns(stack))
            # One Arrow record batch per session, so that a session is one contiguous block.
            writer.write_examples_on_file()
            rows.append(_session_row(stack))
    if rows:
        writer.finalize()
        unfinished.replace(file)
    else:
        writer.close()
        unfinished.unlink(missing_ok=True)
    _write_json(partial / f"shard-{number:05d}.json", {"sessions": rows, "rejected": rejected})


def _features():
    from datasets import Features, Value

    return Features(
        {
            "subject": Value("string"),
            "session": Value("string"),
            "slice_index": Value("int32"),
            "position_mm": Value("float32"),
            "pixels": Value("binary"),
            "mask": Value("binary"),
        }
    )


def _slice_columns(stack: Stack) -> dict[str, list[Any]]:
    count = len(stack.pixels)
    masks = [None] * count if stack.mask is None else [np.ascontiguousarray(m).tobytes() for m in stack.mask]
    return {
        "subject": [stack.subject] * count,
        "session": [stack.session] * count,
        "slice_index": list(range(count)),
        "position_mm": stack.positions_mm.tolist(),
        "pixels": [np.ascontiguousarray(p).tobytes() for p in stack.pixels],
        "mask": masks,
    }


def _session_row(stack: Stack) -> dict[str, Any]:
    digest = hashlib.sha256(stack.pixels.tobytes())
    digest.update(b"" if stack.mask is None else stack.mask.tobytes())
    digest.update(stack.affine.tobytes() + stack.present.tobytes())
    return {
        **stack.covariates,
        "subject": stack.subject,
        "session": stack.session,
        "num_slices": len(stack.pixels),
        "present": stack.present.tolist(),
        "affine": stack.affine.ravel().tolist(),
        "native_shape": list(stack.native_shape),
        "native_affine": stack.native_affine.ravel().tolist(),
        "mask_dtype": "" if stack.mask is None else str(stack.mask.dtype),
        "content_hash": digest.hexdigest(),
    }


def _finish(partial: Path, out: Path, num_shards: int, preprocessing: Preprocessing, fingerprint: str) -> None:
    """Join the shards and give the store its name."""
    parts = [json.loads((partial / f"shard-{n:05d}.json").read_text()) for n in range(num_shards)]
    rows = [row for part in parts for row in part["sessions"]]
    rejected = pd.DataFrame([r for part in parts for r in part["rejected"]], columns=REJECTED_COLUMNS)
    is_further = rejected["reason"].astype(str).str.startswith(FURTHER_SCAN)
    if not rows:
        refused = rejected[~is_further]
        first = f"{refused['reason'].iloc[0]} [{refused['file'].iloc[0]}]" if len(refused) else "no scans"
        shutil.rmtree(partial)
        raise StoreError(
            f"not one session could be used; first reason: {first}",
            where=out,
            remedy="Check the files, or choose other contrasts with --set contrasts=[…]",
        )
    table = pd.DataFrame(rows)
    table.insert(2, "first_row", np.concatenate([[0], np.cumsum(table["num_slices"])[:-1]]).astype(np.int64))
    table.to_parquet(partial / "sessions.parquet")
    rejected.to_csv(partial / "rejected.tsv", sep="\t", index=False)
    preprocessing.save(partial)
    _write_datasets_index(partial / "slices", [n for n, part in enumerate(parts) if part["sessions"]])
    content = hashlib.sha256("".join(table["content_hash"]).encode() + preprocessing.model_dump_json().encode())
    _write_json(
        partial / "store.json",
        {
            "schema_version": SCHEMA_VERSION,
            "contrasts": list(preprocessing.contrasts),
            "preprocessing": preprocessing.model_dump(mode="json"),
            "num_sessions": len(table),
            "num_subjects": int(table["subject"].nunique()),
            "num_slices": int(table["num_slices"].sum()),
            "num_rejected_files": int((~is_further).sum()),
            "content_hash": content.hexdigest(),
            "source_fingerprint": fingerprint,
        },
    )
    for leftover in [*partial.glob("shard-*.json"), partial / "plan.json"]:
        leftover.unlink()
    partial.rename(out)


def _write_datasets_index(folder: Path, shards: list[int]) -> None:
    """The two files that make a folder of Arrow shards a saved `datasets.Dataset`."""
    from datasets import DatasetInfo

    DatasetInfo(features=_features()).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": f"data-{n:05d}.arrow"} for n in shards],
        "_fingerprint": hashlib.sha256(repr(shards).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    _write_json(folder / "state.json", state)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=_json_value) + "\n", encoding="utf-8")
    temporary.replace(path)


def _json_value(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    return str(value)
