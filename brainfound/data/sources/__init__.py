"""Every layout that a cohort can be read from, one module each, in the order in which they are tried.

The first that recognises a path reads it. What a user wrote (a manifest) comes before what was found; layouts with a
file or folder of their own name before those that are told from folder names; DICOM last. A module has ``NAME``,
``LOOKS_LIKE`` (for the error that nothing was recognised), ``recognises(path)`` and ``read(path, work)``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from brainfound.data.sources.file_names import iter_files
from brainfound.errors import CohortError

if TYPE_CHECKING:
    from brainfound.data.cohort import Cohort

_MODULES = (
    *("manifest", "openmind", "fomo_tasks", "fomo300k", "fomo60k"),
    *("bids", "bids_collection", "named_files", "dicom"),
)
_LOOKED_AT = 10_000


@dataclass(frozen=True)
class SourceLayout:
    """One layout."""

    name: str
    layout_hint: str
    can_read: Callable[[Path], bool]
    read: Callable[[Path, Path | None], Cohort]


def _sources() -> tuple[SourceLayout, ...]:
    found = [import_module(f"{__name__}.{module}") for module in _MODULES]
    return tuple(SourceLayout(module.NAME, module.LAYOUT_HINT, module.can_read, module.read) for module in found)


def read_source(path: Path, work: Path | None = None) -> Cohort:
    """Read a path with the first layout that recognises it.

    Raises:
        CohortError: there is nothing, no layout recognises it, or its reader refuses it.
    """
    if not path.exists():
        raise CohortError("no such file or folder", where=path, remedy="Check the path of the source")
    if path.name in ("", ".."):  # layouts are told from names too, and "." has none
        path = Path(os.path.abspath(path))
    sources = _sources()
    for source in sources:
        if source.can_read(path):
            return source.read(path, work)
    raise CohortError(
        "no scans found",
        where=path,
        got=_summarise_files(path),
        expected="one of: " + "; ".join(source.layout_hint for source in sources),
        remedy="Give the folder that holds one of these, or write a manifest",
    )


def _summarise_files(path: Path) -> str:
    """Counts of files by ending, and a few folders' count, so that a user sees where he is."""
    files = list(islice(iter_files(path, []), _LOOKED_AT))
    if not files:
        return "no files"
    endings = Counter("".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix for file in files)
    counted = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in endings.most_common(5))
    return f"files: {counted}" + (" and more" if len(files) == _LOOKED_AT else "")
