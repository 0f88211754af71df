"""The registry of source layouts, in the order in which they are tried.

A path is read by the first layout that recognises it. Manifests come first because the user wrote them. Layouts with a
characteristic file or folder come before those recognised by folder names, and DICOM comes last.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import islice
from pathlib import Path

from brainfound.data.reading.archives import fetch_remedy
from brainfound.data.reading.image_names import holds_voxels
from brainfound.data.sources import bids, dicom, fomo60k, fomo300k, fomo_tasks, manifest, named_files, nnunet, openmind
from brainfound.data.sources.file_names import BROKEN_LINK, iter_files
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
    _require_fetched(path)
    for layout in SOURCE_LAYOUTS:
        if layout.can_read(path):
            table = layout.read(path, work)
            if num_links := sum(reason.startswith(BROKEN_LINK) for _, reason in table.unused):
                table.notes.append(f"{num_links} files are links whose target is not there, and are not used")
            return table
    expected = "one of: " + "; ".join(layout.layout_hint for layout in SOURCE_LAYOUTS)
    remedy = "Give the folder that holds one of these, or write a manifest"
    raise CohortError("no scans found", where=path, got=_summarise_files(path), expected=expected, remedy=remedy)


def _require_fetched(path: Path) -> None:
    """Refuse a folder in which every image is a link whose target is not there, as in a fresh clone of a data set."""
    links: list[Path] = []
    for file in iter_files(path, []) if path.is_dir() else ():
        if holds_voxels(file):
            if file.is_file():
                return
            links.append(file)
    if links:
        what, got = "no image is there, only links to them", f"{len(links)} links"
        remedy = fetch_remedy(links[0]) or "Copy or download the images themselves"
        raise CohortError(what, where=path, got=got, remedy=remedy)


def _summarise_files(path: Path) -> str:
    """Number of files by suffix."""
    files = list(islice(iter_files(path, []), _MAX_FILES_COUNTED))
    if not files:
        return "no files"
    suffixes = Counter("".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix for file in files)
    counts = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in suffixes.most_common(5))
    return f"files: {counts}" + (" and more" if len(files) == _MAX_FILES_COUNTED else "")
