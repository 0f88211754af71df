"""The registry of source layouts, in the order in which they are tried.

A path is read by the first layout that recognises it. Manifests come first because the user wrote them. Layouts with a
characteristic file or folder come before those recognised by folder names, and DICOM comes last.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path

from brainfound.data.sources import bids, dicom, fomo60k, fomo300k, fomo_tasks, manifest, named_files, nnunet, openmind
from brainfound.data.sources.file_names import iter_files
from brainfound.data.sources.tables import SourceLayout, SourceTable
from brainfound.errors import CohortError

SOURCE_LAYOUTS: tuple[SourceLayout, ...] = (
    manifest.LAYOUT,
    openmind.LAYOUT,
    fomo_tasks.LAYOUT,
    fomo300k.LAYOUT,
    fomo60k.LAYOUT,
    nnunet.LAYOUT,
    bids.LAYOUT,
    bids.COLLECTION_LAYOUT,
    named_files.LAYOUT,
    dicom.LAYOUT,
)
_MAX_FILES_COUNTED = 10_000


def read_source(path: Path, work: Path | None = None) -> SourceTable:
    """Read a path with the first layout that recognises it; `work` is the folder for converted DICOM."""
    if not path.exists():
        raise CohortError("no such file or folder", where=path, remedy="Check the path of the source")
    if path.name in ("", ".."):  # some layouts are recognised by the folder's name, and "." has none
        path = Path(os.path.abspath(path))
    for layout in SOURCE_LAYOUTS:
        if layout.can_read(path):
            return layout.read(path, work)
    expected = "one of: " + "; ".join(layout.layout_hint for layout in SOURCE_LAYOUTS)
    remedy = "Give the folder that holds one of these, or write a manifest"
    raise CohortError("no scans found", where=path, got=_summarise_files(path), expected=expected, remedy=remedy)


def _summarise_files(path: Path) -> str:
    """Number of files by suffix."""
    files = list(islice(iter_files(path, []), _MAX_FILES_COUNTED))
    if not files:
        return "no files"
    suffixes = Counter("".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix for file in files)
    counts = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in suffixes.most_common(5))
    return f"files: {counts}" + (" and more" if len(files) == _MAX_FILES_COUNTED else "")
