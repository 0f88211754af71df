"""BIDS data sets, raw or derivative (BIDS 1.10): a single one, or a folder of several as downloaded from OpenNeuro.

The first half reads one data set: scans, label maps, participants, sessions and scanners. The second half reads a
folder of data sets (``ds000001/sub-01/…``). A subject present in two of them would count as two subjects, so folders
that may be sessions, derivatives or versions of one data set are refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.reading.image_names import stem
from brainfound.data.sources import manifest
from brainfound.data.sources.bids_files import BidsName, Sidecars, contrast_from_bids_name, mask_column
from brainfound.data.sources.covariates import clean_covariates, notes_on_visits
from brainfound.data.sources.file_names import (
    SubjectNamer,
    UnusedFiles,
    contains_image,
    iter_images,
    natural_sort_key,
    split_words,
    subfolders,
)
from brainfound.data.sources.identifiers import is_session_name
from brainfound.data.sources.persons import labels_of_one_person
from brainfound.data.sources.tables import (
    LabelMapRow,
    SessionKey,
    SourceLayout,
    SourceTable,
    count_noun,
    join,
    join_label_maps,
    read_json,
    read_table,
    sort_by_session,
    strip_session_prefix,
)
from brainfound.errors import CohortError

_SESSION_TABLES = "sub-*_sessions.tsv"
_NATIVE_SPACES = {"", "orig", "native", "individual", "t1w", "t2w", "flair", "dwi", "trace", "adc", "swi"}
"""Values of ``space-`` for the acquired grid, or for that of another scan of the same subject."""
_SESSION = ("subject", "session")
_NO_SCANS = "the BIDS folder holds no scans of a known contrast"
_MAX_YEARS_OF_VISITS = 10
"""Two labels with ages further apart are two people."""
_MISPLACED = "its name is that of another subject or session than its folder's"


def can_read(path: Path) -> bool:
    """Whether a folder has ``sub-*`` folders, with images or a ``dataset_description.json``. DICOM does not count."""
    if not path.is_dir():
        return False
    subjects = subfolders(path, "sub-*")
    return bool(subjects) and ((path / "dataset_description.json").is_file() or contains_image(subjects))


def read(root: Path, work: Path | None = None) -> SourceTable:
    """Read the scans of ``sub-*/[ses-*/]*/*``, label maps there and below ``derivatives/``, and their tables."""
    unused: UnusedFiles = []
    notes: list[str] = []
    if _is_derivative(root, notes):
        notes.append("a derivative data set: its images were processed by others")
    sidecars = Sidecars(root)
    rows: list[dict[str, Any]] = []
    label_maps: list[LabelMapRow] = []
    for subject in subfolders(root, "sub-*"):
        for file in iter_images(subject, unused):
            key, column = _parse_subject_session(root, file), mask_column(file)
            contrast, reason = contrast_from_bids_name(BidsName.parse(file))
            if _name_mismatches_folder(file, key):
                unused.append((file, _MISPLACED))
            elif column is not None:
                label_maps.append((column, key, file))
            elif contrast == UNKNOWN:
                unused.append((file, reason))
            elif contrast == "DWI" and sidecars.is_b0(file):
                unused.append((file, "b0 image (b ≤ 5 s/mm²), not diffusion-weighted"))
            else:
                row = {"subject": key[0], "session": key[1], "contrast": contrast, "path": str(file)}
                rows.append(row | sidecars.get_scanner_columns(file))
    if not rows:
        raise CohortError(
            _NO_SCANS,
            where=root.name or root,
            got=f"{len(unused)} other images" if unused else "no images",
            expected="files such as sub-01/anat/sub-01_T1w.nii.gz",
            remedy="Check the suffixes, or write a manifest",
        )
    sort_by_session(rows, lambda file: (BidsName.parse(file).order, natural_sort_key(file.name)))
    table = pd.DataFrame(rows)
    notes += _notes_on_choices(table)
    label_maps += _find_derivatives(root, unused)
    mask_columns = _join_label_maps(table, label_maps, unused, notes)
    table = _join_tables(table, root, notes)
    _require_distinct_people(root, table)
    if sidecars.faulty:
        notes.append(f"{len(sidecars.faulty)} sidecars cannot be used; their values are missing")
    return SourceTable(table, root, LAYOUT.name, mask_columns, notes, [*unused, *sidecars.faulty])


LAYOUT = SourceLayout("BIDS", "sub-*/ folders (BIDS)", can_read, read)


def _is_derivative(root: Path, notes: list[str]) -> bool:
    return str(read_json(root / "dataset_description.json", notes).get("DatasetType", "")).lower() == "derivative"


