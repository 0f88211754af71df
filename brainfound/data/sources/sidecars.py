"""Sidecars of BIDS scans: the scanner, by the inheritance principle, and b-values (BIDS 1.10, "Common principles")."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from brainfound.data.sources.bids_names import BidsName
from brainfound.data.sources.folders import HIGHEST_B0, Unused, in_order, stem

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
        self.faulty: Unused = []

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

    def scanner_of(self, scan: Path) -> dict[str, Any]:
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
        return bool(values) and max(values) <= HIGHEST_B0

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
            files = sorted(folder.glob("*.json"), key=lambda file: in_order(file.name)) if folder.is_dir() else []
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
