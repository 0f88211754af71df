"""A folder of several BIDS data sets (``ds000001/sub-01/…``), as OpenNeuro's and OpenMind's downloads are."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pandas as pd

from brainfound.data.cohort import Cohort
from brainfound.data.sources import bids
from brainfound.data.sources.file_names import SubjectNamer, UnusedFiles, is_visit, split_words, subfolders
from brainfound.errors import CohortError

NAME = "BIDS data sets"
_MOST_NOTES = 20
_COPIES = {"sourcedata", "derivatives", "code"}
"""Folders of the BIDS standard that hold the people of the data set beside them once more."""
_PROCESSED = {
    *("bids", "raw", "rawdata", "source", "orig", "original", "nifti", "nii", "processed", "preproc", "preprocessed"),
    *("stripped", "skullstripped", "brain", "defaced", "registered", "coregistered", "normalised", "normalized"),
    *("fmriprep", "smriprep", "freesurfer", "mriqc", "copy", "old", "new", "backup"),
}
_VISIT = re.compile(r"(?:wave|round|phase|followup)[_\-]?\w{1,3}", re.IGNORECASE)
LAYOUT_HINT = "folders with sub-*/ in them (several BIDS data sets)"


def can_read(path: Path) -> bool:
    """A folder whose folders are BIDS."""
    return path.is_dir() and bool(_datasets(path))


def read(path: Path, work: Path | None = None) -> Cohort:
    """All data sets; a subject is ``<dataset>_<subject>``, and the site is the data set where no table says one.

    One person in two of them would be two subjects, so folders that are visits, derivatives or versions of one data
    set are refused. Names that are in several data sets otherwise are of different people, which a note says.

    Raises:
        CohortError: the folders may hold the same people, or none holds a scan.
    """
    names = SubjectNamer()
    tables, notes = [], []
    unused: UnusedFiles = []
    columns: list[str] = ["mask"]
    folders = _datasets(path)
    beside = [folder for folder in folders if folder.name.lower() not in _COPIES]
    if beside:
        unused += [(folder, "a copy of the data set beside it") for folder in folders if folder not in beside]
        folders = beside
    others = [folder for folder in subfolders(path, "[!.]*") if folder not in (*folders, *(file for file, _ in unused))]
    unused += [(folder, "a folder that is no BIDS data set (read it by itself)") for folder in others]
    notes += _check_people(path, folders)
    for folder in folders:
        if path.name == "derivatives" or _is_derivative(folder):
            raise CohortError(
                "several derivatives may hold the same people", where=path.name, remedy="Give one of the folders"
            )
        try:
            cohort = bids.read(folder)
        except CohortError as error:
            unused.append((folder, error.what))
            continue
        table = cohort.table
        table["subject"] = [names(folder.name, subject) for subject in table["subject"]]
        table["site"] = table["site"].where(table["site"].notna(), folder.name)
        tables.append(table.assign(dataset=folder.name))
        notes += [f"{folder.name}: {note}" for note in cohort.notes]
        unused += cohort.unused
        columns += [column for column in cohort.mask_columns if column not in columns]
    if not tables:
        raise CohortError("no data set holds a scan", where=path.name, got=unused[0][1], remedy="Check the suffixes")
    if len(notes) > _MOST_NOTES:
        notes = [*notes[:_MOST_NOTES], f"{len(notes) - _MOST_NOTES} more notes; read a data set alone to see its own"]
    known = [table.dropna(axis="columns", how="all") for table in tables]
    return Cohort(pd.concat(known, ignore_index=True), path, tuple(columns), source=NAME, notes=notes, unused=unused)


def _datasets(path: Path) -> list[Path]:
    return [folder for folder in subfolders(path, "[!.]*") if bids.can_read(folder)]


def _check_people(path: Path, folders: list[Path]) -> list[str]:
    """A note on names that are in several data sets.

    Raises:
        CohortError: the names of the folders say that these are the same people.
    """
    if len(folders) > 1 and (visit := next((f for f in folders if is_visit(f.name) or _VISIT.fullmatch(f.name)), None)):
        _refuse(path, "the folders look like visits of the same people", visit.name)
    people = {folder: {child.name for child in subfolders(folder, "sub-*")} for folder in folders}
    data_sets_of = Counter(name for names in people.values() for name in names)
    shared = {name for name, count in data_sets_of.items() if count > 1}
    if not shared:
        return []
    versions = [folder for folder in folders if people[folder] & shared and _words(folder)]
    for one, other in combinations(versions, 2):
        if people[one] & people[other] and _may_be_versions(_words(one), _words(other)):
            _refuse(path, "the folders look like versions of one data set", f"{one.name} and {other.name}")
    return [f"{len(shared)} names of subjects are in several data sets; they are taken as different people"]


def _words(folder: Path) -> tuple[str, ...]:
    return split_words(folder.name)


def _may_be_versions(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether a name goes on where the other ends, or both are the same but for words of processing."""
    shorter = min(len(one), len(other))
    rests = [[word for word in words if word not in _PROCESSED] for words in (one, other)]
    return one[:shorter] == other[:shorter] or rests[0] == rests[1] or not all(rests)


def _refuse(path: Path, what: str, got: str) -> None:
    raise CohortError(
        what,
        where=path.name,
        got=got,
        remedy="Give one of the folders, or write a manifest with the columns subject, session, contrast, path",
    )


def _is_derivative(folder: Path) -> bool:
    try:
        content = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("DatasetType", "")).lower() == "derivative"