def _parse_subject_session(root: Path, file: Path) -> SessionKey:
    """Subject and session of a path, such as ``("sub-01", "a")``; the session is ``"1"`` if the path names none."""
    parts = file.relative_to(root).parts
    session = next((part.removeprefix("ses-") for part in parts[:-1] if part.startswith("ses-")), None)
    if session is None:
        match = re.search(r"_ses-([A-Za-z0-9]+)", file.name)
        session = match.group(1) if match else "1"
    return next(part for part in parts if part.startswith("sub-")), session


def _name_mismatches_folder(file: Path, key: SessionKey) -> bool:
    entities = BidsName.parse(file).entities
    name = f"{stem(file)}_".lower()
    other_subject = "sub" in entities and not name.startswith(f"{key[0]}_".lower())
    return other_subject or ("ses" in entities and f"_ses-{key[1]}_".lower() not in name)


def _spaces_of_sessions(table: pd.DataFrame, space: Callable[[Path], str]) -> dict[SessionKey, set[str]]:
    """The spaces of each session's scans, counting only the first scan of each contrast."""
    used = table.drop_duplicates(["subject", "session", "contrast"])
    spaces = used["path"].map(lambda path: space(Path(path)))
    return {key: set(names) for key, names in spaces.groupby([used["subject"], used["session"]])}


def _require_distinct_people(root: Path, table: pd.DataFrame) -> None:
    """Refuse labels that may be one person (``sub-01a``, ``sub-01b``), unless tables show that they are several."""
    for labels in labels_of_one_person(set(table["subject"])):
        if not any(_differ(table, one, other) for one, other in combinations(labels, 2)):
            what = "two subjects may be one person: they differ in capital letters, leading zeros or a visit only"
            row = table[table["subject"] == labels[1]].iloc[0]
            cells = (labels[0], labels[1].removeprefix("sub-"), row["contrast"])
            line = ", ".join([*cells, Path(row["path"]).relative_to(root).as_posix()])
            remedy = (
                "If they are two people, give the sex and age of both in participants.tsv; if not, move the scans into "
                f"ses-* folders or write a manifest (subject, session, contrast, path), with lines such as {line}"
            )
            raise CohortError(what, where=root.name, got=" and ".join(labels[:2]), remedy=remedy)


def _differ(table: pd.DataFrame, one: str, other: str) -> bool:
    """Whether the tables give two subjects another sex, or ages further apart than visits of one person."""
    rows = [table[table["subject"] == subject] for subject in (one, other)]
    sexes = [set(part["sex"].dropna()) if "sex" in table else set() for part in rows]
    ages = [part["age_years"].dropna() if "age_years" in table else pd.Series(dtype=float) for part in rows]
    are_apart = (
        all(map(len, ages)) and max(ages[1].min() - ages[0].max(), ages[0].min() - ages[1].max()) > _MAX_YEARS_OF_VISITS
    )
    return (all(sexes) and sexes[0].isdisjoint(sexes[1])) or are_apart


def _notes_on_choices(table: pd.DataFrame) -> list[str]:
    """Notes on several scans of one contrast, and on sessions with mixed spaces."""
    notes = []
    num_further = int(table.duplicated(["subject", "session", "contrast"]).sum())
    if num_further:
        notes.append(
            f"{num_further} further scans of a contrast that its session has already: the one without space- "
            "and with the fewest entities is used, then by echo, run and name"
        )
    num_chunks = sum("chunk" in BidsName.parse(Path(path)).entities for path in table["path"])
    if num_chunks:
        notes.append(f"{num_chunks} scans are chunks of a volume (chunk-…); the first is read as if it were the whole")
    spaces = _spaces_of_sessions(table, lambda file: BidsName.parse(file).entities.get("space", "none"))
    num_mixed = sum(len(names) > 1 for names in spaces.values())
    if num_mixed:
        notes.append(f"in {num_mixed} sessions the scans that are used lie in different spaces (space-…)")
    return notes


def _find_derivatives(root: Path, unused: UnusedFiles) -> list[LabelMapRow]:
    label_maps = []
    derivatives = root / "derivatives"
    pipelines = subfolders(derivatives, "*")
    if subfolders(derivatives, "sub-*"):  # ISLES'22 has no folder of a pipeline
        pipelines = [derivatives, *(folder for folder in pipelines if not folder.name.startswith("sub-"))]
    for pipeline in pipelines:
        for subject in subfolders(pipeline, "sub-*"):
            for file in iter_images(subject, unused):
                key, column = _parse_subject_session(pipeline, file), mask_column(file)
                if _name_mismatches_folder(file, key):
                    unused.append((file, _MISPLACED))
                elif column is None:
                    unused.append((file, "an image of derivatives/ (give that folder itself to use it)"))
                else:
                    label_maps.append((column, key, file))
    return label_maps


