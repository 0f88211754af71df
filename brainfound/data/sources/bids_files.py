"""Sidecars of BIDS scans: the scanner, by the inheritance principle, and b-values (BIDS 1.10, "Common principles").

Names of BIDS files: entities, suffix, and what they say of contrast and order (BIDS 1.10).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from brainfound.contrasts import CONTRASTS, UNKNOWN, parse_contrast
from brainfound.data.sources.file_names import MAX_B0_S_PER_MM2, UnusedFiles, natural_sort_key, stem
from brainfound.errors import UsageError

_SUFFIXES = {suffix for contrast in CONTRASTS.values() for suffix in contrast.bids_suffixes}
_NOT_CHOICES = {"sub", "ses", "part", "ce"}
_BRAIN = re.compile(r"(?:^|_)(?:label|desc)-(?:brain|head)", re.IGNORECASE)
_TISSUE = re.compile(r"(?:^|_)(?:label|desc)-(?:ribbon|GM|WM|CSF|SCGM|CGM)(?:_|$)")


@dataclass(frozen=True)
class BidsName:
    """``sub-01_ses-a_run-2_T1w`` in parts."""

    entities: dict[str, str]
    suffix: str

    @classmethod
    def of(cls, path: PurePath) -> BidsName:
        """The parts of a file's name; parts without a hyphen before the suffix are passed over.

        >>> BidsName.of(PurePath("sub-01_run-2_T1w.nii.gz"))
        BidsName(entities={'sub': '01', 'run': '2'}, suffix='T1w')
        """
        *before, suffix = stem(path).split("_")
        pairs = (part.split("-", 1) for part in before if "-" in part)
        return cls({key: value for key, value in pairs}, suffix)

    @property
    def order(self) -> tuple:
        """Of several scans of one contrast the first is used: that with the fewest entities (so the scanner's own
        grid before ``space-…``, the plain before the reconstructed), then by echo, run and name."""
        choices = {key: value for key, value in self.entities.items() if key not in _NOT_CHOICES}
        number = [natural_sort_key(choices.get(key, "")) for key in ("echo", "run")]
        return ("space" in choices, len(choices), *number, natural_sort_key(sorted(choices.items())))


def contrast_from_bids_name(name: BidsName) -> tuple[str, str]:
    """Contrast, and if it is unknown the reason why the file is no scan.

    Only the suffix counts: ``sub-01_T1w_defacemask`` is no T1w. A suffix in small letters (``t1``) is understood.
    """
    part = name.entities.get("part", "mag")
    if part != "mag":
        return UNKNOWN, f"not a magnitude image (part-{part})"
    if "inv" in name.entities:
        return UNKNOWN, "one inversion of an MP2RAGE"
    suffix = name.suffix
    if suffix not in _SUFFIXES:
        try:
            contrast = parse_contrast(suffix) if re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", suffix) else UNKNOWN
        except UsageError:
            contrast = UNKNOWN
        if contrast == UNKNOWN:
            return UNKNOWN, f"no known contrast ({suffix})" if name.entities else "no known contrast in the name"
    else:
        contrast = next(known.name for known in CONTRASTS.values() if suffix in known.bids_suffixes)
    enhanced = name.entities.get("ce", "none") != "none"
    return ("T1ce" if contrast == "T1w" and enhanced else contrast), ""


def mask_column(path: PurePath) -> str | None:
    """The cohort column of a label map: ``mask`` (of a lesion), ``brain_mask``, ``dseg``; None if it is none.

    >>> mask_column(PurePath("sub-01_label-lesion_mask.nii.gz")), mask_column(PurePath("sub-01_desc-brain_mask.nii"))
    ('mask', 'brain_mask')
    """
    name = stem(path)
    if name.endswith(("_dseg", "-dseg")):
        return "dseg"
    if re.search(r"[_-](brainmask|skull-?stripped_mask)$", name):
        return "brain_mask"
    if "sub" not in BidsName.of(path).entities:  # deface_mask.nii.gz in a folder beside its scan
        return None
    if name.endswith(("_mask", "_roi")) and "_task-" not in name and not _TISSUE.search(name):
        return "brain_mask" if _BRAIN.search(name) else "mask"
    if name.endswith("_defacemask"):
        return "deface_mask"
    return None


SCANNER_COLUMNS = {
    "MagneticFieldStrength": "field_strength_t",
    "Manufacturer": "manufacturer",
    "ManufacturersModelName": "scanner",
}
"""What is kept of a sidecar. Institution, station, serial number and dates are not: they can point to a person."""

_B_VALUES = ("DiffusionBValue", "bvalue", "bval")
_READ = (*SCANNER_COLUMNS, *_B_VALUES)
_STRONGEST_T = 20.0


class Sidecars:
    """Reads each JSON of a BIDS folder once.

    Attributes:
        faulty: files that are no valid JSON, or say something impossible, with the reason.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listed: dict[Path, list[tuple[BidsName, Path]]] = {}
        self._content: dict[Path, dict[str, Any]] = {}
        self.faulty: UnusedFiles = []

    def of(self, scan: Path) -> dict[str, Any]:
        """What the sidecars say of a scan: those of the folders above first, so the nearest one wins."""
        name = BidsName.of(scan)
        folders = [scan.parent]
        while folders[0] != self._root and folders[0] != folders[0].parent:
            folders.insert(0, folders[0].parent)
        facts: dict[str, Any] = {}
        for folder in folders:
            for other, file in self._json_files(folder):
                if other.suffix == name.suffix and other.entities.items() <= name.entities.items():
                    facts |= self._read(file)
        return facts

    def get_scanner_columns(self, scan: Path) -> dict[str, Any]:
        """The columns of `SCANNER_COLUMNS` as far as they are known."""
        facts = self.of(scan)
        row: dict[str, Any] = {}
        for key, column in SCANNER_COLUMNS.items():
            value = facts.get(key)
            if value in (None, "", [], "n/a"):
                continue
            if column == "field_strength_t":
                strength = _field_strength(value)
                if strength is None:
                    self._blame(scan, f"the field strength cannot be that of a scanner: {value!r}")
                    continue
                row[column] = strength
            elif isinstance(value, str):
                row[column] = value.strip()
        return row

    def is_b0(self, scan: Path) -> bool:
        """Whether all b-values that are known of a diffusion scan are 5 s/mm² or less."""
        values = self._b_values(scan.with_name(stem(scan) + ".bval"))
        if not values:
            known = next((v for k, v in self.of(scan).items() if k in _B_VALUES), None)
            values = [float(known)] if isinstance(known, int | float) and not isinstance(known, bool) else []
        return bool(values) and max(values) <= MAX_B0_S_PER_MM2

    def _b_values(self, file: Path) -> list[float]:
        if not file.is_file():
            return []
        try:
            return [float(word) for word in file.read_text(encoding="utf-8-sig").replace(",", " ").split()]
        except (OSError, ValueError) as error:
            self._blame(file, f"not a list of b-values ({error})")
            return []

    def _json_files(self, folder: Path) -> list[tuple[BidsName, Path]]:
        """The JSON files of a folder, those with the fewest entities first."""
        if folder not in self._listed:
            files = (
                sorted(folder.glob("*.json"), key=lambda file: natural_sort_key(file.name)) if folder.is_dir() else []
            )
            named = [(BidsName.of(file), file) for file in files if not file.name.startswith(".")]
            self._listed[folder] = sorted(named, key=lambda pair: len(pair[0].entities))
        return self._listed[folder]

    def _read(self, file: Path) -> dict[str, Any]:
        if file not in self._content:
            self._content[file] = {}
            try:
                content = json.loads(file.read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError) as error:
                self._blame(file, f"not a valid JSON sidecar ({type(error).__name__})")
            else:
                if isinstance(content, dict):
                    self._content[file] = {key: content[key] for key in _READ if key in content}
                else:
                    self._blame(file, "not a valid JSON sidecar (no object)")
        return self._content[file]

    def _blame(self, file: Path, reason: str) -> None:
        if (file, reason) not in self.faulty:
            self.faulty.append((file, reason))


def _field_strength(value: Any) -> float | None:
    try:
        strength = float(value)
    except (TypeError, ValueError):
        return None
    return strength if 0 < strength <= _STRONGEST_T else None
