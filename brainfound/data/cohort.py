"""The cohort: a table of scans, read from any source of `brainfound.data.sources`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.reading.archives import is_file
from brainfound.data.reading.image_names import is_image
from brainfound.data.reading.scan import load_scan
from brainfound.data.sources import read_source
from brainfound.data.sources.tables import SourceTable, count_noun
from brainfound.errors import CohortError, describe_path

_PER_SCAN = {"subject", "session", "contrast", "path"}


@dataclass(frozen=True)
class Session:
    """One subject at one visit: a file per contrast, label maps, and covariates."""

    subject: str
    session: str
    scans: dict[str, Path]
    """Contrast → file. Unknown spellings of a contrast are kept. A path may lie inside a zip
    (``…/ses-01.zip/anat/x.nii.gz``), see `brainfound.data.reading.archives`."""
    covariates: dict[str, Any]
    masks: dict[str, Path]
    """Label-map column → file."""
    extra_scans: tuple[tuple[str, Path], ...] = ()
    """Further scans of contrasts in `scans`, in table order; they are tried where those before cannot be used."""

    def candidates(self, contrasts: Iterable[str]) -> tuple[dict[str, list[Path]], list[tuple[str, Path, str]]]:
        """Contrast → its scans in the order in which they are tried, and the files that are listed as two contrasts.

        Each of the latter is ``(contrast, file, other contrast)``. A file counts for the first contrast that lists it
        first, or else for the first that lists it.
        """
        wanted = [contrast for contrast in contrasts if contrast in self.scans]
        claims: dict[Path, str] = {}
        listed = [(contrast, self.scans[contrast]) for contrast in wanted]
        listed += [(contrast, file) for contrast, file in self.extra_scans if contrast in wanted]
        scans: dict[str, list[Path]] = {contrast: [] for contrast in wanted}
        repeated: list[tuple[str, Path, str]] = []
        for contrast, file in listed:
            if claims.setdefault(file, contrast) != contrast:
                repeated.append((contrast, file, claims[file]))
            elif file not in scans[contrast]:
                scans[contrast].append(file)
        return {contrast: files for contrast, files in scans.items() if files}, repeated


class Cohort(SourceTable):
    """Sessions of one source.

    Attributes:
        table: one row per scan, with `brainfound.data.sources.tables.COLUMNS` and further columns. If a session
            has several scans of one contrast, the first that can be used is used.
        root: the folder to which the source's relative paths refer.
        mask_columns: the columns of label maps.
        source: the recognised layout ("BIDS", "manifest", "FOMO60K", …).
        notes: remarks from reading the source. They name a subject only where its rows contradict each other.
        unused: files that are not scans of the table, each with the reason.
        rejected: data sets of a collection that cannot be read, each with the reason.
    """

    @classmethod
    def read(cls, path: str | Path, *, work: str | Path | None = None) -> Cohort:
        """Read a folder, a manifest, or another file of any layout of `brainfound.data.sources`.

        Files converted from DICOM are kept in the folder ``work`` and reused.

        Raises:
            CohortError: the path is missing, not recognised, damaged, or without scans.
            UsageError: a package that the source needs is not installed.
        """
        path = Path(path)
        _require_one_data_set(path)
        try:
            return cls(**vars(read_source(path, None if work is None else Path(work))))
        except CohortError as error:
            raise _explain(path, error) from None

    def label_codes(self) -> dict[str, dict[int, int]]:
        """Column of label maps → nonzero code → in how many sessions it is; reads them all.

        ScanError: a label map cannot be read.
        """
        counts: dict[str, Counter[int]] = {column: Counter() for column in self.mask_columns}
        for session in self.sessions():
            for column, file in session.masks.items():
                counts[column].update(int(code) for code in np.unique(load_scan(file, labels=True).data) if code)
        return {column: dict(sorted(own.items())) for column, own in counts.items() if own}

    def __len__(self) -> int:
        return int(self.table.groupby(["subject", "session"], sort=False).ngroups)

    def sessions(self) -> Iterator[Session]:
        """The sessions, ordered by subject and session."""
        columns = {str(column): self.table[column].tolist() for column in self.table.columns}
        groups: dict[tuple[Any, Any], list[int]] = {}
        for row, key in enumerate(zip(columns["subject"], columns["session"], strict=True)):
            groups.setdefault(key, []).append(row)
        covariates = [column for column in columns if column not in _PER_SCAN and column not in self.mask_columns]
        for (subject, session), rows in sorted(groups.items(), key=lambda item: item[0]):
            scans: dict[str, Path] = {}
            extra: list[tuple[str, Path]] = []
            for contrast, file in ((columns["contrast"][row], Path(columns["path"][row])) for row in rows):
                if contrast in scans:
                    extra.append((contrast, file))
                scans.setdefault(contrast, file)
            masks = {c: _first_known(columns[c], rows) for c in self.mask_columns if c in columns}
            yield Session(
                subject=str(subject),
                session=str(session),
                scans=scans,
                covariates={column: _first_known(columns[column], rows) for column in covariates},
                masks={column: Path(file) for column, file in masks.items() if file is not None},
                extra_scans=tuple(extra),
            )

    def missing_files(self) -> list[Path]:
        """Scans and label maps of the table that are not there, in its order."""
        columns = [self.table[column].dropna() for column in ("path", *self.mask_columns) if column in self.table]
        return [Path(file) for file in dict.fromkeys(pd.concat(columns).sort_index(kind="stable")) if not is_file(file)]

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.table["contrast"].value_counts().items())
        unused = f"; {len(self.unused)} files unused" if self.unused else ""
        sessions, subjects = count_noun(len(self), "session"), count_noun(self.table["subject"].nunique(), "subject")
        return f"Cohort({self.source}, {sessions} of {subjects}: {counts}{unused})"


def _require_one_data_set(path: Path) -> None:
    """Refuse a folder of several nnU-Net or Decathlon data sets, such as ``nnUNet_raw``."""
    for folder in (path, path / "nnUNet_raw"):
        if folder.is_dir() and not (folder / "dataset.json").is_file():
            found = sorted(file.parent for file in folder.glob("*/dataset.json") if (file.parent / "imagesTr").is_dir())
            if found:
                names = ", ".join(data_set.name for data_set in found[:8])
                more = f" and {len(found) - 8} more" if len(found) > 8 else ""
                raise CohortError(
                    f"a folder of {count_noun(len(found), 'nnU-Net data set')}, which are read one at a time",
                    where=path,
                    got=names + more,
                    remedy=f"Choose one: {found[0]}",
                    usage=True,
                )


_REMEDIES = {
    "a scan": "Give the folder that holds it, or a manifest; `predict` and `check` read single scans",
    "a store": "Give the scans or the manifest that it was made from; `evaluate` and `probe` read stores",
    "a zip archive": "Unpack it and give its folder",
    "a part of an nnU-Net data set": "Give the folder that holds it and dataset.json",
    "an empty folder": "Give the folder that holds the scans",
}
_UNSURE = ("a model", "an experiment or an evaluation")
"""Kinds of folders whose mark a folder of scans may have too."""


def _explain(path: Path, error: CohortError) -> CohortError:
    """The error for a path that cannot be read as a cohort: what it leads to, where that is plainly something else."""
    kind = "a scan" if path.is_file() and is_image(path) else describe_path(path)
    if not path.exists():
        return CohortError(error.what, where=path, remedy="Check the path of the source", usage=True)
    if kind is None and (path.parent / "dataset.json").is_file():
        kind = "a part of an nnU-Net data set"
    if kind in (None, "a file", "a BIDS data set") or (kind in _UNSURE and next(path.rglob("*.nii*"), None)):
        return error
    known = [name for name in _REMEDIES if kind.startswith((name, f"a folder inside {name}"))]
    remedy = _REMEDIES[known[0]] if known else "Give a folder of scans, or a manifest"
    return CohortError(f"this is {kind}, not a source of scans", where=path, remedy=remedy, usage=True)


def _first_known(values: list[Any], rows: list[int]) -> Any:
    value: Any = next((values[row] for row in rows if not pd.isna(values[row])), None)
    return value.item() if hasattr(value, "item") else value
