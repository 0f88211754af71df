"""Names of image files: the suffixes that are read, and the two files of a pair."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

MGH_SUFFIXES = (".mgz", ".mgh.gz", ".mgh")
IMAGE_SUFFIXES = (".nii.gz", ".nii", *MGH_SUFFIXES, ".img.gz", ".img", ".hdr.gz", ".hdr")
"""In lower case, packed ones first; names may be in capitals."""
_PAIR = re.compile(r"(.+)\.(hdr|img)(\.gz)?", re.IGNORECASE)


def is_image(path: PurePath) -> bool:
    """Whether the name has an image suffix, also that of the header of a pair."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def holds_voxels(path: PurePath) -> bool:
    """Whether the name is that of an image's voxels, which in a pair (``.hdr`` and ``.img``) stand for both files.

    Hidden files are never images (``._x.nii.gz`` is a copying artefact).
    """
    return is_image(path) and not is_header(path) and not path.name.startswith(".")


def is_header(path: PurePath) -> bool:
    """Whether the name is that of the header of a pair."""
    match = _PAIR.fullmatch(path.name)
    return match is not None and match[2].lower() == "hdr"


def other_half(path: Path) -> Path | None:
    """The other file of a pair, which may be missing; None for an image in one file.

    >>> [str(other_half(Path(name))) for name in ("a.hdr", "a.IMG", "a.img.gz", "a.nii")]
    ['a.img', 'a.HDR', 'a.hdr.gz', 'None']
    """
    match = _PAIR.fullmatch(path.name)
    if match is None:
        return None
    suffix = "img" if is_header(path) else "hdr"
    return path.with_name(f"{match[1]}.{suffix.upper() if match[2].isupper() else suffix}{match[3] or ''}")


def stem(path: PurePath) -> str:
    """The name without its image suffix.

    >>> stem(PurePath("a/b.T1w.nii.gz"))
    'b.T1w'
    """
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if path.name.lower().endswith(suffix)), path.suffix)
    return path.name[: len(path.name) - len(suffix)]
