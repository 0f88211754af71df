"""The meaning of covariates in a table: ages in years, words for the sexes, and codes for missing values.

A value that leaves a doubt is reported in a note with file, line and value. Nothing is guessed: numbers for the sexes
(1, 2) stay as they are unless the JSON sidecar names them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.sources.tables import MISSING, is_missing, read_json, spellings

MAX_AGE_YEARS = 150
_DOUBTFUL_AGE_YEARS = 110
_CODES = frozenset(
    {-9, -99_999, -999_999, -(2**31), 99_999, 999_999}
    | {-code for digit in (6, 7, 8, 9) for code in (11 * digit, 111 * digit, 1111 * digit)}
    | {code for digit in (7, 8, 9) for code in (111 * digit, 1111 * digit)}
)
"""Numbers that tables of other programs hold in place of a missing value."""
_UNITS_PER_YEAR = {"year": 1.0, "month": 12.0, "week": 365.25 / 7, "day": 365.25}
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
_TOP_CODED_AGES = tuple(re.compile(pattern) for pattern in (rf"(?:>=?|≥)\s*{_NUMBER}", rf"{_NUMBER}\s*\+"))
_DICOM_AGE = re.compile(r"(\d{3})([ymwd])")
_AGE_WITH_UNIT = re.compile(rf"{_NUMBER}\s*(?:(y|yo|yrs?|years?)|(months?)|(weeks?)|(days?))\.?")
"""``6m`` is not among them: it may be a boy of six."""
_DATE = re.compile(r"\d{1,4}[-./]\d{1,2}[-./]\d{1,4}|\d{5,}")
_SEXES = {
    **dict.fromkeys(("f", "female", "females", "w", "woman", "girl", "feminine", "weiblich", "frau", "femme"), "F"),
    **dict.fromkeys(("m", "male", "males", "man", "boy", "masculine", "männlich", "maennlich", "mann", "homme"), "M"),
}
_UNKNOWN_SEXES = {"unknown", "unbekannt", "inconnu", "desconocido", "sconosciuto", "not known", "unk", "u", "?", "-"}
_NOT_COVARIATES = {"subject", "session", "contrast", "path", "dataset", "filename", "age_years"}
_MAX_PLACES = 5
_MAX_VALUE_LENGTH = 24


def clean_covariates(table: pd.DataFrame, name: str, notes: list[str], sidecars: Sequence[Path] = ()) -> pd.DataFrame:
    """A table of `read_table` with ages in years as float and with ``F`` and ``M`` for the sexes.

    Units of ages and levels of the sexes come from the first of the JSON `sidecars` that has them. Ages may be written
    ``89+`` or ``>89`` (masked for privacy), ``025Y`` (DICOM) or ``25 years``. Other text, negative ages, ages above 150
    years and codes (999) become missing. Ages from 110 years on are kept. A code in any other column is missing if it
    lies far from the column's other numbers (`_are_codes`), and kept if it may be one of them. A note reports each of
    these, and calls the table `name`; another one counts subjects whose visits contradict each other.
    """
    table = table.copy()
    for column in table.columns:
        if column not in _NOT_COVARIATES and not pd.api.types.is_bool_dtype(table[column].dtype):
            table[column] = _without_codes(table[column], name, sidecars, notes)
    if "age_years" in table:
        unit = _age_unit(sidecars, _names_of("age_years", table), notes)
        _add_note(_note_on_unit(unit, name), notes)
        table["age_years"] = _parse_ages(table["age_years"], _UNITS_PER_YEAR.get(unit, 1.0), name, notes)
    _harmonise_sexes(table, sidecars, name, notes)
    for note in notes_on_visits(table, name):
        _add_note(note, notes)
    return table


def _add_note(note: str, notes: list[str]) -> None:
    if note and note not in notes:
        notes.append(note)


def _described(sidecars: Sequence[Path], columns: Sequence[str], key: str, notes: list[str]) -> Any:
    """The first value of `key` that a sidecar gives for one of the `columns`; None if there is none."""
    for file in sidecars:
        content = {str(column).lower(): described for column, described in read_json(file, notes).items()}
        for described in (content.get(column) for column in columns):
            if isinstance(described, dict) and key in described:
                return described[key]
    return None


def _names_of(column: str, table: pd.DataFrame) -> list[str]:
    """The names that a sidecar may have for a column; a name with a column of its own is not among them."""
    own = {str(name).lower() for name in table.columns} - {column}
    return [name for name in spellings(column) if name not in own]


def _age_unit(sidecars: Sequence[Path], names: Sequence[str], notes: list[str]) -> str:
    """``"month"`` and the like; "year" if no sidecar gives a unit."""
    unit = str(_described(sidecars, names, "Units", notes) or "year").lower().strip().rstrip("s")
    return "year" if unit in ("y", "yr", "yo", "") else unit


def _note_on_unit(unit: str, name: str) -> str:
    if unit not in _UNITS_PER_YEAR:
        return f"{name}: the unit of ages is not known ({unit!r}); taken as years"
    return "" if unit == "year" else f"{name}: ages are given in {unit}s and were turned into years"


def _parse_ages(values: pd.Series, units_per_year: float, name: str, notes: list[str]) -> pd.Series:
    """Ages in years as float; what cannot be an age is missing."""
    ages = pd.Series([_parse_age(value, units_per_year) for value in values], index=values.index, dtype=float)
    numbers = pd.to_numeric(values, errors="coerce")
    is_given = np.array([not is_missing(value) and str(value).strip() not in MISSING for value in values], dtype=bool)
    is_text = ages.isna() & is_given
    is_outside = ages.notna() & (~ages.between(0, MAX_AGE_YEARS) | numbers.isin(_CODES))
    is_doubtful = (ages >= _DOUBTFUL_AGE_YEARS) & ~is_outside
    comma = re.fullmatch(r"(\d+),(\d+)", next((str(value).strip() for value in values[is_text]), ""))
    example = f"{comma.group(1)}.{comma.group(2)}" if comma else "35.5"
    for chosen, fault, remedy in (
        (is_text, "an age that is not a number, now missing", f"Write years with a point ({example}) or n/a"),
        (is_outside, "an age below 0, above 150 years or a code, now missing", "Write years or n/a, not months"),
        (is_doubtful, "an age of 110 years or more, kept", "If these are months or days, turn them into years"),
    ):
        if chosen.any():
            _add_note(f"{name}: {chosen.sum()} × {fault}: {_places(values[chosen])}. {remedy}", notes)
    return ages.where(~is_outside)


def _parse_age(value: Any, units_per_year: float) -> float:
    """An age in years; NaN if it is not a number. A unit after the number outranks that of the sidecar."""
    if is_missing(value) or isinstance(value, bool):
        return math.nan
    text = str(value).strip().lower()
    if _PLAIN_NUMBER.fullmatch(text):
        return float(text) / units_per_year
    if match := next((match for pattern in _TOP_CODED_AGES if (match := pattern.fullmatch(text))), None):
        return float(match.group(1)) / units_per_year
    if match := _DICOM_AGE.fullmatch(text):
        unit = next(unit for unit in _UNITS_PER_YEAR if unit.startswith(match.group(2)))
        return int(match.group(1)) / _UNITS_PER_YEAR[unit]
    if match := _AGE_WITH_UNIT.fullmatch(text):
        number, *units = match.groups()
        return float(number) / next(n for n, unit in zip(_UNITS_PER_YEAR.values(), units, strict=True) if unit)
    return math.nan


def _places(values: pd.Series) -> str:
    """The first values with their lines: ``line 3 '35-40', line 7 'unknown'``. Dates are not repeated."""
    where = f"{values.index.name} " if values.index.name else ""
    listed = [f"{where}{line} {_shown(value)}" if where else _shown(value) for line, value in values.items()]
    more = f" and {len(listed) - _MAX_PLACES} more" if len(listed) > _MAX_PLACES else ""
    return ", ".join(listed[:_MAX_PLACES]) + more


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())
    return "a date or a long number" if _DATE.search(text) else repr(text[:_MAX_VALUE_LENGTH])


def _harmonise_sexes(table: pd.DataFrame, sidecars: Sequence[Path], name: str, notes: list[str]) -> None:
    """Words for the sexes as ``F`` and ``M``, in place; others stay. An empty cell is filled from ``gender``."""
    if "sex" not in table:
        return
    gender = next((column for column in table.columns if str(column).lower() == "gender"), None)
    if gender is not None and (empty := table["sex"].isna() & table[gender].notna()).any():
        words = _levels(sidecars, ["gender"], notes)
        known = [words.get(_code(value), value) for value in table[gender]]
        table["sex"] = table["sex"].astype(object).where(~empty, pd.Series(known, table.index, dtype=object))
        notes.append(f"{name}: {empty.sum()} × a sex from the column {gender!r}, where 'sex' is empty")
    words = _levels(sidecars, _names_of("sex", table), notes)
    sexes, num_unknown = [], 0
    for value in table["sex"]:
        word = _code(value)
        sex = _SEXES.get(words.get(word, ""), _SEXES.get(word, value))
        is_unknown = sex == value and words.get(word, word) in _UNKNOWN_SEXES
        num_unknown += is_unknown
        sexes.append(None if is_unknown or is_missing(sex) else sex)
    table["sex"] = pd.Series(sexes, index=table.index, dtype=object)
    if num_unknown:
        notes.append(f"{name}: {num_unknown} × a sex that is not known, now missing")
    codes = sorted({str(value) for value in table["sex"].dropna() if _PLAIN_NUMBER.fullmatch(str(value))})
    if codes:
        notes.append(f"{name}: the sexes are numbers ({', '.join(codes[:4])}), kept as they are. Write F and M")
        table["sex"] = table["sex"].infer_objects()


def _levels(sidecars: Sequence[Path], names: Sequence[str], notes: list[str]) -> dict[str, str]:
    """Code → description of the first of the columns `names` that a sidecar describes."""
    levels = _described(sidecars, names, "Levels", notes)
    return {str(code).strip().lower(): _level(text) for code, text in levels.items()} if type(levels) is dict else {}


def _code(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).strip().lower()


def _level(text: Any) -> str:
    """The description of a level: text, or an object with ``Description`` (BIDS 1.10)."""
    return str(text.get("Description", "") if isinstance(text, dict) else text).strip().lower()


def _without_codes(values: pd.Series, name: str, sidecars: Sequence[Path], notes: list[str]) -> pd.Series:
    """A column without codes for missing values. What may be a code or a value stays; a note reports both."""
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    given = numbers.isin(_CODES)
    if not given.any():
        return values
    limits = [_described(sidecars, (str(values.name).lower(),), key, notes) for key in ("Minimum", "Maximum")]
    others = [*numbers[numbers.notna() & ~given], *(limit for limit in limits if isinstance(limit, int | float))]
    codes = given & _are_codes(numbers, others)
    doubtful = given & ~codes & ~numbers.between(min(others, default=0), max(others, default=0))
    for chosen, fault, remedy in (
        (codes, "a code for a missing value, now missing", "If it is a value, state Minimum or Maximum in the sidecar"),
        (doubtful, "a number that may be a code for a missing value, kept", "Write n/a if it is missing"),
    ):
        if chosen.any():
            places = _places(numbers[chosen])
            _add_note(f"{name}: column {values.name!r} holds {chosen.sum()} × {fault}: {places}. {remedy}", notes)
    return values.where(~codes) if pd.api.types.is_numeric_dtype(values.dtype) else values.where(~codes, None)


def _are_codes(numbers: pd.Series, others: Sequence[float]) -> pd.Series:
    """Whether numbers are too far from the `others` of their column to be values like them.

    Negative: there are no other negative ones, or it lies further below them than they spread. Positive: more than
    twice the largest, or less than half of the smallest.
    """
    if not others:
        return numbers.notna()
    low, high = min(others), max(others)
    least = 0.0 if low >= 0 else low - max(high - low, -low)
    return (numbers < least) | ((numbers > 0) & ((numbers > 2 * high) | (numbers < low / 2)))


_FIRST_VISIT = re.compile(r"(?:baseline|base|bl|bsl|screening|screen|scr?|initial|init|pre(?:[-_]?op)?)")
_DAY_FIRST = re.compile(r"(\d\d)[-._](\d\d)[-._](\d{4})")


def notes_on_visits(table: pd.DataFrame, name: str) -> list[str]:
    """Notes that count subjects whose visits contradict each other in sex, or whose age falls, with their rows."""
    notes = []
    for column, what in (("sex", "sexes differ"), ("age_years", "age falls")):
        if {"subject", "session", column} <= set(table.columns):
            known = table[column].notna() & table["session"].notna()
            visits: dict[str, dict[tuple[str, Any], int]] = {}
            cells = (table[name][known] for name in ("subject", "session", column))
            for place, (subject, session, value) in zip(np.flatnonzero(known), zip(*cells, strict=True), strict=True):
                visits.setdefault(subject, {}).setdefault((str(session), value), int(place))
            found = [(subject, pair) for subject, rows in visits.items() if (pair := _contradiction(rows, column))]
            if found:
                more = f" and {len(found) - _MAX_PLACES} more" if len(found) > _MAX_PLACES else ""
                texts = [f"{who} ({_places(table[column].iloc[list(pair)])})" for who, pair in found[:_MAX_PLACES]]
                fault = f"{len(found)} × a subject whose {what} between visits: {'; '.join(texts)}{more}"
                notes.append(f"{name}: {fault}. Correct the table, or give two people two names")
    return notes


def _contradiction(rows: dict[tuple[str, Any], int], column: str) -> tuple[int, int] | None:
    """Places of the first two rows of one subject whose sexes differ, or between which the age falls.

    `rows` are the places of its sessions with their values.
    """
    if column == "sex":
        places = list({value: place for (_, value), place in reversed(rows.items())}.values())[::-1]
        return (places[0], places[1]) if len(places) > 1 else None
    if len({value for _, value in rows}) < 2:
        return None
    visits = [(order, value, place) for (name, value), place in rows.items() if (order := _visit_order(name))]
    for (one, earlier, first), (other, later, second) in pairwise(sorted(visits)):
        if (one[:2] == other[:2] or one[0] < other[0]) and earlier > later and one != other:
            return first, second
    return None


def _visit_order(session: str) -> tuple[int, str, float] | None:
    """A key that sorts the visits of one subject by time, as far as their names say it: rank, unit, number.

    >>> _visit_order("baseline") < _visit_order("m06") < _visit_order("m12"), _visit_order("rest")
    (True, None)
    """
    name = _DAY_FIRST.sub(r"\3\2\1", session.lower().strip()).removeprefix("ses-")
    if _FIRST_VISIT.fullmatch(name):
        return 0, "", 0.0
    parts = re.findall(r"\d+|[a-z]+", name)
    words, numbers = [part for part in parts if part.isalpha()], [part for part in parts if part.isdecimal()]
    if not numbers and re.fullmatch("[a-f]", name):
        return 1, "letter", float(ord(name))
    is_date = not words and len(numbers) > 1
    if len(words) > 1 or not numbers or (len(numbers) > 1 and not is_date):
        return None
    return 1, "date" if is_date or len(numbers[0]) == 8 else "".join(words), float("".join(numbers))
