"""Files of a source: which are images, in which order, and what their names say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePath

from brainfound.contrasts import UNKNOWN, contrast_from_filename
from brainfound.errors import CohortError

IMAGES = (".nii.gz", ".nii", ".mgz")
"""Endings of the files that a scan can be read from."""

DICOM_ENDINGS = (".dcm", ".ima", ".dicom")

Unused = list[tuple[Path, str]]
"""Files that are no scans of the cohort, each with the reason."""

_B_VALUE = re.compile(r"(?:^|[_\-. ])b[-_]?(\d+)(?=$|[_\-. ])", re.IGNORECASE)
_LOOKED_AT = 20_000
HIGHEST_B0 = 5
"""An image of b ≤ 5 s/mm² is not diffusion-weighted but a b0 (the rule of FOMO300K)."""


def is_image(path: PurePath) -> bool:
    """Whether the name ends as an image does. Names that begin with a dot are copies' shadows, never images."""
    return path.name.lower().endswith(IMAGES) and not path.name.startswith(".")


def stem(path: PurePath) -> str:
    """The name without the ending of an image.

    >>> stem(PurePath("a/b.T1w.nii.gz"))
    'b.T1w'
    """
    name = path.name
    for ending in IMAGES:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return PurePath(name).stem


def in_order(text: object) -> tuple[tuple[int, int, str], ...]:
    """A sorting key in which run-2 comes before run-10."""
    parts = re.findall(r"\d+|\D+", str(text))
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def files_under(folder: Path, unused: Unused, *, without: Iterable[str] = ()) -> Iterator[Path]:
    """All files below a folder in a fixed order; links are followed, hidden names are passed over.

    A folder that cannot be listed is put into ``unused``, since its files would be lost silently.

    Args:
        folder: where to begin.
        unused: gets the folders that cannot be listed.
        without: names of folders directly below ``folder`` that are passed over.
    """

    def cannot_list(error: OSError) -> None:
        unused.append((Path(error.filename or folder), f"the folder cannot be listed ({error.strerror})"))

    seen: set[tuple[int, int]] = set()
    skip = set(without)
    for here, folders, names in os.walk(folder, onerror=cannot_list, followlinks=True):
        facts = os.stat(here)
        if (facts.st_dev, facts.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        first = Path(here) == folder
        folders[:] = sorted(
            (name for name in folders if not name.startswith(".") and not (first and name in skip)), key=in_order
        )
        yield from (Path(here) / name for name in sorted(names, key=in_order) if not name.startswith("."))


def images_under(folder: Path, unused: Unused, *, without: Iterable[str] = ()) -> Iterator[Path]:
    """The images of `files_under`. A link to nothing (a file that was not downloaded) goes into ``unused``."""
    for file in files_under(folder, unused, without=without):
        if not is_image(file):
            continue
        if file.is_file():
            yield file
        else:
            unused.append((file, "a link whose target is not there (download the file first)"))


def holds_image(folders: Iterable[Path]) -> bool:
    """Whether an image, downloaded or not, is among the first files below these folders; DICOM alone has none."""
    files = (file for folder in folders for file in files_under(folder, []))
    return any(is_image(file) for file in islice(files, _LOOKED_AT))


def subfolders(folder: Path, pattern: str) -> list[Path]:
    """The folders directly below that match a pattern, in a fixed order."""
    return sorted((child for child in folder.glob(pattern) if child.is_dir()), key=lambda child: in_order(child.name))


def contrast_of_name(path: PurePath) -> str:
    """`contrast_from_filename`, except that a diffusion scan whose name says b ≤ 5 is of unknown contrast.

    >>> contrast_of_name(PurePath("dwi_b0.nii.gz")), contrast_of_name(PurePath("dwi_b1000.nii.gz"))
    ('unknown', 'DWI')
    """
    contrast = contrast_from_filename(path)
    b_value = _B_VALUE.search(stem(path))
    if contrast == "DWI" and b_value and int(b_value.group(1)) <= HIGHEST_B0:
        return UNKNOWN
    return contrast


def inside(root: Path, relative: str, where: Path, line: object) -> Path:
    """A path that a downloaded index names below its root.

    Raises:
        CohortError: the path leads out of the root (``..`` or another absolute path).
    """
    base = os.path.abspath(root)
    full = os.path.normpath(os.path.join(base, relative))
    if full != base and not full.startswith(base.rstrip(os.sep) + os.sep):
        raise CohortError(
            "a path leads out of the folder",
            where=f"{where.name}, {line}",
            expected="a path below the folder of the index",
            remedy="Do not use this index, or write a manifest of the files you trust",
        )
    return root / os.path.relpath(full, base)


def plain_name(text: object) -> str:
    """A name that can be part of a file name: no slashes and no blanks."""
    return re.sub(r"[\s/\\:]+", "-", str(text).strip()) or "unnamed"


class SubjectNames:
    """``<dataset>_<participant>`` for sources in which participants' names repeat between data sets."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str]] = {}

    def __call__(self, dataset: object, participant: object) -> str:
        """The name; two different participants never get the same one.

        Raises:
            CohortError: two participants would have one name.
        """
        key = (str(dataset), str(participant))
        name = f"{plain_name(dataset)}_{plain_name(participant)}"
        if self._known.setdefault(name, key) != key:
            raise CohortError(
                "two subjects of different data sets would have one name", got=name, remedy="Write a manifest"
            )
        return name
