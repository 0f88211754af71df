"""BIDS folders, raw and derivative (BIDS 1.10): scans, label maps, participants, sessions and scanners."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.sources.bids_files import BidsName, Sidecars, contrast_from_bids_name, mask_column
from brainfound.data.sources.file_names import (
    UnusedFiles,
    contains_image,
    iter_images,
    natural_sort_key,
    stem,
    subfolders,
)
from brainfound.data.sources.tables import (
    LabelMapRow,
    SessionKey,
    SourceTable,
    convert_ages_to_years,
    join,
    join_label_maps,
    parse_ages,
    read_json,
    read_table,
    sort_by_session,
    strip_session_prefix,
)
from brainfound.errors import CohortError

NAME = "BIDS"
LAYOUT_HINT = "sub-*/ folders (BIDS)"
DEFAULT_SESSION = "1"

_SESSION_TABLES = "sub-*_sessions.tsv"
_NATIVE_SPACES = {"", "orig", "native", "individual", "t1w", "t2w", "flair"}
"""The acquired grid, or that of another scan of the same subject."""
_MISPLACED = "its name is that of another subject or session than its folder's"


def can_read(path: Path) -> bool:
    """A folder with ``sub-*`` folders that hold an image, or with a description as BIDS. DICOM alone does not count."""
    if not path.is_dir():
        return False
    subjects = subfolders(path, "sub-*")
    return bool(subjects) and ((path / "dataset_description.json").is_file() or contains_image(subjects))


def read(root: Path, work: Path | None = None) -> SourceTable:
    """The scans of ``sub-*/[ses-*/]*/*``, label maps there and below ``derivatives/``, and the tables beside them.

    Raises:
        CohortError: no scan of a known contrast, or a table that cannot be used.
    """
    unused: UnusedFiles = []
    notes: list[str] = []
    if is_derivative(root, notes):
        notes.append("a derivative data set: its images were processed by others")
    sidecars = Sidecars(root)
    rows: list[dict[str, Any]] = []
    label_maps: list[LabelMapRow] = []
    for subject in subfolders(root, "sub-*"):
        for file in iter_images(subject, unused):
            key = parse_subject_session(root, file)
            column = mask_column(file)
            if _name_mismatches_folder(file, key):
                unused.append((file, _MISPLACED))
                continue
            if column is not None:
                label_maps.append((column, key, file))
                continue
            contrast, reason = contrast_from_bids_name(BidsName.parse(file))
            if contrast == "DWI" and sidecars.is_b0(file):
                contrast, reason = UNKNOWN, "b0 image (b ≤ 5 s/mm²), not diffusion-weighted"
            if contrast == UNKNOWN:
                unused.append((file, reason))
                continue
            row = {"subject": key[0], "session": key[1], "contrast": contrast, "path": str(file)}
            rows.append(row | sidecars.get_scanner_columns(file))
    if not rows:
        raise CohortError(
            "the BIDS folder holds no scans of a known contrast",
            where=root.name or root,
            got=f"{len(unused)} other images" if unused else "no images",
            expected="files such as sub-01/anat/sub-01_T1w.nii.gz",
            remedy="Check the suffixes, or write a manifest",
        )
    sort_by_session(rows, lambda file: (BidsName.parse(file).order, natural_sort_key(file.name)))
    notes += _notes_on_choices(rows) + _notes_on_leading_zeros({row["subject"] for row in rows})
    table = pd.DataFrame(rows)
    label_maps += _find_derivatives(root, unused)
    mask_columns = _join_label_maps(table, label_maps, unused)
    table = _join_tables(table, root, notes)
    if sidecars.faulty:
        notes.append(f"{len(sidecars.faulty)} sidecars cannot be used; their values are missing")
    return SourceTable(table, root, mask_columns, source=NAME, notes=notes, unused=[*unused, *sidecars.faulty])


def is_derivative(root: Path, notes: list[str]) -> bool:
    """Whether ``dataset_description.json`` declares a derivative data set."""
    return str(read_json(root / "dataset_description.json", notes).get("DatasetType", "")).lower() == "derivative"


def parse_subject_session(root: Path, file: Path) -> SessionKey:
    """``("sub-01", "a")`` of a path; the session without ``ses-``, and ``"1"`` if there is none."""
    parts = file.relative_to(root).parts
    session = next((part.removeprefix("ses-") for part in parts[:-1] if part.startswith("ses-")), None)
    if session is None:
        match = re.search(r"_ses-([A-Za-z0-9]+)", file.name)
        session = match.group(1) if match else DEFAULT_SESSION
    return next(part for part in parts if part.startswith("sub-")), session


def _name_mismatches_folder(file: Path, key: SessionKey) -> bool:
    entities = BidsName.parse(file).entities
    name = f"{stem(file)}_".lower()
    other_subject = "sub" in entities and not name.startswith(f"{key[0]}_".lower())
    return other_subject or ("ses" in entities and f"_ses-{key[1]}_".lower() not in name)


def _notes_on_choices(rows: list[dict[str, Any]]) -> list[str]:
    """Notes on sessions with several scans of one contrast, and on sessions with mixed spaces."""
    notes = []
    used: set[tuple[str, ...]] = set()
    spaces: dict[SessionKey, set[str]] = {}
    for row in rows:
        key = (row["subject"], row["session"])
        if (*key, row["contrast"]) not in used:
            used.add((*key, row["contrast"]))
            spaces.setdefault(key, set()).add(BidsName.parse(Path(row["path"])).entities.get("space", "none"))
    if len(used) < len(rows):
        notes.append(
            f"{len(rows) - len(used)} further scans of a contrast that its session has already: the one without space- "
            "and with the fewest entities is used, then by echo, run and name"
        )
    num_mixed = sum(len(found) > 1 for found in spaces.values())
    if num_mixed:
        notes.append(f"in {num_mixed} sessions the scans that are used lie in different spaces (space-…)")
    return notes


def _notes_on_leading_zeros(subjects: set[str]) -> list[str]:
    """``sub-1`` beside ``sub-01`` may be one person."""
    counts = Counter(re.sub(r"(?<!\d)0+(?=\d)", "", subject) for subject in subjects)
    alike = sum(count for count in counts.values() if count > 1)
    note = f"{alike} subjects differ from another in leading zeros only; they count as different subjects"
    return [note] if alike else []


def _find_derivatives(root: Path, unused: UnusedFiles) -> list[LabelMapRow]:
    label_maps = []
    for pipeline in subfolders(root / "derivatives", "*"):
        for subject in subfolders(pipeline, "sub-*"):
            for file in iter_images(subject, unused):
                key, column = parse_subject_session(pipeline, file), mask_column(file)
                if _name_mismatches_folder(file, key):
                    unused.append((file, _MISPLACED))
                elif column is None:
                    unused.append((file, "an image of derivatives/ (give that folder itself to use it)"))
                else:
                    label_maps.append((column, key, file))
    return label_maps


def _join_label_maps(table: pd.DataFrame, label_maps: list[LabelMapRow], unused: UnusedFiles) -> tuple[str, ...]:
    """One label map per session and column: raw folders before derivatives, then the order of scans.

    A label map must lie in the space of the session's scans, native or of the same template.
    """
    spaces: dict[SessionKey, set[str]] = {}
    used = table.drop_duplicates(["subject", "session", "contrast"])
    for subject, session, path in zip(used["subject"], used["session"], used["path"], strict=True):
        spaces.setdefault((subject, session), set()).add(_template_space(Path(path)))
    usable = []
    label_maps.sort(key=lambda item: ("derivatives" in item[2].parts, BidsName.parse(item[2]).order))
    for column, key, file in label_maps:
        space = _template_space(file)
        if key in spaces and space not in spaces[key]:
            unused.append((file, f"a label map in another space ({space or 'native'}) than the scans"))
        else:
            usable.append((column, key, file))
    return join_label_maps(table, usable, unused)


def _template_space(file: Path) -> str:
    """The template's name, or "" for a space of the subject."""
    space = BidsName.parse(file).entities.get("space", "")
    return "" if space.lower() in _NATIVE_SPACES else space


def _join_tables(table: pd.DataFrame, root: Path, notes: list[str]) -> pd.DataFrame:
    """Join participants.tsv, then each ``sub-*_sessions.tsv``, whose values have priority."""
    participants = root / "participants.tsv"
    if not participants.is_file() and root.parent.name == "derivatives":
        participants = root.parent.parent / "participants.tsv"
        if participants.is_file():
            notes.append("participants.tsv of the raw data set is used")
    if participants.is_file():
        table = _join_participants(table, participants, notes)
    sessions = []
    inherited = (root / "sessions.json", root / "participants.json")
    for file in sorted(root.glob("sub-*/sub-*_sessions.tsv"), key=lambda file: natural_sort_key(file.name)):
        file_notes: list[str] = []
        facts = read_table(file, file_notes, bids_ids=True)
        file_notes = [note.replace(file.name, _SESSION_TABLES) for note in file_notes]  # notes hold no identifiers
        notes += [note for note in file_notes if note not in notes]
        if "session" not in facts:
            raise CohortError("a table of sessions has no column 'session_id'", where=file.name, remedy="Add it")
        facts["subject"] = file.parent.name
        facts["session"] = strip_session_prefix(facts["session"])
        sessions.append(parse_ages(convert_ages_to_years(facts, file, notes, inherited, _SESSION_TABLES), file))
    if sessions:
        facts = pd.concat(sessions, ignore_index=True)
        table = join(table, facts, ("subject", "session"), root / _SESSION_TABLES, notes)
    return table


def _join_participants(table: pd.DataFrame, file: Path, notes: list[str]) -> pd.DataFrame:
    facts = read_table(file, notes, bids_ids=True)
    if "subject" not in facts:
        raise CohortError("participants.tsv has no column 'participant_id'", where=file.name, remedy="Add it")
    facts = facts[facts["subject"].notna()].copy()
    facts["subject"] = [name if name.startswith("sub-") else f"sub-{name}" for name in facts["subject"]]
    keys = ["subject"]
    if "session" in facts and facts["subject"].duplicated().any():
        facts["session"] = strip_session_prefix(facts["session"])
        keys = ["subject", "session"]
    facts = parse_ages(convert_ages_to_years(facts, file, notes), file)
    with_scans, listed = set(table["subject"]), set(facts["subject"])
    if listed - with_scans:
        notes.append(f"{len(listed - with_scans)} subjects of participants.tsv have no scans")
    if with_scans - listed:
        notes.append(f"{len(with_scans - listed)} subjects with scans are not in participants.tsv")
    return join(table, facts, keys, file, notes if len(keys) > 1 else None)
