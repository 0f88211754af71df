"""What the name of a file says where no standard does: contrast, label map, person, visit.

``BraTS-GLI-00000-001-t1c.nii.gz`` is a T1ce of the person ``BraTS-GLI-00000`` at the visit ``001``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from brainfound.contrasts import CONTRASTS, UNKNOWN, parse_contrast
from brainfound.data.sources.folders import contrast_of_name, in_order, stem
from brainfound.errors import UsageError

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
_DOUBTFUL = {"pd", "md", "fl"}
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
class Person:
    """The person and the visit that an identifier names."""

    subject: str
    session: str | None
    site: str | None
    certain: bool
    """Whether the identifier has a known form."""


def read_name(path: PurePath) -> FileName:
    """Contrast, label map and identifier of a file's name.

    >>> read_name(PurePath("BraTS2021_00000_t1ce.nii.gz")).identifier, read_name(PurePath("p1_flair_seg.nii")).contrast
    ('BraTS2021_00000', 'unknown')
    """
    name = stem(path)
    words = [(found.group(), found.start(), found.end()) for found in re.finditer(r"[^_\-. ]+", name)]
    lower = [word.lower() for word, _, _ in words]
    doubtful = {i for i in range(len(lower)) if _is_doubtful(lower, i)}
    first, last = _contrast_words([_NO_CONTRAST if i in doubtful else word for i, word in enumerate(lower)])
    read = PurePath("_".join(word for i, (word, _, _) in enumerate(words) if i not in doubtful)) if doubtful else path
    contrast = contrast_of_name(read) if first < last else UNKNOWN
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
    return FileName(contrast, column, _joined(name, words, rest), (further, in_order(name)))


def _contrast_words(lower: list[str]) -> tuple[int, int]:
    """First and past-the-last word of the contrast: two neighbouring words before one, the last match first."""
    for width in (2, 1):
        for end in range(len(lower), width - 1, -1):
            if _is_contrast("".join(lower[end - width : end])):
                return end - width, end
    return len(lower), len(lower)


def _is_doubtful(lower: list[str], i: int) -> bool:
    before = (re.search(r"\d", word) and not _is_contrast(word) for word in lower[:i])
    alone = all(word in _VARIANTS | _LABEL_WORDS for word in [*lower[:i], *lower[i + 1 :]])
    return lower[i] in _DOUBTFUL and not alone and not any(before)


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


def person_of(identifier: str) -> Person:
    """Person, visit and site of an identifier; without a known form all of it is the person.

    >>> person_of("IXI002-Guys-0828")
    Person(subject='IXI002', session=None, site='Guys', certain=True)
    >>> person_of("patient1_v2").session
    'v2'
    """
    for family in _FAMILIES:
        found = family.fullmatch(identifier)
        if found and not (family is _FAMILIES[-1] and may_be_a_person(found["session"], found["subject"])):
            parts = found.groupdict()
            return Person(parts["subject"], parts.get("session"), parts.get("site"), certain=True)
    return Person(identifier, None, None, certain=False)


def is_visit(text: str) -> bool:
    """Whether a whole name is a word for a visit: ``ses-1``, ``baseline``, ``2019-03-01``."""
    return re.fullmatch(_VISIT, text, re.IGNORECASE) is not None


def may_be_a_person(visit: str, before: str) -> bool:
    """Whether a short word for a visit is maybe a person's name, as ``HC_m01`` (a man) rather than ``p1_m01``.

    >>> may_be_a_person("m01", "HC"), may_be_a_person("m01", "p1"), may_be_a_person("visit1", "HC")
    (True, False, False)
    """
    return _SHORT_VISIT.fullmatch(visit) is not None and not re.search(r"\d", before)


def before_a_short_visit(identifier: str) -> str | None:
    """``HC`` of ``HC_m01``, where the rest may be a visit or a person."""
    found = re.fullmatch(rf"(.+?)[_\-. ]{_SHORT_VISIT.pattern}", identifier, re.IGNORECASE)
    return found.group(1) if found and not re.search(r"\d", found.group(1)) else None


def is_contrast_name(text: str) -> bool:
    """Whether a whole name is that of a contrast."""
    return _is_contrast(re.sub(_SEPARATORS, "", text.lower()))


def is_repeat(identifier: str) -> bool:
    """Whether an identifier is a number of one or two digits, which below a person's folder counts repeats."""
    return re.fullmatch(r"\d{1,2}", identifier) is not None


def words_of(text: str) -> tuple[str, ...]:
    """The words between separators, in small letters."""
    return tuple(word for word in re.split(_SEPARATORS, text.lower()) if word)
