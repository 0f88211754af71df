"""Files of a source: which are images, in which order, and what their names say.

What the name of a file says where no standard does: contrast, label map, person, visit.

``BraTS-GLI-00000-001-t1c.nii.gz`` is a T1ce of the person ``BraTS-GLI-00000`` at the visit ``001``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath

from brainfound.contrasts import CONTRASTS, UNKNOWN, contrast_from_filename, parse_contrast
from brainfound.errors import CohortError, UsageError

_SEPARATORS = r"[_\-. ]+"
_LABEL_WORDS = {"seg", "segm", "segmentation", "mask", "masks", "label", "labels", "gt", "roi", "dseg", "brainmask"}
_LESION_WORDS = {"lesion", "lesions"}
_OF_LABELS = {"consensus", "manual", "automatic", "auto", "expert", "ground", "truth", "final", "tumor", "tumour"}
_VARIANTS = {
    *("brain", "stripped", "skullstripped", "ss", "bet", "defaced", "defacing", "reg", "registered"),
    *("coreg", "coregistered", "bias", "corrected", "n4", "mni", "preproc", "preprocessed", "norm"),
    *("normalized", "normalised", "crop", "cropped", "raw", "orig", "original", "ax", "axial"),
    *("tra", "sag", "sagittal", "cor", "coronal", "2d", "3d", "iso", "1mm"),
    *("2mm", "ras", "lps", "unstripped", "native"),
}
_REPEAT = re.compile(r"(?:run|r|rep|echo|acq)?\d{1,2}|run|rep|echo")
_B_VALUE = re.compile(r"b\d+")
_VISIT = (
    r"(?:(?:ses|session|visit|vis|wave|v|tp|timepoint|time|study|exam|month|mo|m|week|wk|w|year|yr|y|day|d|fu|fup|followup"
    r"|follow-?up|scan|mr)[_\-]?\d+[a-z]?|baseline|bl|followup|follow-up|fu|preop|postop"
    r"|(?:19|20)\d{2}[-.]?[01]\d[-.]?[0-3]\d|\d{2}[-.]\d{2}[-.](?:19|20)\d{2})"
)
_SHORT_VISIT = re.compile(r"(?:v|m|w|y|d|mr|scan)[_\-]?\d+[a-z]?", re.IGNORECASE)
_AMBIGUOUS_CONTRASTS = {"pd", "md", "fl"}
"""Contrasts only behind a person's number: ``PD_001`` is of a study on Parkinson's disease."""
_NO_CONTRAST = "xx"
_FAMILIES = tuple(
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
        rf"(?P<subject>.+?)[_\-. ](?P<session>{_VISIT})",
    )
)
"""Names of public sets, and last the words for a visit. Each must match a whole identifier."""


@dataclass(frozen=True)
class FileName:
    """What is read from one name."""

    contrast: str
    label_column: str | None
    """The cohort column if it is a label map (``mask``, ``brain_mask``, ``dseg``)."""
    identifier: str
    """What remains without contrast, words of processing and numbers of a repeat."""
    order: tuple
    """Of several scans of one contrast, the one with the fewest further words is first."""


@dataclass(frozen=True)
class SubjectIdentity:
    """The person and the visit that an identifier names."""

    subject: str
    session: str | None
    site: str | None
    certain: bool
    """Whether the identifier has a known form."""


def parse_filename(path: PurePath) -> FileName:
    """Contrast, label map and identifier of a file's name.

    >>> parse_filename(PurePath("BraTS2021_00000_t1ce.nii.gz")).identifier, parse_filename(PurePath("p1_flair_seg.nii")).contrast
    ('BraTS2021_00000', 'unknown')
    """
    name = stem(path)
    words = [(found.group(), found.start(), found.end()) for found in re.finditer(r"[^_\-. ]+", name)]
    lower = [word.lower() for word, _, _ in words]
    doubtful = {i for i in range(len(lower)) if _is_ambiguous(lower, i)}
    first, last = _contrast_words([_NO_CONTRAST if i in doubtful else word for i, word in enumerate(lower)])
    read = PurePath("_".join(word for i, (word, _, _) in enumerate(words) if i not in doubtful)) if doubtful else path
    contrast = scan_contrast_from_filename(read) if first < last else UNKNOWN
    column = _label_column(lower, last if first < last else None)
    dropped = set(range(first, last)) | {i for i in range(last, len(lower)) if _B_VALUE.fullmatch(lower[i])}
    if column:
        contrast = UNKNOWN
        dropped |= {i for i, w in enumerate(lower) if w in _LABEL_WORDS | _LESION_WORDS | _OF_LABELS}
    variants = {i for i, word in enumerate(lower) if word in _VARIANTS}
    # A number after the contrast repeats it (p1_T1_2), unless no number before it can name the person (study_T1_01).
    named = any(re.search(r"\d", word) for i, word in enumerate(lower[:first]) if i not in dropped)
    repeats = {i for i in range(last, len(words)) if named and _REPEAT.fullmatch(lower[i])}
    rest = [i for i in range(len(words)) if i not in dropped | variants | repeats]
    further = len(variants) + len(repeats)
    return FileName(contrast, column, _joined(name, words, rest), (further, natural_sort_key(name)))


def _contrast_words(lower: list[str]) -> tuple[int, int]:
    """First and past-the-last word of the contrast: two neighbouring words before one, the last match first."""
    for width in (2, 1):
        for end in range(len(lower), width - 1, -1):
            if _is_contrast("".join(lower[end - width : end])):
                return end - width, end
    return len(lower), len(lower)


def _is_ambiguous(lower: list[str], i: int) -> bool:
    before = (re.search(r"\d", word) and not _is_contrast(word) for word in lower[:i])
    alone = all(word in _VARIANTS | _LABEL_WORDS for word in [*lower[:i], *lower[i + 1 :]])
    return lower[i] in _AMBIGUOUS_CONTRASTS and not alone and not any(before)


def _is_contrast(word: str) -> bool:
    try:
        return word != "scan" and parse_contrast(word) in CONTRASTS and parse_contrast(word) != UNKNOWN
    except UsageError:
        return False


def _label_column(lower: list[str], after_contrast: int | None) -> str | None:
    found = [i for i, word in enumerate(lower) if word in _LABEL_WORDS]
    lesions = [i for i, word in enumerate(lower) if word in _LESION_WORDS]
    # "lesion_001_T1" is a scan of a study on lesions; "001_T1_lesion" and "lesions" are outlines.
    if not found and not any(after_contrast is None or i >= after_contrast for i in lesions):
        return None
    if "brainmask" in lower or ("brain" in lower and found):
        return "brain_mask"
    if {"deface", "defaced", "defacing", "face", "anon", "anonymization"} & set(lower):
        return "deface_mask"
    return "dseg" if "dseg" in lower else "mask"


def _joined(name: str, words: list[tuple[str, int, int]], keep: list[int]) -> str:
    """The kept words with the separators that stood before them."""
    text = ""
    for i in keep:
        word, start, _ = words[i]
        text += (name[words[i - 1][2] : start] if text and i else "") + word
    return text


def parse_identifier(identifier: str) -> SubjectIdentity:
    """Person, visit and site of an identifier; without a known form all of it is the person.

    >>> parse_identifier("IXI002-Guys-0828")
    Person(subject='IXI002', session=None, site='Guys', certain=True)
    >>> parse_identifier("patient1_v2").session
    'v2'
    """
    for family in _FAMILIES:
        found = family.fullmatch(identifier)
        if found and not (family is _FAMILIES[-1] and could_be_subject(found["session"], found["subject"])):
            parts = found.groupdict()
            return SubjectIdentity(parts["subject"], parts.get("session"), parts.get("site"), certain=True)
    return SubjectIdentity(identifier, None, None, certain=False)


def is_visit(text: str) -> bool:
    """Whether a whole name is a word for a visit: ``ses-1``, ``baseline``, ``2019-03-01``."""
    return re.fullmatch(_VISIT, text, re.IGNORECASE) is not None


def could_be_subject(visit: str, before: str) -> bool:
    """Whether a short word for a visit is maybe a person's name, as ``HC_m01`` (a man) rather than ``p1_m01``.

    >>> could_be_subject("m01", "HC"), could_be_subject("m01", "p1"), could_be_subject("visit1", "HC")
    (True, False, False)
    """
    return _SHORT_VISIT.fullmatch(visit) is not None and not re.search(r"\d", before)


def prefix_before_visit(identifier: str) -> str | None:
    """``HC`` of ``HC_m01``, where the rest may be a visit or a person."""
    found = re.fullmatch(rf"(.+?)[_\-. ]{_SHORT_VISIT.pattern}", identifier, re.IGNORECASE)
    return found.group(1) if found and not re.search(r"\d", found.group(1)) else None


def is_contrast_name(text: str) -> bool:
    """Whether a whole name is that of a contrast."""
    return _is_contrast(re.sub(_SEPARATORS, "", text.lower()))


def is_repeat(identifier: str) -> bool:
    """Whether an identifier is a number of one or two digits, which below a person's folder counts repeats."""
    return re.fullmatch(r"\d{1,2}", identifier) is not None


