"""A plain folder of files whose names say the contrast: ``folder/[<subject>/[<session>/]]*.nii.gz``.

Who is who is read from names, and a mistake would let one person be in training and test. So whatever leaves doubt
is an error that asks for a manifest.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.cohort import Cohort
from brainfound.data.sources.dicom_series import is_dicom
from brainfound.data.sources.file_names import (
    DICOM_SUFFIXES,
    FileName,
    SubjectIdentity,
    UnusedFiles,
    could_be_subject,
    is_contrast_name,
    is_repeat,
    is_visit,
    iter_files,
    iter_images,
    natural_sort_key,
    parse_filename,
    parse_identifier,
    prefix_before_visit,
    split_words,
)
from brainfound.data.sources.tables import join_label_maps
from brainfound.errors import CohortError

NAME = "files by name"
LAYOUT_HINT = "images whose names say the contrast (p1_T1.nii.gz, p1/flair.nii.gz)"
_SKIPPED_FOLDERS = {
    *("anat", "brains", "data", "dataset", "derivatives", "dicom", "gz", "hgg", "images"),
    *("imagestr", "imagests", "img", "lgg", "label", "labels", "labelstr", "labelsts", "mask"),
    *("masks", "mr", "mri", "nifti", "niftis", "nii", "raw", "scans", "seg"),
    *("segmentations", "test", "testing", "train", "training", "val", "validation"),
}
"""Folders that are no subject, whatever lies in them; folders named by a contrast are none either."""
_LABEL_FOLDERS = {"label", "labels", "labelstr", "labelsts", "mask", "masks", "seg", "segmentations"}
_SPLITS = {
    **dict.fromkeys(("train", "training", "imagestr", "labelstr"), "train"),
    **dict.fromkeys(("test", "testing", "imagests", "labelsts"), "test"),
    **dict.fromkeys(("val", "validation"), "val"),
}
_GROUP = re.compile(
    r"(?:site|cent(?:er|re)|hospital|scanner|group|batch|cohort|part|fold|set)[_\-]?(?:\d+|[a-z])?", re.IGNORECASE
)


@dataclass(frozen=True)
class _File:
    path: Path
    outer: tuple[str, ...]
    """Folders above that of the person; they say nothing of him."""
    folders: tuple[str, ...]
    name: FileName


def can_read(path: Path) -> bool:
    """A folder in which the name of an image says a contrast."""
    return path.is_dir() and any(parse_filename(file).contrast != UNKNOWN for file in iter_images(path, []))


def read(path: Path, work: Path | None = None) -> Cohort:
    """Scans and label maps by name. Names of public sets and words for a visit (v2, ses-1, baseline) are known.

    Raises:
        CohortError: it cannot be told which files are of one person.
    """
    unused: UnusedFiles = []
    files = []
    for file in _images(path, unused):
        name = parse_filename(file)
        above = {part.lower() for part in file.relative_to(path).parts[:-1]}
        if above & _LABEL_FOLDERS and name.label_column is None:
            name = replace(name, contrast=UNKNOWN, label_column="mask")
        if name.contrast == UNKNOWN and name.label_column is None:
            unused.append((file, "no known contrast in the name"))
            continue
        parts = file.relative_to(path).parts[:-1]
        folders = tuple(part for part in parts if not _is_skipped_folder(part))
        outer = parts[: parts.index(folders[0])] if folders else parts
        if folders and is_repeat(name.identifier):  # p1/T1_2.nii.gz
            name = replace(name, identifier="")
        files.append(_File(file, outer, folders, name))
    persons = _identify_subjects(path, files)
    _require_unique_scans(files, persons)
    _require_unambiguous(
        [person for file, person in zip(files, persons, strict=True) if file.name.label_column is None]
    )
    rows: list[dict[str, Any]] = [
        {
            "subject": person.subject,
            "session": person.session or "1",
            "contrast": file.name.contrast,
            "path": str(file.path),
            "site": person.site,
            "_order": (natural_sort_key(person.subject), natural_sort_key(person.session or "1"), file.name.order),
        }
        for file, person in zip(files, persons, strict=True)
        if file.name.label_column is None
    ]
    rows.sort(key=lambda row: row["_order"])
    table = pd.DataFrame(rows).drop(columns="_order")
    columns = _join_label_maps(table, files, persons, unused)
    notes = ["subjects and visits were read from names; write a manifest where that is wrong"]
    return Cohort(table, path, columns, source=NAME, notes=notes, unused=unused)


def _images(path: Path, unused: UnusedFiles) -> Iterator[Path]:
    yield from iter_images(path, unused)
    # DICOM files often have no ending, or the end of a number (1.2.840.113); other files need not be opened.
    maybe = (file for file in iter_files(path, []) if re.fullmatch(r"(?:\.\d*)?", file.suffix) or _ends_as_dicom(file))
    unused.extend((file, "DICOM beside images is not read") for file in maybe if is_dicom(file))


def _ends_as_dicom(file: Path) -> bool:
    return file.suffix.lower() in DICOM_SUFFIXES


def _is_skipped_folder(folder: str) -> bool:
    return folder.lower() in _SKIPPED_FOLDERS or is_contrast_name(folder)


def _identify_subjects(root: Path, files: list[_File]) -> list[SubjectIdentity]:
    depth = {len(file.folders) for file in files}
    if len(depth) > 1:
        _refuse("the images lie at different depths", " and ".join(f"{d} folders down" for d in sorted(depth)))
    if depth == {0}:
        return _subjects_from_names(root, files)
    if depth == {1}:
        return _subjects_from_folders(files)
    if depth == {2}:
        return [_subject_from_two_folders(file) for file in files]
    _refuse("the images lie too deep", f"{'/'.join(files[0].folders)}/")


def _subjects_from_names(root: Path, files: list[_File]) -> list[SubjectIdentity]:
    empty = [not file.name.identifier for file in files]
    if all(empty):  # t1.nii.gz, flair.nii.gz: the folder is the person
        return [_subject_from_root(root.resolve())] * len(files)
    if any(empty):
        _refuse("some names say a subject and others none", files[empty.index(True)].path.name)
    visits = [is_visit(file.name.identifier) and not could_be_subject(file.name.identifier, "") for file in files]
    if any(visits):  # ses-1_T1.nii.gz, ses-2_T1.nii.gz
        if not all(visits):
            _refuse("some names say a subject and others a visit only", files[visits.index(True)].path.name)
        person = _subject_from_root(root.resolve())
        if person.session or not re.search(r"\d", person.subject):
            _refuse("the names say visits, and the folder no subject", root.resolve().name)
        return [replace(person, session=file.name.identifier) for file in files]
    return [parse_identifier(file.name.identifier) for file in files]


def _subject_from_root(root: Path) -> SubjectIdentity:
    """The person whose folder was given; in ``p1/ses-1/anat`` it is two folders up."""
    visit = None
    for folder in (root, *root.parents[:2]):
        if is_visit(folder.name) and not visit:
            visit = folder.name
        elif not _is_skipped_folder(folder.name):
            if folder != root and not re.search(r"\d", folder.name):
                break
            person = parse_identifier(folder.name)
            return replace(person, session=visit or person.session)
    _refuse("the files and their folder name no subject", root.name)


def _subjects_from_folders(files: list[_File]) -> list[SubjectIdentity]:
    """A folder per subject, with or without its name in the files; or groups of files that name their subjects."""
    foreign: dict[str, set[str]] = defaultdict(set)
    for file in files:
        if file.name.label_column is None and not _matches_folder(file.name.identifier, file.folders[0]):
            foreign[file.folders[0]].add(file.name.identifier)
    by_name = any(len(found) > 1 for found in foreign.values())
    homes: dict[str, set[str]] = defaultdict(set)
    for folder, found in foreign.items():
        for identifier in found:
            if by_name or re.search(r"\d", identifier):  # a word in every folder (brain_T1) is no person
                homes[parse_identifier(identifier).subject].add(folder)
    shared = [subject for subject, folders in homes.items() if len(folders) > 1]
    if shared:
        _refuse("files of one name lie in several folders", f"{shared[0]!r} in {', '.join(sorted(homes[shared[0]]))}")
    persons = []
    for file in files:
        folder, identifier = file.folders[0], file.name.identifier
        if by_name:
            if identifier not in foreign[folder] and file.name.label_column is None:
                _refuse("some files are named by their subject and others by their folder", file.path.name)
            persons.append(parse_identifier(identifier))
        elif is_visit(identifier):
            if could_be_subject(identifier, "" if _GROUP.fullmatch(folder) else folder):
                _refuse("it cannot be told whether names are visits or subjects", f"{folder}/{file.path.name}")
            persons.append(SubjectIdentity(parse_identifier(folder).subject, identifier, None, certain=True))
        else:
            longer = max((folder, identifier if _matches_folder(identifier, folder) else ""), key=len)
            persons.append(parse_identifier(longer))
    return persons


def _subject_from_two_folders(file: _File) -> SubjectIdentity:
    """``<subject>/<session>/``; or ``site1/<subject>/`` where the upper folder has a word for a group."""
    upper, lower = file.folders
    person, below = parse_identifier(upper), parse_identifier(lower)
    identifier = file.name.identifier
    if not (_matches_folder(identifier, lower) or _matches_folder(identifier, upper) or is_visit(identifier)):
        _refuse("a file names another subject than its folders", f"{upper}/{lower}/{file.path.name}")
    if _GROUP.fullmatch(upper) and not is_visit(lower) and not lower.isdecimal():
        return SubjectIdentity(below.subject, below.session, below.site or upper, certain=True)
    numbered = lower.isdecimal() and re.search(r"\d", upper) and not _GROUP.fullmatch(upper)
    if is_visit(lower) and could_be_subject(lower, "" if _GROUP.fullmatch(upper) else upper):
        _refuse("it cannot be told whether folders are visits or subjects", f"{upper}/{lower}/")
    if is_visit(lower) or numbered:
        return SubjectIdentity(person.subject, lower, person.site, certain=True)
    if below.session and below.subject.lower() in (upper.lower(), person.subject.lower()):
        return SubjectIdentity(below.subject, below.session, below.site, certain=True)
    if lower == upper:
        return person
    _refuse("it cannot be told whether folders are visits or subjects", f"{upper}/{lower}/")


def _matches_folder(identifier: str, folder: str) -> bool:
    """Whether a name can be one of its folder: no name, a visit, or one begins with the words of the other."""
    name, home = split_words(identifier), split_words(folder)
    shorter = min(len(name), len(home))
    return not name or is_visit(identifier) or name[:shorter] == home[:shorter]


def _require_unambiguous(persons: list[SubjectIdentity]) -> None:
    """Names that may be two persons, or two visits of one person, are not guessed at."""
    subjects = sorted({person.subject for person in persons}, key=natural_sort_key)
    uncertain = sorted({person.subject for person in persons if not person.certain}, key=natural_sort_key)
    by_letters: dict[str, str] = {}
    for subject in subjects:
        other = by_letters.setdefault(subject.lower(), subject)
        if other != subject:
            _refuse("two subjects differ in capital letters only", f"{other} and {subject}")
    by_start: dict[str, str] = {}
    for subject in uncertain:
        start = prefix_before_visit(subject)
        other = subject if start is None else by_start.setdefault(start.lower(), subject)
        if other != subject:
            _refuse("they may be two subjects or two visits of one", f"{other} and {subject}")
    by_words = {split_words(subject): subject for subject in subjects}
    by_rest: dict[tuple[str, ...], str] = {}
    for subject in uncertain:
        words = split_words(subject)
        if words and words[-1] in ("pre", "post"):
            _refuse("pre and post may mean visits or a contrast agent", subject)
        for length in range(1, len(words)):
            if words[:length] in by_words:
                _refuse("one name begins with another", f"{by_words[words[:length]]} and {subject}")
        rest = words[:-1]
        if rest and re.search(r"\d", words[-1]) and _could_be_subject(rest[-1]):
            other = by_rest.setdefault(rest, subject)
            if other != subject:
                _refuse("they may be two subjects or two visits of one", f"{other} and {subject}")


def _require_unique_scans(files: list[_File], persons: list[SubjectIdentity]) -> None:
    """``train/001_T1`` and ``test/001_T1`` may be two persons, ``raw/p1_T1`` and ``derivatives/p1_T1`` one scan."""
    outer_of: dict[tuple[str, str, str], tuple[str, ...]] = {}
    split_of: dict[str, str] = {}
    for file, person in zip(files, persons, strict=True):
        for split in {_SPLITS[part.lower()] for part in file.outer if part.lower() in _SPLITS}:
            if split_of.setdefault(person.subject, split) != split:
                _refuse("one name is in training and in test or validation", person.subject)
        if file.name.label_column is None:
            key = (person.subject, person.session or "1", file.name.contrast)
            other = outer_of.setdefault(key, file.outer)
            if other != file.outer:
                folders = " and ".join(f"{'/'.join(outer)}/" for outer in (other, file.outer))
                _refuse("the same scan of one name lies in several folders", f"{person.subject!r} in {folders}")


def _could_be_subject(word: str) -> bool:
    """Whether a word with a number can be a person's name rather than a group's (``site1``)."""
    return re.search(r"\d$", word) is not None and not _GROUP.fullmatch(word)


def _refuse(what: str, got: str) -> NoReturn:
    raise CohortError(
        f"the subjects cannot be told from the names: {what}",
        got=got,
        remedy="Write a manifest with the columns subject, session, contrast, path",
    )


def _join_label_maps(
    table: pd.DataFrame, files: list[_File], persons: list[SubjectIdentity], unused: UnusedFiles
) -> tuple[str, ...]:
    pairs = sorted(
        zip(files, persons, strict=True), key=lambda pair: (pair[0].name.order, natural_sort_key(pair[0].path))
    )
    found = [
        (file.name.label_column, (person.subject, person.session or "1"), file.path)
        for file, person in pairs
        if file.name.label_column is not None
    ]
    return join_label_maps(table, found, unused)
