"""Label maps joined to the sessions of a cohort's table.

Tables of sources: reading CSV, TSV and Parquet as people and Excel write them, and joining them to scans.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.sources.file_names import UnusedFiles
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
_IDENTIFIERS = {"participant_id": "subject", "session_id": "session"}
_SEPARATORS = (",", "\t", ";")
_MISSING = ("", "n/a", "N/A", "#N/A", "NA", "NaN", "nan", "null", "NULL")
"""Cells that say nothing. ``None`` is not among them: it is a label in some tables."""
_NO_AGE = {*(word.lower() for word in _MISSING), "none", "unknown"}
_YEARS = {"year": 1.0, "month": 12.0, "week": 365.25 / 7, "day": 365.25}


def read_table(path: Path, *, renamed: bool = True, bids_ids: bool = False) -> tuple[pd.DataFrame, list[str]]:
    """A table and notes on how it had to be read.

    Byte-order marks, UTF-16 (Excel's "Unicode text") and another separator than the ending promises are
    understood. Names of subjects and sessions stay text (007 is not 7). Known columns are found in any case, and
    ``age``, ``participant_id``, ``session_id``, ``group`` get their names here unless ``renamed`` is off. With
    ``of_ids`` (tables of BIDS and FOMO) it is ``participant_id`` and ``session_id`` that name, and other columns
    called ``subject`` or ``session`` are kept as ``subject_2`` and ``session_2``. Missing text is None.

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
    if bids_ids:
        table = _with_ids_first(table, path, notes)
    if renamed:
        table = table.rename(columns=known_names(table.columns))
    for column in _TEXT:
        if column in table:
            table[column] = pd.Series([as_text(v) for v in table[column]], index=table.index, dtype=object)
    notes += _make_plain(table)
    for column in table.columns:  # pandas would keep missing text as NaN, which is not None
        if pd.api.types.is_string_dtype(table[column].dtype) or table[column].dtype == object:
            values = [None if _is_missing(value) else value for value in table[column]]
            table[column] = pd.Series(values, index=table.index, dtype=object)
    return table, notes


def _read_text(path: Path, notes: list[str]) -> pd.DataFrame:
    content = path.read_bytes()
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    text, skipped = _without_blank_start(text)
    first = text.partition("\n")[0]
    expected = "," if path.suffix.lower() == ".csv" else "\t"
    separator = expected
    if expected not in first:
        separator = next((other for other in _SEPARATORS if other in first), expected)
    if separator != expected:
        word = {",": "commas", "\t": "tabs", ";": "semicolons"}[separator]
        notes.append(f"{path.name}: the columns are separated by {word}")
    _check_fields(text, separator, path, skipped)
    header = [column.strip() for column in pd.read_csv(io.StringIO(first), sep=separator).columns]
    kinds = {index: str for index, name in enumerate(header) if _known_name(name) in _TEXT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # empty fields at the end of a row, checked above
        table = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            dtype=kinds,
            na_values=list(_MISSING),
            keep_default_na=False,
            low_memory=False,
            index_col=False,
        )
    table.columns = [str(column).strip() for column in table.columns]
    return table


def _without_blank_start(text: str) -> tuple[str, int]:
    """The text from its header on, and the number of blank lines before it."""
    blank = re.match(r"(?:[ \t]*\r?\n)*", text)
    end = blank.end() if blank else 0
    return text[end:], text.count("\n", 0, end)


def _check_fields(text: str, separator: str, path: Path, skipped: int) -> None:
    """A row with more fields than the header (``45,5`` in a table with commas) would lose or shift its values."""
    rows = csv.reader(io.StringIO(text), delimiter=separator)
    header = next(rows, [])
    for row in rows:
        if any(field.strip() for field in row[len(header) :]):
            raise CohortError(
                "a row has more fields than the header",
                where=f"{path.name}, line {rows.line_num + skipped}",
                got=f"{len(row)} fields",
                expected=f"{len(header)}",
                remedy="Put values that hold a separator in quotes",
            )


def _known_name(column: str) -> str:
    lower = column.lower()
    return _RENAMED.get(lower, lower if lower in _KNOWN else column)


def known_names(columns: Iterable[str]) -> dict[str, str]:
    """New names of columns that are known under another one; a column that has the name already is not replaced."""
    columns = list(columns)
    names: dict[str, str] = {}
    for column in columns:
        known = _known_name(column)
        if known != column and known not in columns and known not in names.values():
            names[column] = known
    return names


def _with_ids_first(table: pd.DataFrame, path: Path, notes: list[str]) -> pd.DataFrame:
    names: dict[str, str] = {}
    for identifier, known in _IDENTIFIERS.items():
        column = next((column for column in table.columns if column.lower() == identifier), None)
        others = [other for other in table.columns if other != column and _known_name(other) == known]
        if column is None:
            continue
        names[column] = known
        for number, other in enumerate(others, start=2):
            names[other] = f"{known}_{number}"
            notes.append(f"{path.name}: {identifier} names the {known}; the column {other!r} is kept as {names[other]}")
    return table.rename(columns=names)


def strip_session_prefix(values: Iterable[Any]) -> list[str | None]:
    """Names of sessions without ``ses-``; missing ones stay None."""
    names = [as_text(value) for value in values]
    return [None if name is None else name.removeprefix("ses-") for name in names]


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


def parse_ages(table: pd.DataFrame, path: Path, notes: list[str] | None = None) -> pd.DataFrame:
    """``age_years`` as float; "89+" (ages masked for privacy, BIDS) is 89.

    Args:
        table: may have no ages.
        path: the file that the error names.
        notes: given for an index that its user did not write and cannot mend: what is no age is then missing, and
            a note counts it.

    Raises:
        CohortError: an age is not a number, or not an age of a person, and no notes are given.
    """
    if "age_years" not in table:
        return table
    ages, odd = _numbers(table["age_years"])
    wrong = ages[ages.notna() & ~((ages >= 0) & (ages <= 150))]
    if notes is not None:
        unusable = sum(text.lower() not in _NO_AGE for text in odd) + len(wrong)
        if unusable:
            notes.append(f"{path.name}: {unusable} ages are not used, since they are no number of years")
        return table.assign(age_years=ages.drop(wrong.index).reindex(ages.index))
    if not odd.empty:
        comma = re.fullmatch(r"\d+,\d+", odd.iloc[0])
        remedy = f"Write a point: {odd.iloc[0].replace(',', '.')}" if comma else "Write years or n/a"
        raise CohortError("an age is not a number", where=path.name, got=repr(odd.iloc[0]), remedy=remedy)
    if not wrong.empty:
        raise CohortError(
            "an age is not one of a person", where=path.name, got=f"{wrong.iloc[0]:g}", remedy="Write years or n/a"
        )
    return table.assign(age_years=ages)


def _numbers(values: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Ages as float, and those that are no numbers as text; "89+" is 89."""
    ages = pd.to_numeric(values, errors="coerce").astype(float)
    odd = values[ages.isna() & values.notna()].astype(str).str.strip()
    masked = odd[odd.str.fullmatch(r"\d+\s*\+")]
    ages.loc[masked.index] = masked.str.rstrip(" +").astype(float)
    return ages, odd.drop(masked.index)


def convert_ages_to_years(
    table: pd.DataFrame, path: Path, notes: list[str], inherited: Sequence[Path] = (), name: str = ""
) -> pd.DataFrame:
    """Ages in the unit that the table's JSON states (BIDS: ``participants.json``), as years.

    The JSON beside the table comes first, then the inherited ones (the data set's ``sessions.json``); notes call the
    table by ``name``.
    """
    name = name or path.name
    if "age_years" not in table:
        return table
    units = (_unit_of_ages(file, notes) for file in (path.with_suffix(".json"), *inherited))
    unit = next((unit for unit in units if unit is not None), "year")
    note = ""
    if unit in _YEARS and unit != "year":
        ages, odd = _numbers(table["age_years"])
        years = (ages / _YEARS[unit]).astype(object)
        years.loc[odd.index] = odd  # to be refused as what it is
        table["age_years"] = years
        note = f"{name}: ages are given in {unit}s and were turned into years"
    elif unit not in (*_YEARS, "y", "yr", "yo", ""):
        note = f"{name}: the unit of ages is not known ({unit!r}); taken as years"
    if note and note not in notes:
        notes.append(note)
    return table


def _unit_of_ages(described: Path, notes: list[str]) -> str | None:
    """``"month"`` and the like; None where the file is not there or does not describe ages."""
    if not described.is_file():
        return None
    try:
        content = json.loads(described.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        note = f"{described.name} is not valid JSON and was not used ({type(error).__name__})"
        if note not in notes:
            notes.append(note)
        return None
    columns = {str(name).lower(): about for name, about in content.items()} if isinstance(content, dict) else {}
    about = next((columns[name] for name in ("age_years", "age", "age_at_scan", "ageatscan") if name in columns), None)
    if not isinstance(about, dict) or "Units" not in about:
        return None
    return str(about["Units"]).lower().strip().rstrip("s")


def join(
    table: pd.DataFrame, facts: pd.DataFrame, keys: Sequence[str], path: Path, notes: list[str] | None = None
) -> pd.DataFrame:
    """Covariates joined to scans. Where both say something, the new facts win if they know a value.

    With ``notes``, facts that no scan has the name for are counted: ``1`` in the table is not ``ses-01`` of a folder.

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
    if notes is not None:
        there = set(table[list(keys)].itertuples(index=False, name=None))
        lost = sum(key not in there for key in facts[list(keys)].itertuples(index=False, name=None))
        if lost:
            notes.append(f"{lost} of {len(facts)} rows of {path.name} name nothing that was read, and are not used")
    facts = facts.drop(columns=[c for c in ("contrast", "path", "mask") if c in facts and c not in keys])
    facts = facts.drop(columns=[c for c in ("subject", "session") if c in facts and c not in keys])
    joined = table.merge(facts, on=list(keys), how="left", suffixes=("", "__new"))
    for column in [column for column in joined.columns if column.endswith("__new")]:
        old = column.removesuffix("__new")
        joined[old] = joined[column].where(joined[column].notna(), joined[old])
        joined = joined.drop(columns=column)
    return joined


SessionKey = tuple[str, str]
"""(subject, session)."""


def join_label_maps(
    table: pd.DataFrame, label_maps: Iterable[tuple[str, SessionKey, Path]], unused: UnusedFiles
) -> tuple[str, ...]:
    """A column per kind of label map, with the first map of each session; the others go into ``unused``.

    Args:
        table: the scans; gets the columns.
        label_maps: (column, session, file), in the order of preference.
        unused: gets what is not joined, with the reason.

    Returns:
        The columns, with ``mask`` always among them.
    """
    keys = list(zip(table["subject"], table["session"], strict=True))
    known = set(keys)
    found: dict[str, dict[SessionKey, Path]] = {"mask": {}}
    for column, key, file in label_maps:
        if key not in known:
            unused.append((file, "a label map of a session without scans"))
        elif key in found.setdefault(column, {}):
            unused.append((file, f"a further label map ({column}) of its session"))
        else:
            found[column][key] = file
    columns = tuple(column for column, files in found.items() if files or column == "mask")
    for column in columns:
        table[column] = [str(found[column][key]) if key in found[column] else None for key in keys]
    return columns
