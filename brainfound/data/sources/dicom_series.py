"""Grouping of DICOM files into series, subjects and sessions; nothing that identifies a person is kept."""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from brainfound.data.sources.file_names import DICOM_SUFFIXES, UnusedFiles, natural_sort_key, sanitise_name
from brainfound.data.sources.identifiers import is_session_name
from brainfound.errors import CohortError

_TAGS = [
    *("PatientID", "PatientName", "PatientBirthDate", "PatientAge", "PatientSex", "Modality"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "StudyDate", "StudyTime"),
    *("ContrastBolusAgent", "ContrastBolusIngredient"),
]
_AGENT_SEQUENCES = ["ContrastBolusAgentSequence", "SharedFunctionalGroupsSequence"]
_NO_AGENT = re.compile(
    r"\W*|0+(\.0*)?( ?ml)?|(no|not|none|nil|without|w/o|unknown|n/?a|false|pre|plain|ohne|keine?|sans|sin|senza)\b.*"
    r"|(non|un)[- ]?(contrast|enhanced).*",
    re.IGNORECASE | re.DOTALL,
)
"""Texts in place of the name of a contrast agent."""
_NO_PATIENT = {
    *("", "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "na", "n/a", "removed", "redacted"),
    *("deidentified", "de-identified", "patient", "subject", "test", "default", "null"),
}
_REPEATED_CHARACTER = re.compile(r"0+|(\D)\1{2,}")
"""Placeholders that some anonymisers write: 000000, XXXX, ----."""
MAX_FOLDERS_PER_PATIENT, MAX_FOLDER_SHARE_PER_PATIENT = 2, 0.1
"""A PatientID that exceeds both limits (a number and a share of the folders) does not belong to one person."""
_YEARS_PER_UNIT = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_MAX_AGE_YEARS = 110
_FIRST_DATE = "19700101"
"""Study dates before the first MRI of a person are placeholders."""
_TITLES = {"mr", "mrs", "ms", "dr", "prof", "herr", "frau", "jr", "sr"}


class _Person(NamedTuple):
    """What one header says about the person; in memory only."""

    study_date: str
    name: tuple[str, ...]
    birth_date: str
    age: str
    sex: str


@dataclass
class Series:
    """The files of one series, its subject and session, and the few facts kept about the person."""

    uid: str
    study: str
    number: int
    patient: str | None
    """PatientID, in memory only."""
    named: frozenset[str]
    """Words of PatientName, in memory only: a folder with the person's name must not name the subject."""
    acquired_at: str
    folder: str
    age_years: float | None
    sex: str | None
    has_agent: bool = False
    """Whether the header names a contrast agent."""
    files: list[Path] = field(default_factory=list)
    subject: str = ""
    session: str = ""

    @property
    def key(self) -> str:
        """A short anonymous name: a hash of the series and of the sizes of its files."""
        text = self.uid + "".join(f"{file.name} {file.stat().st_size}" for file in self.files)
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def is_dicom(path: Path) -> bool:
    """Whether a file has a DICOM suffix, or the marker ``DICM`` at byte 128."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(root: Path, files: Iterable[Path], unused: UnusedFiles) -> list[Series]:
    """Group files into MR series, with ``subject`` and ``session`` set; other DICOM files go into ``unused``.

    CohortError if the headers of one PatientID contradict each other about the person.
    """
    series_by_uid: dict[tuple[str, str | None], Series] = {}
    persons: dict[str, set[_Person]] = defaultdict(set)
    for file in files:
        if file.name.upper() == "DICOMDIR" or not is_dicom(file):
            continue
        header = _read_header(file)
        if header is None:
            unused.append((file, "no DICOM header that can be read"))
        elif not header["SeriesInstanceUID"]:
            unused.append((file, "no series in the header"))
        elif header["Modality"] != "MR":
            unused.append((file, f"modality {sanitise_name(header['Modality'] or 'unknown')[:8]}, not MR"))
        else:
            parts = file.relative_to(root).parts
            series = _make_series(header, decode_filename(parts[0]) if len(parts) > 1 else "")
            series_by_uid.setdefault((series.uid, series.patient), series).files.append(file)
            if series.patient is not None:
                persons[series.patient].add(_read_person(header))
    all_series = list(series_by_uid.values())
    _require_one_person_per_id(persons)
    _require_distinct_patient_ids(all_series)
    _assign_subjects(all_series)
    _assign_sessions(all_series)
    return sorted(all_series, key=lambda one: (*map(natural_sort_key, (one.subject, one.session)), one.number, one.uid))


def max_folders_per_patient(series: Iterable[Series]) -> int:
    """The largest number of folders with one PatientID; folders that share a study count once."""
    return max((len(folders) for folders in _folders_by_patient(series).values()), default=0)


def _read_header(file: Path) -> dict[str, str] | None:
    """The tags as text, "" where missing; None if the file is not DICOM."""
    import pydicom.config
    from pydicom.errors import InvalidDicomError

    force = file.suffix.lower() in DICOM_SUFFIXES
    try:
        # Validation would print header values in warnings.
        with pydicom.config.disable_value_validation():
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS + _AGENT_SEQUENCES, force=force)
            text = {tag: "" if (value := header.get(tag)) is None else str(value).strip() for tag in _TAGS}
            return {**text, "agent": "yes" if _has_agent(header) else ""}
    except (
        *(InvalidDicomError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError),
        *(struct.error, NotImplementedError, RecursionError),
    ):
        return None


def _has_agent(header: Any) -> bool:
    """Whether a header names a contrast agent, and does not deny that it was given."""
    groups = header.get("SharedFunctionalGroupsSequence") or []
    usages = [usage for group in groups for usage in group.get("ContrastBolusUsageSequence") or []]
    if usages and all(usage.get("ContrastBolusAgentAdministered") == "NO" for usage in usages):
        return False
    names = [header.get(tag) for tag in ("ContrastBolusAgent", "ContrastBolusIngredient")]
    names += [item.get("CodeMeaning") for item in header.get("ContrastBolusAgentSequence") or []]
    return any(name is not None and not _NO_AGENT.fullmatch(str(name).strip()) for name in names)


def decode_filename(name: str) -> str:
    """Decode a file name that is not UTF-8 as Latin-1, so that it can be written into a table."""
    try:
        return os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:
        return os.fsencode(name).decode("latin-1")


def _make_series(header: dict[str, str], folder: str) -> Series:
    patient, number, sex = header["PatientID"], header["SeriesNumber"], header["PatientSex"].upper()
    is_placeholder = patient.lower() in _NO_PATIENT or _REPEATED_CHARACTER.fullmatch(patient) is not None
    return Series(
        uid=header["SeriesInstanceUID"],
        study=header["StudyInstanceUID"],
        number=int(number) if number.isdecimal() else 0,
        patient=None if is_placeholder else patient,
        named=frozenset(re.findall(r"[^\W\d_]{2,}", header["PatientName"].lower())),
        acquired_at=f"{header['StudyDate']} {header['StudyTime']}",
        folder=folder,
        age_years=_age_years(header["PatientAge"]),
        sex=sex if sex in ("F", "M") else None,
        has_agent=bool(header["agent"]),
    )


def _age_years(text: str) -> float | None:
    """Years of a DICOM age; None for other text, for the placeholders 000Y and 999Y, and from 110 years up.

    >>> _age_years("018M"), _age_years("000Y"), _age_years("45")
    (1.5, None, None)
    """
    age = re.fullmatch(r"(\d{1,3})([YMWD])", text.upper())
    years = int(age.group(1)) * _YEARS_PER_UNIT[age.group(2)] if age else 0
    return years if 0 < years < _MAX_AGE_YEARS else None


def _read_person(header: dict[str, str]) -> _Person:
    text = unicodedata.normalize("NFKD", header["PatientName"].casefold())
    text = "".join(letter for letter in text if not unicodedata.combining(letter))
    words = [word for word in re.split(r"[\W_]+", text) if word and word not in _NO_PATIENT | _TITLES]
    words = [word for word in words if not is_session_name(word)]
    words = [word for word in words if len(word) > 1] or words  # initials count only on their own
    is_date = re.fullmatch(r"[12]\d{7}", header["PatientBirthDate"]) is not None
    is_placeholder = header["PatientBirthDate"] in ("19000101", "11111111", "18000101", "18500101")
    birth_date = header["PatientBirthDate"] if is_date and not is_placeholder else ""
    sex, study_date = header["PatientSex"].upper(), header["StudyDate"].replace(".", "")
    has_date = re.fullmatch(r"\d{8}", study_date) is not None and study_date >= _FIRST_DATE
    return _Person(
        study_date=study_date if has_date else "",
        name=() if _REPEATED_CHARACTER.fullmatch("".join(words)) else tuple(words),
        birth_date=birth_date,
        age=header["PatientAge"].upper() if _age_years(header["PatientAge"]) else "",
        sex=sex if sex in ("F", "M") else "",
    )


def _require_one_person_per_id(persons: dict[str, set[_Person]]) -> None:
    """Refuse a PatientID whose headers differ in name, birth date or sex, or whose ages fall with time.

    PatientIDs that differ in capital letters only are refused too.
    """
    if len({patient.casefold() for patient in persons}) < len(persons):
        remedy = "Write one PatientID for each person into the headers, or convert the series and write a manifest"
        raise CohortError("two PatientIDs differ in capital letters only", remedy=remedy)
    for known in persons.values():
        pairs = [sorted(pair) for pair in combinations(known, 2)]
        for what, contradicts in _CONTRADICTIONS.items():
            if any(contradicts(first, second) for first, second in pairs):
                raise CohortError(
                    f"the headers of one PatientID contradict each other: {what}",
                    got=f"{len(known)} different headers",
                    expected="one person for each PatientID",
                    remedy="If it is one person (a changed surname, a typing error), write one PatientName, "
                    "PatientBirthDate and PatientSex into the headers, or convert the series and write a manifest; "
                    "otherwise give each person a PatientID",
                )


def _names_contradict(first: _Person, second: _Person) -> bool:
    """Whether neither name has all words of the other. A changed surname passes if the birth date is the same.

    >>> doe = _Person("", ("doe", "jane"), "19750101", "", "")
    >>> others = [doe._replace(name=("jane", "doe", "mary")), doe._replace(name=("roe", "jane"))]
    >>> [_names_contradict(doe, other) for other in (*others, others[1]._replace(birth_date=""))]
    [False, False, True]
    """
    one, two = set(first.name), set(second.name)
    if not one or not two or one <= two or two <= one or "".join(first.name) == "".join(second.name):
        return False
    return not (one & two and first.birth_date and first.birth_date == second.birth_date)


def _birth_dates_contradict(first: _Person, second: _Person) -> bool:
    """Whether two birth dates differ; the first of January may stand for the year."""
    dates = {first.birth_date, second.birth_date} - {""}
    same_year = len({date[:4] for date in dates}) == 1
    return len(dates) == 2 and not (same_year and any(date.endswith("0101") for date in dates))


def _ages_contradict(first: _Person, second: _Person) -> bool:
    """Whether the age falls from the first to the second study, or rises by more than two years too many."""
    if not (first.age and second.age and first.study_date and second.study_date):
        return False
    unit = max(_YEARS_PER_UNIT[first.age[-1]], _YEARS_PER_UNIT[second.age[-1]])
    before, after = (math.floor((_age_years(one.age) or 0) / unit + 1e-6) for one in (first, second))
    if first.study_date == second.study_date:
        return abs(after - before) * unit > 1
    years = int(second.study_date[:4]) - int(first.study_date[:4])
    return after < before or (after - before) * unit > years + 2


_CONTRADICTIONS = {
    "different names": _names_contradict,
    "different birth dates": _birth_dates_contradict,
    "ages that do not fit the study dates": _ages_contradict,
    "both sexes": lambda first, second: bool(first.sex and second.sex and first.sex != second.sex),
}


def _assign_subjects(series: list[Series]) -> None:
    """Name subjects after folders if folders and people match one to one, otherwise by a hash of PatientID.

    Without a PatientID each study counts as a person. A folder name that contains a word of the person's name is not
    used, not even hashed: a list of names would reveal it.
    """
    by_folder: dict[str, list[Series]] = defaultdict(list)
    for one in series:
        one.subject = f"sub-{_short_hash(one.patient if one.patient is not None else one.study)}"
        by_folder[one.folder].append(one)
    if not _folders_match_patients(series):
        return
    for folder, inside in by_folder.items():
        first = min(inside, key=lambda one: (one.acquired_at, one.study))
        named = _contains_patient_name(folder, frozenset[str]().union(*(one.named for one in inside)))
        subject = f"sub-{_short_hash(first.patient or first.study)}" if named else sanitise_name(folder)
        for one in inside:
            one.subject = subject


def _contains_patient_name(folder: str, names: frozenset[str]) -> bool:
    """Whether a folder's name contains a word of a person's name; words of two letters count only on their own.

    >>> [_contains_patient_name(folder, frozenset({"li", "wu"})) for folder in ("LI_WU", "clinic")]
    [True, False]
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower()
    words = set(re.findall(r"[^\W\d_]+", spaced))
    return any(name in words or (len(name) > 2 and name in folder.lower()) for name in names)


def _folders_by_patient(series: Iterable[Series]) -> dict[str, set[str]]:
    """The folders of each PatientID; folders that share a study count as one."""
    folders: dict[str, set[str]] = defaultdict(set)
    first_folders: dict[str, str] = {}
    for one in series:
        folder = first_folders.setdefault(one.study, one.folder) if one.study else one.folder
        if one.patient is not None:
            folders[one.patient].add(folder)
    return folders


def _require_distinct_patient_ids(series: list[Series]) -> None:
    """Refuse a PatientID that everybody shares; one person may have two folders, or a small share of many."""
    most, folders = max_folders_per_patient(series), len({one.folder for one in series})
    if most > MAX_FOLDERS_PER_PATIENT and most > MAX_FOLDER_SHARE_PER_PATIENT * folders:
        raise CohortError(
            "one PatientID is in many folders: one person, or an anonymiser's placeholder for everybody",
            got=f"{most} of {folders} folders",
            remedy="If it is one person, put these folders into one; otherwise anonymise again with a PatientID for "
            "each person, or convert the series and write a manifest",
        )


def _folders_match_patients(series: list[Series]) -> bool:
    folders = {one.folder for one in series}
    if len(folders) < 2 or "" in folders:
        return False
    groups: dict[tuple[str, str], set[str | None]] = defaultdict(set)
    for one in series:
        groups["folder", one.folder].add(one.patient)
        groups["study", one.study].add(one.folder)
        if one.patient is not None:
            groups["patient", one.patient].add(one.folder)
    return all(len(group) == 1 for group in groups.values())


def _assign_sessions(series: list[Series]) -> None:
    """Number the studies of a subject 1, 2, … in order of time; dates are not kept."""
    studies: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for one in series:
        studies[one.subject].add((one.acquired_at, one.study))
    for one in series:
        ordered = list(dict.fromkeys(study for _, study in sorted(studies[one.subject])))
        one.session = str(ordered.index(one.study) + 1)


def _short_hash(text: str) -> str:
    return hashlib.sha256(f"brainfound {text}".encode()).hexdigest()[:10]
