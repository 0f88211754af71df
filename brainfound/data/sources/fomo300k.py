"""FOMO300K: ``PT001_*/sub-XX/ses-YY.zip`` with BIDS-like names inside; unpacked sessions are read as well.

``PT030_OpenNeuro`` has one more level, the OpenNeuro data set: ``PT030_OpenNeuro/ds000001/sub-XX/ses-YY.zip``.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.reading.archives import list_members, open_binary
from brainfound.data.reading.image_names import holds_voxels, stem
from brainfound.data.sources.bids_files import BidsName, contrast_from_bids_name, mask_column
from brainfound.data.sources.file_names import (
    MAX_B0_S_PER_MM2,
    SubjectNamer,
    UnusedFiles,
    iter_images,
    natural_sort_key,
    parse_filename,
    read_scan_name,
    subfolders,
)
from brainfound.data.sources.fomo60k import join_by_names, join_participants
from brainfound.data.sources.tables import SourceLayout, SourceTable, read_table, sort_by_session
from brainfound.errors import CohortError, ScanError

_PARTS = "PT[0-9]*"


def can_read(path: Path) -> bool:
    """Whether the path is the root with ``PT001_*`` folders, or one such folder, and holds sessions."""
    return path.is_dir() and any(any(_sessions(part)) for part, _ in _parts(path))


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read the scans inside the zips, with paths such as ``…/ses-01.zip/anat/x.nii.gz``; nothing is unpacked.

    A zip that cannot be used is listed in ``unused`` with the reason; the others are read. Images without a contrast
    in their names are kept as ``unknown``, and so are diffusion scans whose b-values are all ≤ 5 s/mm².
    """
    unused: UnusedFiles = []
    notes: list[str] = []
    namer = SubjectNamer()
    rows: list[dict[str, Any]] = []
    for part, dataset in _parts(path):
        for subject in subfolders(part, "sub-*"):
            loose = iter_images(subject, unused, without=subfolders(subject, "ses-*"))
            unused += [(file, "not in the zip or folder of a session") for file in loose]
        for session in _sessions(part):
            participant = session.parent.name
            label = session.name.removesuffix(".zip").removeprefix("ses-")
            for file in _images(session, unused):
                contrast, reason = _contrast(file)
                if reason:
                    unused.append((file, reason))
                    continue
                scan = {"contrast": contrast, "path": str(file), "site": dataset, "dataset": dataset}
                key = {"subject": namer(dataset, participant), "session": label, "_participant": participant}
                rows.append(key | scan)
    if not rows:
        got = unused[0][1] if unused else "no images"
        raise CohortError("no images found", where=path.name, got=got, remedy="Check the archives")
    sort_by_session(rows, lambda file: (BidsName.parse(file).order, str(file)))
    table = pd.DataFrame(rows)
    root = _table_folder(path)
    if (root / "participants.tsv").is_file():
        table = join_participants(table, root, notes)
    table = _join_scan_facts(table, root, notes)
    return SourceTable(table.drop(columns="_participant"), root, LAYOUT.name, notes=notes, unused=unused)


LAYOUT = SourceLayout("FOMO300K", "PT001_*/sub-*/ses-*.zip (FOMO300K)", can_read, read)


def _parts(path: Path) -> list[tuple[Path, str]]:
    """The folders of data sets with their names: ``PT001_x`` or ``PT030_OpenNeuro/ds000001``."""
    if any(path.glob("sub-*/ses-*.zip")):
        above = path.resolve().parent.name
        return [(path, f"{above}/{path.resolve().name}" if fnmatch(above, _PARTS) else path.resolve().name)]
    tops = [path] if fnmatch(path.resolve().name, _PARTS) else subfolders(path, _PARTS)
    parts = []
    for top in tops:
        name = top.resolve().name
        parts.append((top, name))
        parts += [(inner, f"{name}/{inner.name}") for inner in subfolders(top, "ds*")]
    return parts


def _table_folder(path: Path) -> Path:
    """The folder with the tables: the path, or one above it if the path is a part of the release."""
    here = path.resolve()
    above = [here.parents[number] for number in (0, 1) if number < len(here.parents)]
    is_part = fnmatch(here.name, _PARTS) or fnmatch(here.parent.name, _PARTS)
    return next((folder for folder in above if is_part and (folder / "participants.tsv").is_file()), path)


def _sessions(part: Path) -> Iterator[Path]:
    """The zips and unpacked folders of sessions; only the zip of a session that has both."""
    for subject in subfolders(part, "sub-*"):
        children = sorted(subject.glob("ses-*"), key=lambda child: natural_sort_key(child.name))
        for child in children:
            is_zip = child.suffix.lower() == ".zip" and child.is_file()
            if is_zip or (child.is_dir() and child.with_name(child.name + ".zip") not in children):
                yield child


def _images(session: Path, unused: UnusedFiles) -> list[Path]:
    if session.is_dir():
        return list(iter_images(session, unused))
    try:
        members = list_members(session)
    except ScanError as error:
        unused.append((session, error.what))
        return []
    images = [session / member for member in members if holds_voxels(PurePosixPath(member))]
    if not images:
        unused.append((session, "an archive without images"))
    return images


def _contrast(file: Path) -> tuple[str, str]:
    """The contrast, and the reason if the file is not used at all."""
    if mask_column(file):
        return UNKNOWN, "a label map"
    contrast, reason = contrast_from_bids_name(BidsName.parse(file))
    if reason and not reason.startswith("no known contrast"):
        return UNKNOWN, reason
    if contrast == UNKNOWN:
        if parse_filename(file).label_column:
            return UNKNOWN, "a label map"
        if "-" not in file.name:
            contrast = read_scan_name(file).contrast
    return (UNKNOWN if contrast == "DWI" and _is_b0(file) else contrast), ""


def _is_b0(file: Path) -> bool:
    try:
        with open_binary(file.with_name(stem(file) + ".bval")) as stream:
            b_values = [float(word) for word in stream.read(100_000).split()]
    except (ScanError, OSError, ValueError):
        return False  # unknown b-values: the name decides
    return bool(b_values) and max(b_values) <= MAX_B0_S_PER_MM2


def _join_scan_facts(table: pd.DataFrame, root: Path, notes: list[str]) -> pd.DataFrame:
    """Join ``mri_info.tsv``, which has one row per scan, by file name."""
    file = root / "mri_info.tsv"
    if not file.is_file():
        return table
    facts = read_table(file, notes, bids_ids=True)
    if not {"dataset", "subject", "session", "filename"} <= set(facts.columns):
        notes.append("mri_info.tsv has no columns dataset, participant_id, session_id, filename and was not used")
        return table
    facts = facts.rename(columns={"filename": "_file"})
    facts["_file"] = [None if name is None else PurePosixPath(name).name for name in facts["_file"]]
    table["_file"] = [Path(path).name for path in table["path"]]
    return join_by_names(table, facts, ("session", "_file"), file, notes).drop(columns="_file")