def split_words(text: str) -> tuple[str, ...]:
    """The words between separators, in small letters."""
    return tuple(word for word in re.split(_SEPARATORS, text.lower()) if word)


IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz")
"""Endings of the files that a scan can be read from."""

DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")

UnusedFiles = list[tuple[Path, str]]
"""Files that are no scans of the cohort, each with the reason."""

_B_VALUE_SUFFIX = re.compile(r"(?:^|[_\-. ])b[-_]?(\d+)(?=$|[_\-. ])", re.IGNORECASE)
_LOOKED_AT = 20_000
MAX_B0_S_PER_MM2 = 5
"""An image of b ≤ 5 s/mm² is not diffusion-weighted but a b0 (the rule of FOMO300K)."""


def is_image(path: PurePath) -> bool:
    """Whether the name ends as an image does. Names that begin with a dot are copies' shadows, never images."""
    return path.name.lower().endswith(IMAGE_SUFFIXES) and not path.name.startswith(".")


def stem(path: PurePath) -> str:
    """The name without the ending of an image.

    >>> stem(PurePath("a/b.T1w.nii.gz"))
    'b.T1w'
    """
    name = path.name
    for ending in IMAGE_SUFFIXES:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return PurePath(name).stem


def natural_sort_key(text: object) -> tuple[tuple[int, int, str], ...]:
    """A sorting key in which run-2 comes before run-10."""
    parts = re.findall(r"\d+|\D+", str(text))
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts)