def _join_label_maps(
    table: pd.DataFrame, label_maps: list[LabelMapRow], unused: UnusedFiles, notes: list[str]
) -> tuple[str, ...]:
    """Join one label map per session and column: raw folders come before derivatives, then the order is that of scans.

    A label map must lie in the space of the session's scans: native, or the same template.
    """
    spaces = _spaces_of_sessions(table, _template_space)
    usable = []
    label_maps.sort(key=lambda item: ("derivatives" in item[2].parts, BidsName.parse(item[2]).order))
    for column, key, file in label_maps:
        space = _template_space(file)
        if key in spaces and space not in spaces[key]:
            unused.append((file, f"a label map in another space ({space or 'native'}) than the scans"))
        else:
            usable.append((column, key, file))
    return join_label_maps(table, usable, unused, notes)


def _template_space(file: Path) -> str:
    """The template's name, or "" for a space of the subject."""
    space = BidsName.parse(file).entities.get("space", "")
    return "" if space.lower() in _NATIVE_SPACES else space


def _join_tables(table: pd.DataFrame, root: Path, notes: list[str]) -> pd.DataFrame:
    """Join participants.tsv, then each ``sub-*_sessions.tsv``, whose values have priority."""
    participants, raw_participants = root / "participants.tsv", root.parent.parent / "participants.tsv"
    if not participants.is_file() and root.parent.name == "derivatives" and raw_participants.is_file():
        participants = raw_participants
        notes.append("participants.tsv of the raw data set is used")
    if participants.is_file():
        table = _join_participants(table, participants, notes)
    sessions: dict[bytes, list[tuple[Path, pd.DataFrame]]] = {}
    found: list[str] = []
    for file in sorted(root.glob("sub-*/sub-*_sessions.tsv"), key=lambda file: natural_sort_key(file.name)):
        facts = read_table(file, found, bids_ids=True)
        if "session" not in facts:
            raise CohortError("a table of sessions has no column 'session_id'", where=file.name, remedy="Add it")
        facts["subject"] = file.parent.name
        facts["session"] = strip_session_prefix(facts["session"])
        sidecar = file.with_suffix(".json")
        sessions.setdefault(sidecar.read_bytes() if sidecar.is_file() else b"", []).append((sidecar, facts))
    if sessions:
        inherited = (root / "sessions.json", root / "participants.json")
        cleaned = []
        for files in sessions.values():  # those with the same sidecar together, so that a note counts them together
            facts = pd.concat([facts for _, facts in files])
            cleaned.append(clean_covariates(facts, _SESSION_TABLES, found, [files[0][0], *inherited]))
        table = join(table, pd.concat(cleaned), _SESSION, root / _SESSION_TABLES, notes)
        if not any("between visits" in note for note in [*notes, *found]):
            notes += notes_on_visits(table, f"{_SESSION_TABLES} and participants.tsv")
    found = [re.sub(r"^sub-\w+?_sessions", "sub-*_sessions", note) for note in found]  # notes hold no identifiers
    notes += dict.fromkeys(found)
    return table


def _join_participants(table: pd.DataFrame, file: Path, notes: list[str]) -> pd.DataFrame:
    """Join by subject; a row with a session belongs to that session alone, and outranks those without one."""
    facts = read_table(file, notes, bids_ids=True)
    if "subject" not in facts:
        raise CohortError("no column 'participant_id'", where=file.name, remedy="Add it")
    facts = facts[facts["subject"].notna()].copy()
    facts["subject"] = [name if name.startswith("sub-") else f"sub-{name}" for name in facts["subject"]]
    facts = clean_covariates(facts, file.name, notes, [file.with_suffix(".json")])
    with_scans, listed = set(table["subject"]), set(facts["subject"])
    if listed - with_scans:
        notes.append(f"{len(listed - with_scans)} subjects of participants.tsv have no scans")
    if with_scans - listed:
        notes.append(f"{len(with_scans - listed)} subjects with scans are not in participants.tsv")
    if "session" not in facts:
        return join(table, facts, ("subject",), file)
    facts["session"] = _name_only_sessions(strip_session_prefix(facts["session"]), facts["subject"], table)
    table = join(table, facts[facts["session"].isna()], ("subject",), file)
    table = join(table, facts[facts["session"].notna()], _SESSION, file, notes)
    keys = table[list(_SESSION)].drop_duplicates()
    rows = set(facts[list(_SESSION)].itertuples(index=False, name=None))
    has_row = [key in rows or (key[0], None) in rows for key in keys.itertuples(index=False, name=None)]
    if not all(has_row):
        notes.append(f"{has_row.count(False)} of {len(has_row)} sessions with scans have no row in participants.tsv")
    return table


