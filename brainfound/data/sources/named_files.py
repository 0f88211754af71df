"""A plain folder of images with the contrast in their names: ``folder/[<subject>/[<session>/]]*.nii.gz``.

Subjects and sessions are read from names of files and folders. A mistake would put one person into both training and
test, so every ambiguity is an error that asks for a manifest.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.reading.image_names import stem
from brainfound.data.sources.dicom_series import is_dicom
from brainfound.data.sources.file_names import (
    DICOM_SUFFIXES,
    FileName,
    UnusedFiles,
    is_contrast_name,
    iter_files,
    iter_images,
    parse_filename,
    split_words,
)
from brainfound.data.sources.folders import (
    find_results,
    find_templates,
    find_time_points,
    is_container,
    label_folder,
    names_contrast,
    read_folders,
)
from brainfound.data.sources.identifiers import (
    YEAR,
    SubjectIdentity,
    could_be_subject,
    has_number,
    is_group,
    is_long_number,
    is_session_name,
    parse_identifier,
)
from brainfound.data.sources.named_file import NamedFile, describe_file, without_words
from brainfound.data.sources.persons import find_doubt
from brainfound.data.sources.tables import LabelMapRow, SourceLayout, SourceTable, join_label_maps, sort_by_session
from brainfound.data.sources.words import IN_DOUBT
from brainfound.errors import CohortError

_ISBI_VISIT = re.compile(r"((?:training|test)\d\d)/\1_(\d\d)")
"""Visits of the ISBI challenge of 2015."""
_ENDS_WITH_NUMBER = re.compile(r"[_\-. ]0\d$")
_SPLITS = {
    **dict.fromkeys(("train", "training", "imagestr", "labelstr"), "train"),
    **dict.fromkeys(("test", "testing", "imagests", "labelsts"), "test"),
    **dict.fromkeys(("val", "validation"), "val"),
}


def can_read(path: Path) -> bool:
    """Whether a folder has an image whose name, or whose folder, states a contrast or leaves doubt about it."""
    if not path.is_dir():
        return False
    for file in iter_images(path, []):
        name, folders = parse_filename(file), file.relative_to(path).parts[:-1]
        in_contrast = name.label_column is None and any(map(names_contrast, folders))
        if _says_contrast(name) or (in_contrast and not any(map(label_folder, folders))):
            return True
    return False


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read scans and label maps by name; names of public data sets and session words (v2, baseline) are recognised."""
    unused: UnusedFiles = []
    files = []
    images = list(iter_images(path, unused))
    results = find_results(images)
    relative = [image.relative_to(path).parent for image in images]
    templates, known = find_templates(relative), {part for folders in relative for part in folders.parts}
    time_points, num_images = find_time_points(images), Counter(image.parent for image in images)
    for image, folders in zip(images, relative, strict=True):
        if templates.intersection(folders.parts):
            unused.append((image, "a template"))
            continue
        if image in results:
            unused.append((image, f"made by SPM or CAT12 of {results[image].name}"))
            continue
        alone = num_images[image.parent] == 1
        file = replace(describe_file(path, time_points.get(image, image), known, alone), path=image)
        if file.is_scan and file.name.contrast == UNKNOWN:
            unused.append((image, file.name.reason))
        else:
            files.append(file)
    if not any(file.is_scan for file in files):
        reasons = [reason for _, reason in unused]
        reason = next((reason for reason in reasons if reason.startswith(IN_DOUBT)), reasons[0] if reasons else None)
        remedy = "Write a manifest with the columns subject, session, contrast, path"
        raise CohortError("no name states the contrast of its image", where=path.name, got=reason, remedy=remedy)
    # DICOM files often have no suffix or a numeric one (1.2.840.113); other files need not be opened.
    maybe_dicom = (
        file
        for file in iter_files(path, [])
        if re.fullmatch(r"(?:\.\d*)?", file.suffix) or file.suffix.lower() in DICOM_SUFFIXES
    )
    unused += [(file, "DICOM in a folder of images is not read") for file in maybe_dicom if is_dicom(file)]
    identified = _identify_subjects(path, files)
    rows: list[dict[str, Any]] = []
    label_maps: list[LabelMapRow] = []
    for file, subject in sorted(identified, key=lambda pair: pair[0].order):
        key = (subject.subject, subject.session or "1")
        if file.name.label_column is None:
            row = {"subject": key[0], "session": key[1], "contrast": file.name.contrast}
            rows.append({**row, "path": str(file.path), "site": subject.site})
        else:
            label_maps.append((file.name.label_column, key, file.path))
    orders = {file.path: file.order for file in files}
    sort_by_session(rows, lambda file: orders[file])
    table = pd.DataFrame(rows)
    doubts = Counter(reason for _, reason in unused if reason.startswith(IN_DOUBT))
    notes = [f"{count} images are not used, {reason}; a manifest can say it" for reason, count in doubts.items()]
    columns = join_label_maps(table, label_maps, unused, notes)
    notes += _notes_on_steps(identified)
    notes += ["subjects and visits were read from names; write a manifest if that is wrong"]
    return SourceTable(table, path, LAYOUT.name, columns, notes, unused)


