"""What the folders above an image say: groups of subjects, processing steps, contrasts and kinds of label maps.

What is left of a path may name the subject and the session: ``ADNI/002_S_0295/MP-RAGE/2006-04-18_08_20_30.0/I13722`` is
the subject ``002_S_0295`` at ``2006-04-18``, and a T1w.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

from brainfound.contrasts import UNKNOWN
from brainfound.data.sources.file_names import (
    is_contrast_name,
    label_column,
    parse_filename,
    read_scan_name,
    split_words,
    stem,
)
from brainfound.data.sources.identifiers import has_number, is_group, is_session_name, parse_identifier
from brainfound.data.sources.word_table import (
    AMBIGUOUS_WORDS,
    BRAIN_WORDS,
    CONTAINER_WORDS,
    DATA_SET_WORDS,
    DATA_TYPE_WORDS,
    FORM_WORDS,
    LABEL_QUALIFIERS,
    LABEL_WORDS,
    LESION_WORDS,
    PARCELLATIONS,
    SCANNER_WORDS,
    SITE_WORDS,
    STEP_RANKS,
    STRUCTURES,
)
from brainfound.data.sources.words import IN_DOUBT, PROTOCOL_WORDS

PLAIN_STEP = STEP_RANKS[""]
_LABEL_FOLDER_WORDS = LABEL_WORDS | LESION_WORDS | LABEL_QUALIFIERS | STRUCTURES.keys() | BRAIN_WORDS | CONTAINER_WORDS
_SUBJECT_WORD = re.compile(
    r"(?:sub|subj|subject|pat|patient|patients|proband|participant)[-_ ]?\d+[a-z]?|p\d{2,4}", re.IGNORECASE
)
"""A number that a word calls a person's; what lies above it are groups."""
_ARCHIVE_DATE = re.compile(r"(\d{4}-\d\d-\d\d)_\d\d_\d\d_\d\d\.\d+")
"""A visit in the archives of LONI (ADNI, PPMI, AIBL): its day and time."""
_ARCHIVE_IMAGE = re.compile(r"[IS]\d+")
_LONGITUDINAL = re.compile(r"(.+)\.long\.(.+)")
"""A visit of FreeSurfer's longitudinal stream, and the template of its subject."""
_TEMPLATE_WORD = re.compile(r"[._-](?:base|template)$", re.IGNORECASE)
_MAYBE_NAMES = AMBIGUOUS_WORDS | {"bravo", "swan", "resolve", "trace", "merge"}
"""Contrasts that may as well name a disease or a person, unless they lie in the folder of a subject."""
_TIME_POINT = re.compile(r"t(?:0|[3-9]|\d\d)", re.IGNORECASE)
_TEMPLATE_FOLDERS = ("fsaverage", "mni152", "icbm152", "mni_icbm152")
_SPM_MAP = re.compile(r"(?:s\d*)?(?:u_r[cp]\d|i?y_|wj_|[mwr0]{0,3}[cp]\d)(?=[^\W_]{2})(.+)")
_SPM_COPY = re.compile(r"(?:s\d*)?[mwr]{1,3}(?=[^\W_])(.+)")
"""Names of SPM's maps, and of its moved or corrected copies, before the name of the scan."""
SPM_MARK = re.compile(
    r"(?:s\d*)?(?:u_r[cp]\d|i?y_|wj_|[mwr][mwr0]{0,2}[cp][0-6](?=[a-zA-Z0-9])"
    r"|[cp][0-6](?=[a-zA-Z]{2}|[a-zA-Z]\d\d)|wm)"
)
"""How names of SPM's results may begin, where the scan itself is not there."""
_SPM_FOLDERS = {"mri", "report", "label", "surf"}


@dataclass(frozen=True)
class Folders:
    """What the folders of one image say."""

    groups: tuple[str, ...]
    """Folders of several subjects: data sets, parts, sites, scanners."""
    named: tuple[str, ...]
    """Folders that may name the subject and the session."""
    contrast: str = UNKNOWN
    reason: str = ""
    """Why a folder that names a contrast leaves doubt."""
    label_column: str | None = None
    step: str = ""
    """The folder of a processing step."""
    rank: int = PLAIN_STEP
    """The place of the step: of several copies of a scan, the one with the lowest comes first."""
    site: str | None = None


def find_templates(paths: Iterable[PurePath]) -> set[str]:
    """The folders of templates: public ones, and those of FreeSurfer's longitudinal stream (``p1_base``)."""
    parts = {part for path in paths for part in path.parts}
    bases = {match.group(2) for match in map(_LONGITUDINAL.fullmatch, parts) if match}
    return bases | {part for part in parts if part.lower().startswith(_TEMPLATE_FOLDERS)}


