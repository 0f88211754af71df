"""FOMO60K, the pretraining set of the FOMO25 challenge, in both releases.

First release: ``sub_<N>/ses_<M>/<sequence>[_k].nii.gz``. Later release: ``<dataset>/<participant>/<session>/<file>``
with ``participants.tsv`` (dataset, participant_id, session_id, group, …) and ``mapping.tsv`` (dataset, participant_id,
session_id, filename) in the root.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.cohort import Cohort
from brainfound.data.sources.file_names import (
    SubjectNamer,
    UnusedFiles,
    contains_image,
    is_image,
    iter_images,
    natural_sort_key,
    parse_filename,
    safe_join,
    scan_contrast_from_filename,
    subfolders,
)
from brainfound.data.sources.tables import (
    SessionKey,
    join,
    join_label_maps,
    parse_ages,
    read_table,
    strip_session_prefix,
)
from brainfound.errors import CohortError

NAME = "FOMO60K"
LAYOUT_HINT = "sub_<N>/ses_<M>/*.nii.gz or mapping.tsv (FOMO60K)"
_KEYS = ("dataset", "subject", "session")


def can_read(path: Path) -> bool:
    """Either release in its root, or the folder above the ``fomo-60k`` of the first; DICOM in such folders is not."""
    return path.is_dir() and (_is_later(path) or _first_release(path) is not None)


def read(path: Path, work: Path | None = None) -> Cohort:
    """The scans of either release. A name that says no contrast (``scan_3``) is kept as ``unknown``.

    Raises:
        CohortError: no images, or an index that leads out of its folder.
    """
    unused: UnusedFiles = []
    notes: list[str] = []
    maps: list[tuple[str, SessionKey, Path]] = []
    if _is_later(path):
        root = path
        table = _read_later(root, maps, unused, notes)
    else:
        root = _first_release(path) or path
        table = _read_first(root, maps, unused)
    if table.empty:
        raise CohortError(
            "no images found", where=path.name, expected="sub_<N>/ses_<M>/*.nii.gz", remedy="Unpack the release here"
        )
    columns = join_label_maps(table, maps, unused)
    return Cohort(table, root, columns, source=NAME, notes=notes, unused=unused)


def _is_later(path: Path) -> bool:
    """Whether there is a ``mapping.tsv`` with a release's columns; other programs write files of that name too."""
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


def _read_first(root: Path, maps: list[tuple[str, SessionKey, Path]], unused: UnusedFiles) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    subjects = subfolders(root, "sub_*")
    for subject in subjects:
        sessions = subfolders(subject, "ses_*")
        loose = list(iter_images(subject, unused, without=[session.name for session in sessions]))
        only = [] if sessions else [file for file in loose if file.parent == subject]  # then it is the one session
        unused += [(file, "not in the folder of a session") for file in loose if file not in only]
        _take(rows, maps, subject.name, "ses_1", only)
        for session in sessions:
            _take(rows, maps, subject.name, session.name, iter_images(session, unused))
    others = iter_images(root, unused, without=[subject.name for subject in subjects])
    unused += [(file, "not in the folder of a subject") for file in others]
    return pd.DataFrame(rows)


def _take(
    rows: list[dict[str, Any]],
    maps: list[tuple[str, SessionKey, Path]],
    subject: str,
    session: str,
    files: Iterable[Path],
    **facts: Any,
) -> None:
    """Scans become rows; what is named as a label map (``t1_seg``) is none."""
    for file in files:
        column = parse_filename(file).label_column
        if column:
            maps.append((column, (subject, session), file))
        else:
            contrast = scan_contrast_from_filename(file)
            rows.append({"subject": subject, "session": session, "contrast": contrast, "path": str(file), **facts})