LAYOUT = SourceLayout(
    "files by name", "images whose names say the contrast (p1_T1.nii.gz, p1/flair.nii.gz)", can_read, read
)


def _says_contrast(name: FileName) -> bool:
    return name.label_column is None and not name.is_silent


def _notes_on_steps(identified: list[tuple[NamedFile, SubjectIdentity]]) -> list[str]:
    """A note on copies of one scan in folders of several processing steps, and on the order of their use."""
    ranks: dict[tuple[str, str | None, str], set[int]] = defaultdict(set)
    for file, subject in identified:
        if file.is_scan:
            ranks[subject.subject, subject.session, file.name.contrast].add(file.place.rank)
    num_copied = sum(len(found) > 1 for found in ranks.values())
    order = "registered or corrected ones come first, then acquired ones, then those in the space of a template"
    return [f"{num_copied} scans lie in folders of several processing steps; {order}"] if num_copied else []


def _identify_subjects(root: Path, files: list[NamedFile]) -> list[tuple[NamedFile, SubjectIdentity]]:
    """The subject and the session of each file; CohortError if one person may be two subjects, or two people one."""
    scans = [file for file in files if file.is_scan]
    depths = {len(file.folders) for file in scans}
    if len(depths) > 1:
        _refuse("the images lie at different depths", " and ".join(f"{depth} folders down" for depth in sorted(depths)))
    depth = max(depths, default=0)
    if depth > 2:
        _refuse("the images lie too deep", f"{'/'.join(scans[0].folders)}/")
    readers = {0: _subjects_from_names, 1: _subjects_from_folders, 2: _subjects_from_two_folders}
    level = [file for file in files if len(file.folders) == depth]
    identified = list(zip(level, readers[depth](root, level), strict=True))
    identified = [(file, _with_site(file, identity)) for file, identity in identified]
    _require_one_group(identified)
    identified += [(file, _subject_of_map(file)) for file in files if len(file.folders) != depth]
    _require_unique_scans(identified)
    _require_unambiguous(identified)
    return identified


def _with_site(file: NamedFile, identity: SubjectIdentity) -> SubjectIdentity:
    return identity if identity.site else replace(identity, site=file.place.site)


def _subject_of_map(file: NamedFile) -> SubjectIdentity:
    """The subject of a label map that lies higher or deeper than the scans: by its name, or else by its folders."""
    if file.identity.subject or not file.folders:
        return file.identity
    home = parse_identifier("_".join(file.folders))
    return replace(home, session=home.session or file.identity.session)


def _require_one_group(identified: list[tuple[NamedFile, SubjectIdentity]]) -> None:
    """Refuse a name in two groups: ``Prisma/p1`` and ``Skyra/p1`` may be two subjects, or one at two scanners."""
    groups: dict[str, tuple[str, ...]] = {}
    for file, identity in identified:
        own = tuple(part for part in file.place.groups if not is_container(part))
        if file.is_scan and not identity.certain and (other := groups.setdefault(identity.subject, own)) != own:
            folders = ", ".join(sorted({"/".join(other), "/".join(own)}))
            _refuse("folders of one name lie in several groups", f"{identity.subject!r} in {folders}")


def _subjects_from_names(root: Path, files: list[NamedFile]) -> list[SubjectIdentity]:
    empty = [not file.identity.subject for file in files]
    visits = [not file.identity.subject and file.identity.session is not None for file in files]
    if any(visits) and not all(visits):
        _refuse("some names say a subject and others a visit only", files[visits.index(True)].path.name)
    if any(empty) and not all(empty):
        _refuse("some names say a subject and others none", files[empty.index(True)].path.name)
    if not all(empty):
        return [file.identity for file in files]
    subject = _subject_from_root(root.resolve())  # t1.nii.gz, flair.nii.gz: the folder is the subject
    is_doubtful = subject.session or not has_number(subject.subject)
    # ses-1_T1.nii.gz, ses-2_T1.nii.gz; study101_T1.nii.gz, study102_T1.nii.gz
    if any(visits) and (is_doubtful or any(is_long_number(file.identity.session or "") for file in files)):
        _refuse("the names say visits, and the folder no subject", root.resolve().name)
    return [replace(subject, session=file.identity.session or subject.session) for file in files]


