"""Tables of sources: reading CSV, TSV and Parquet as people and Excel write them, and joining them to scans."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.errors import CohortError

ENDINGS = (".csv", ".tsv", ".txt", ".parquet")
_RENAMED = {
    "age": "age_years",
    "age_at_scan": "age_years",
    "ageatscan": "age_years",
    "participant_id": "subject",
    "subject_id": "subject",
    "session_id": "session",
    "group": "diagnosis",
    "dx": "diagnosis",
}
_KNOWN = ("subject", "session", "contrast", "path", "mask", "age_years", "sex", "site", "diagnosis", "dataset")
_TEXT = ("subject", "session", "dataset", "filename")
_SEPARATORS = (",", "\t", ";")
_YEARS = {"year": 1.0, "month": 12.0, "week": 365.25 / 7, "day": 365.25}


def read_table(path: Path, *, renamed: bool = True) -> tuple[pd.DataFrame, list[str]]:
    """A table and notes on how it had to be read.

    Byte-order marks, UTF-16 (Excel's "Unicode text") and another separator than the ending promises are
    understood. Names of subjects and sessions stay text (007 is not 7). Known columns are found in any case, and
    ``age``, ``participant_id``, ``session_id``, ``group`` get their names here unless ``renamed`` is off.

    Raises:
        CohortError: the file cannot be read as a table.
    """
    notes: list[str] = []
    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
            table.columns = [str(column).strip() for column in table.columns]
        elif path.suffix.lower() in ENDINGS:
            table = _read_text(path, notes)
        else:
            raise CohortError(
                "not a source of scans",
                where=path.name,
                expected="a .csv, .tsv or .parquet manifest, OpenMind's .json, or a folder",
                remedy="Give the folder or the manifest",
            )
    except UnicodeDecodeError as error:
        raise CohortError("the text is not UTF-8", where=path.name, remedy='Save it as "CSV UTF-8"') from error
    except (ValueError, OSError, csv.Error) as error:
        raise CohortError(f"cannot be read as a table: {error}", where=path.name, remedy="Check the file") from error
    if renamed:
        table = with_known_names(table)
    for column in _TEXT:
        if column in table:
            table[column] = [as_text(value) for value in table[column]]
    notes += _make_plain(table)
    return table, notes


def _read_text(path: Path, notes: list[str]) -> pd.DataFrame:
    content = path.read_bytes()
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    first = text.partition("\n")[0]
    expected = "," if path.suffix.lower() == ".csv" else "\t"
    separator = expected
    if expected not in first:
        separator = next((other for other in _SEPARATORS if other in first), expected)
    if separator != expected:
        word = {",": "commas", "\t": "tabs", ";": "semicolons"}[separator]
        notes.append(f"{path.name}: the columns are separated by {word}")
    _check_fields(text, separator, path)
    header = [column.strip() for column in pd.read_csv(io.StringIO(first), sep=separator).columns]
    kinds = {index: str for index, name in enumerate(header) if _known_name(name) in _TEXT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # empty fields at the end of a row, checked above
        table = pd.read_csv(
            io.StringIO(text), sep=separator, dtype=kinds, na_values=["n/a"], low_memory=False, index_col=False
        )
    table.columns = [str(column).strip() for column in table.columns]
    return table


def _check_fields(text: str, separator: str, path: Path) -> None:
    """A row with more fields than the header (``45,5`` in a table with commas) would lose or shift its values."""
    rows = csv.reader(io.StringIO(text), delimiter=separator)
    header = next(rows, [])
    for row in rows:
        if any(field.strip() for field in row[len(header) :]):
            raise CohortError(
                "a row has more fields than the header",
                where=f"{path.name}, line {rows.line_num}",
                got=f"{len(row)} fields",
                expected=f"{len(header)}",
                remedy="Put values that hold a separator in quotes",
            )


def _known_name(column: str) -> str:
    lower = column.lower()
    return _RENAMED.get(lower, lower if lower in _KNOWN else column)


def with_known_names(table: pd.DataFrame) -> pd.DataFrame:
    """The table with known columns under their own names; a column that has the name already is not replaced."""
    names: dict[str, str] = {}
    for column in table.columns:
        known = _known_name(column)
        if known != column and known not in table and known not in names.values():
            names[column] = known
    return table.rename(columns=names)


def as_text(value: Any) -> str | None:
    """An identifier as text: 7 and 7.0 of a binary table become "7"; nothing and blanks become None."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _make_plain(table: pd.DataFrame) -> list[str]:
    """Columns of several kinds (a number here, a word there), of dates or of lists become text."""
    mixed = []
    for column in table.columns:
        values = table[column]
        if pd.api.types.is_datetime64_any_dtype(values):
            table[column] = [None if pd.isna(value) else value.isoformat() for value in values]
        elif values.dtype == object:
            kinds = {type(value) for value in values if not _is_missing(value)}
            if len(kinds) > 1 or any(kind not in (str, int, float, bool) for kind in kinds):
                table[column] = [None if _is_missing(value) else _text_of(value) for value in values]
                mixed.append(column)
    return [f"column {column!r} holds values of several kinds and is read as text" for column in mixed]


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))


