"""The meaning of covariates in a table: ages in years, words for the sexes, and codes for missing values.

A value that leaves a doubt is reported in a note with file, line and value. Nothing is guessed: numbers for the sexes
(1, 2) stay as they are unless the JSON sidecar names them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfound.data.sources.tables import MISSING, is_missing, read_json, spellings

MAX_AGE_YEARS = 150
_DOUBTFUL_AGE_YEARS = 110
_CODES = frozenset((-9, -77, -88, -99, -777, -888, -999, -9999, -99999, 999, 9999, 99999))
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
    years and codes (999) become missing. Ages from 110 years on are kept, and so are codes in other numeric columns.
    A note reports each of these, and calls the table `name`.
    """
    table = table.copy()
    if "age_years" in table:
        unit = _age_unit(sidecars, _names_of("age_years", table), notes)
        _add_note(_note_on_unit(unit, name), notes)
        table["age_years"] = _parse_ages(table["age_years"], _UNITS_PER_YEAR.get(unit, 1.0), name, notes)
    _harmonise_sexes(table, sidecars, name, notes)
    for column in table.columns:
        if column not in _NOT_COVARIATES and not pd.api.types.is_bool_dtype(table[column].dtype):
            _add_note(_note_on_codes(table[column], name), notes)
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


def _note_on_codes(values: pd.Series, name: str) -> str:
    """A note on codes of a numeric column: those that lie outside the range of its other numbers."""
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    others = numbers[numbers.notna() & ~numbers.isin(_CODES)]
    low, high = (others.min(), others.max()) if len(others) else (0.0, 0.0)
    codes = numbers[numbers.isin(_CODES) & ~numbers.between(low, high)]
    if codes.empty:
        return ""
    fault = f"column {values.name!r} holds {len(codes)} × a number that may be a code for a missing value, kept"
    return f"{name}: {fault}: {_places(codes)}. Write n/a if it is missing"