def _subject_from_root(root: Path) -> SubjectIdentity:
    """The subject whose folder was given; for ``p1/ses-1/anat`` its name is two folders up."""
    session = None
    for folder in (root, *root.parents[:2]):
        if is_session_name(folder.name) and not session:
            session = folder.name
        elif read_folders((folder.name,), ()).named:
            if folder != root and not re.search(r"\d", folder.name):
                break
            subject = parse_identifier(folder.name)
            return replace(subject, subject=subject.subject or folder.name, session=session or subject.session)
    _refuse("the files and their folder name no subject", root.name)


def _subjects_from_folders(root: Path, files: list[NamedFile]) -> list[SubjectIdentity]:
    """Either each folder is a subject, whether or not its files repeat the name, or the files name their subjects."""
    homes = {file.folders[0]: parse_identifier(file.folders[0]) for file in files}
    visits = [folder for folder, home in homes.items() if not home.subject]
    if visits:
        if len(visits) < len(homes):
            _refuse("some folders name a visit and others a subject", ", ".join(f"{folder}/" for folder in visits[:3]))
        subjects = _subjects_from_names(root, files)
        return [replace(one, session=file.folders[0]) for one, file in zip(subjects, files, strict=True)]
    if len(homes) > 1 and all(re.fullmatch(YEAR, folder) for folder in homes):
        _refuse("the folders may be years or subjects", ", ".join(f"{folder}/" for folder in homes))
    foreign: dict[str, set[str]] = defaultdict(set)  # subjects of names that do not match their folder
    for file in files:
        home = homes[file.folders[0]]
        if file.is_scan and not _matches_folder(file.identity, home) and not _is_protocol_of(file.identity, home):
            foreign[file.folders[0]].add(file.identity.subject)
    by_name = any(len(subjects) > 1 or is_group(folder) for folder, subjects in foreign.items())
    subject_folders: dict[str, set[str]] = defaultdict(set)
    for folder, named in foreign.items():
        for subject in named:
            if by_name or re.search(r"\d", subject):  # a word in every folder (brain_T1) is not a subject
                subject_folders[subject].add(folder)
    for name, folders in subject_folders.items():
        if len(folders) > 1:
            _refuse("files of one name lie in several folders", f"{name!r} in {', '.join(sorted(folders))}")
    if by_name:
        _require_several_persons(files, foreign)
    identities = []
    for file in files:
        folder, own, home = file.folders[0], file.identity, homes[file.folders[0]]
        if by_name:
            if own.subject not in foreign[folder] and file.is_scan:
                _refuse("some files are named by their subject and others by their folder", file.path.name)
            identities.append(own)
        elif visit := _ISBI_VISIT.fullmatch(f"{folder}/{own.subject}"):
            identities.append(replace(home, session=visit.group(2)))
        elif _extends(own, home):
            is_person = has_number(home.subject) and not own.certain
            own = without_words(own, len(split_words(home.subject))) if is_person else own
            identities.append(replace(own, session=own.session or home.session))
        else:
            if is_session_name(own.subject) and could_be_subject(own.subject, "" if is_group(folder) else folder):
                _refuse("the names of files may be visits or subjects", f"{folder}/{file.path.name}")
            session = own.subject if is_session_name(own.subject) else own.session
            words = own.words
            if _is_protocol_of(own, home) and not home.certain:
                words += split_words(own.subject)
            identities.append(replace(home, session=session or home.session, words=words))
    _require_numbers(files, homes)
    return identities


def _extends(own: SubjectIdentity, home: SubjectIdentity) -> bool:
    """Whether a file's name begins with its folder's, and goes on."""
    words, folder = split_words(own.subject), split_words(home.subject)
    return len(words) > len(folder) and words[: len(folder)] == folder


def _is_protocol_of(own: SubjectIdentity, home: SubjectIdentity) -> bool:
    """Whether the words of a name, without the number of its folder, can only be those of a protocol."""
    is_person = home.certain or has_number(home.subject)
    return is_person and not own.certain and not re.search(r"\d", own.subject)


