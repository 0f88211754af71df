"""DICOM files in series, and series in persons and visits, with nothing kept that names a person."""

from __future__ import annotations

import hashlib
import re
import struct
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brainfound.data.sources.folders import DICOM_ENDINGS, Unused, in_order, plain_name

_TAGS = [
    *("PatientID", "PatientName", "PatientAge", "PatientSex", "Modality"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "StudyDate", "StudyTime"),
]
_NO_PATIENT = {"", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "0", "na", "n/a"}
_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


@dataclass
class Series:
    """The files of one series, where they belong, and the little that is kept of the person."""

    uid: str
    study: str
    number: int
    patient: str | None
    """PatientID, in memory only."""
    named: frozenset[str]
    """Words of PatientName, in memory only, so that no folder with the person's name becomes a subject's name."""
    when: str
    folder: str
    age_years: float | None
    sex: str | None
    files: list[Path] = field(default_factory=list)
    subject: str = ""
    session: str = ""

    @property
    def key(self) -> str:
        """A short name that says nothing: a hash of the series and of the sizes of its files."""
        text = self.uid + "".join(f"{file.name} {file.stat().st_size}" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark at byte 128, or its usual ending."""
    if path.suffix.lower() in DICOM_ENDINGS:
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(root: Path, files: Iterable[Path], unused: Unused) -> list[Series]:
    """The MR series of a folder, with ``subject`` and ``session`` set; everything else goes into ``unused``."""
    found: dict[str, Series] = {}
    for file in files:
        if file.name.upper() == "DICOMDIR" or not is_dicom(file):
            continue
        header = _read_header(file)
        uid = str(header.get("SeriesInstanceUID", "")) if header is not None else ""
        if header is None or not uid:
            unused.append((file, "no DICOM header that can be read" if header is None else "no series in the header"))
            continue
        modality = str(header.get("Modality", "") or "unknown")
        if modality != "MR":
            unused.append((file, f"modality {plain_name(modality)[:8]}, not MR"))
            continue
        if uid not in found:
            parts = file.relative_to(root).parts
            found[uid] = _series(uid, header, parts[0] if len(parts) > 1 else "")
        found[uid].files.append(file)
    series = list(found.values())
    _name_subjects(series)
    _name_sessions(series)
    return sorted(series, key=lambda one: (in_order(one.subject), in_order(one.session), one.number, one.uid))


def _read_header(file: Path) -> Any:
    import pydicom.config
    from pydicom.errors import InvalidDicomError

    force = file.suffix.lower() in DICOM_ENDINGS
    try:
        # Without validation, whose warnings would print values of the header.
        with pydicom.config.disable_value_validation():
            return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=force)
    except (
        *(InvalidDicomError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError),
        *(struct.error, NotImplementedError, RecursionError),
    ):
        return None


def _series(uid: str, header: Any, folder: str) -> Series:
    patient = str(header.get("PatientID", "") or "").strip()
    words = frozenset(re.findall(r"[^\W\d_]{3,}", str(header.get("PatientName", "") or "").lower()))
    age = re.fullmatch(r"(\d{1,3})([YMWD])", str(header.get("PatientAge", "") or "").strip().upper())
    sex = str(header.get("PatientSex", "") or "").strip().upper()
    number = str(header.get("SeriesNumber", "") or "")
    return Series(
        uid=uid,
        study=str(header.get("StudyInstanceUID", "")),
        number=int(number) if number.isdecimal() else 0,
        patient=None if patient.lower() in _NO_PATIENT else patient,
        named=words,
        when=f"{header.get('StudyDate', '') or ''} {header.get('StudyTime', '') or ''}",
        folder=folder,
        age_years=int(age.group(1)) * _YEARS[age.group(2)] if age else None,
        sex=sex if sex in ("F", "M") else None,
    )


def _name_subjects(series: list[Series]) -> None:
    """Folders are the subjects if each holds one person and each person lies in one; otherwise PatientID's hash is.

    Without a PatientID a study is a person, since nothing else can be known. A folder that holds a word of the
    person's name is not used as a name either.
    """
    if _folders_are_persons(series):
        for one in series:
            named = any(word in one.folder.lower() for word in one.named)
            one.subject = f"sub-{_short_hash(one.folder)}" if named else plain_name(one.folder)
        return
    for one in series:
        one.subject = f"sub-{_short_hash(one.patient if one.patient is not None else one.study)}"


def _folders_are_persons(series: list[Series]) -> bool:
    folders = {one.folder for one in series}
    if len(folders) < 2 or "" in folders:
        return False
    persons: dict[str, set[str | None]] = defaultdict(set)
    homes: dict[str, set[str]] = defaultdict(set)
    studies: dict[str, set[str]] = defaultdict(set)
    for one in series:
        persons[one.folder].add(one.patient)
        studies[one.study].add(one.folder)
        if one.patient is not None:
            homes[one.patient].add(one.folder)
    in_one = all(len(found) == 1 for found in (*homes.values(), *studies.values()))
    return in_one and all(len(found) == 1 for found in persons.values())


def _name_sessions(series: list[Series]) -> None:
    """Studies of a subject in order of time become 1, 2, …; dates are not kept."""
    studies: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for one in series:
        studies[one.subject].add((one.when, one.study))
    for one in series:
        in_time: list[str] = []
        for _, study in sorted(studies[one.subject]):
            if study not in in_time:
                in_time.append(study)
        one.session = str(in_time.index(one.study) + 1)


def _short_hash(text: str) -> str:
    return hashlib.sha256(f"brainfound {text}".encode()).hexdigest()[:10]
