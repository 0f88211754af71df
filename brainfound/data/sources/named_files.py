"""A plain folder of images with the contrast in their names: ``folder/[<subject>/[<session>/]]*.nii.gz``.

Subjects and sessions are read from names of files and folders. A mistake would put one person into both training and
test, so every ambiguity is an error that asks for a manifest.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.sources.dicom_series import is_dicom
from brainfound.data.sources.file_names import (
    DICOM_SUFFIXES,
    FileName,
    SubjectIdentity,
    UnusedFiles,
    could_be_subject,
    describe_label_map,
    is_contrast_name,
    is_session_name,
    iter_files,
    iter_images,
    natural_sort_key,
    parse_filename,
    parse_identifier,
    prefix_before_session,
    split_words,
)
from brainfound.data.sources.tables import (
    LabelMapRow,
    SessionKey,
    SourceLayout,
    SourceTable,
    join_label_maps,
    sort_by_session,
)
from brainfound.data.sources.words import IN_DOUBT
from brainfound.errors import CohortError

_SKIPPED_FOLDERS = {
    *("anat", "brains", "data", "dataset", "derivatives", "dicom", "gz", "hgg", "images"),
    *("imagestr", "imagests", "img", "lgg", "label", "labels", "labelstr", "labelsts", "mask"),
    *("masks", "mr", "mri", "nifti", "niftis", "nii", "raw", "scans", "seg"),
    *(
        "segmentations",
        "fast",
        "first",
        "sienax",
        "vbm",
        "transforms",
        "lesions",
        "test",
        "testing",
        "train",
        "training",
        "val",
        "validation",
    ),
}
"""Folders that never name a subject; folders named after a contrast do not either."""
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
    """Folders above the subject's folder."""
    folders: tuple[str, ...]
    """Folders that may name the subject and the session."""
    name: FileName

    @property
    def is_scan(self) -> bool:
        return self.name.label_column is None


