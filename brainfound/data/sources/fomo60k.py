"""FOMO60K, the pretraining set of the FOMO25 challenge, in both releases.

First release: ``sub_<N>/ses_<M>/<sequence>[_k].nii.gz``. Second release: ``<dataset>/<participant>/<session>/<file>``
with ``participants.tsv`` (dataset, participant_id, session_id, group, …) and ``mapping.tsv`` (dataset, participant_id,
session_id, filename) in the root.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.reading.image_names import holds_voxels
from brainfound.data.sources.covariates import clean_covariates
from brainfound.data.sources.file_names import (
    SubjectNamer,
    UnusedFiles,
    contains_image,
    iter_images,
    natural_sort_key,
    parse_filename,
    read_scan_name,
    safe_join,
    subfolders,
)
from brainfound.data.sources.tables import (
    LabelMapRow,
    SourceLayout,
    SourceTable,
    contradictions,
    join,
    join_label_maps,
    read_table,
    sort_by_session,
    strip_session_prefix,
)
from brainfound.errors import CohortError

_INDEX_COLUMNS = ("dataset", "subject", "session", "filename")


def can_read(path: Path) -> bool:
    """Whether the path is the root of either release, or holds ``fomo-60k`` of the first. DICOM does not count."""
    return path.is_dir() and (_is_second_release(path) or _first_release(path) is not None)


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read the scans of either release. Images without a contrast in their names (``scan_3``) become ``unknown``."""
    unused: UnusedFiles = []
    notes: list[str] = []
    label_maps: list[LabelMapRow] = []
    if _is_second_release(path):
        root = path
        table = _read_second_release(root, label_maps, unused, notes)
    else:
        root = _first_release(path) or path
        table = _read_first_release(root, label_maps, unused)
    if table.empty:
        expected = "sub_<N>/ses_<M>/*.nii.gz"
        raise CohortError("no images found", where=path.name, expected=expected, remedy="Unpack the release here")
    columns = join_label_maps(table, label_maps, unused, notes)
    return SourceTable(table, root, LAYOUT.name, columns, notes, unused)


LAYOUT = SourceLayout("FOMO60K", "sub_<N>/ses_<M>/*.nii.gz or mapping.tsv (FOMO60K)", can_read, read)


def _is_second_release(path: Path) -> bool:
    """Whether ``mapping.tsv`` has the columns of the release; other programs write files of that name too."""
    try:
        with (path / "mapping.tsv").open("rb") as stream:
            header = stream.readline(10_000).decode("utf-8-sig", errors="replace")
    except OSError:
        return False
    return {"dataset", "filename"} <= set(re.split(r"[\t,;]", header.strip().lower().replace('"', "")))


def _first_release(path: Path) -> Path | None:
    for root in (path, path / "fomo-60k"):
        sessions = (session for session in root.glob("sub_*/ses_*") if session.is_dir())
        if contains_image(sessions):
            return root
    return None


def _read_first_release(root: Path, label_maps: list[LabelMapRow], unused: UnusedFiles) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    subjects = subfolders(root, "sub_*")
    for subject in subjects:
        sessions = subfolders(subject, "ses_*")
        loose = list(iter_images(subject, unused, without=sessions))
        only_session = [] if sessions else [file for file in loose if file.parent == subject]
        unused += [(file, "not in the folder of a session") for file in loose if file not in only_session]
        _add_images(rows, label_maps, subject.name, "ses_1", only_session)
        for session in sessions:
            _add_images(rows, label_maps, subject.name, session.name, iter_images(session, unused))
    unused += [(file, "not in the folder of a subject") for file in iter_images(root, unused, without=subjects)]
    return pd.DataFrame(rows)


def _add_images(
    rows: list[dict[str, Any]],
    label_maps: list[LabelMapRow],
    subject: str,
    session: str,
    files: Iterable[Path],
    **facts: Any,
) -> None:
    """Add scans to `rows`, and files named as label maps (``t1_seg``) to `label_maps`."""
    for file in files:
        column = parse_filename(file).label_column
        if column:
            label_maps.append((column, (subject, session), file))
        else:
            contrast = read_scan_name(file).contrast
            rows.append({"subject": subject, "session": session, "contrast": contrast, "path": str(file), **facts})