def _read_later(
    root: Path, maps: list[tuple[str, SessionKey, Path]], unused: UnusedFiles, notes: list[str]
) -> pd.DataFrame:
    """What ``mapping.tsv`` lists and is there; images that it does not list are not used."""
    index = root / "mapping.tsv"
    mapping, of_reading = read_table(index, bids_ids=True)
    notes += of_reading
    missing = [column for column in (*_KEYS, "filename") if column not in mapping]
    if missing:
        raise CohortError(
            f"mapping.tsv has no column {missing[0].replace('subject', 'participant_id')!r}",
            where=index.name,
            got=", ".join(map(str, mapping.columns[:12])),
            remedy="Get the file of the release again",
        )
    names = SubjectNamer()
    rows: list[dict[str, Any]] = []
    listed: set[Path] = set()
    absent = 0
    for line, values in enumerate(mapping[[*_KEYS, "filename"]].itertuples(index=False), start=2):
        if any(value is None for value in values):
            raise CohortError("a value is missing", where=f"{index.name}, line {line}", remedy="Get the file again")
        dataset, participant, session, _ = values
        file = safe_join(root, "/".join(values), index, f"line {line}")
        if file in listed:
            continue
        listed.add(file)
        if not is_image(file):
            unused.append((file, "not an image"))
        elif file.is_file():
            facts = {"site": dataset, "dataset": dataset, "_participant": participant}
            _take(rows, maps, names(dataset, participant), session, [file], **facts)
        else:
            absent += 1
            unused.append((file, "listed in mapping.tsv, but not there"))
    if absent:
        notes.append(f"{absent} of {len(listed)} files of mapping.tsv are not there (a partial download?)")
    unused += [(file, "not listed in mapping.tsv") for file in iter_images(root, unused) if file not in listed]
    if not rows:
        return pd.DataFrame()
    rows.sort(
        key=lambda row: (
            natural_sort_key(row["subject"]),
            natural_sort_key(row["session"]),
            natural_sort_key(row["path"]),
        )
    )
    return join_people(pd.DataFrame(rows), root, notes).drop(columns=["_participant"])


def join_people(table: pd.DataFrame, root: Path, notes: list[str]) -> pd.DataFrame:
    """``participants.tsv`` joined by data set and participant, and by session where it has rows per session.

    The table needs the columns ``dataset`` and ``_participant`` beside ``session``.
    """
    file = root / "participants.tsv"
    if not file.is_file():
        notes.append("there is no participants.tsv: nothing is known of the people")
        return table
    people, of_reading = read_table(file, bids_ids=True)
    notes += of_reading
    if not {"dataset", "subject"} <= set(people.columns):
        raise CohortError(
            "participants.tsv has no columns 'dataset' and 'participant_id'",
            where=file.name,
            got=", ".join(map(str, people.columns[:12])),
            remedy="Get the file of the release again",
        )
    people = parse_ages(people, file, notes)
    by_session = "session" in people and people["session"].notna().any()
    return join_by_names(table, people, ("session",) if by_session else (), file, notes)


def join_by_names(
    table: pd.DataFrame, facts: pd.DataFrame, further: tuple[str, ...], file: Path, notes: list[str]
) -> pd.DataFrame:
    """Facts joined by data set, participant and further columns, as an index of a release names them.

    Rows that say different things of one name are not used, since whose they are cannot be known.
    """
    facts = facts.rename(columns={"dataset": "_dataset", "subject": "_participant", "session": "_session"})
    keys = ["_dataset", "_participant", *("_session" if column == "session" else column for column in further)]
    if "_session" in keys:
        facts["_session"] = strip_session_prefix(facts["_session"])
        table["_session"] = [name.removeprefix("ses-") for name in table["session"]]
    facts = facts.drop_duplicates()
    doubtful = facts.duplicated(subset=keys, keep=False)
    if doubtful.any():
        notes.append(f"{doubtful.sum()} rows of {file.name} are not used: they say different things of one name")
        facts = facts[~doubtful]
    known = set(facts["_dataset"])
    table["_dataset"] = [_name_in(known, dataset) for dataset in table["dataset"]]
    joined = join(table, facts, keys, file, notes)
    return joined.drop(columns=[column for column in ("_dataset", "_session") if column in joined])


def _name_in(known: set[str], dataset: str) -> str:
    """How a table calls a data set: ``PT030_OpenNeuro/ds000001`` whole, or by its last or its first part."""
    first, _, rest = dataset.partition("/")
    return next((name for name in (dataset, rest, first) if name in known), dataset)
