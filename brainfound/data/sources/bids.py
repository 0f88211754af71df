"""BIDS folders, raw and derivative (BIDS 1.10): scans, label maps, people, visits and scanners."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.cohort import Cohort
from brainfound.data.sources.bids_files import BidsName, Sidecars, contrast_from_bids_name, mask_column
from brainfound.data.sources.file_names import (
    UnusedFiles,
    contains_image,
    iter_images,
    natural_sort_key,
    stem,
    subfolders,
)
from brainfound.data.sources.tables import SessionKey as _Key
from brainfound.data.sources.tables import (
    convert_ages_to_years,
    join,
    join_label_maps,
    parse_ages,
    read_table,
    strip_session_prefix,
)
from brainfound.errors import CohortError

NAME = "BIDS"
LAYOUT_HINT = "sub-*/ folders (BIDS)"
DEFAULT_SESSION = "1"

_VISITS = "sub-*_sessions.tsv"
_NATIVE = {"", "orig", "native", "individual", "t1w", "t2w", "flair"}
"""Spaces in which a scan lies as the scanner took it, or is aligned to another scan of its person."""


def can_read(path: Path) -> bool:
    """A folder with ``sub-*`` folders that hold an image or are described as BIDS; with DICOM alone it is none."""
    if not path.is_dir():
        return False
    people = subfolders(path, "sub-*")
    return bool(people) and ((path / "dataset_description.json").is_file() or contains_image(people))


def read(root: Path, work: Path | None = None) -> Cohort:
    """The scans of ``sub-*/[ses-*/]*/*``, label maps there and below ``derivatives/``, and the tables beside them.

    Raises:
        CohortError: no scan of a known contrast, or a table that cannot be used.
    """
    unused: UnusedFiles = []
    notes = _description_notes(root)
    sidecars = Sidecars(root)
    rows: list[dict[str, Any]] = []
    label_maps: list[tuple[str, _Key, tuple, Path]] = []
    for file in _images(root, unused):
        key = parse_subject_session(root, file)
        if _name_mismatches_folder(file, key):
            unused.append((file, "its name is that of another subject or session than its folder's"))
            continue
        column = mask_column(file)
        if column is not None:
            label_maps.append((column, key, BidsName.of(file).order, file))
            continue
        name = BidsName.of(file)
        contrast, reason = contrast_from_bids_name(name)
        if contrast == "DWI" and sidecars.is_b0(file):
            contrast, reason = UNKNOWN, "b0 image (b ≤ 5 s/mm²), not diffusion-weighted"
        if contrast == UNKNOWN:
            unused.append((file, reason))
            continue
        facts = sidecars.get_scanner_columns(file)
        rows.append(
            {"subject": key[0], "session": key[1], "contrast": contrast, "path": str(file), **facts}
            | {"_order": (natural_sort_key(key[0]), natural_sort_key(key[1]), name.order, natural_sort_key(file.name))}
        )
    if not rows:
        raise CohortError(
            "the BIDS folder holds no scans of a known contrast",
            where=root.name or root,
            got=f"{len(unused)} other images" if unused else "no images",
            expected="files such as sub-01/anat/sub-01_T1w.nii.gz",
            remedy="Check the suffixes, or write a manifest",
        )
    rows.sort(key=lambda row: row["_order"])
    notes += _notes_on_choices(rows) + _leading_zero_notes({row["subject"] for row in rows})
    table = pd.DataFrame(rows).drop(columns="_order")
    _add_derivatives(root, label_maps, unused)
    mask_columns = _join_label_maps(table, label_maps, unused)
    table = _join_tables(table, root, notes)
    if sidecars.faulty:
        notes.append(f"{len(sidecars.faulty)} sidecars cannot be used; what they say of their scans is not known")
    return Cohort(table, root, mask_columns, source=NAME, notes=notes, unused=[*unused, *sidecars.faulty])


def parse_subject_session(root: Path, file: Path) -> _Key:
    """``("sub-01", "a")`` of a path; the session without ``ses-`` and ``"1"`` where there is none."""
    parts = file.relative_to(root).parts
    session = next((part.removeprefix("ses-") for part in parts[:-1] if part.startswith("ses-")), None)
    if session is None:
        found = re.search(r"_ses-([A-Za-z0-9]+)", file.name)
        session = found.group(1) if found else DEFAULT_SESSION
    return next(part for part in parts if part.startswith("sub-")), session


def _name_mismatches_folder(file: Path, key: _Key) -> bool:
    said = BidsName.of(file).entities
    name = f"{stem(file)}_".lower()
    other = "sub" in said and not name.startswith(f"{key[0]}_".lower())
    return other or ("ses" in said and f"_ses-{key[1]}_".lower() not in name)


def _images(root: Path, unused: UnusedFiles) -> Iterator[Path]:
    for folder in subfolders(root, "sub-*"):
        yield from iter_images(folder, unused)


def _description_notes(root: Path) -> list[str]:
    file = root / "dataset_description.json"
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        return [f"{file.name} is not valid JSON and was not used ({type(error).__name__})"]
    derivative = isinstance(content, dict) and str(content.get("DatasetType", "")).lower() == "derivative"
    return ["a derivative data set: its images were processed by others"] if derivative else []


def _notes_on_choices(rows: list[dict[str, Any]]) -> list[str]:
    """Say what was chosen where a session holds several scans of one contrast, and where spaces are mixed."""
    notes = []
    seen: set[tuple[str, ...]] = set()
    spaces: dict[_Key, set[str]] = {}
    further = 0
    for row in rows:
        key = (row["subject"], row["session"], row["contrast"])
        if key in seen:
            further += 1
            continue
        seen.add(key)
        space = BidsName.of(Path(row["path"])).entities.get("space", "none")
        spaces.setdefault(key[:2], set()).add(space)
    if further:
        notes.append(
            f"{further} further scans of a contrast that its session has already: the one without space- and with "
            "the fewest entities is used, then by echo, run and name"
        )
    mixed = sum(len(found) > 1 for found in spaces.values())
    if mixed:
        notes.append(f"in {mixed} sessions the scans that are used lie in different spaces (space-…)")
    return notes


def _leading_zero_notes(subjects: set[str]) -> list[str]:
    """``sub-1`` beside ``sub-01`` may be one person."""
    plain = Counter(re.sub(r"(?<!\d)0+(?=\d)", "", subject) for subject in subjects)
    alike = sum(count for count in plain.values() if count > 1)
    return [f"{alike} subjects differ from another in leading zeros only; they are taken as others"] if alike else []


def _add_derivatives(root: Path, label_maps: list[tuple[str, _Key, tuple, Path]], unused: UnusedFiles) -> None:
    for pipeline in subfolders(root / "derivatives", "*"):
        for subject in subfolders(pipeline, "sub-*"):
            for file in iter_images(subject, unused):
                column = mask_column(file)
                if _name_mismatches_folder(file, parse_subject_session(pipeline, file)):
                    unused.append((file, "its name is that of another subject or session than its folder's"))
                elif column is None:
                    unused.append((file, "an image of derivatives/ (give that folder itself to use it)"))
                else:
                    label_maps.append((column, parse_subject_session(pipeline, file), BidsName.of(file).order, file))


def _join_label_maps(
    table: pd.DataFrame, label_maps: list[tuple[str, _Key, tuple, Path]], unused: UnusedFiles
) -> tuple[str, ...]:
    """One label map per session and column: raw folders before derivatives, then the order of scans.

    A map in the space of a template is not one of a scan in its own space, nor the reverse: its voxels would be wrong.
    """
    spaces: dict[_Key, set[str]] = {}
    used = table.drop_duplicates(["subject", "session", "contrast"])
    for subject, session, path in zip(used["subject"], used["session"], used["path"], strict=True):
        spaces.setdefault((subject, session), set()).add(_space(Path(path)))
    usable = []
    for column, key, _, file in sorted(label_maps, key=lambda item: ("derivatives" in item[3].parts, item[2])):
        if key in spaces and _space(file) not in spaces[key]:
            unused.append((file, f"a label map in another space ({_space(file) or 'native'}) than the scans"))
        else:
            usable.append((column, key, file))
    return join_label_maps(table, usable, unused)


def _space(file: Path) -> str:
    """The template's name, or "" for a space of the person himself."""
    space = BidsName.of(file).entities.get("space", "")
    return "" if space.lower() in _NATIVE else space


def _join_tables(table: pd.DataFrame, root: Path, notes: list[str]) -> pd.DataFrame:
    """participants.tsv, then each ``sub-*_sessions.tsv``, which knows better what changes between visits."""
    people = root / "participants.tsv"
    if not people.is_file() and root.parent.name == "derivatives":
        people = root.parent.parent / "participants.tsv"
        if people.is_file():
            notes.append("participants.tsv of the raw data set is used")
    if people.is_file():
        table = _join_participants(table, people, notes)
    visits = []
    for file in sorted(root.glob("sub-*/sub-*_sessions.tsv"), key=lambda file: natural_sort_key(file.name)):
        facts, of_reading = read_table(file, bids_ids=True)
        of_reading = [note.replace(file.name, _VISITS) for note in of_reading]  # notes name nobody
        notes += [note for note in of_reading if note not in notes]
        if "session" not in facts:
            raise CohortError("a table of sessions has no column 'session_id'", where=file.name, remedy="Add it")
        facts["subject"] = file.parent.name
        facts["session"] = strip_session_prefix(facts["session"])
        above = (root / "sessions.json", root / "participants.json")
        visits.append(parse_ages(convert_ages_to_years(facts, file, notes, above, _VISITS), file))
    if visits:
        table = join(table, pd.concat(visits, ignore_index=True), ("subject", "session"), root / _VISITS, notes)
    return table


def _join_participants(table: pd.DataFrame, file: Path, notes: list[str]) -> pd.DataFrame:
    people, of_reading = read_table(file, bids_ids=True)
    notes += of_reading
    if "subject" not in people:
        raise CohortError("participants.tsv has no column 'participant_id'", where=file.name, remedy="Add it")
    people = people[people["subject"].notna()].copy()
    people["subject"] = [name if name.startswith("sub-") else f"sub-{name}" for name in people["subject"]]
    keys = ["subject"]
    if "session" in people and people["subject"].duplicated().any():
        people["session"] = strip_session_prefix(people["session"])
        keys = ["subject", "session"]
    people = parse_ages(convert_ages_to_years(people, file, notes), file)
    with_scans, listed = set(table["subject"]), set(people["subject"])
    if listed - with_scans:
        notes.append(f"{len(listed - with_scans)} subjects of participants.tsv have no scans")
    if with_scans - listed:
        notes.append(f"{len(with_scans - listed)} subjects with scans are not in participants.tsv")
    return join(table, people, keys, file, notes if len(keys) > 1 else None)
