"""Manifests: one scan per row, in CSV, TSV or Parquet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from brainfound.contrasts import CONTRASTS, parse_contrast
from brainfound.data.sources.covariates import clean_covariates
from brainfound.data.sources.file_names import UnusedFiles, split_words
from brainfound.data.sources.persons import find_same_spelling
from brainfound.data.sources.tables import SourceLayout, SourceTable, contradictions, merge_rows, read_table
from brainfound.errors import CohortError, UsageError

_FILES = ("manifest.tsv", "manifest.csv", "manifest.parquet")
_SESSION = ("subject", "session")
_REQUIRED = ("subject", "contrast", "path")
_WORDS_FOR_A_SCAN = {
    *("acq", "acquisition", "comment", "comments", "echo", "file", "filename", "flip", "image", "manufacturer"),
    *("md5", "modality", "note", "notes", "plane", "protocol", "qc", "run", "scan", "scanner", "sequence", "series"),
    *("sha256", "slice", "space", "spacing", "strength", "te", "ti", "tr", "voxel", "weighting"),
}
"""Words in the names of columns that may differ between the scans of one session."""


def can_read(path: Path) -> bool:
    """Whether the path is a file but not JSON (`read` refuses files other than tables), or a folder with a manifest."""
    return (path.is_file() and path.suffix.lower() != ".json") or any((path / name).is_file() for name in _FILES)


def find_subjects(folder: Path) -> set[str] | None:
    """The subjects of a folder's manifest; None without one, or if it is a file of another program."""
    try:
        table = read_table(_find(folder), []) if can_read(folder) else pd.DataFrame()
    except CohortError:
        return None
    is_manifest = "subject" in table and not {"contrast", "path"}.isdisjoint(table.columns)
    return set(table["subject"].dropna()) if is_manifest else None


def _find(folder: Path) -> Path:
    return next(folder / name for name in _FILES if (folder / name).is_file())


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read the scans of a manifest. Paths are relative to its folder and may lead anywhere, since the user wrote them.

    The columns ``mask``, ``dseg`` and ``…_mask`` hold label maps. A covariate belongs to its session: an empty cell is
    filled from another row, and a CohortError names the line and column of rows that contradict each other. Columns on
    single scans, such as ``echo_ms``, may differ; then the first value of a session counts, with a note.
    """
    if path.is_dir():
        path = _find(path)
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
    table = clean_covariates(table, path.name, notes, [path.with_suffix(".json")])
    covariates = [name for name in table.columns if name not in ("session", *_REQUIRED, *mask_columns)]
    table = merge_rows(table, _SESSION, path, [name for name in covariates if not _is_per_scan(name)])
    notes += _notes_on_columns_of_scans(table, [name for name in covariates if _is_per_scan(name)], path)
    repeated = table.astype(str).duplicated()
    if repeated.any():
        table = table[~repeated]
        notes.append(f"{repeated.sum()} rows repeat another row and were dropped")
    shared = table.groupby("path")["subject"].nunique()
    if (shared > 1).any():
        notes.append(f"{(shared > 1).sum()} files are listed for more than one subject")
    if doubt := find_same_spelling(set(table["subject"])):
        notes.append(f"{doubt} are spelled alike; they count as different people")
    unused = _further_label_maps(table, [column for column in mask_columns if column in table])
    return SourceTable(table, path.parent, LAYOUT.name, mask_columns, notes, unused)


LAYOUT = SourceLayout("manifest", "manifest.tsv, .csv or .parquet with subject, contrast, path", can_read, read)


def _is_per_scan(column: str) -> bool:
    return not _WORDS_FOR_A_SCAN.isdisjoint(split_words(column))


def _notes_on_columns_of_scans(table: pd.DataFrame, columns: list[str], path: Path) -> list[str]:
    differs = contradictions(table, _SESSION, columns).any()
    names = ", ".join(repr(column) for column in columns if differs[column])
    return [f"{path.name}: the values of {names} differ within sessions; the first one counts"] if names else []


def _further_label_maps(table: pd.DataFrame, columns: list[str]) -> UnusedFiles:
    """The label maps of a session that has another one in the same column."""
    differs = contradictions(table, _SESSION, columns)
    reason = "a further label map ({}) of its session"
    return [(Path(file), reason.format(name)) for name in columns for file in table[name][differs[name]].unique()]


def _require_columns(table: pd.DataFrame, path: Path) -> None:
    for column in _REQUIRED:
        if column not in table:
            got = ", ".join(map(str, table.columns[:12]))
            remedy = "Add the column (needed: subject, contrast, path), or rename the file if it is not a manifest"
            raise CohortError(f"the manifest has no column {column!r}", where=path.name, got=got, remedy=remedy)
    if table.empty:
        raise CohortError("the manifest has no rows", where=path.name, remedy="List one scan per row")
    for column in _REQUIRED:
        empty = table.index[table[column].isna()]
        if len(empty):
            where = f"{path.name}, {empty.name} {empty[0]}"
            raise CohortError(f"column {column!r} is empty", where=where, remedy="Fill it in")


def _parse_contrasts(path: Path, names: pd.Series) -> list[str]:
    """Canonical names. Unknown names stay, so that only their scans are refused; CohortError if all are unknown."""
    contrasts: list[str] = []
    first_error: CohortError | None = None
    for line, name in names.astype(str).items():
        try:
            contrasts.append(parse_contrast(name))
        except UsageError as error:
            contrasts.append(name)
            first_error = first_error or CohortError(
                error.what, where=f"{path.name}, {names.index.name} {line}", remedy=error.remedy
            )
    if first_error is not None and not any(contrast in CONTRASTS for contrast in contrasts):
        raise first_error
    return contrasts
