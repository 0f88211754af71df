"""The registry of source layouts, one module each, in the order in which they are tried.

The first layout that can read a path reads it. Manifests come first because the user wrote them. Layouts with a
characteristic file or folder come before those recognised by folder names, and DICOM comes last. A layout module has
``NAME``, ``LAYOUT_HINT`` (one line for the error if no layout fits), ``can_read(path)`` and ``read(path, work)``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path

from brainfound.data.sources.file_names import iter_files
from brainfound.data.sources.tables import SourceTable
from brainfound.errors import CohortError

_MODULES = (
    *("manifest", "openmind", "fomo_tasks", "fomo300k", "fomo60k"),
    *("bids", "bids_collection", "named_files", "dicom"),
)
_MAX_FILES_COUNTED = 10_000


@dataclass(frozen=True)
class SourceLayout:
    """One row of the registry."""

    name: str
    layout_hint: str
    can_read: Callable[[Path], bool]
    read: Callable[[Path, Path | None], SourceTable]


def source_layouts() -> tuple[SourceLayout, ...]:
    """All layouts, in the order in which they are tried."""
    modules = [import_module(f"{__name__}.{name}") for name in _MODULES]
    return tuple(SourceLayout(module.NAME, module.LAYOUT_HINT, module.can_read, module.read) for module in modules)


def read_source(path: Path, work: Path | None = None) -> SourceTable:
    """Read a path with the first layout that recognises it; `work` is the folder for converted DICOM.

    Raises:
        CohortError: the path does not exist, no layout recognises it, or the layout's reader refuses it.
    """
    if not path.exists():
        raise CohortError("no such file or folder", where=path, remedy="Check the path of the source")
    if path.name in ("", ".."):  # some layouts are recognised by the folder's name, and "." has none
        path = Path(os.path.abspath(path))
    layouts = source_layouts()
    for layout in layouts:
        if layout.can_read(path):
            return layout.read(path, work)
    raise CohortError(
        "no scans found",
        where=path,
        got=_summarise_files(path),
        expected="one of: " + "; ".join(layout.layout_hint for layout in layouts),
        remedy="Give the folder that holds one of these, or write a manifest",
    )


def _summarise_files(path: Path) -> str:
    """Number of files by suffix."""
    files = list(islice(iter_files(path, []), _MAX_FILES_COUNTED))
    if not files:
        return "no files"
    suffixes = Counter("".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix for file in files)
    counts = ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in suffixes.most_common(5))
    return f"files: {counts}" + (" and more" if len(files) == _MAX_FILES_COUNTED else "")