def find_results(images: Collection[Path]) -> dict[Path, Path]:
    """Images that SPM or CAT12 made of another, each with that image.

    Maps are known by the marks before the name (``c1p01_T1.nii`` next to ``p01_T1.nii``, or down in ``mri``).
    A moved copy (``mp01_T1.nii``) counts only if there are maps too: ``mp01`` may be another person.
    """
    known = {(image.parent, stem(image)): image for image in images}
    found: dict[Path, Path] = {}
    for pattern in (_SPM_MAP, _SPM_COPY):
        with_maps = set(found.values())
        for image in images:
            match = pattern.fullmatch(stem(image))
            inner = image.parent.name.lower() in _SPM_FOLDERS
            for folder in (image.parent, image.parent.parent) if inner and match else (image.parent,) * bool(match):
                origin = known.get((folder, match.group(1))) if match else None
                if origin and (pattern is _SPM_MAP or origin in with_maps):
                    found.setdefault(image, origin)
    return found


def read_folders(parts: Sequence[str], known: Collection[str]) -> Folders:
    """What the folders of an image say, from the outermost; `known` are the names of all folders of the source."""
    anchor = next((i for i, part in enumerate(parts) if _is_public(part)), None)
    if anchor is None:
        anchor = next((i for i, part in enumerate(parts) if _SUBJECT_WORD.fullmatch(part)), None)
    groups, named = list[str](), list[str]()
    contrast, reason, column, step, rank, site = UNKNOWN, "", None, "", PLAIN_STEP, None
    num_scanners = len({part.lower() for part in known if is_scanner(part)})
    for i, part in enumerate(parts):
        is_above = not named and (anchor is None or i < anchor)
        if match := _LONGITUDINAL.fullmatch(part):
            visit, base = match.group(1), _TEMPLATE_WORD.sub("", match.group(2))
            same = parse_identifier(visit).subject in (base, parse_identifier(base).subject)
            named += [visit] if same else [base, visit]
            step, rank = part, STEP_RANKS["long"]
        elif i == anchor:
            named.append(part)
        elif match := _ARCHIVE_DATE.fullmatch(part):
            named.append(match.group(1))
        elif i and _ARCHIVE_DATE.fullmatch(parts[i - 1]) and _ARCHIVE_IMAGE.fullmatch(part):
            continue
        elif named and i + 1 < len(parts) and _ARCHIVE_DATE.fullmatch(parts[i + 1]):
            continue  # the description of a series
        elif is_above and (is_scanner(part) or is_site(part)):
            groups.append(part)
            site = part
        elif is_scanner(part) and num_scanners == 1:
            continue
        elif (found := _step_rank(part, known)) is not None:
            step, rank = part, max(found, rank) if step else found
        elif folder_column := label_folder(part):
            column = folder_column
        elif names_contrast(part):
            own = read_scan_name(PurePath(_words_only(part)))
            if steps := [STEP_RANKS[word] for word in split_words(part) if word in STEP_RANKS]:
                step, rank = part, max(steps)
            may_name_a_group = _MAYBE_NAMES & set(split_words(part)) and not any(map(has_number, named))
            if own.contrast == UNKNOWN or may_name_a_group or _may_be_no_contrast(part, known):
                reason = reason or f"{IN_DOUBT}: the folder {part}/ may name a contrast, or not"
            else:
                differs = contrast not in (UNKNOWN, own.contrast)
                reason = f"{IN_DOUBT}: folders of {contrast} and of {own.contrast}" if differs else ""
                contrast = own.contrast
        elif is_container(part, inside=bool(named)) or (is_above and _is_data_set(part)):
            if not named and not set(split_words(part)) <= FORM_WORDS:
                groups.append(part)
        elif is_above and anchor is not None and not is_session_name(part):
            groups.append(part)
            site = part if is_group(part) else site
        else:
            named.append(part)
    return Folders(tuple(groups), tuple(named), contrast, reason, column, step, rank, site)


def _may_be_no_contrast(folder: str, known: Collection[str]) -> bool:
    """Whether ``T1`` may be a time point, since there is a ``T0`` or ``T3``, or the space of images (``in_T1``)."""
    words = split_words(folder)
    is_target = bool({"to", "onto", "in", "on", "space"} & set(words)) and sum(map(is_contrast_name, words)) < 2
    return is_target or (folder.lower() in ("t1", "t2") and any(map(_TIME_POINT.fullmatch, known)))


@lru_cache(maxsize=4096)
def _is_public(folder: str) -> bool:
    return parse_identifier(folder).certain


def is_container(folder: str, inside: bool = False) -> bool:
    """Whether a folder names nobody: ``data``, ``nifti``, a contrast, or ``anat_1`` inside a subject's folder."""
    if inside and re.sub(r"[-_ ]?\d{1,2}$", "", folder.lower()) in DATA_TYPE_WORDS:
        return True
    words = split_words(folder)
    return is_contrast_name(folder) or (bool(words) and all(w in CONTAINER_WORDS or is_contrast_name(w) for w in words))