def _require_several_persons(files: list[NamedFile], foreign: dict[str, set[str]]) -> None:
    """Refuse folders whose files may belong to one person: they must be a group, or repeat a contrast by subject."""
    for folder, subjects in foreign.items():
        scans = [file for file in files if file.is_scan and file.folders[0] == folder]
        named = {(file.identity.subject, file.name.contrast) for file in scans}
        repeated = len(named) > len({contrast for _, contrast in named})
        certain = all(file.identity.certain for file in scans)
        is_group_folder = is_group(folder) or (not has_number(folder) and repeated and all(map(has_number, subjects)))
        if len(subjects) > 1 and not certain and not is_group_folder:
            _refuse("the names in a folder may be subjects, or series of one", f"{', '.join(sorted(subjects))}")


def _require_numbers(files: list[NamedFile], homes: dict[str, SubjectIdentity]) -> None:
    """Refuse several names without a number in a folder: ``anna/anna_abc`` may be a protocol or a person."""
    names: dict[str, set[str]] = defaultdict(set)
    for file in files:
        home, own = homes[file.folders[0]].subject, file.identity.subject
        if file.is_scan and not has_number(home) and not is_group(home) and own and not has_number(own):
            names[home].add(own)
    for subjects in names.values():
        if len(subjects) > 1:
            _refuse("the names in a folder may be subjects, or protocols of one", f"{', '.join(sorted(subjects))}")


def _subjects_from_two_folders(root: Path, files: list[NamedFile]) -> list[SubjectIdentity]:
    identities = [_subject_from_two_folders(file) for file in files]
    uppers: dict[str, set[str]] = defaultdict(set)
    for file, identity in zip(files, identities, strict=True):
        if file.is_scan and is_group(file.folders[0]):
            uppers[identity.subject].add(file.folders[0])
    for subject, folders in uppers.items():
        if len(folders) > 1:
            _refuse("folders of one name lie in several groups", f"{subject!r} in {', '.join(sorted(folders))}")
    return identities


def _subject_from_two_folders(file: NamedFile) -> SubjectIdentity:
    """``<subject>/<session>/``, ``<session>/<subject>/``, or ``site1/<subject>/`` if the upper folder is a group."""
    upper, lower = file.folders
    above, below, both = (parse_identifier(name) for name in (upper, lower, f"{upper}_{lower}"))
    is_session = is_session_name(lower) or not below.subject
    own, homes = file.identity, (above, below)
    fits = any(_matches_folder(own, home) for home in homes)
    if not fits and not any(_is_protocol_of(own, home) for home in homes):
        _refuse("a file names another subject than its folders", f"{upper}/{lower}/{file.path.name}")
    words = () if fits else split_words(own.subject)
    if both.certain and both.session and not below.certain:
        return both
    if is_group(upper) and (not is_session or lower.isdecimal()):
        return replace(below, session=below.session or own.session, site=below.site or upper, words=words)
    if is_session and could_be_subject(lower, "" if is_group(upper) else upper):
        _refuse("the folders may be visits or subjects", f"{upper}/{lower}/")
    if not above.subject and has_number(below.subject) and not is_session:
        return replace(below, session=upper, words=words)
    is_year = re.fullmatch(r"(?:19|20)\d{2}", lower) is not None and not re.fullmatch(r"(?:19|20)\d{2}", upper)
    if above.subject and (is_session or (is_year and has_number(upper))):
        return replace(above, session=lower, words=words)
    if below.session and below.subject.lower() in (upper.lower(), above.subject.lower()):
        return replace(below, words=words)
    if lower == upper:
        return above
    _refuse("the folders may be visits or subjects", f"{upper}/{lower}/")


def _matches_folder(own: SubjectIdentity, home: SubjectIdentity) -> bool:
    """Whether a name fits its folder: it names no subject, or one of both begins with the words of the other."""
    words, folder = split_words(own.subject), split_words(home.subject)
    shorter = min(len(words), len(folder))
    return not words or is_session_name(own.subject) or (shorter > 0 and words[:shorter] == folder[:shorter])


