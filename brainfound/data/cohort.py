"""The cohort: a table of scans, read from a BIDS folder or a manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.contrasts import CONTRASTS, contrast_from_filename, parse_contrast
from brainfound.errors import CohortError, UsageError, did_you_mean

COLUMNS = ("subject", "session", "contrast", "path", "mask", "age_years", "sex", "site", "diagnosis")
"""The columns that every cohort table has; more are kept."""

_PER_SCAN = {"subject", "session", "contrast", "path"}
_MANIFESTS = ("manifest.tsv", "manifest.csv", "manifest.parquet")
_IMAGES = (".nii.gz", ".nii", ".mgz")
_RENAMED = {
    "age": "age_years",
    "participant_id": "subject",
    "session_id": "session",
    "group": "diagnosis",
    "dx": "diagnosis",
}


@dataclass(frozen=True)
class Session:
    """One subject at one visit: a file per contrast, label maps, and what is known of the subject."""

    subject: str
    session: str
    scans: dict[str, Path]
    """A file per contrast. A contrast that a manifest spells in no known way is kept as it is spelt."""
    covariates: dict[str, Any]
    masks: dict[str, Path]
    extra_scans: tuple[tuple[str, Path], ...] = ()
    """Further scans of a contrast that is already in `scans`, in file order."""


class Cohort:
    """Sessions of one source.

    Attributes:
        table: one row per scan with the columns of `COLUMNS` and whatever else the source says.
        root: the folder to which the source's relative paths refer.
    """

    def __init__(self, table: pd.DataFrame, root: Path, mask_columns: tuple[str, ...] = ("mask",)) -> None:
        for column in COLUMNS:
            if column not in table:
                table[column] = None
        rest = [column for column in table.columns if column not in COLUMNS]
        self.table = table[[*COLUMNS, *rest]].reset_index(drop=True)
        self.root = root
        self.mask_columns = mask_columns

    @classmethod
    def read(cls, path: str | Path) -> Cohort:
        """Recognise and read a source: a BIDS folder, a manifest (CSV, TSV, Parquet), or a folder that holds one.

        Raises:
            CohortError: nothing is there, it is not recognised, or it holds no scans.
        """
        path = Path(path)
        if path.is_file():
            return _read_manifest(path)
        if not path.is_dir():
            raise CohortError("no such file or folder", where=path, remedy="Check the path of the source")
        for name in _MANIFESTS:
            if (path / name).is_file():
                return _read_manifest(path / name)
        if any(child.is_dir() for child in path.glob("sub-*")):
            return _read_bids(path)
        raise CohortError(
            "no scans found",
            where=path,
            expected="a BIDS folder (sub-*/) or a manifest.tsv with the columns subject, contrast, path",
            remedy="Give a BIDS folder or write a manifest",
        )

    def __len__(self) -> int:
        return int(self.table.groupby(["subject", "session"], sort=False).ngroups)

    def sessions(self) -> Iterator[Session]:
        """The sessions, ordered by subject and session."""
        for (subject, session), rows in self.table.groupby(["subject", "session"], sort=True):
            scans: dict[str, Path] = {}
            extra: list[tuple[str, Path]] = []
            for contrast, file in zip(rows["contrast"], rows["path"], strict=True):
                if contrast in scans:
                    extra.append((contrast, Path(file)))
                else:
                    scans[contrast] = Path(file)
            skip = _PER_SCAN | set(self.mask_columns)
            covariates = {column: _first_known(rows[column]) for column in rows.columns if column not in skip}
            masks = {column: _first_known(rows[column]) for column in self.mask_columns if column in rows}
            yield Session(
                subject=str(subject),
                session=str(session),
                scans=scans,
                covariates=covariates,
                masks={column: Path(file) for column, file in masks.items() if file is not None},
                extra_scans=tuple(extra),
            )

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.table["contrast"].value_counts().items())
        return f"Cohort({len(self)} sessions of {self.table['subject'].nunique()} subjects: {counts})"


def _first_known(values: pd.Series) -> Any:
    known = values.dropna()
    if known.empty:
        return None
    value = known.iloc[0]
    return value.item() if hasattr(value, "item") else value


def _read_manifest(path: Path) -> Cohort:
    table = _read_table(path)
    table = table.rename(columns={old: new for old, new in _RENAMED.items() if old in table and new not in table})
    for column in ("subject", "contrast", "path"):
        if column not in table:
            raise CohortError(
                f"the manifest has no column {column!r}",
                where=path.name,
                got=", ".join(table.columns[:12]),
                remedy="Add the column (subject, contrast and path are required)",
            )
    if table.empty:
        raise CohortError("the manifest has no rows", where=path.name, remedy="List one scan per row")
    for column in ("subject", "contrast", "path"):
        empty = table.index[table[column].isna()]
        if len(empty):
            raise CohortError(
                f"column {column!r} is empty", where=f"{path.name}, line {empty[0] + 2}", remedy="Fill it in"
            )
    if "session" not in table:
        table["session"] = "1"
    table["session"] = table["session"].fillna("1").astype(str)
    table["subject"] = table["subject"].astype(str)
    table["contrast"] = _contrasts_of_rows(path, table["contrast"])
    mask_columns = tuple(column for column in table.columns if column == "mask" or column.endswith("_mask")) or (
        "mask",
    )
    for column in ("path", *mask_columns):
        if column in table:
            table[column] = [None if pd.isna(file) else str(path.parent / str(file)) for file in table[column]]
    return Cohort(_with_typed_ages(table, path), path.parent, mask_columns)


def _read_table(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix in (".csv", ".tsv", ".txt"):
            kinds = {"subject": str, "session": str, "participant_id": str, "session_id": str}
            return pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t", dtype=kinds, na_values=["n/a"])
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise CohortError(f"cannot be read as a table: {error}", where=path.name, remedy="Check the file") from error
    raise CohortError(
        "not a source of scans",
        where=path.name,
        expected="a .csv, .tsv or .parquet manifest, or a folder",
        remedy="Give the folder or the manifest",
    )


def _contrasts_of_rows(path: Path, names: pd.Series) -> list[str]:
    """Canonical names. A name that is not known stays, so that its scan alone is refused, unless no name is known."""
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


def _with_typed_ages(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    if "age_years" in table:
        ages = pd.to_numeric(table["age_years"], errors="coerce")
        odd = table["age_years"][ages.isna() & table["age_years"].notna()]
        # BIDS writes "89+" where ages above 89 are masked for privacy.
        masked = odd.astype(str).str.fullmatch(r"\s*\d+\+\s*")
        if not odd.empty and masked.all():
            ages.loc[odd.index] = odd.astype(str).str.strip(" +").astype(float)
        elif not odd.empty:
            raise CohortError(
                "an age is not a number", where=path.name, got=repr(odd.iloc[0]), remedy="Write years or n/a"
            )
        table["age_years"] = ages
    return table


def _read_bids(root: Path) -> Cohort:
    rows = []
    for subject_folder in sorted(root.glob("sub-*")):
        for file in sorted(subject_folder.rglob("*")):
            if not file.name.endswith(_IMAGES) or not file.is_file():
                continue
            contrast = contrast_from_filename(file)
            if contrast == "unknown" or "_part-phase" in file.name:
                continue
            subject, session = _bids_entities(root, file)
            rows.append({"subject": subject, "session": session, "contrast": contrast, "path": str(file)})
    if not rows:
        raise CohortError(
            "the BIDS folder holds no scans of a known contrast",
            where=root,
            expected="files such as sub-01/anat/sub-01_T1w.nii.gz",
            remedy="Check the suffixes, or write a manifest",
        )
    table = pd.DataFrame(rows)
    table, mask_columns = _join_masks(table, root)
    return Cohort(_join_participants(table, root), root, mask_columns)


def _bids_entities(root: Path, file: Path) -> tuple[str, str]:
    parts = file.relative_to(root).parts
    session = next((part.removeprefix("ses-") for part in parts if part.startswith("ses-")), None)
    if session is None:
        found = re.search(r"_ses-([A-Za-z0-9]+)", file.name)
        session = found.group(1) if found else "1"
    subject = next(part for part in parts if part.startswith("sub-"))
    return subject, session


def _join_masks(table: pd.DataFrame, root: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Label maps of ``derivatives/<pipeline>/sub-…``: lesion masks as ``mask``, tissue maps as ``dseg``."""
    found: dict[str, dict[tuple[str, str], str]] = {"mask": {}, "dseg": {}}
    for pipeline in sorted((root / "derivatives").glob("*")):
        for file in sorted(pipeline.glob("sub-*/**/*")):
            if not file.name.endswith(_IMAGES):
                continue
            stem = file.name.split(".")[0]
            brain = re.search(r"(label|desc)-(brain|head)", stem) is not None
            column = "dseg" if stem.endswith("_dseg") else "mask" if stem.endswith("_mask") and not brain else None
            if column:
                found[column].setdefault(_bids_entities(pipeline, file), str(file))
    keys = list(zip(table["subject"], table["session"], strict=True))
    for column, files in found.items():
        if files or column == "mask":
            table[column] = [files.get(key) for key in keys]
    return table, ("mask", "dseg") if found["dseg"] else ("mask",)


def _join_participants(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    file = root / "participants.tsv"
    if not file.is_file():
        return table
    people = _read_table(file)
    people = people.rename(columns={old: new for old, new in _RENAMED.items() if old in people and new not in people})
    if "subject" not in people:
        raise CohortError("participants.tsv has no column 'participant_id'", where=file.name, remedy="Add it")
    people["subject"] = [name if str(name).startswith("sub-") else f"sub-{name}" for name in people["subject"]]
    repeated = people["subject"][people["subject"].duplicated()]
    if not repeated.empty:
        raise CohortError(
            "participants.tsv lists a subject twice", where=file.name, got=repeated.iloc[0], remedy="Keep one row each"
        )
    people = _with_typed_ages(people, file)
    clashes = [column for column in people.columns if column in table.columns and column != "subject"]
    return table.merge(people.drop(columns=clashes), on="subject", how="left")


def require_column(columns: list[str], wanted: str, where: str) -> None:
    """Raise one clear line if a covariate column is not there."""
    if wanted not in columns:
        raise UsageError(f"no column {wanted!r}", where=where, remedy=did_you_mean(wanted, columns))