def can_read(path: Path) -> bool:
    """Whether a folder has an image whose name states a contrast, or leaves doubt about it."""
    return path.is_dir() and any(_says_contrast(parse_filename(file)) for file in iter_images(path, []))


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read scans and label maps by name; names of public data sets and session words (v2, baseline) are recognised."""
    unused: UnusedFiles = []
    files = []
    for image in iter_images(path, unused):
        file = _describe(path, image)
        if file.is_scan and file.name.contrast == UNKNOWN:
            unused.append((image, file.name.reason))
        else:
            files.append(file)
    if not any(file.is_scan for file in files):
        reason = next(reason for file, reason in unused if _says_contrast(parse_filename(file)))
        remedy = "Write a manifest with the columns subject, session, contrast, path"
        raise CohortError("no name states the contrast of its image", where=path.name, got=reason, remedy=remedy)
    # DICOM files often have no suffix or a numeric one (1.2.840.113); other files need not be opened.
    maybe_dicom = (
        file
        for file in iter_files(path, [])
        if re.fullmatch(r"(?:\.\d*)?", file.suffix) or file.suffix.lower() in DICOM_SUFFIXES
    )
    unused += [(file, "DICOM beside images is not read") for file in maybe_dicom if is_dicom(file)]
    identified = list(zip(files, _identify_subjects(path, files), strict=True))
    _require_unique_scans(identified)
    _require_unambiguous([subject for file, subject in identified if file.is_scan])
    rows: list[dict[str, Any]] = []
    label_maps: list[LabelMapRow] = []
    for file, subject in sorted(identified, key=lambda pair: (pair[0].name.order, natural_sort_key(pair[0].path))):
        key = (subject.subject, subject.session or "1")
        if file.name.label_column is None:
            row = {"subject": key[0], "session": key[1], "contrast": file.name.contrast}
            rows.append({**row, "path": str(file.path), "site": subject.site})
        else:
            label_maps.append((file.name.label_column, key, file.path))
    sort_by_session(rows, lambda file: parse_filename(file).order)
    table = pd.DataFrame(rows)
    columns = join_label_maps(table, label_maps, unused)
    doubts = Counter(reason for _, reason in unused if reason.startswith(IN_DOUBT))
    notes = [f"{count} images are not used, {reason}; a manifest can say it" for reason, count in doubts.items()]
    notes += _notes_on_label_maps(label_maps)
    notes += ["subjects and visits were read from names; write a manifest if that is wrong"]
    return SourceTable(table, path, LAYOUT.name, columns, notes, unused)


LAYOUT = SourceLayout(
    "files by name", "images whose names say the contrast (p1_T1.nii.gz, p1/flair.nii.gz)", can_read, read
)


def _says_contrast(name: FileName) -> bool:
    return name.label_column is None and not name.is_silent


def _notes_on_label_maps(label_maps: list[LabelMapRow]) -> list[str]:
    """A note for each choice between label maps of a session that show different things."""
    first: dict[tuple[str, SessionKey], str] = {}
    choices: Counter[tuple[str, str, str]] = Counter()
    for column, key, file in label_maps:
        shown = describe_label_map(file)
        taken = first.setdefault((column, key), shown)
        choices[column, taken, shown] += taken != shown
    return [
        f"{column}: {taken!r} is used and not {other!r} of the same session ({count} times)"
        for (column, taken, other), count in choices.items()
        if count
    ]


def _describe(root: Path, image: Path) -> _File:
    name = parse_filename(image)
    parts = image.relative_to(root).parts[:-1]
    if name.label_column is None and any(part.lower() in _LABEL_FOLDERS for part in parts):
        name = replace(name, contrast=UNKNOWN, label_column="mask")
    folders = tuple(part for part in parts if not _is_skipped_folder(part))
    outer = parts[: parts.index(folders[0])] if folders else parts
    if folders and re.fullmatch(r"\d{1,2}", name.identifier):  # a repeat number: p1/T1_2.nii.gz
        name = replace(name, identifier="")
    return _File(image, outer, folders, name)


def _is_skipped_folder(folder: str) -> bool:
    return is_contrast_name(folder) or all(
        word in _SKIPPED_FOLDERS or is_contrast_name(word) for word in split_words(folder)
    )


def _identify_subjects(root: Path, files: list[_File]) -> list[SubjectIdentity]:
    depths = {len(file.folders) for file in files}
    if len(depths) > 1:
        _refuse("the images lie at different depths", " and ".join(f"{depth} folders down" for depth in sorted(depths)))
    if depths == {0}:
        return _subjects_from_names(root, files)
    if depths == {1}:
        return _subjects_from_folders(files)
    if depths == {2}:
        return [_subject_from_two_folders(file) for file in files]
    _refuse("the images lie too deep", f"{'/'.join(files[0].folders)}/")


def _subjects_from_names(root: Path, files: list[_File]) -> list[SubjectIdentity]:
    empty = [not file.name.identifier for file in files]
    if all(empty):  # t1.nii.gz, flair.nii.gz: the folder is the subject
        return [_subject_from_root(root.resolve())] * len(files)
    if any(empty):
        _refuse("some names say a subject and others none", files[empty.index(True)].path.name)
    sessions = [
        is_session_name(file.name.identifier) and not could_be_subject(file.name.identifier, "") for file in files
    ]
    if any(sessions):  # ses-1_T1.nii.gz, ses-2_T1.nii.gz
        if not all(sessions):
            _refuse("some names say a subject and others a visit only", files[sessions.index(True)].path.name)
        subject = _subject_from_root(root.resolve())
        if subject.session or not re.search(r"\d", subject.subject):
            _refuse("the names say visits, and the folder no subject", root.resolve().name)
        return [replace(subject, session=file.name.identifier) for file in files]
    return [parse_identifier(file.name.identifier) for file in files]


def _subject_from_root(root: Path) -> SubjectIdentity:
    """The subject whose folder was given; for ``p1/ses-1/anat`` its name is two folders up."""
    session = None
    for folder in (root, *root.parents[:2]):
        if is_session_name(folder.name) and not session:
            session = folder.name
        elif not _is_skipped_folder(folder.name):
            if folder != root and not re.search(r"\d", folder.name):
                break
            subject = parse_identifier(folder.name)
            return replace(subject, session=session or subject.session)
    _refuse("the files and their folder name no subject", root.name)


def _subjects_from_folders(files: list[_File]) -> list[SubjectIdentity]:
    """Either each folder is a subject, whether or not its files repeat the name, or the files name their subjects."""
    foreign: dict[str, set[str]] = defaultdict(set)  # identifiers that do not match their folder
    for file in files:
        if file.is_scan and not _matches_folder(file.name.identifier, file.folders[0]):
            foreign[file.folders[0]].add(file.name.identifier)
    by_name = any(len(identifiers) > 1 for identifiers in foreign.values())
    subject_folders: dict[str, set[str]] = defaultdict(set)
    for folder, identifiers in foreign.items():
        for identifier in identifiers:
            if by_name or re.search(r"\d", identifier):  # a word in every folder (brain_T1) is not a subject
                subject_folders[parse_identifier(identifier).subject].add(folder)
    for name, folders in subject_folders.items():
        if len(folders) > 1:
            _refuse("files of one name lie in several folders", f"{name!r} in {', '.join(sorted(folders))}")
    subjects = []
    for file in files:
        folder, identifier = file.folders[0], file.name.identifier
        if by_name:
            if identifier not in foreign[folder] and file.is_scan:
                _refuse("some files are named by their subject and others by their folder", file.path.name)
            subjects.append(parse_identifier(identifier))
        elif is_session_name(identifier):
            if could_be_subject(identifier, "" if _GROUP.fullmatch(folder) else folder):
                _refuse("the names of files may be visits or subjects", f"{folder}/{file.path.name}")
            subjects.append(SubjectIdentity(parse_identifier(folder).subject, identifier, None, certain=True))
        else:
            longer = max((folder, identifier if _matches_folder(identifier, folder) else ""), key=len)
            subjects.append(parse_identifier(longer))
    return subjects


def _subject_from_two_folders(file: _File) -> SubjectIdentity:
    """``<subject>/<session>/``, or ``site1/<subject>/`` if the upper folder names a group."""
    upper, lower = file.folders
    above, below = parse_identifier(upper), parse_identifier(lower)
    identifier = file.name.identifier
    is_group, is_session = _GROUP.fullmatch(upper) is not None, is_session_name(lower)
    if not (_matches_folder(identifier, lower) or _matches_folder(identifier, upper)):
        _refuse("a file names another subject than its folders", f"{upper}/{lower}/{file.path.name}")
    if is_group and not is_session and not lower.isdecimal():
        return SubjectIdentity(below.subject, below.session, below.site or upper, certain=True)
    if is_session and could_be_subject(lower, "" if is_group else upper):
        _refuse("the folders may be visits or subjects", f"{upper}/{lower}/")
    if is_session or (lower.isdecimal() and re.search(r"\d", upper) and not is_group):
        return SubjectIdentity(above.subject, lower, above.site, certain=True)
    if below.session and below.subject.lower() in (upper.lower(), above.subject.lower()):
        return SubjectIdentity(below.subject, below.session, below.site, certain=True)
    if lower == upper:
        return above
    _refuse("the folders may be visits or subjects", f"{upper}/{lower}/")


def _matches_folder(identifier: str, folder: str) -> bool:
    """Whether an identifier fits its folder: it is empty or a session, or one begins with the words of the other."""
    name, home = split_words(identifier), split_words(folder)
    shorter = min(len(name), len(home))
    return not name or is_session_name(identifier) or name[:shorter] == home[:shorter]


def _require_unambiguous(identities: list[SubjectIdentity]) -> None:
    """Refuse names that may be two subjects or two sessions of one subject."""
    subjects = sorted({identity.subject for identity in identities}, key=natural_sort_key)
    uncertain = sorted({identity.subject for identity in identities if not identity.certain}, key=natural_sort_key)
    by_letters: dict[str, str] = {}
    for subject in subjects:
        other = by_letters.setdefault(subject.lower(), subject)
        if other != subject:
            _refuse("two subjects differ in capital letters only", f"{other} and {subject}")
    by_prefix: dict[str, str] = {}
    for subject in uncertain:
        prefix = prefix_before_session(subject)
        other = subject if prefix is None else by_prefix.setdefault(prefix.lower(), subject)
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
        rest = words[:-1]  # "p1" of "p1_2": a subject's name with a number, or a group's such as "site1"
        if rest and re.search(r"\d", words[-1]) and re.search(r"\d$", rest[-1]) and not _GROUP.fullmatch(rest[-1]):
            other = by_rest.setdefault(rest, subject)
            if other != subject:
                _refuse("they may be two subjects or two visits of one", f"{other} and {subject}")


def _require_unique_scans(identified: list[tuple[_File, SubjectIdentity]]) -> None:
    """Refuse a name in two folders: ``train/p1`` and ``test/p1`` may be two subjects, ``raw/p1`` and ``reg/p1`` one."""
    outer_folders: dict[tuple[str, str, str], tuple[str, ...]] = {}
    splits: dict[str, str] = {}
    for file, subject in identified:
        for split in {_SPLITS[part.lower()] for part in file.outer if part.lower() in _SPLITS}:
            if splits.setdefault(subject.subject, split) != split:
                _refuse("one name is in training and in test or validation", subject.subject)
        if file.is_scan:
            key = (subject.subject, subject.session or "1", file.name.contrast)
            other = outer_folders.setdefault(key, file.outer)
            if other != file.outer:
                folders = " and ".join(f"{'/'.join(outer)}/" for outer in (other, file.outer))
                _refuse("the same scan of one name lies in several folders", f"{subject.subject!r} in {folders}")


def _refuse(what: str, got: str) -> NoReturn:
    remedy = "Write a manifest with the columns subject, session, contrast, path"
    raise CohortError(f"the names do not identify the subjects: {what}", got=got, remedy=remedy)
