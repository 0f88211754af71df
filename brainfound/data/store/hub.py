"""Stores on the Hugging Face Hub: pushed, downloaded, or streamed slice by slice.

A pushed store keeps its files as they are, so that a download is opened without conversion, and `datasets` streams the
Arrow files as those of any data set. Identifiers stay at home unless they are asked for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.data.store.folder import StoreFolder
from brainfound.data.store.session_table import SessionTable
from brainfound.data.store.store import Store
from brainfound.errors import StoreError

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
        columns: covariates to keep, see `brainfound.data.store.copies.copy_store`.
        token: of the Hub; by default the one that is logged in.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    from brainfound.data.store.copies import copy_store

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
