"""Manifests: one scan per row, in CSV, TSV or Parquet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from brainfound.contrasts import CONTRASTS, parse_contrast
from brainfound.data.sources.tables import SourceLayout, SourceTable, parse_ages, read_table
from brainfound.errors import CohortError, UsageError

_FILES = ("manifest.tsv", "manifest.csv", "manifest.parquet")
_REQUIRED = ("subject", "contrast", "path")


def can_read(path: Path) -> bool:
    """Whether the path is a file but not JSON (`read` refuses files other than tables), or a folder with a manifest."""
    return (path.is_file() and path.suffix.lower() != ".json") or any((path / name).is_file() for name in _FILES)


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read the scans of a manifest. Paths are relative to its folder and may lead anywhere, since the user wrote them.

    The columns ``mask``, ``dseg`` and ``…_mask`` hold label maps. A CohortError names the faulty line.
    """
    if path.is_dir():
        path = next(path / name for name in _FILES if (path / name).is_file())
    notes: list[str] = []
    table = read_table(path, notes)
    _require_columns(table, path)
    if "session" not in table:
        table["session"] = "1"
    table["session"] = table["session"].fillna("1").astype(str)
    table["subject"] = table["subject"].astype(str)
    table["contrast"] = _parse_contrasts(path, table["contrast"])
    mask_columns = tuple(c for c in table.columns if c in ("mask", "dseg") or c.endswith("_mask")) or ("mask",)
    for column in ("path", *mask_columns):
        if column in table:
            table[column] = [None if pd.isna(file) else str(path.parent / str(file).strip()) for file in table[column]]
    table = parse_ages(table, path)
    repeated = table.astype(str).duplicated()
    if repeated.any():
        table = table[~repeated]
        notes.append(f"{repeated.sum()} rows repeat another row and were dropped")
    shared = table.groupby("path")["subject"].nunique()
    if (shared > 1).any():
        notes.append(f"{(shared > 1).sum()} files are listed for more than one subject")
    return SourceTable(table, path.parent, LAYOUT.name, mask_columns, notes)


LAYOUT = SourceLayout("manifest", "manifest.tsv, .csv or .parquet with subject, contrast, path", can_read, read)


def _require_columns(table: pd.DataFrame, path: Path) -> None:
    for column in _REQUIRED:
        if column not in table:
            got = ", ".join(map(str, table.columns[:12]))
            remedy = "Add the column (needed: subject, contrast, path), or rename the file if it is not a manifest"
            raise CohortError(f"the manifest has no column {column!r}", where=path.name, got=got, remedy=remedy)
    if table.empty:
        raise CohortError("the manifest has no rows", where=path.name, remedy="List one scan per row")
    for column in _REQUIRED:
        empty = [row for row, value in enumerate(table[column]) if pd.isna(value) or not str(value).strip()]
        if empty:
            where = f"{path.name}, line {empty[0] + 2}"
            raise CohortError(f"column {column!r} is empty", where=where, remedy="Fill it in")


def _parse_contrasts(path: Path, names: pd.Series) -> list[str]:
    """Canonical names. Unknown names stay, so that only their scans are refused; CohortError if all are unknown."""
    contrasts: list[str] = []
    first_error: CohortError | None = None
    for line, name in enumerate(names.astype(str), start=2):
        try:
            contrasts.append(parse_contrast(name))
        except UsageError as error:
            contrasts.append(name)
            first_error = first_error or CohortError(error.what, where=f"{path.name}, line {line}", remedy=error.remedy)
    if first_error is not None and not any(contrast in CONTRASTS for contrast in contrasts):
        raise first_error
    return contrasts
