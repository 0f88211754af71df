"""Stores on the Hugging Face Hub: pushed, downloaded, or streamed slice by slice.

A pushed store keeps its files as they are, so that a download is opened without conversion, and `datasets` streams the
Arrow files as those of any data set. Identifiers stay at home unless they are asked for.

A store as a store of its own: some sessions, sessions of several stores, or all without identifiers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.store.folder import SessionTable, StoreFolder, partial_path
from brainfound.data.store.plan import (
    MAX_SHARDS,
    MIN_SESSIONS_PER_SHARD,
    SessionKey,
    SourceFingerprints,
    remove_folder,
    require_free_space,
    resolve_store_path,
)
from brainfound.data.store.store import Store
from brainfound.data.store.writer import (
    QUALITY_COLUMNS,
    REJECTED_COLUMNS,
    StoreParts,
    assemble,
    move_into_place,
    write_blocks,
)
from brainfound.errors import StoreError

SAFE_COVARIATES = ("age_years", "sex", "site", "diagnosis")
"""What a copy without identifiers keeps of the covariates, unless it is told to keep more."""


def copy_store(store: Store, out: Path, *, keep_ids: bool = True, columns: Sequence[str] | None = None) -> Store:
    """Write the sessions of a store as a store of its own.

    Args:
        keep_ids: False numbers subjects and sessions anew in a random order, keeps no file names and no rejected
            files, and of the covariates only ``age_years``, ``sex``, ``site`` and ``diagnosis``.
        columns: the covariates to keep.

    Raises:
        StoreError: something is there.
        UsageError: no such column.
    """
    out = resolve_store_path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError("something is there", where=out, remedy="Give another folder")
    _require_space_for_copy(store, out)
    if columns is None:
        columns = store.covariates if keep_ids else [name for name in SAFE_COVARIATES if name in store.covariates]
    for name in columns:
        store.covariate(name)
    names = _session_keys(store) if keep_ids else _anonymous_keys(store)
    partial = partial_path(out)
    remove_folder(partial)
    (partial / "slices").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    # In the order of the new names, so that the old order does not show.
    order = sorted(range(len(store)), key=names.__getitem__)
    size = max(MIN_SESSIONS_PER_SHARD, -(-len(store) // MAX_SHARDS))
    for number, chosen in enumerate(_chunks(order, size)):
        rows += write_blocks(partial / "slices" / f"data-{number:05d}.arrow", store, chosen, names)
    covariates = {
        names[index]: {name: store.sessions[name].iloc[index] for name in columns} for index in range(len(store))
    }
    parts = StoreParts(rows, _files_of_sessions(store, keep_ids), _quality_of_sessions(store, names, keep_ids))
    facts = {key: value for key, value in store.facts.items() if key in ("hooks", "mask")}
    # It was not made of files, so preparing into it is refused.
    facts |= {"settings": "copy", "copied_from": store.content_hash if keep_ids else None}
    SourceFingerprints("copy", {}, {}).write(partial)
    assemble(parts, covariates, partial, store.preprocessing, facts, keep_ids=False)
    if out.exists():
        out.rmdir()
    move_into_place(partial, out)
    return Store.open(out)


def _require_space_for_copy(store: Store, out: Path) -> None:
    height, width = store.preprocessing.size
    pixel_bytes = len(store.contrasts) * store.preprocessing.bits // 8 + 1
    out.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(out, store.num_slices * height * width * pixel_bytes, "for the copy")


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _session_keys(store: Store) -> dict[int, SessionKey]:
    keys = zip(store.sessions["subject"], store.sessions["session"], strict=True)
    return {index: (str(subject), str(session)) for index, (subject, session) in enumerate(keys)}


def _anonymous_keys(store: Store) -> dict[int, SessionKey]:
    """Numbers in place of identifiers: subjects in an order of chance, the visits of a subject in theirs."""
    subjects = store.sessions["subject"].astype(str)
    unique = sorted(set(subjects))
    width = len(str(len(unique)))
    shuffled = np.random.default_rng().permutation(len(unique))
    number = {name: int(place) + 1 for name, place in zip(unique, shuffled, strict=True)}
    visits = subjects.groupby(subjects).cumcount() + 1
    return {
        index: (f"subject-{number[name]:0{width}d}", f"{visits.iloc[index]:02d}") for index, name in enumerate(subjects)
    }


def _files_of_sessions(store: Store, keep_ids: bool) -> pd.DataFrame:
    if not keep_ids:
        return pd.DataFrame(columns=REJECTED_COLUMNS)
    return pd.concat([store.rejected, store.further_scans, store.unused_files], ignore_index=True)[REJECTED_COLUMNS]


def _quality_of_sessions(store: Store, names: Mapping[int, SessionKey], keep_ids: bool) -> pd.DataFrame:
    quality = store.quality.copy()
    new = {key: names[index] for index, key in _session_keys(store).items()}
    renamed = [new[key] for key in zip(quality["subject"], quality["session"], strict=True)]
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

_SMALL_FILES = ["store.json", "preprocessing.json", "sessions.arrow"]


def push(
    store: Store,
    repo_id: str,
    *,
    private: bool = True,
    keep_ids: bool = False,
    columns: Sequence[str] | None = None,
    token: str | None = None,
) -> str:
    """Put a store on the Hub as a data set.

    Args:
        repo_id: such as ``"lab/ixi-224"``.
        private: make the repository private.
        keep_ids: keep subjects, sessions, file names and the list of rejected files; otherwise subjects are numbered
            anew in a random order.
        columns: covariates to keep, see `brainfound.data.store.sharing.copy_store`.
        token: of the Hub; by default the one that is logged in.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        copy = copy_store(store, Path(temporary) / "store", keep_ids=keep_ids, columns=columns)
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
        (copy.path / "README.md").write_text(card, encoding="utf-8")
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=copy.path, repo_type="dataset", commit_message="Store of slices"
        )
    return str(commit)