def _name_only_sessions(sessions: list[str | None], subjects: pd.Series, table: pd.DataFrame) -> list[str | None]:
    """The session of each row; ``1`` where the subject has one row and scans whose paths name no session."""
    keys = zip(table["path"], table["subject"], strict=True)
    inside = [path.rpartition(f"{os.sep}{name}{os.sep}")[2] for path, name in keys]
    names_session = [bool(re.search(r"(?:^|[/\\_])ses-", path)) for path in inside]
    unnamed = set(table["subject"]) - set(table["subject"][names_session])
    num_rows = Counter(subjects)
    only = [subject in unnamed and num_rows[subject] == 1 for subject in subjects]
    return ["1" if is_only and session else session for session, is_only in zip(sessions, only, strict=True)]


# A folder of several data sets

_MAX_NOTES = 20
_COPIES = {"sourcedata", "derivatives", "code"}
"""Folders of the BIDS standard that repeat the subjects of the data set next to them."""
_PROCESSING_WORDS = {
    *("bids", "raw", "rawdata", "source", "orig", "original", "nifti", "nii", "processed", "preproc", "preprocessed"),
    *("stripped", "skullstripped", "brain", "defaced", "registered", "coregistered", "normalised", "normalized"),
    *("fmriprep", "smriprep", "freesurfer", "mriqc", "copy", "old", "new", "backup"),
}
_VISIT = re.compile(r"(?:wave|round|phase|followup)[_\-]?\w{1,3}", re.IGNORECASE)
_MAYBE_VISIT = re.compile(
    r"(?:pre|post|before|after|first|second|third|last|early|late|t\d)|(?:data|study|scans?|bids)?[_\-]?(?:19|20)\d\d"
    r"|(?:anat|dwi|func|structural|functional|diffusion)(?:[_\-]?bids)?",
    re.IGNORECASE,
)
"""Folders that hold the same people if they share names of subjects."""


def read_collection(path: Path, work: Path | None = None) -> SourceTable:
    """Read all data sets: BIDS folders, and folders with a manifest.

    Subjects are named ``<dataset>_<subject>``; the site is the data set if no table gives one. The same subject name in
    unrelated data sets counts as different people, and a note reports it. A data set that cannot be read is rejected,
    and a note gives its name, the number of its subjects and the reason. Raises a CohortError if the folders may hold
    the same people, or if no data set can be read.
    """
    namer = SubjectNamer()
    tables: list[pd.DataFrame] = []
    unused: UnusedFiles = []
    rejected: UnusedFiles = []
    columns: list[str] = ["mask"]
    datasets = _datasets(path)
    originals = [folder for folder in datasets if folder.name.lower() not in _COPIES]
    others = [folder for folder in subfolders(path, "[!.]*") if folder not in datasets]
    if originals:
        unused += [(folder, "a copy of the data set next to it") for folder in datasets if folder not in originals]
        datasets = originals
    for folder in others:
        is_lost = folder.name.lower() not in _COPIES and contains_image([folder])
        reason = "a folder that is not a BIDS data set (read it by itself)"
        (rejected if is_lost else unused).append((folder, f"{folder.name}: {reason}" if is_lost else reason))
    notes = _check_people(path, datasets)
    for folder in datasets:
        has_manifest = _has_manifest(folder)
        if not has_manifest and (path.name == "derivatives" or _is_derivative(folder, [])):
            what = "several derivatives may hold the same people"
            raise CohortError(what, where=path.name, remedy="Give one of the folders")
        try:
            source = manifest.read(folder) if has_manifest else read(folder)
        except CohortError as error:
            if error.what == _NO_SCANS:
                unused.append((folder, _NO_SCANS))
            else:
                rejected.append((folder, _reason_of_loss(folder, error)))
            continue
        table = source.table
        table["subject"] = [namer(folder.name, subject) for subject in table["subject"]]
        table["site"] = table["site"].where(table["site"].notna(), folder.name)
        tables.append(table.assign(dataset=folder.name).dropna(axis="columns", how="all"))
        notes += [f"{folder.name}: {note}" for note in source.notes]
        unused += source.unused
        columns += [column for column in source.mask_columns if column not in columns]
    if not tables:
        got = (rejected or unused)[0][1]
        raise CohortError("no data set holds a scan", where=path.name, got=got, remedy="Check the data sets one by one")
    if len(notes) > _MAX_NOTES:
        notes = [*notes[:_MAX_NOTES], f"{len(notes) - _MAX_NOTES} more notes; read a data set alone to see its own"]
    table = pd.concat(tables, ignore_index=True)
    _refuse_shared_files(path, table)
    lost = [reason for _, reason in rejected]
    name = "data sets" if any(_has_manifest(folder) for folder in datasets) else COLLECTION_LAYOUT.name
    return SourceTable(table, path, name, tuple(columns), [*lost, *notes], unused, rejected)