def _require_unambiguous(identified: list[tuple[NamedFile, SubjectIdentity]]) -> None:
    """Refuse names that may be two subjects or two sessions of one subject."""
    if doubt := find_doubt([identity for file, identity in identified if file.is_scan]):
        _refuse(*doubt)
    _require_shared_contrasts([(file, identity) for file, identity in identified if file.is_scan])
    by_scan: dict[tuple[str, str | None, str], tuple[str, ...]] = {}  # the words besides the subject's number
    for file, identity in identified:
        if file.is_scan:
            key = (identity.subject, identity.session, file.name.contrast)
            other_words = by_scan.setdefault(key, identity.words)
            if other_words != identity.words:
                got = " and ".join(repr("_".join(found)) for found in (other_words, identity.words))
                _refuse("words next to a number may name a protocol or a person", f"{got} of {identity.subject}")


def _require_shared_contrasts(identified: list[tuple[NamedFile, SubjectIdentity]]) -> None:
    """Refuse subjects that may be parts of one name (``anna_301_T1``, ``anna_501_flair``, ``T1_abc_01``).

    Subjects of a group have contrasts in common; the scans of one person, named by protocol or by the number of the
    series (``3_T1``, ``5_flair``), have not.
    """
    by_word: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    by_tail: dict[tuple[str, ...], SubjectIdentity] = {}
    for file, identity in identified:
        first = next(iter(split_words(identity.subject)), "")
        if not identity.certain and (not re.search(r"\d", first) or identity.subject.isdecimal()):
            by_word["" if identity.subject.isdecimal() else first][identity.subject].add(file.name.contrast)
        tail = _number_after_contrast(file, identity)
        other = by_tail.setdefault(tail, identity) if tail else identity
        if other.subject != identity.subject and not (other.certain and identity.certain):
            _refuse("the number after the contrast is the same", f"{other.subject} and {identity.subject}")
    for subjects in by_word.values():
        if len(subjects) > 1 and sum(map(len, subjects.values())) == len(set().union(*subjects.values())):
            _refuse("the names may be subjects, or series of one", " and ".join(subjects))


def _number_after_contrast(file: NamedFile, identity: SubjectIdentity) -> tuple[str, ...]:
    """The subject's words after the contrast, from the last with a number: ``01`` of ``T1_abc_01``."""
    words = split_words(stem(file.path))
    contrasts = [i for i, word in enumerate(words) if is_contrast_name(word)]
    after = words[contrasts[0] + 1 :] if contrasts else ()
    kept = [word for word in split_words(identity.subject) if word in after]
    numbered = [i for i, word in enumerate(kept) if re.search(r"\d", word)]
    return tuple(kept[numbered[-1] :]) if numbered else ()


def _require_unique_scans(identified: list[tuple[NamedFile, SubjectIdentity]]) -> None:
    """Refuse a name in two folders: ``train/p1`` and ``test/p1`` may be two subjects, ``raw/p1`` and ``reg/p1`` one."""
    outer_folders: dict[tuple[str, str, str], tuple[str, ...]] = {}
    contrast_folders: dict[tuple[str, str, str], str] = {}
    numbered: dict[tuple[str, str, str], str] = {}
    splits: dict[str, str] = {}
    for file, subject in identified:
        for split in {_SPLITS[part.lower()] for part in file.place.groups if part.lower() in _SPLITS}:
            if splits.setdefault(subject.subject, split) != split:
                _refuse("one name is in training and in test or validation", subject.subject)
        if file.is_scan:
            key = (subject.subject, subject.session or "1", file.name.contrast)
            other = outer_folders.setdefault(key, file.place.groups)
            if other != file.place.groups:
                folders = " and ".join(f"{'/'.join(groups)}/" for groups in (other, file.place.groups))
                _refuse("the same scan of one name lies in several folders", f"{subject.subject!r} in {folders}")
            if _ENDS_WITH_NUMBER.search(stem(file.path)):
                other_name = numbered.setdefault(key, file.path.name)
                if other_name != file.path.name:
                    _refuse("numbers after the contrast may be people or repeats", f"{other_name}, {file.path.name}")
            folder = file.path.parent.name
            is_foreign = is_contrast_name(folder) and parse_filename(Path(folder)).contrast != file.name.contrast
            if is_foreign and (other_folder := contrast_folders.setdefault(key, folder)) != folder:
                _refuse("the folders may be visits or contrasts", f"{other_folder}/ and {folder}/")


def _refuse(what: str, got: str) -> NoReturn:
    remedy = "Write a manifest with the columns subject, session, contrast, path"
    raise CohortError(f"the names do not identify the subjects: {what}", got=got, remedy=remedy)
