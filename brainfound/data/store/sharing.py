"""Sharing a store: a copy (of all or some sessions, with or without identifiers), the Hugging Face Hub, and streaming.

On the Hub a store keeps its files, so a download opens without conversion, and `datasets` streams its Arrow files.
Identifiers are only uploaded on request.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.sources.tables import SessionKey
from brainfound.data.store.folder import StoreFolder, partial_path, session_keys
from brainfound.data.store.plan import (
    MAX_SHARDS,
    MIN_SESSIONS_PER_SHARD,
    SourceFingerprints,
    remove_folder,
    require_free_space,
    resolve_store_path,
)
from brainfound.data.store.reader import StoreReader
from brainfound.data.store.writer import (
    QUALITY_COLUMNS,
    REJECTED_COLUMNS,
    StoreParts,
    assemble,
    move_into_place,
    write_blocks,
)
from brainfound.errors import StoreError
from brainfound.hub import cache_if_hub_is_away, describe_hub_error, hub_errors

SAFE_COVARIATES = ("age_years", "sex", "site", "diagnosis")
"""The covariates that a copy without identifiers keeps by default."""


def copy_store(store: StoreReader, out: Path, *, keep_ids: bool = True, columns: Sequence[str] | None = None) -> Path:
    """Write the sessions of a store (filtered, or of several stores) as a new store; returns its folder.

    Without ``keep_ids`` subjects and sessions are numbered in a random order, and file names, rejected files and all
    covariates but `SAFE_COVARIATES` are left out. ``columns`` are the covariates to keep, in place of these defaults.
    """
    out = resolve_store_path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError("something is there", where=out, remedy="Give another folder", usage=True)
    height, width = store.preprocessing.size
    pixel_bytes = len(store.contrasts) * store.preprocessing.bits // 8 + 1
    out.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(out, store.num_slices * height * width * pixel_bytes, "for the copy")
    if columns is None:
        columns = store.covariates if keep_ids else [name for name in SAFE_COVARIATES if name in store.covariates]
    for name in columns:
        store.covariate(name)
    names = store.table.keys if keep_ids else _anonymous_keys(store)
    partial = partial_path(out)
    remove_folder(partial)
    (partial / "slices").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    # In the order of the new names, which hides the old order.
    order = sorted(range(len(store)), key=names.__getitem__)
    size = max(MIN_SESSIONS_PER_SHARD, -(-len(store) // MAX_SHARDS))
    for number, chosen in enumerate(order[start : start + size] for start in range(0, len(order), size)):
        rows += write_blocks(partial / "slices" / f"data-{number:05d}.arrow", store, chosen, names)
    covariates = {key: {name: store.sessions[name].iloc[index] for name in columns} for index, key in enumerate(names)}
    files = pd.concat([store.rejected, store.further_scans, store.unused_files], ignore_index=True)[REJECTED_COLUMNS]
    parts = StoreParts(rows, files if keep_ids else files[:0], _quality_of_sessions(store, names, keep_ids))
    facts = {key: value for key, value in store.facts.items() if key in ("hooks", "mask")}
    # A copy has no source files: preparing into it is refused.
    facts |= {"settings": "copy", "copied_from": store.content_hash if keep_ids else None}
    SourceFingerprints("copy", {}, {}).write(partial)
    assemble(parts, covariates, partial, store.preprocessing, facts, keep_ids=False)
    if out.exists():
        out.rmdir()
    move_into_place(partial, out)
    return out


def _anonymous_keys(store: StoreReader) -> list[SessionKey]:
    """Numbers in place of identifiers: subjects in random order, the visits of each in their order."""
    subjects = store.sessions["subject"]
    unique = sorted(set(subjects))
    width = len(str(len(unique)))
    number = dict(zip(unique, np.random.default_rng().permutation(len(unique)) + 1, strict=True))
    visits = subjects.groupby(subjects).cumcount() + 1
    return [(f"subject-{number[name]:0{width}d}", f"{visit:02d}") for name, visit in zip(subjects, visits, strict=True)]


def _quality_of_sessions(store: StoreReader, names: Sequence[SessionKey], keep_ids: bool) -> pd.DataFrame:
    quality = store.quality.copy()
    new = dict(zip(store.table.keys, names, strict=True))
    renamed = [new[key] for key in session_keys(quality)]
    quality["subject"] = [subject for subject, _ in renamed]
    quality["session"] = [session for _, session in renamed]
    if not keep_ids:
        quality["file"] = ""
    return quality[QUALITY_COLUMNS]


_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: slices/*.arrow
---

# {title}

{num_sessions} sessions of {num_subjects} subjects, {num_slices} axial slices of {size} pixels, contrasts {contrasts}.
Made with BrainFound; `store.json` says how. Content hash `{content_hash}`.

```python
import brainfound

store = brainfound.Store.from_hub("{repo_id}")
```

Who shares it is responsible for being allowed to: check the terms of the cohort.
"""


