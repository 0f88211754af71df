"""A folder of several BIDS data sets (``ds000001/sub-01/…``), as downloads of OpenNeuro and OpenMind are.

A subject present in two data sets would count as two subjects, so folders that may be sessions, derivatives or versions
of one data set are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pandas as pd

from brainfound.data.sources import bids
from brainfound.data.sources.file_names import SubjectNamer, UnusedFiles, is_session_name, split_words, subfolders
from brainfound.data.sources.tables import SourceTable
from brainfound.errors import CohortError

NAME = "BIDS data sets"
LAYOUT_HINT = "folders with sub-*/ in them (several BIDS data sets)"

_MAX_NOTES = 20
_COPIES = {"sourcedata", "derivatives", "code"}
"""Folders of the BIDS standard that repeat the subjects of the data set beside them."""
_PROCESSING_WORDS = {
    *("bids", "raw", "rawdata", "source", "orig", "original", "nifti", "nii", "processed", "preproc", "preprocessed"),
    *("stripped", "skullstripped", "brain", "defaced", "registered", "coregistered", "normalised", "normalized"),
    *("fmriprep", "smriprep", "freesurfer", "mriqc", "copy", "old", "new", "backup"),
}
_SESSION = re.compile(r"(?:wave|round|phase|followup)[_\-]?\w{1,3}", re.IGNORECASE)


def can_read(path: Path) -> bool:
    """A folder whose subfolders are BIDS data sets."""
    return path.is_dir() and bool(_datasets(path))


def read(path: Path, work: Path | None = None) -> SourceTable:
    """All data sets; a subject is ``<dataset>_<subject>``, and the site is the data set if no table gives one.

    Subject names that occur in unrelated data sets count as different people, and a note says so.

    Raises:
        CohortError: the folders may hold the same people, or none holds a scan.
    """
    namer = SubjectNamer()
    tables: list[pd.DataFrame] = []
    unused: UnusedFiles = []
    columns: list[str] = ["mask"]
    datasets = _datasets(path)
    originals = [folder for folder in datasets if folder.name.lower() not in _COPIES]
    others = [folder for folder in subfolders(path, "[!.]*") if folder not in datasets]
    if originals:
        unused += [(folder, "a copy of the data set beside it") for folder in datasets if folder not in originals]
        datasets = originals
    unused += [(folder, "a folder that is not a BIDS data set (read it by itself)") for folder in others]
    notes = _check_people(path, datasets)
    for folder in datasets:
        if path.name == "derivatives" or bids.is_derivative(folder, []):
            raise CohortError(
                "several derivatives may hold the same people", where=path.name, remedy="Give one of the folders"
            )
        try:
            cohort = bids.read(folder)
        except CohortError as error:
            unused.append((folder, error.what))
            continue
        table = cohort.table
        table["subject"] = [namer(folder.name, subject) for subject in table["subject"]]
        table["site"] = table["site"].where(table["site"].notna(), folder.name)
        tables.append(table.assign(dataset=folder.name).dropna(axis="columns", how="all"))
        notes += [f"{folder.name}: {note}" for note in cohort.notes]
        unused += cohort.unused
        columns += [column for column in cohort.mask_columns if column not in columns]
    if not tables:
        raise CohortError("no data set holds a scan", where=path.name, got=unused[0][1], remedy="Check the suffixes")
    if len(notes) > _MAX_NOTES:
        notes = [*notes[:_MAX_NOTES], f"{len(notes) - _MAX_NOTES} more notes; read a data set alone to see its own"]
    table = pd.concat(tables, ignore_index=True)
    return SourceTable(table, path, tuple(columns), source=NAME, notes=notes, unused=unused)


def _datasets(path: Path) -> list[Path]:
    return [folder for folder in subfolders(path, "[!.]*") if bids.can_read(folder)]


def _check_people(path: Path, datasets: list[Path]) -> list[str]:
    """A note on subject names that occur in several data sets.

    Raises:
        CohortError: the names of the folders suggest that these are the same people.
    """
    sessions = [folder.name for folder in datasets if is_session_name(folder.name) or _SESSION.fullmatch(folder.name)]
    if len(datasets) > 1 and sessions:
        _refuse(path, "the folders look like visits of the same people", sessions[0])
    subjects = {folder: {child.name for child in subfolders(folder, "sub-*")} for folder in datasets}
    counts = Counter(name for names in subjects.values() for name in names)
    shared = {name for name, count in counts.items() if count > 1}
    if not shared:
        return []
    words = {folder: split_words(folder.name) for folder in datasets}
    candidates = [folder for folder in datasets if subjects[folder] & shared and words[folder]]
    for one, other in combinations(candidates, 2):
        if subjects[one] & subjects[other] and _may_be_versions(words[one], words[other]):
            _refuse(path, "the folders look like versions of one data set", f"{one.name} and {other.name}")
    return [f"{len(shared)} names of subjects are in several data sets; they count as different people"]


def _may_be_versions(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether one name begins with the other, or both are the same without words of processing."""
    shorter = min(len(one), len(other))
    rests = [[word for word in words if word not in _PROCESSING_WORDS] for words in (one, other)]
    return one[:shorter] == other[:shorter] or rests[0] == rests[1] or not all(rests)


def _refuse(path: Path, what: str, got: str) -> None:
    raise CohortError(
        what,
        where=path.name,
        got=got,
        remedy="Give one of the folders, or write a manifest with the columns subject, session, contrast, path",
    )