def _has_manifest(folder: Path) -> bool:
    """Whether a data set is read by its manifest. One of another program next to ``sub-*`` folders does not count."""
    return not can_read(folder) or manifest.find_subjects(folder) is not None


def _subjects(folder: Path) -> set[str]:
    """The names of a data set's subjects; empty for a manifest that cannot be read."""
    listed = manifest.find_subjects(folder)
    return {child.name for child in subfolders(folder, "sub-*")} if listed is None else listed


def _reason_of_loss(folder: Path, error: CohortError) -> str:
    """The name of a data set, the number of its subjects and the error, without identifiers of subjects."""
    subjects = _subjects(folder)
    whole = f"with its {count_noun(len(subjects), 'subject')}" if subjects else "whole"
    return f"{folder.name} is left out {whole}: {re.sub(r'sub-[0-9A-Za-z]+', 'sub-*', str(error))}"


def _refuse_shared_files(path: Path, table: pd.DataFrame) -> None:
    """Refuse manifests that list the same scan: one person would become two."""
    datasets = table["dataset"].groupby([os.path.realpath(file) for file in table["path"]]).agg(["nunique", "unique"])
    shared = datasets[datasets["nunique"] > 1]
    if len(shared):
        _refuse(path, "several data sets list the same scans", " and ".join(sorted(shared["unique"].iloc[0])[:2]))


def _datasets(path: Path) -> list[Path]:
    folders = subfolders(path, "[!.]*") if path.is_dir() else []
    return [folder for folder in folders if manifest.can_read(folder) or can_read(folder)]


COLLECTION_LAYOUT = SourceLayout(
    name="BIDS data sets",
    layout_hint="folders with sub-*/ or a manifest in them (several data sets)",
    can_read=lambda path: any(
        can_read(folder) or manifest.find_subjects(folder) is not None for folder in _datasets(path)
    ),
    read=read_collection,
)


def _check_people(path: Path, datasets: list[Path]) -> list[str]:
    """A note on subject names that occur in several data sets; CohortError if they seem to be the same people."""
    sessions = [folder.name for folder in datasets if is_session_name(folder.name) or _VISIT.fullmatch(folder.name)]
    if len(datasets) > 1 and sessions:
        _refuse(path, "the folders look like visits of the same people", sessions[0])
    subjects = {folder: _subjects(folder) for folder in datasets}
    counts = Counter(name for names in subjects.values() for name in names)
    shared = {name for name, count in counts.items() if count > 1}
    if not shared:
        return []
    words = {folder: split_words(folder.name) for folder in datasets}
    candidates = [folder for folder in datasets if subjects[folder] & shared and words[folder]]
    parts = [folder.name for folder in candidates if _MAYBE_VISIT.fullmatch(folder.name)]
    if len(parts) > 1:
        _refuse(path, "the folders look like visits or contrasts of the same people", " and ".join(parts[:2]))
    for one, other in combinations(candidates, 2):
        if subjects[one] & subjects[other] and _may_be_versions(words[one], words[other]):
            _refuse(path, "the folders look like versions of one data set", f"{one.name} and {other.name}")
    return [f"{len(shared)} names of subjects are in several data sets; they count as different people"]


def _may_be_versions(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether one name begins with the other, or both are equal apart from words for processing."""
    shorter = min(len(one), len(other))
    rests = [[word for word in words if word not in _PROCESSING_WORDS] for words in (one, other)]
    return one[:shorter] == other[:shorter] or rests[0] == rests[1] or not all(rests)


def _refuse(path: Path, what: str, got: str) -> NoReturn:
    remedy = "Give one of the folders, or write a manifest with the columns subject, session, contrast, path"
    raise CohortError(what, where=path.name, got=got, remedy=remedy)