def _text_of(value: Any) -> str:
    if isinstance(value, date):
        return value.isoformat()
    return str(as_text(value)) if isinstance(value, float) else str(value)


def with_typed_ages(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """``age_years`` as float; "89+" (ages masked for privacy, BIDS) is 89.

    Raises:
        CohortError: an age is not a number, or not an age of a person.
    """
    if "age_years" not in table:
        return table
    ages = pd.to_numeric(table["age_years"], errors="coerce").astype(float)
    odd = table["age_years"][ages.isna() & table["age_years"].notna()].astype(str).str.strip()
    masked = odd[odd.str.fullmatch(r"\d+\s*\+")]
    ages.loc[masked.index] = masked.str.rstrip(" +").astype(float)
    odd = odd.drop(masked.index)
    if not odd.empty:
        comma = re.fullmatch(r"\d+,\d+", odd.iloc[0])
        remedy = f"Write a point: {odd.iloc[0].replace(',', '.')}" if comma else "Write years or n/a"
        raise CohortError("an age is not a number", where=path.name, got=repr(odd.iloc[0]), remedy=remedy)
    wrong = ages[ages.notna() & ~((ages >= 0) & (ages <= 150))]
    if not wrong.empty:
        raise CohortError(
            "an age is not one of a person", where=path.name, got=f"{wrong.iloc[0]:g}", remedy="Write years or n/a"
        )
    return table.assign(age_years=ages)


def ages_in_years(table: pd.DataFrame, path: Path, notes: list[str]) -> pd.DataFrame:
    """Ages in the unit that the table's JSON beside it states (BIDS: ``participants.json``), as years."""
    described = path.with_suffix(".json")
    if "age_years" not in table or not described.is_file():
        return table
    try:
        content = json.loads(described.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        notes.append(f"{described.name} is not valid JSON and was not used ({type(error).__name__})")
        return table
    columns = {str(name).lower(): about for name, about in content.items()} if isinstance(content, dict) else {}
    about = next((columns[name] for name in ("age_years", "age", "age_at_scan", "ageatscan") if name in columns), None)
    unit = str(about.get("Units", "years") if isinstance(about, dict) else "years").lower().strip().rstrip("s")
    if unit in _YEARS and unit != "year":
        table["age_years"] = pd.to_numeric(table["age_years"], errors="coerce") / _YEARS[unit]
        notes.append(f"{path.name}: ages are given in {unit}s and were turned into years")
    elif unit not in (*_YEARS, "y", "yr", "yo", ""):
        notes.append(f"{path.name}: the unit of ages is not known ({unit!r}); taken as years")
    return table


def join(table: pd.DataFrame, facts: pd.DataFrame, keys: Sequence[str], path: Path) -> pd.DataFrame:
    """Covariates joined to scans. Where both say something, the new facts win if they know a value.

    Raises:
        CohortError: the facts have two different rows for one key.
    """
    facts = facts.drop_duplicates().dropna(subset=list(keys))
    repeated = facts[facts.duplicated(subset=list(keys))]
    if not repeated.empty:
        raise CohortError(
            f"{path.name} lists a subject twice" if len(keys) == 1 else f"{path.name} lists a session twice",
            where=path.name,
            got=" ".join(str(repeated.iloc[0][key]) for key in keys),
            remedy="Keep one row each",
        )
    facts = facts.drop(columns=[c for c in ("contrast", "path", "mask") if c in facts and c not in keys])
    facts = facts.drop(columns=[c for c in ("subject", "session") if c in facts and c not in keys])
    joined = table.merge(facts, on=list(keys), how="left", suffixes=("", "__new"))
    for column in [column for column in joined.columns if column.endswith("__new")]:
        old = column.removesuffix("__new")
        joined[old] = joined[column].where(joined[column].notna(), joined[old])
        joined = joined.drop(columns=column)
    return joined