def _read_second_release(
    root: Path, label_maps: list[LabelMapRow], unused: UnusedFiles, notes: list[str]
) -> pd.DataFrame:
    """Read the images that are listed in ``mapping.tsv`` and exist; others are not used."""
    index = root / "mapping.tsv"
    mapping = read_table(index, notes, bids_ids=True)
    missing = [column for column in _INDEX_COLUMNS if column not in mapping]
    if missing:
        what = f"mapping.tsv has no column {missing[0].replace('subject', 'participant_id')!r}"
        remedy = "Get the file of the release again"
        raise CohortError(what, where=index.name, got=", ".join(map(str, mapping.columns[:12])), remedy=remedy)
    namer = SubjectNamer()
    rows: list[dict[str, Any]] = []
    listed: set[Path] = set()
    num_missing = 0
    for line, values in enumerate(mapping[list(_INDEX_COLUMNS)].itertuples(index=False), start=2):
        if any(value is None for value in values):
            raise CohortError("a value is missing", where=f"{index.name}, line {line}", remedy="Get the file again")
        dataset, participant, session, _ = values
        file = safe_join(root, "/".join(values), index, f"line {line}")
        if file in listed:
            continue
        listed.add(file)
        if not holds_voxels(file):
            unused.append((file, "not an image"))
        elif file.is_file():
            facts = {"site": dataset, "dataset": dataset, "_participant": participant}
            _add_images(rows, label_maps, namer(dataset, participant), session, [file], **facts)
        else:
            num_missing += 1
            unused.append((file, "listed in mapping.tsv, but not there"))
    if num_missing:
        notes.append(f"{num_missing} of {len(listed)} files of mapping.tsv are not there (a partial download?)")
    unused += [(file, "not listed in mapping.tsv") for file in iter_images(root, unused) if file not in listed]
    if not rows:
        return pd.DataFrame()
    sort_by_session(rows, natural_sort_key)
    return join_participants(pd.DataFrame(rows), root, notes).drop(columns="_participant")


def join_participants(table: pd.DataFrame, root: Path, notes: list[str]) -> pd.DataFrame:
    """Join ``participants.tsv`` by data set and participant, and by session if it has rows per session.

    The table needs the columns ``dataset``, ``_participant`` and ``session``.
    """
    file = root / "participants.tsv"
    if not file.is_file():
        notes.append("there is no participants.tsv: the subjects have no covariates")
        return table
    facts = read_table(file, notes, bids_ids=True)
    if not {"dataset", "subject"} <= set(facts.columns):
        what = "participants.tsv has no columns 'dataset' and 'participant_id'"
        remedy = "Get the file of the release again"
        raise CohortError(what, where=file.name, got=", ".join(map(str, facts.columns[:12])), remedy=remedy)
    by_session = "session" in facts and facts["session"].notna().any()
    return join_by_names(table, facts, ("session",) if by_session else (), file, notes)


def join_by_names(
    table: pd.DataFrame, facts: pd.DataFrame, other_keys: tuple[str, ...], file: Path, notes: list[str]
) -> pd.DataFrame:
    """Join facts by data set, participant and `other_keys`, as named in a release's tables.

    Contradictory rows for one key are not used, since there is no telling which is right.
    """
    facts = clean_covariates(facts, file.name, notes)
    facts = facts.rename(columns={"dataset": "_dataset", "subject": "_participant", "session": "_session"})
    keys = ["_dataset", "_participant", *("_session" if column == "session" else column for column in other_keys)]
    if "_session" in keys:
        facts["_session"] = strip_session_prefix(facts["_session"])
        table["_session"] = [name.removeprefix("ses-") for name in table["session"]]
    facts = facts.drop_duplicates().dropna(subset=keys)
    differs = contradictions(facts, keys, [column for column in facts.columns if column not in keys]).any(axis=1)
    contradictory = differs.groupby([facts[key] for key in keys], sort=False).transform("any")
    if contradictory.any():
        notes.append(f"{contradictory.sum()} rows of {file.name} are not used: they contradict each other")
        facts = facts[~contradictory]
    known = set(facts["_dataset"])
    table["_dataset"] = [_match_dataset(known, dataset) for dataset in table["dataset"]]
    joined = join(table, facts, keys, file, notes)
    return joined.drop(columns=["_dataset", "_session"], errors="ignore")


def _match_dataset(known: set[str], dataset: str) -> str:
    """The name of a data set in the table: ``PT030_OpenNeuro/ds000001`` in full, or its last or first part."""
    first, _, rest = dataset.partition("/")
    return next((name for name in (dataset, rest, first) if name in known), dataset)
