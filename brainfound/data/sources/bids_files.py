"""BIDS file names and sidecars (BIDS 1.10; sidecars by the inheritance principle, "Common principles")."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from brainfound.data.reading.image_names import stem
from brainfound.data.sources.file_names import MAX_B0_S_PER_MM2, UnusedFiles, label_column, natural_sort_key
from brainfound.data.sources.words import read_bids_name

SCANNER_COLUMNS = {
    "MagneticFieldStrength": "field_strength_t",
    "Manufacturer": "manufacturer",
    "ManufacturersModelName": "scanner",
}
"""Sidecar keys to keep, and their cohort columns. Institution, station, serial number and dates are not kept, since
they can identify a person."""

_ENTITIES_WITHOUT_RANK = {"sub", "ses", "part", "ce"}
_BRAIN = re.compile(r"(?:^|_)(?:label|desc)-(?:brain|head)", re.IGNORECASE)
_TISSUE = re.compile(r"(?:^|_)(?:label|desc)-(?:ribbon|GM|WM|CSF|SCGM|CGM)(?:_|$)")
_B_VALUE_KEYS = ("DiffusionBValue", "bvalue", "bval")
_KEYS = (*SCANNER_COLUMNS, *_B_VALUE_KEYS)
_MAX_FIELD_STRENGTH_T = 20.0


@dataclass(frozen=True)
class BidsName:
    """A BIDS file name such as ``sub-01_ses-a_run-2_T1w``, split into entities and suffix."""

    entities: dict[str, str]
    suffix: str

    @classmethod
    def parse(cls, path: PurePath) -> BidsName:
        """Split a file name; parts without a hyphen before the suffix are ignored.

        >>> BidsName.parse(PurePath("sub-01_run-2_T1w.nii.gz"))
        BidsName(entities={'sub': '01', 'run': '2'}, suffix='T1w')
        """
        *before, suffix = stem(path).split("_")
        pairs = (part.split("-", 1) for part in before if "-" in part)
        return cls({key: value for key, value in pairs}, suffix)

    @property
    def order(self) -> tuple:
        """Sort key: of several scans of one contrast, the first is used.

        Scans without ``space-`` and with few entities come first (the acquired grid before a template's, the plain scan
        before a reconstructed one), then echo, run and name decide. The inversions of an MP2RAGE (``acq-inv1``) come
        behind its other images.
        """
        ranked = {key: value for key, value in self.entities.items() if key not in _ENTITIES_WITHOUT_RANK}
        numbers = [natural_sort_key(ranked.get(key, "")) for key in ("echo", "run")]
        inversion = re.search("inv[-]?[12]", ranked.get("acq", ""), re.IGNORECASE) is not None
        return ("space" in ranked, inversion, len(ranked), *numbers, natural_sort_key(sorted(ranked.items())))


def contrast_from_bids_name(name: BidsName) -> tuple[str, str]:
    """The contrast of a file name, and the reason if it is unknown: ``sub-01_T1w_defacemask`` is not a T1w."""
    reading = read_bids_name(name.entities, name.suffix)
    return reading.contrast, reading.reason


def mask_column(path: PurePath) -> str | None:
    """The cohort column of a label map: ``mask`` (a lesion), ``brain_mask``, ``deface_mask``, ``dseg``; else None.

    >>> mask_column(PurePath("sub-01_label-lesion_mask.nii.gz")), mask_column(PurePath("sub-01_desc-brain_mask.nii"))
    ('mask', 'brain_mask')
    """
    name = stem(path)
    if name.endswith(("_dseg", "-dseg")):
        return "dseg"
    if re.search(r"[_-](brainmask|skull-?stripped_mask)$", name):
        return "brain_mask"
    if "sub" not in BidsName.parse(path).entities:  # such as deface_mask.nii.gz next to its scan
        return None
    if name.endswith(("_mask", "_msk", "_roi")) and "_task-" not in name and not _TISSUE.search(name):
        return "brain_mask" if _BRAIN.search(name) else label_column(name)
    return "deface_mask" if name.endswith("_defacemask") else None


class Sidecars:
    """Reads each JSON file of a BIDS folder once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[Path, list[tuple[BidsName, Path]]] = {}
        self._content: dict[Path, dict[str, Any]] = {}
        self.faulty: UnusedFiles = []
        """Files with invalid JSON or impossible values."""

    def get_scanner_columns(self, scan: Path) -> dict[str, Any]:
        """The columns of `SCANNER_COLUMNS` whose values are known for a scan."""
        facts = self._inherited(scan)
        row: dict[str, Any] = {}
        for key, column in SCANNER_COLUMNS.items():
            value = facts.get(key)
            if value in (None, "", [], "n/a"):
                continue
            if column == "field_strength_t":
                row[column] = _parse_field_strength(value)
                if row[column] is None:
                    self._add_fault(scan, f"the field strength cannot be that of a scanner: {value!r}")
            elif isinstance(value, str):
                row[column] = value.strip()
        return {column: value for column, value in row.items() if value is not None}

    def is_b0(self, scan: Path) -> bool:
        """Whether b-values of a diffusion scan are known and none exceeds 5 s/mm²."""
        values = self._b_values(scan.with_name(stem(scan) + ".bval"))
        if not values:
            known = next((v for k, v in self._inherited(scan).items() if k in _B_VALUE_KEYS), None)
            values = [float(known)] if isinstance(known, int | float) and not isinstance(known, bool) else []
        return bool(values) and max(values) <= MAX_B0_S_PER_MM2

    def _inherited(self, scan: Path) -> dict[str, Any]:
        """Sidecar values of a scan, read from the root downwards, so that the nearest file wins."""
        name = BidsName.parse(scan)
        folders = [scan.parent]
        while folders[0] != self._root and folders[0] != folders[0].parent:
            folders.insert(0, folders[0].parent)
        facts: dict[str, Any] = {}
        for folder in folders:
            for other, file in self._json_files(folder):
                if other.suffix == name.suffix and other.entities.items() <= name.entities.items():
                    facts |= self._read(file)
        return facts

    def _b_values(self, file: Path) -> list[float]:
        if not file.is_file():
            return []
        try:
            return [float(word) for word in file.read_text(encoding="utf-8-sig").replace(",", " ").split()]
        except (OSError, ValueError) as error:
            self._add_fault(file, f"not a list of b-values ({error})")
            return []

    def _json_files(self, folder: Path) -> list[tuple[BidsName, Path]]:
        """The JSON files of a folder, those with the fewest entities first."""
        if folder not in self._files:
            files = sorted(folder.glob("*.json"), key=lambda file: natural_sort_key(file.name))
            named = [(BidsName.parse(file), file) for file in files if not file.name.startswith(".")]
            self._files[folder] = sorted(named, key=lambda pair: len(pair[0].entities))
        return self._files[folder]

    def _read(self, file: Path) -> dict[str, Any]:
        if file not in self._content:
            content: Any = {}
            try:
                content = json.loads(file.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError) as error:
                self._add_fault(file, f"not a valid JSON sidecar ({type(error).__name__})")
            if not isinstance(content, dict):
                self._add_fault(file, "not a valid JSON sidecar (no object)")
                content = {}
            self._content[file] = {key: content[key] for key in _KEYS if key in content}
        return self._content[file]

    def _add_fault(self, file: Path, reason: str) -> None:
        if (file, reason) not in self.faulty:
            self.faulty.append((file, reason))


def _parse_field_strength(value: Any) -> float | None:
    try:
        strength = float(value)
    except (TypeError, ValueError):
        return None
    return strength if 0 < strength <= _MAX_FIELD_STRENGTH_T else None
