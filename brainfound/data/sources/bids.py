"""BIDS folders, raw and derivative (BIDS 1.10): scans, label maps, people, visits and scanners."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.cohort import Cohort
from brainfound.data.sources.bids_names import BidsName, contrast_of, mask_column
from brainfound.data.sources.folders import Unused, images_under, in_order, subfolders
from brainfound.data.sources.sidecars import Sidecars
from brainfound.data.sources.tables import ages_in_years, join, read_table, with_typed_ages
from brainfound.errors import CohortError

NAME = "BIDS"
LOOKS_LIKE = "sub-*/ folders (BIDS)"
DEFAULT_SESSION = "1"

_Key = tuple[str, str]


def recognises(path: Path) -> bool:
    """A folder with ``sub-*`` folders."""
    return path.is_dir() and any(child.is_dir() for child in path.glob("sub-*"))


def read(root: Path, work: Path | None = None) -> Cohort:
    """The scans of ``sub-*/[ses-*/]*/*``, label maps there and below ``derivatives/``, and the tables beside them.

    Raises:
        CohortError: no scan of a known contrast, or a table that cannot be used.
    """
    unused: Unused = []
    notes = _description_notes(root)
    sidecars = Sidecars(root)
    rows: list[dict[str, Any]] = []
    label_maps: list[tuple[str, _Key, tuple, Path]] = []
    for file in _images(root, unused):
        key = subject_and_session(root, file)
        column = mask_column(file)
        if column is not None:
            label_maps.append((column, key, BidsName.of(file).order, file))
            continue
        name = BidsName.of(file)
        contrast, reason = contrast_of(name)
        if contrast == "DWI" and sidecars.is_b0(file):
            contrast, reason = UNKNOWN, "b0 image (b ≤ 5 s/mm²), not diffusion-weighted"
        if contrast == UNKNOWN:
            unused.append((file, reason))
            continue
        facts = sidecars.scanner_of(file)
        rows.append(
            {"subject": key[0], "session": key[1], "contrast": contrast, "path": str(file), **facts}
            | {"_order": (in_order(key[0]), in_order(key[1]), name.order, in_order(file.name))}
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
    notes += _notes_on_choices(rows)
    table = pd.DataFrame(rows).drop(columns="_order")
    _add_derivatives(root, label_maps, unused)
    mask_columns = _join_label_maps(table, label_maps, unused)
    table = _join_tables(table, root, notes)
    if sidecars.faulty:
        notes.append(f"{len(sidecars.faulty)} sidecars cannot be used; what they say of their scans is not known")
    return Cohort(table, root, mask_columns, source=NAME, notes=notes, unused=[*unused, *sidecars.faulty])


def subject_and_session(root: Path, file: Path) -> _Key:
    """``("sub-01", "a")`` of a path; the session without ``ses-`` and ``"1"`` where there is none."""
    parts = file.relative_to(root).parts
    session = next((part.removeprefix("ses-") for part in parts[:-1] if part.startswith("ses-")), None)
    if session is None:
        found = re.search(r"_ses-([A-Za-z0-9]+)", file.name)
        session = found.group(1) if found else DEFAULT_SESSION
    return next(part for part in parts if part.startswith("sub-")), session


def _images(root: Path, unused: Unused) -> Iterator[Path]:
    for folder in subfolders(root, "sub-*"):
        yield from images_under(folder, unused)


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


def _add_derivatives(root: Path, label_maps: list[tuple[str, _Key, tuple, Path]], unused: Unused) -> None:
    for pipeline in subfolders(root / "derivatives", "*"):
        for subject in subfolders(pipeline, "sub-*"):
            for file in images_under(subject, unused):
                column = mask_column(file)
                if column is None:
                    unused.append((file, "an image of derivatives/ (give that folder itself to use it)"))
                else:
                    label_maps.append((column, subject_and_session(pipeline, file), BidsName.of(file).order, file))


def _join_label_maps(
    table: pd.DataFrame, label_maps: list[tuple[str, _Key, tuple, Path]], unused: Unused
) -> tuple[str, ...]:
    """One label map per session and column: raw folders before derivatives, then the order of scans."""
    keys = list(zip(table["subject"], table["session"], strict=True))
    found: dict[str, dict[_Key, Path]] = {"mask": {}}
    known = set(keys)
    for column, key, _, file in sorted(label_maps, key=lambda item: ("derivatives" in item[3].parts, item[2])):
        if key not in known:
            unused.append((file, "a label map of a session without scans"))
        elif key in found.setdefault(column, {}):
            unused.append((file, f"a further label map ({column}) of its session"))
        else:
            found[column][key] = file
    columns = tuple(column for column, files in found.items() if files or column == "mask")
    for column in columns:
        table[column] = [str(found[column][key]) if key in found[column] else None for key in keys]
    return columns


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
    for file in sorted(root.glob("sub-*/sub-*_sessions.tsv"), key=lambda file: in_order(file.name)):
        facts, _ = read_table(file)
        if "session" not in facts:
            raise CohortError("a table of sessions has no column 'session_id'", where=file.name, remedy="Add it")
        facts["subject"] = file.parent.name
        facts["session"] = [str(name).removeprefix("ses-") for name in facts["session"]]
        visits.append(with_typed_ages(ages_in_years(facts, file, notes), file))
    if visits:
        file = root / "sub-*_sessions.tsv"
        table = join(table, pd.concat(visits, ignore_index=True), ("subject", "session"), file)
    return table


def _join_participants(table: pd.DataFrame, file: Path, notes: list[str]) -> pd.DataFrame:
    people, of_reading = read_table(file)
    notes += of_reading
    if "subject" not in people:
        raise CohortError("participants.tsv has no column 'participant_id'", where=file.name, remedy="Add it")
    people = people[people["subject"].notna()].copy()
    people["subject"] = [name if name.startswith("sub-") else f"sub-{name}" for name in people["subject"]]
    keys = ["subject"]
    if "session" in people and people["subject"].duplicated().any():
        people["session"] = [None if name is None else str(name).removeprefix("ses-") for name in people["session"]]
        keys = ["subject", "session"]
    people = with_typed_ages(ages_in_years(people, file, notes), file)
    with_scans, listed = set(table["subject"]), set(people["subject"])
    if listed - with_scans:
        notes.append(f"{len(listed - with_scans)} subjects of participants.tsv have no scans")
    if with_scans - listed:
        notes.append(f"{len(with_scans - listed)} subjects with scans are not in participants.tsv")
    return join(table, people, keys, file)
