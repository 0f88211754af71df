"""A folder of several BIDS data sets (``ds000001/sub-01/…``), as OpenNeuro's and OpenMind's downloads are."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from brainfound.data.cohort import Cohort
from brainfound.data.sources import bids
from brainfound.data.sources.folders import SubjectNames, Unused, subfolders
from brainfound.errors import CohortError

NAME = "BIDS data sets"
_MOST_NOTES = 20
LOOKS_LIKE = "folders with sub-*/ in them (several BIDS data sets)"


def recognises(path: Path) -> bool:
    """A folder whose folders are BIDS."""
    return path.is_dir() and bool(_datasets(path))


def read(path: Path, work: Path | None = None) -> Cohort:
    """All data sets; a subject is ``<dataset>_<subject>``, and the site is the data set where no table says one.

    Data sets derived from one another hold the same people, so derivatives are refused.

    Raises:
        CohortError: the data sets are derivatives, or none holds a scan.
    """
    names = SubjectNames()
    tables, notes = [], []
    unused: Unused = []
    columns: list[str] = ["mask"]
    for folder in _datasets(path):
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
    return [folder for folder in subfolders(path, "[!.]*") if bids.recognises(folder)]


def _is_derivative(folder: Path) -> bool:
    try:
        content = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("DatasetType", "")).lower() == "derivative"