def push(
    store: StoreReader,
    repo_id: str,
    *,
    private: bool = True,
    keep_ids: bool = False,
    columns: Sequence[str] | None = None,
    token: str | None = None,
) -> str:
    """Upload a store to the Hub as a data set (``"lab/ixi-224"``); returns the URL of the commit.

    ``keep_ids`` and ``columns`` are those of `copy_store`; the default token is that of the logged-in user.

    Raises:
        StoreError: the Hub cannot be reached, or refuses the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = copy_store(store, Path(temporary) / "store", keep_ids=keep_ids, columns=columns)
        copy = StoreReader.open(folder)
        card = _CARD.format(
            title=repo_id.rpartition("/")[2],
            repo_id=repo_id,
            num_sessions=len(copy),
            num_subjects=copy.facts["num_subjects"],
            num_slices=copy.num_slices,
            size=" × ".join(map(str, copy.preprocessing.size)),
            contrasts=", ".join(copy.contrasts),
            content_hash=copy.content_hash,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        with _as_store_error("the store cannot be uploaded", repo_id), cache_if_hub_is_away():
            api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, repo_type="dataset", commit_message="Store of slices"
            )
    return str(commit)


@contextmanager
def _as_store_error(what: str, repo_id: str) -> Iterator[None]:
    """Turn the errors of Hub calls into a StoreError."""
    try:
        yield
    except hub_errors() as error:
        got, remedy = describe_hub_error(error, "Check the id (owner/name), the connection and the login")
        raise StoreError(what, where=repo_id, got=got, remedy=remedy) from error


def download(
    repo_id: str, *, revision: str | None = None, token: str | None = None, files: list[str] | None = None
) -> Path:
    """Download a store, or some of its files, into the Hub's cache; returns its folder.

    Raises:
        StoreError: it cannot be fetched, or is no store.
    """
    from huggingface_hub import snapshot_download

    with _as_store_error("the store cannot be fetched from the Hugging Face Hub", repo_id), cache_if_hub_is_away():
        place = snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=files)
    folder = Path(place)
    if not (folder / "store.json").is_file():
        raise StoreError("the repository holds no store", where=repo_id, expected="a store.json", remedy="Check the id")
    return folder


def _stream_from_hub(repo_id: str, revision: str | None, token: str | None) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    with _as_store_error("the store cannot be streamed from the Hugging Face Hub", repo_id):
        with cache_if_hub_is_away():
            rows = load_dataset(repo_id, split="train", streaming=True, revision=revision, token=token)
        yield from rows


def stream(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the slices of a Hub repository or of a store's folder, in order, without downloading everything first.

    Yields:
        ``subject``, ``session``, ``slice_index``, ``position_mm``, ``pixels (C, H, W)``, ``present (C,)``, and ``mask
        (H, W)`` or None.
    """
    from datasets import load_dataset

    folder = Path(source)
    if folder.is_dir():
        store = StoreFolder(folder)
        files = [str(folder / "slices" / name) for name in store.table.files]
        rows = load_dataset("arrow", data_files=files, split="train", streaming=True)
    else:
        small_files = ["store.json", "preprocessing.json", "sessions.arrow"]
        folder = download(str(source), revision=revision, token=token, files=small_files)
        rows = _stream_from_hub(str(source), revision, token)
        store = StoreFolder(folder)
    table, preprocessing = store.table, store.preprocessing
    index = {key: place for place, key in enumerate(table.keys)}
    shape = (len(preprocessing.contrasts), *preprocessing.size)
    for row in rows:
        place = index[row["subject"], row["session"]]
        present, mask_dtype = table.present[place], table.sessions["mask_dtype"].iloc[place]
        pixels = np.frombuffer(row["pixels"], dtype=preprocessing.pixel_dtype).reshape(shape)
        mask = np.frombuffer(row["mask"], dtype=mask_dtype).reshape(shape[1:]) if mask_dtype else None
        yield {**row, "pixels": pixels, "mask": mask, "present": present}