def iter_files(folder: Path, unused: UnusedFiles, *, without: Iterable[str] = ()) -> Iterator[Path]:
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
            (name for name in folders if not name.startswith(".") and not (first and name in skip)),
            key=natural_sort_key,
        )
        yield from (Path(here) / name for name in sorted(names, key=natural_sort_key) if not name.startswith("."))


def iter_images(folder: Path, unused: UnusedFiles, *, without: Iterable[str] = ()) -> Iterator[Path]:
    """The images of `iter_files`. A link to nothing (a file that was not downloaded) goes into ``unused``."""
    for file in iter_files(folder, unused, without=without):
        if not is_image(file):
            continue
        if file.is_file():
            yield file
        else:
            unused.append((file, "a link whose target is not there (download the file first)"))


def contains_image(folders: Iterable[Path]) -> bool:
    """Whether an image, downloaded or not, is among the first files below these folders; DICOM alone has none."""
    files = (file for folder in folders for file in iter_files(folder, []))
    return any(is_image(file) for file in islice(files, _LOOKED_AT))


def subfolders(folder: Path, pattern: str) -> list[Path]:
    """The folders directly below that match a pattern, in a fixed order."""
    return sorted(
        (child for child in folder.glob(pattern) if child.is_dir()), key=lambda child: natural_sort_key(child.name)
    )


def scan_contrast_from_filename(path: PurePath) -> str:
    """`contrast_from_filename`, except that a diffusion scan whose name says b ≤ 5 is of unknown contrast.

    >>> scan_contrast_from_filename(PurePath("dwi_b0.nii.gz")), scan_contrast_from_filename(PurePath("dwi_b1000.nii.gz"))
    ('unknown', 'DWI')
    """
    contrast = contrast_from_filename(path)
    b_value = _B_VALUE_SUFFIX.search(stem(path))
    if contrast == "DWI" and b_value and int(b_value.group(1)) <= MAX_B0_S_PER_MM2:
        return UNKNOWN
    return contrast


def safe_join(root: Path, relative: str, where: Path, line: object) -> Path:
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


def sanitise_name(text: object) -> str:
    """A name that can be part of a file name: no slashes and no blanks."""
    return re.sub(r"[\s/\\:]+", "-", str(text).strip()) or "unnamed"


class SubjectNamer:
    """``<dataset>_<participant>`` for sources in which participants' names repeat between data sets."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str]] = {}

    def __call__(self, dataset: object, participant: object) -> str:
        """The name; two different participants never get the same one.

        Raises:
            CohortError: two participants would have one name.
        """
        key = (str(dataset), str(participant))
        name = f"{sanitise_name(dataset)}_{sanitise_name(participant)}"
        if self._known.setdefault(name, key) != key:
            raise CohortError(
                "two subjects of different data sets would have one name", got=name, remedy="Write a manifest"
            )
        return name
