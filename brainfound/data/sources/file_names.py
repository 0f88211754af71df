"""The files of a source, and parsing of free-form names into contrast, label map, subject and session.

``BraTS-GLI-00000-001-t1c.nii.gz`` is a T1ce of the subject ``BraTS-GLI-00000`` in the session ``001``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath

from brainfound.contrasts import CONTRASTS, UNKNOWN, contrast_from_filename, parse_contrast
from brainfound.data.reading.archives import fetch_remedy
from brainfound.errors import CohortError, UsageError

UnusedFiles = list[tuple[Path, str]]
"""Files that are not scans of the cohort, each with the reason."""

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz")
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
BROKEN_LINK = "a link whose target is not there (download the file first)"
MAX_B0_S_PER_MM2 = 5
"""An image with b ≤ 5 s/mm² is a b0, not a diffusion-weighted image (the rule of FOMO300K)."""

_MAX_FILES_SEARCHED = 20_000
_SEPARATORS = r"[_\-. ]+"
_LABEL_WORDS = {"seg", "segm", "segmentation", "mask", "masks", "label", "labels", "gt", "roi", "dseg", "brainmask"}
_LESION_WORDS = {"lesion", "lesions"}
_LABEL_QUALIFIERS = {
    *("consensus", "manual", "automatic", "auto", "expert", "ground", "truth", "final", "tumor", "tumour")
}
_PROCESSING_WORDS = {
    *("brain", "stripped", "skullstripped", "ss", "bet", "defaced", "defacing", "reg", "registered"),
    *("coreg", "coregistered", "bias", "corrected", "n4", "mni", "preproc", "preprocessed", "norm"),
    *("normalized", "normalised", "crop", "cropped", "raw", "orig", "original", "ax", "axial"),
    *("tra", "sag", "sagittal", "cor", "coronal", "2d", "3d", "iso", "1mm"),
    *("2mm", "ras", "lps", "unstripped", "native"),
}
_REPEAT = re.compile(r"(?:run|r|rep|echo|acq)?\d{1,2}|run|rep|echo")
_B_VALUE_WORD = re.compile(r"b\d+")
_B_VALUE_IN_NAME = re.compile(r"(?:^|[_\-. ])b[-_]?(\d+)(?=$|[_\-. ])", re.IGNORECASE)
_SESSION = (
    r"(?:(?:ses|session|visit|vis|wave|v|tp|timepoint|time|study|exam|month|mo|m|week|wk|w|year|yr|y|day|d|fu|fup|followup"
    r"|follow-?up|scan|mr)[_\-]?\d+[a-z]?|baseline|bl|followup|follow-up|fu|preop|postop"
    r"|(?:19|20)\d{2}[-.]?[01]\d[-.]?[0-3]\d|\d{2}[-.]\d{2}[-.](?:19|20)\d{2})"
)
_SHORT_SESSION = re.compile(r"(?:v|m|w|y|d|mr|scan)[_\-]?\d+[a-z]?", re.IGNORECASE)
_AMBIGUOUS_CONTRASTS = {"pd", "md", "fl"}
"""Words that mean a contrast only after a subject's number: ``PD_001`` is from a study of Parkinson's disease."""
_NO_CONTRAST = "xx"
_IDENTIFIER_FORMS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<subject>BraTS-[A-Z]+-\d+)-(?P<session>\d{3})",
        r"(?P<subject>BraTS(?:20)?\d\d_.+)",
        r"(?P<subject>IXI\d{3})-(?P<site>Guys|HH|IOP)-\d{4}",
        r"(?P<subject>UPENN-GBM-\d{5})_(?P<session>\d{2})",
        r"(?P<subject>UCSF-PDGM-\d{3,5})(?:_(?P<session>FU[A-Z0-9]+))?(?:_nifti)?",
        r"(?P<subject>OAS[12]_\d{4})_(?P<session>MR\d+)",
        r"(?P<subject>OAS[34]\d{4})_(?:[A-Z]+_)?(?P<session>d\d{4})",
        r"(?:ADNI_)?(?P<subject>\d{3}_S_\d{4})(?:_(?P<session>.+))?",
        r"(?P<subject>sub-[A-Z0-9]+)(?:_ses-(?P<session>[A-Z0-9]+))?(?:_.*)?",
        rf"(?P<subject>.+?)[_\-. ](?P<session>{_SESSION})",
    )
)
"""Identifiers of public data sets and, last, any name that ends with a session. Each must match in full."""


# Files and paths


def is_image(path: PurePath) -> bool:
    """Whether the name has an image suffix. Hidden files are never images (``._x.nii.gz`` is a copying artefact)."""
    return path.name.lower().endswith(IMAGE_SUFFIXES) and not path.name.startswith(".")


def stem(path: PurePath) -> str:
    """The name without its image suffix.

    >>> stem(PurePath("a/b.T1w.nii.gz"))
    'b.T1w'
    """
    name = path.name
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return PurePath(name).stem


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
        if is_image(file) and file.is_file():
            yield file
        elif is_image(file):
            remedy = fetch_remedy(file)
            unused.append((file, f"{BROKEN_LINK}. {remedy}" if remedy else BROKEN_LINK))


def contains_image(folders: Iterable[Path]) -> bool:
    """Whether an image, downloaded or not, is among the first files below these folders. DICOM does not count."""
    files = (file for folder in folders for file in iter_files(folder, []))
    return any(is_image(file) for file in islice(files, _MAX_FILES_SEARCHED))


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
    label_column: str | None
    """The cohort column of a label map (``mask``, ``brain_mask``, ``deface_mask``, ``dseg``); None for a scan."""
    identifier: str
    """The name without contrast, processing words and repeat numbers."""
    order: tuple
    """Sort key: of several scans of one contrast, the one with the fewest additional words comes first."""


@dataclass(frozen=True)
class SubjectIdentity:
    """The subject and the session that an identifier names."""

    subject: str
    session: str | None
    site: str | None
    certain: bool
    """Whether the identifier has a known form."""


def scan_contrast_from_filename(path: PurePath) -> str:
    """As `contrast_from_filename`, but ``unknown`` for a diffusion scan with b ≤ 5 in its name.

    >>> [scan_contrast_from_filename(PurePath(name)) for name in ("dwi_b0.nii.gz", "dwi_b1000.nii.gz")]
    ['unknown', 'DWI']
    """
    contrast = contrast_from_filename(path)
    b_value = _B_VALUE_IN_NAME.search(stem(path))
    is_b0 = b_value is not None and int(b_value.group(1)) <= MAX_B0_S_PER_MM2
    return UNKNOWN if contrast == "DWI" and is_b0 else contrast


def parse_filename(path: PurePath) -> FileName:
    """Contrast, label map and identifier of a file name.

    >>> parse_filename(PurePath("BraTS2021_00000_t1ce.nii.gz")).identifier
    'BraTS2021_00000'
    >>> parse_filename(PurePath("p1_flair_seg.nii")).contrast
    'unknown'
    """
    name = stem(path)
    words = [(match.group(), match.start(), match.end()) for match in re.finditer(r"[^_\-. ]+", name)]
    lower = [word.lower() for word, _, _ in words]
    ambiguous = {i for i in range(len(lower)) if _is_ambiguous(lower, i)}
    first, last = _find_contrast_words([_NO_CONTRAST if i in ambiguous else word for i, word in enumerate(lower)])
    rest = PurePath("_".join(word for i, (word, _, _) in enumerate(words) if i not in ambiguous)) if ambiguous else path
    contrast = scan_contrast_from_filename(rest) if first < last else UNKNOWN
    column = _label_column(lower, last if first < last else None)
    dropped = set(range(first, last)) | {i for i in range(last, len(lower)) if _B_VALUE_WORD.fullmatch(lower[i])}
    if column:
        contrast = UNKNOWN
        dropped |= {i for i, word in enumerate(lower) if word in _LABEL_WORDS | _LESION_WORDS | _LABEL_QUALIFIERS}
    processing = {i for i, word in enumerate(lower) if word in _PROCESSING_WORDS}
    # A number after the contrast counts repeats (p1_T1_2), unless only it can name the subject (study_T1_01).
    has_number = any(re.search(r"\d", word) for i, word in enumerate(lower[:first]) if i not in dropped)
    repeats = {i for i in range(last, len(words)) if has_number and _REPEAT.fullmatch(lower[i])}
    kept = [i for i in range(len(words)) if i not in dropped | processing | repeats]
    num_additional = len(processing) + len(repeats)
    return FileName(contrast, column, _join_words(name, words, kept), (num_additional, natural_sort_key(name)))


def _find_contrast_words(lower: list[str]) -> tuple[int, int]:
    """Index range of the words that name the contrast: pairs before single words, later ones before earlier ones."""
    for width in (2, 1):
        for end in range(len(lower), width - 1, -1):
            if _is_contrast("".join(lower[end - width : end])):
                return end - width, end
    return len(lower), len(lower)


def _is_ambiguous(lower: list[str], i: int) -> bool:
    before = (re.search(r"\d", word) and not _is_contrast(word) for word in lower[:i])
    alone = all(word in _PROCESSING_WORDS | _LABEL_WORDS for word in [*lower[:i], *lower[i + 1 :]])
    return lower[i] in _AMBIGUOUS_CONTRASTS and not alone and not any(before)


def _is_contrast(word: str) -> bool:
    try:
        return word != "scan" and parse_contrast(word) in CONTRASTS and parse_contrast(word) != UNKNOWN
    except UsageError:
        return False


def _label_column(lower: list[str], after_contrast: int | None) -> str | None:
    labels = [i for i, word in enumerate(lower) if word in _LABEL_WORDS]
    lesions = [i for i, word in enumerate(lower) if word in _LESION_WORDS]
    # "lesion_001_T1" is a scan of a lesion study; "001_T1_lesion" and "lesions" are label maps.
    if not labels and not any(after_contrast is None or i >= after_contrast for i in lesions):
        return None
    if "brainmask" in lower or ("brain" in lower and labels):
        return "brain_mask"
    if {"deface", "defaced", "defacing", "face", "anon", "anonymization"} & set(lower):
        return "deface_mask"
    return "dseg" if "dseg" in lower else "mask"


def _join_words(name: str, words: list[tuple[str, int, int]], kept: list[int]) -> str:
    """The kept words, each with the separator before it."""
    text = ""
    for i in kept:
        word, start, _ = words[i]
        text += (name[words[i - 1][2] : start] if text and i else "") + word
    return text


def parse_identifier(identifier: str) -> SubjectIdentity:
    """Subject, session and site of an identifier; if it has no known form, all of it is the subject.

    >>> parse_identifier("IXI002-Guys-0828")
    SubjectIdentity(subject='IXI002', session=None, site='Guys', certain=True)
    >>> parse_identifier("patient1_v2").session
    'v2'
    """
    for form in _IDENTIFIER_FORMS:
        match = form.fullmatch(identifier)
        if match and not (form is _IDENTIFIER_FORMS[-1] and could_be_subject(match["session"], match["subject"])):
            parts = match.groupdict()
            return SubjectIdentity(parts["subject"], parts.get("session"), parts.get("site"), certain=True)
    return SubjectIdentity(identifier, None, None, certain=False)


def is_session_name(text: str) -> bool:
    """Whether the whole text names a session: ``ses-1``, ``baseline``, ``2019-03-01``."""
    return re.fullmatch(_SESSION, text, re.IGNORECASE) is not None


def could_be_subject(session: str, before: str) -> bool:
    """Whether a short session word may also name a subject: ``HC_m01`` may be a man, ``p1_m01`` is a month.

    >>> could_be_subject("m01", "HC"), could_be_subject("m01", "p1"), could_be_subject("visit1", "HC")
    (True, False, False)
    """
    return _SHORT_SESSION.fullmatch(session) is not None and not re.search(r"\d", before)


def prefix_before_session(identifier: str) -> str | None:
    """``HC`` of ``HC_m01``, whose ending may name a session or a subject; None for other identifiers."""
    match = re.fullmatch(rf"(.+?)[_\-. ]{_SHORT_SESSION.pattern}", identifier, re.IGNORECASE)
    return match.group(1) if match and not re.search(r"\d", match.group(1)) else None


def is_contrast_name(text: str) -> bool:
    """Whether the whole text names a contrast."""
    return _is_contrast(re.sub(_SEPARATORS, "", text.lower()))


def split_words(text: str) -> tuple[str, ...]:
    """The words between separators, in lower case."""
    return tuple(word for word in re.split(_SEPARATORS, text.lower()) if word)