def _is_data_set(folder: str) -> bool:
    """Whether a folder is named by a public data set, or called one: ``ADNI``, ``OAS2_RAW_PART1``, ``my_dataset``."""
    words = [word for word in split_words(folder) if not re.fullmatch(r"v?\d{1,2}|part\d", word)]
    known = DATA_SET_WORDS | CONTAINER_WORDS | STEP_RANKS.keys()
    named = bool(DATA_SET_WORDS & set(words)) and all(word in known for word in words)
    return named and not is_session_name(folder)


@lru_cache(maxsize=4096)
def is_scanner(folder: str) -> bool:
    """Whether a folder names scanners or field strengths only: ``Prisma``, ``3T``, ``GE_1.5T``."""
    words = split_words(
        re.sub(r"(?<!\d)(?:1[._]5|0[._]\d+|[3479])[-_ ]?t(?:esla)?(?![a-z0-9])|petmr_\d+", "tesla", folder.lower())
    )
    return bool(words) and all(word in SCANNER_WORDS for word in words)


def is_site(folder: str) -> bool:
    """Whether a folder names a site of a public study: ``Utrecht``, ``NYU``, ``Leuven_1``."""
    words = [word for word in split_words(folder) if not re.fullmatch(r"\d|[a-z]", word)]
    return bool(words) and SITE_WORDS & set(words) != set() and all(w in SITE_WORDS | DATA_SET_WORDS for w in words)


def _step_rank(folder: str, known: Collection[str]) -> int | None:
    words = (folder.lower(),) if folder.lower() in STEP_RANKS else split_words(folder)
    if words == ("pre",) and any(other.lower().startswith("post") for other in known):
        return None  # visits
    ranks = [STEP_RANKS[word] for word in words if word in STEP_RANKS]
    others = [word for word in words if word not in STEP_RANKS and word not in CONTAINER_WORDS]
    return max(ranks) if ranks and not others else None


def label_folder(folder: str) -> str | None:
    """The kind of label maps in a folder, by its words: ``brain_mask``, ``mask`` for ``lesion_masks``; or None."""
    words = [re.sub(r"(?<=masks|label)(?:tr|ts)$", "", word) for word in split_words(folder)]
    pieces = {piece for word in words for piece in re.sub(r"(?<=.)(masks?|labels?)$", r" \1", word).split()}
    named = DATA_SET_WORDS - PARCELLATIONS | {"roi", "rois"}
    pieces = {piece for piece in pieces if piece not in named and not is_contrast_name(piece)}
    if not pieces & LABEL_WORDS and not {"labelstr", "labelsts", "segmentations"} & pieces:
        return None
    return label_column("_".join(pieces - CONTAINER_WORDS)) if pieces <= _LABEL_FOLDER_WORDS else None


@lru_cache(maxsize=4096)
def names_contrast(folder: str) -> bool:
    """Whether a folder says a contrast and nothing else: ``T1``, ``imagesFLAIR``, ``IXI-T2``, ``Sagittal_3D_FLAIR``."""
    if _is_public(folder):
        return False
    name = parse_filename(PurePath(_words_only(folder)))
    if name.label_column or (name.contrast == UNKNOWN and not is_contrast_name(folder)):
        return False
    left = [re.sub(r"(?<=[a-z])\d$", "", word) for word in split_words(name.identifier)]
    return all(word in PROTOCOL_WORDS | CONTAINER_WORDS | DATA_SET_WORDS for word in left)


def _words_only(folder: str) -> str:
    """Without ``images`` and the like, with an ending as for the name of a file: ``imagesT1`` as ``T1.nii``."""
    divided = re.sub(r"^(images?|imgs?|scans?)(?=[A-Z0-9])", r"\1_", folder)
    words = [word for word in re.split(r"[_\-. ]+", divided) if word.lower() not in CONTAINER_WORDS]
    return ("_".join(words) or folder) + ".nii"


def find_time_points(images: Iterable[Path]) -> dict[Path, Path]:
    """Other paths of images whose folders ``T1`` and ``T2`` are visits, since names repeat them before a contrast.

    ``P1/T1/P1_T1_FLAIR.nii.gz`` next to ``P1_T1_T2.nii.gz`` reads as ``P1/tp1/P1_FLAIR.nii.gz``.
    """
    named: dict[Path, dict[Path, str]] = defaultdict(dict)
    for image in images:
        folder = image.parent.name
        if re.fullmatch(r"[tT]\d", folder):
            match = re.match(rf"(.*?)(?<![^\W_]){folder}[_-](?=([^\W_]+))", stem(image), re.IGNORECASE)
            if match:
                named[image.parent][image] = match.group(2).lower()
    paths = {}
    for parent, words in named.items():
        if sum(is_contrast_name(word) for word in set(words.values())) > 1:
            for image in words:
                name = re.sub(rf"(?<![^\W_]){parent.name}[_-]", "", image.name, count=1, flags=re.IGNORECASE)
                paths[image] = parent.with_name(f"tp{parent.name[1:]}") / name
    return paths
