"""The files of a source, and parsing of free-form names into contrast, label map and identifier.

``BraTS-GLI-00000-001-t1c.nii.gz`` is a T1ce of the subject ``BraTS-GLI-00000`` in the session ``001``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path, PurePath

from brainfound.contrasts import UNKNOWN
from brainfound.data.reading.archives import fetch_remedy
from brainfound.data.reading.image_names import MGH_SUFFIXES, holds_voxels, other_half, stem
from brainfound.data.sources.word_table import (
    BRAIN_WORDS,
    LABEL_QUALIFIERS,
    LABEL_WORDS,
    LESION_WORDS,
    NOT_A_LESION_MAP,
    PARCELLATIONS,
    PROCESSING_AFTER_CONTRAST,
    PROCESSING_WORDS,
    STRUCTURES,
)
from brainfound.data.sources.words import (
    NO_CONTRAST,
    PROTOCOL_WORDS,
    Reading,
    find_words,
    is_contrast_word,
    read_bids_name,
    read_file_name,
)
from brainfound.errors import CohortError

UnusedFiles = list[tuple[Path, str]]
"""Files that are not scans of the cohort, each with the reason."""

DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
BROKEN_LINK = "a link whose target is not there (download the file first)"
MAX_B0_S_PER_MM2 = 5
"""An image with b ≤ 5 s/mm² is a b0, not a diffusion-weighted image (the rule of FOMO300K)."""

_MAX_FILES_SEARCHED = 20_000
_SEPARATORS = r"[_\-. ]+"
_WORDS_OF_LABEL_MAPS = LABEL_WORDS | LESION_WORDS | LABEL_QUALIFIERS | STRUCTURES.keys()
_REPEAT = re.compile(r"(?:run|r|rep|echo|acq)?\d{1,2}|run|rep|echo")
_B_VALUE_WORD = re.compile(r"b\d+")
_B_VALUE_IN_NAME = re.compile(r"(?:^|[_\-. ])b[-_=]?(\d+)(?=$|[_\-. ])", re.IGNORECASE)
_RATER = re.compile(r"(rater|expert|reader|annotator|observer|grader|radiologist)(\d{1,2}|[a-d])?")
_NUMBERED_LABEL = re.compile(r"(mask|seg|segmentation|label|gt|annotation)([1-9])")
_BIDS_NAME = re.compile(r"sub-[A-Za-z0-9+]+(?:_[a-z]+-[A-Za-z0-9.+]+)*_[A-Za-z0-9]+")


# Files and paths


def natural_sort_key(text: object) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts run-2 before run-10."""
    parts = re.findall(r"\d+|\D+", str(text))
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def iter_files(folder: Path, unused: UnusedFiles, *, without: Iterable[Path] = ()) -> Iterator[Path]:
    """All files below a folder in a fixed order; links are followed, hidden names are skipped.

    ``unused`` receives the folders that cannot be listed, so that their files are not lost silently. ``without`` lists
    subfolders to skip.
    """

    def report(error: OSError) -> None:
        unused.append((Path(error.filename or folder), f"the folder cannot be listed ({error.strerror})"))

    seen: set[tuple[int, int]] = set()
    skipped = set(without)
    for here, folders, names in os.walk(folder, onerror=report, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        visible = [name for name in folders if not name.startswith(".") and Path(here, name) not in skipped]
        folders[:] = sorted(visible, key=natural_sort_key)
        yield from (Path(here) / name for name in sorted(names, key=natural_sort_key) if not name.startswith("."))


def iter_images(folder: Path, unused: UnusedFiles, *, without: Iterable[Path] = ()) -> Iterator[Path]:
    """The images among `iter_files`. A broken link (a file that was not downloaded) goes into ``unused``."""
    for file in iter_files(folder, unused, without=without):
        if holds_voxels(file) and file.is_file():
            header = other_half(file)
            if header is not None and not header.is_file():
                unused.append((file, "an .img without its .hdr"))
            else:
                yield file
        elif holds_voxels(file):
            remedy = fetch_remedy(file)
            unused.append((file, f"{BROKEN_LINK}. {remedy}" if remedy else BROKEN_LINK))


def contains_image(folders: Iterable[Path]) -> bool:
    """Whether an image, downloaded or not, is among the first files below these folders. DICOM does not count."""
    files = (file for folder in folders for file in iter_files(folder, []))
    return any(holds_voxels(file) for file in islice(files, _MAX_FILES_SEARCHED))


def subfolders(folder: Path, pattern: str) -> list[Path]:
    """The direct subfolders that match a pattern, in a fixed order."""
    matches = (child for child in folder.glob(pattern) if child.is_dir())
    return sorted(matches, key=lambda child: natural_sort_key(child.name))


def safe_join(root: Path, relative: str, index: Path, place: object) -> Path:
    """Join `root` and a path from a downloaded index; CohortError, naming `place`, if it leads out of the root."""
    base = os.path.abspath(root)
    full = os.path.normpath(os.path.join(base, relative))
    if full != base and not full.startswith(base.rstrip(os.sep) + os.sep):
        raise CohortError(
            "a path leads out of the folder",
            where=f"{index.name}, {place}",
            expected="a path below the folder of the index",
            remedy="Do not use this index, or write a manifest of the files you trust",
        )
    return root / os.path.relpath(full, base)


def sanitise_name(text: object) -> str:
    """A name without slashes, colons and blanks, usable in a file name."""
    return re.sub(r"[\s/\\:]+", "-", str(text).strip()) or "unnamed"


class SubjectNamer:
    """Names subjects ``<dataset>_<participant>``, for sources whose data sets share participant names."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str]] = {}

    def __call__(self, dataset: object, participant: object) -> str:
        key = (str(dataset), str(participant))
        name = f"{sanitise_name(dataset)}_{sanitise_name(participant)}"
        if self._known.setdefault(name, key) != key:
            what = "two subjects of different data sets would have one name"
            raise CohortError(what, got=name, remedy="Write a manifest")
        return name


# Free-form names


@dataclass(frozen=True)
class FileName:
    """The parts of a file name."""

    contrast: str
    reason: str
    """Why the contrast is unknown."""
    label_column: str | None
    """The cohort column of a label map (``mask``, ``brain_mask``, ``gm_mask``, ``dseg``, …); None for a scan."""
    is_silent: bool
    """Whether the name suggests nothing about the contrast: neither one, nor doubt, nor that it is no scan."""
    identifier: str
    """The name without contrast, processing words and repeat numbers."""
    order: tuple
    """Sort key: of several scans of one contrast, the one with the fewest additional words comes first."""


def read_scan_name(path: PurePath) -> Reading:
    """The contrast that a file name states: a BIDS name by its suffix and entities, any other name by its words.

    >>> names = ("sub-1_space-T1w_FLAIR.nii.gz", "p1_t1c.nii", "dwi_b0.nii")
    >>> [read_scan_name(PurePath(name)).contrast for name in names]
    ['FLAIR', 'T1ce', 'unknown']
    """
    name = stem(path)
    if _BIDS_NAME.fullmatch(name):
        *entities, suffix = name.split("_")
        reading = read_bids_name(dict(entity.split("-", 1) for entity in entities), suffix)
    else:
        signed = re.sub(r"(?<=[_ ])-(?=(?:km|gd|gad|c|ce)(?:[_. ]|$))", "without ", name, flags=re.IGNORECASE)
        reading = read_file_name([word for word, _, _ in find_words(signed)])
    b_value = _B_VALUE_IN_NAME.search(name)
    if reading.contrast == "DWI" and b_value is not None and int(b_value.group(1)) <= MAX_B0_S_PER_MM2:
        return replace(reading, contrast=UNKNOWN, reason="a b0 image, not diffusion-weighted")
    return reading


def parse_filename(path: PurePath) -> FileName:
    """Contrast, label map and identifier of a file name.

    >>> parse_filename(PurePath("BraTS2021_00000_t1ce.nii.gz")).identifier
    'BraTS2021_00000'
    >>> parse_filename(PurePath("p1_flair_seg.nii")).contrast
    'unknown'
    """
    name = stem(path)
    words = find_words(name)
    lower = [word.lower() for word, _, _ in words]
    reading = read_scan_name(path)
    used = read_file_name([word for word, _, _ in words]).used
    first, last = (min(used), max(used) + 1) if used else (len(lower), len(lower))
    parts = [(part, i) for i, (word, _, _) in enumerate(words) for part in _label_parts(word)]
    column, rank = _label_column(parts, last if used else None, path)
    dropped = set(used) | {i for i in range(last, len(lower)) if _B_VALUE_WORD.fullmatch(lower[i])}
    if column:
        reading = Reading(UNKNOWN, f"a label map ({column})")
        dropped |= {i for part, i in parts if part in _WORDS_OF_LABEL_MAPS or f"{part}_mask" == column}
        dropped |= _find_rater(parts)[1]
    processing = {i for i, word in enumerate(lower) if word in PROCESSING_WORDS}
    after = {i for i in range(first, len(lower)) if used and _is_processing_after_contrast(lower[i])}
    processing = (processing | after) - dropped
    # A number after the contrast counts repeats (p1_T1_2), unless only it can name the subject (study_T1_01).
    before = [word for i, word in enumerate(lower[:first]) if i not in dropped and word not in PROTOCOL_WORDS]
    has_number = any(re.search(r"\d", word) for word in before)
    repeats: set[int] = set()
    for i in range(last, len(words)):
        # Behind another word, a number is part of an identifier or of a date (7_T1_hc_01, 7_T1_2019-03).
        is_repeat = _REPEAT.fullmatch(lower[i]) or re.sub(r"(?<=[a-z]{3})\d$", "", lower[i]) in PROTOCOL_WORDS
        if has_number and is_repeat and i - 1 in dropped | processing | repeats:
            repeats.add(i)
    kept = [i for i in range(len(words)) if i not in dropped | processing | repeats]
    num_glued = sum(re.match(r"[23]d\w", lower[i]) is not None for i in used)  # 3DT1 next to T1
    num_additional = len(processing) + len(repeats) + len(used) + num_glued
    order = (rank, num_additional, natural_sort_key(name))
    silent = reading.reason == NO_CONTRAST
    return FileName(reading.contrast, reading.reason, column, silent, _join_words(name, words, kept), order)


def _is_processing_after_contrast(word: str) -> bool:
    return word in PROCESSING_AFTER_CONTRAST or re.fullmatch(r"\d\.\d+(?:mm)?", word) is not None


def _label_parts(word: str) -> list[str]:
    """The parts of a word between capitals, and before ``mask``, ``seg``, ``map`` or ``label``.

    >>> _label_parts("BrainExtractionMask"), _label_parts("lesionmap"), _label_parts("aparc+aseg")
    (['brain', 'extraction', 'mask'], ['lesion', 'mask'], ['aparc', 'aseg'])
    """
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z]{2})|\+|(?<=^[tT][12])(?=lesion|tumou?r)", " ", word).lower().split()
    glued = [re.fullmatch(r"(.{2,}?)(?:masks?|segs?|maps?|labels?)", part) for part in parts]
    return [
        piece
        for part, match in zip(parts, glued, strict=True)
        for piece in (
            [match.group(1), "mask"] if match and match.group(1) in LESION_WORDS | STRUCTURES.keys() else [part]
        )
        if piece
    ]


def _label_column(parts: list[tuple[str, int]], after_contrast: int | None, path: PurePath) -> tuple[str | None, int]:
    """The column of a label map, and its rank: maps of lesions and tumours come first; None for a scan.

    `parts` are those of the words, each with the place of its word.
    """
    words = {part for part, _ in parts}
    if words & PARCELLATIONS:
        return "dseg", 0
    if "brainmask" in words and path.name.lower().endswith(MGH_SUFFIXES):  # FreeSurfer's stripped image
        return None, 0
    lesions = [
        i
        for (part, i), (after, _) in pairwise([*parts, ("", -1)])
        if part in LESION_WORDS and after not in NOT_A_LESION_MAP
    ]
    # "lesion_001_T1" is a scan of a lesion study; "001_T1_lesion" and "lesions" are label maps.
    is_of_rater = any(
        _NUMBERED_LABEL.fullmatch(part) or (after_contrast is None and _RATER.fullmatch(part)) for part in words
    )
    if (
        not words & LABEL_WORDS
        and not is_of_rater
        and not any(after_contrast is None or i >= after_contrast for i in lesions)
    ):
        return None, 0
    if "dseg" in words:
        return "dseg", 0
    if lesions:
        return "mask", 0
    if "seg" in words and words & {"brain", "fast"}:  # FSL's FAST: classes of tissue within the brain
        return "dseg", 0
    if tissue := next((STRUCTURES[part] for part, _ in parts if part in STRUCTURES and part != "face"), None):
        return f"{tissue}_mask", 0
    if "brainmask" in words or words & BRAIN_WORDS:
        return "brain_mask", 0
    if {"deface", "defaced", "defacing", "face", "anon", "anonymization"} & words:
        return "deface_mask", 0
    before = next((parts[k - 1] for k in range(1, len(parts)) if parts[k][0] in LABEL_WORDS), None)
    if before and after_contrast is not None and before[1] >= after_contrast and _is_unknown(before[0]):
        return f"{before[0]}_mask", 0
    return "mask", 1


def _is_unknown(word: str) -> bool:
    """Whether a word before ``mask`` can only say what it shows."""
    return re.fullmatch(r"[^\W\d_]{3,}", word) is not None and word not in _WORDS_OF_LABEL_MAPS | PROCESSING_WORDS


def label_column(name: str) -> str:
    """The column of a map that is known to be a mask, by the words of its name: ``mask`` unless they name a tissue."""
    parts = [(part, 0) for word in re.split(_SEPARATORS, name) for part in _label_parts(word)]
    return _label_column([*parts, ("mask", 0)], 0, PurePath(name))[0] or "mask"


def rater_of(path: PurePath) -> str:
    """Whose label map it is, of several of one image; "" if the name does not say it.

    >>> [rater_of(PurePath(name)) for name in ("p1_rater-2_mask.nii", "mask1.nii", "lesion_2.nii", "consensus.nii")]
    ['rater2', 'mask1', 'mask2', '']
    """
    parts = [(part, i) for i, word in enumerate(re.split(_SEPARATORS, stem(path))) for part in _label_parts(word)]
    return _find_rater(parts)[0]


def _find_rater(parts: list[tuple[str, int]]) -> tuple[str, set[int]]:
    """The rater and the places of its words: ``rater1``, ``expert_b``, ``mask2``, or ``segmentation_2`` at the end."""
    for k, ((part, i), (after, j)) in enumerate(pairwise([*parts, ("", -1)])):
        rater, is_last = _RATER.fullmatch(part), k == len(parts) - 2
        if rater and (rater.group(2) or re.fullmatch(r"\d{1,2}|[a-d]", after)):
            return f"{rater.group(1)}{rater.group(2) or after}", {i} if rater.group(2) else {i, j}
        if _NUMBERED_LABEL.fullmatch(part):
            return part, {i}
        if is_last and part in LABEL_WORDS | LESION_WORDS and re.fullmatch("[1-9]", after):
            return f"mask{after}", {i, j}
    return "", set()


def describe_label_map(path: PurePath) -> str:
    """The words of a name that say what a label map shows.

    >>> describe_label_map(PurePath("p1_lesion_mask.nii.gz"))
    'lesion mask'
    """
    known = _WORDS_OF_LABEL_MAPS | BRAIN_WORDS | PARCELLATIONS
    return " ".join(word for word in re.split(r"[_\-. +]+", stem(path).lower()) if word in known)


def _join_words(name: str, words: list[tuple[str, int, int]], kept: list[int]) -> str:
    """The kept words, each with the separator before it."""
    text = ""
    for i in kept:
        word, start, _ = words[i]
        text += (name[words[i - 1][2] : start] if text and i else "") + word
    return text


def is_contrast_name(text: str) -> bool:
    """Whether the whole text names a contrast."""
    return is_contrast_word(re.sub(_SEPARATORS, "", text.lower()))


def split_words(text: str) -> tuple[str, ...]:
    """The words between separators, in lower case."""
    return tuple(word for word in re.split(_SEPARATORS, text.lower()) if word)