def download(repo_id: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a store into the Hub's cache; returns its folder.

    Raises:
        StoreError: the repository holds no store.
    """
    return _snapshot(repo_id, revision, token, None)


def stream(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Iterator[dict[str, Any]]:
    """The slices of a store one after the other, without downloading it whole.

    Args:
        source: a repository of the Hub, or a store's folder.

    Yields:
        ``subject``, ``session``, ``slice_index``, ``position_mm``, ``pixels (C, H, W)``, ``present (C,)``, and ``mask
        (H, W)`` or None.

    Raises:
        StoreError: there is no store.
    """
    from datasets import load_dataset

    folder = Path(source)
    if folder.is_dir():
        StoreFolder(folder)  # refuses what is not a store
        state = json.loads((folder / "slices" / "state.json").read_text(encoding="utf-8"))
        files = [str(folder / "slices" / entry["filename"]) for entry in state["_data_files"]]
        rows = load_dataset("arrow", data_files=files, split="train", streaming=True)
    else:
        folder = _snapshot(str(source), revision, token, _SMALL_FILES)
        rows = load_dataset(str(source), split="train", streaming=True, revision=revision, token=token)
    facts = StoreFolder(folder)
    sessions = _sessions_by_name(facts.table)
    shape = (len(facts.preprocessing.contrasts), *facts.preprocessing.size)
    for row in rows:
        present, mask_dtype = sessions[row["subject"], row["session"]]
        pixels = np.frombuffer(row["pixels"], dtype=facts.preprocessing.pixel_dtype).reshape(shape)
        mask = np.frombuffer(row["mask"], dtype=mask_dtype).reshape(shape[1:]) if mask_dtype else None
        yield {**row, "pixels": pixels, "mask": mask, "present": present}


def _snapshot(repo_id: str, revision: str | None, token: str | None, files: list[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=files))
    if not (folder / "store.json").is_file():
        raise StoreError("the repository holds no store", where=repo_id, expected="a store.json", remedy="Check the id")
    return folder


def _sessions_by_name(table: SessionTable) -> dict[tuple[str, str], tuple[np.ndarray, str]]:
    of = table.sessions
    return {
        (subject, session): (table.present[index], dtype)
        for index, (subject, session, dtype) in enumerate(
            zip(of["subject"], of["session"], of["mask_dtype"], strict=True)
        )
    }
