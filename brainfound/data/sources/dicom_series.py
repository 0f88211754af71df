"""DICOM files in series, and series in persons and visits, with nothing kept that names a person."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from brainfound.data.sources.file_names import DICOM_SUFFIXES, UnusedFiles, natural_sort_key, sanitise_name
from brainfound.errors import CohortError

_TAGS = [
    *("PatientID", "PatientName", "PatientAge", "PatientSex", "Modality"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "StudyDate", "StudyTime"),
]
_NO_PATIENT = {
    *("", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "na", "n/a", "removed", "redacted"),
    *("deidentified", "de-identified", "patient", "subject", "test", "default", "null"),
}
_FILLED_WITH_ONE_SIGN = re.compile(r"0+|(\D)\1{2,}")
"""000000, XXXX, ----: what some anonymisers write."""
MAX_FOLDERS_PER_PATIENT, MAX_FOLDER_SHARE_PER_PATIENT = 2, 0.1
"""A PatientID in more folders than the first, and in more than the second part of all, is no person's alone."""
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
    acquired_at: str
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
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark at byte 128, or its usual ending."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(root: Path, files: Iterable[Path], unused: UnusedFiles) -> list[Series]:
    """The MR series of a folder, with ``subject`` and ``session`` set; everything else goes into ``unused``.

    Raises:
        CohortError: one PatientID stands in so many folders that it may be an anonymiser's word for everybody.
    """
    found: dict[str, Series] = {}
    for file in files:
        if file.name.upper() == "DICOMDIR" or not is_dicom(file):
            continue
        header = _read_header(file)
        uid = header["SeriesInstanceUID"] if header is not None else ""
        if header is None or not uid:
            unused.append((file, "no DICOM header that can be read" if header is None else "no series in the header"))
            continue
        modality = header["Modality"] or "unknown"
        if modality != "MR":
            unused.append((file, f"modality {sanitise_name(modality)[:8]}, not MR"))
            continue
        if uid not in found:
            parts = file.relative_to(root).parts
            found[uid] = _series(uid, header, decode_filename(parts[0]) if len(parts) > 1 else "")
        found[uid].files.append(file)
    series = list(found.values())
    _require_distinct_patient_ids(series)
    _assign_subjects(series)
    _name_sessions(series)
    return sorted(
        series, key=lambda one: (natural_sort_key(one.subject), natural_sort_key(one.session), one.number, one.uid)
    )


def max_folders_per_patient(series: Iterable[Series]) -> int:
    """In how many folders the PatientID stands that stands in most; folders that share a study are one."""
    return max((len(homes) for homes in _folders_by_patient(series).values()), default=0)


def _read_header(file: Path) -> dict[str, str] | None:
    """The tags as text, "" where there is none; None for what is no DICOM."""
    import pydicom.config
    from pydicom.errors import InvalidDicomError

    force = file.suffix.lower() in DICOM_SUFFIXES
    try:
        # Without validation, whose warnings would print values of the header; values are read when asked for.
        with pydicom.config.disable_value_validation():
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=force)
            return {tag: "" if (value := header.get(tag)) is None else str(value).strip() for tag in _TAGS}
    except (
        *(InvalidDicomError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError),
        *(struct.error, NotImplementedError, RecursionError),
    ):
        return None


def decode_filename(name: str) -> str:
    """A file name that is not UTF-8 as Latin-1, so that it can be written into a table."""
    try:
        return os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        return os.fsencode(name).decode("latin-1")


def _series(uid: str, header: dict[str, str], folder: str) -> Series:
    patient = header["PatientID"]
    words = frozenset(re.findall(r"[^\W\d_]{2,}", header["PatientName"].lower()))
    age = re.fullmatch(r"(\d{1,3})([YMWD])", header["PatientAge"].upper())
    sex = header["PatientSex"].upper()
    number = header["SeriesNumber"]
    is_nobody = patient.lower() in _NO_PATIENT or _FILLED_WITH_ONE_SIGN.fullmatch(patient) is not None
    return Series(
        uid=uid,
        study=header["StudyInstanceUID"],
        number=int(number) if number.isdecimal() else 0,
        patient=None if is_nobody else patient,
        named=words,
        acquired_at=f"{header['StudyDate']} {header['StudyTime']}",
        folder=folder,
        age_years=int(age.group(1)) * _YEARS[age.group(2)] if age else None,
        sex=sex if sex in ("F", "M") else None,
    )


def _assign_subjects(series: list[Series]) -> None:
    """Folders are the subjects if each holds one person and each person lies in one; otherwise PatientID's hash is.

    Without a PatientID a study is a person, since nothing else can be known. A folder that holds a word of the
    person's name is not used as a name either: who has a list of names could look up its hash.
    """
    if _folders_match_patients(series):
        of_folder: dict[str, list[Series]] = defaultdict(list)
        for one in series:
            of_folder[one.folder].append(one)
        for folder, inside in of_folder.items():
            first = min(inside, key=lambda one: (one.acquired_at, one.study))
            named = _contains_patient_name(folder, frozenset[str]().union(*(one.named for one in inside)))
            subject = f"sub-{_short_hash(first.patient or first.study)}" if named else sanitise_name(folder)
            for one in inside:
                one.subject = subject
        return
    for one in series:
        one.subject = f"sub-{_short_hash(one.patient if one.patient is not None else one.study)}"


def _contains_patient_name(folder: str, names: frozenset[str]) -> bool:
    """Whether a folder is called by a word of a name; words of two letters count where they stand alone.

    >>> _contains_patient_name("LI_WU", frozenset({"li", "wu"})), _contains_patient_name("clinic", frozenset({"li", "wu"}))
    (True, False)
    """
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower()
    words = set(re.findall(r"[^\W\d_]+", apart))
    return any(name in words or (len(name) > 2 and name in folder.lower()) for name in names)


def _folders_by_patient(series: Iterable[Series]) -> dict[str, set[str]]:
    """Per PatientID one folder for each group of folders that share a study."""
    homes: dict[str, set[str]] = defaultdict(set)
    of_study: dict[str, str] = {}
    for one in series:
        home = of_study.setdefault(one.study, one.folder) if one.study else one.folder
        if one.patient is not None:
            homes[one.patient].add(home)
    return homes


def _require_distinct_patient_ids(series: list[Series]) -> None:
    """A cohort must not become one subject because an anonymiser gave everybody one PatientID.

    Series and visits of a person may lie in folders of their own, so two folders, and a small part of many folders,
    are believed.
    """
    most, folders = max_folders_per_patient(series), len({one.folder for one in series})
    if most > MAX_FOLDERS_PER_PATIENT and most > MAX_FOLDER_SHARE_PER_PATIENT * folders:
        raise CohortError(
            "one PatientID stands in many folders: one person, or an anonymiser's word for everybody",
            got=f"{most} of {folders} folders",
            remedy="If it is one person, put these folders into one; otherwise anonymise again with a PatientID for "
            "each person, or convert the series and write a manifest",
        )


def _folders_match_patients(series: list[Series]) -> bool:
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
        studies[one.subject].add((one.acquired_at, one.study))
    for one in series:
        in_time: list[str] = []
        for _, study in sorted(studies[one.subject]):
            if study not in in_time:
                in_time.append(study)
        one.session = str(in_time.index(one.study) + 1)


def _short_hash(text: str) -> str:
    return hashlib.sha256(f"brainfound {text}".encode()).hexdigest()[:10]
