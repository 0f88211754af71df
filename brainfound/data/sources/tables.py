"""Reading tables (CSV, TSV and Parquet, as people and Excel write them), and joining them to the table of scans.

Covariates are joined by subject, or by subject and session. Ages are converted to years. Each kind of label map gets a
column. Whatever is ignored or ambiguous is reported in a note without identifiers.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.sources.file_names import UnusedFiles, natural_sort_key
from brainfound.errors import CohortError

SessionKey = tuple[str, str]
"""(subject, session)."""
LabelMapRow = tuple[str, SessionKey, Path]
"""(column, session, file) of one label map."""

COLUMNS = ("subject", "session", "contrast", "path", "mask", "age_years", "sex", "site", "diagnosis")
"""The columns of every cohort table; further columns are kept."""
_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
_RENAMED = {
    **dict.fromkeys(("age", "age_at_scan", "ageatscan"), "age_years"),
    **dict.fromkeys(("group", "dx"), "diagnosis"),
    **{"participant_id": "subject", "subject_id": "subject", "session_id": "session"},
}
_KNOWN = (*COLUMNS, "dataset")
_TEXT = ("subject", "session", "dataset", "filename")
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
_MISSING = ("", "n/a", "N/A", "#N/A", "NA", "NaN", "nan", "null", "NULL")
"""Spellings of a missing value. The word ``None`` is not one: it is a label in some tables."""
_READ_OPTIONS: dict[str, Any] = dict(low_memory=False, index_col=False, keep_default_na=False, na_values=list(_MISSING))
_NO_AGE = {*(word.lower() for word in _MISSING), "none", "unknown"}
_UNITS_PER_YEAR = {"year": 1.0, "month": 12.0, "week": 365.25 / 7, "day": 365.25}


@dataclass
class SourceTable:
    """The scans of a source, as the reader of its layout returns them; `Cohort` has the same attributes."""

    table: pd.DataFrame
    root: Path
    source: str
    mask_columns: tuple[str, ...] = ("mask",)
    notes: list[str] = field(default_factory=list)
    unused: UnusedFiles = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = with_all_columns(self.table)


@dataclass(frozen=True)
class SourceLayout:
    """One row of the registry."""

    name: str
    layout_hint: str
    """One line for the error when no layout fits."""
    can_read: Callable[[Path], bool]
    read: Callable[[Path, Path | None], SourceTable]


def with_all_columns(table: pd.DataFrame) -> pd.DataFrame:
    """A copy with all of `COLUMNS` first, empty where the source has none."""
    rest = [column for column in table.columns if column not in COLUMNS]
    table = table.assign(**{column: None for column in COLUMNS if column not in table})
    return table[[*COLUMNS, *rest]].reset_index(drop=True)


def read_table(path: Path, notes: list[str], *, bids_ids: bool = False) -> pd.DataFrame:
    """Read a table, with the cohort's column names; `notes` receives anything unusual about the file.

    Byte-order marks, UTF-16 (Excel's "Unicode text") and an unexpected separator are handled. Names of subjects and
    sessions stay text (007 is not 7). Known columns are matched in any case, and ``age``, ``participant_id``,
    ``session_id`` and ``group`` are renamed. With ``bids_ids`` (tables of BIDS and FOMO) ``participant_id`` and
    ``session_id`` are the identifiers, and other columns called ``subject`` or ``session`` are kept as ``subject_2``
    and ``session_2``. Missing text is None.
    """
    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix.lower() in _TABLE_SUFFIXES:
            table = _read_text(path, notes)
        else:
            expected = "a .csv, .tsv or .parquet manifest, OpenMind's .json, or a folder"
            remedy = "Give the folder or the manifest"
            raise CohortError("not a source of scans", where=path.name, expected=expected, remedy=remedy)
    except UnicodeDecodeError as error:
        raise CohortError("the text is not UTF-8", where=path.name, remedy='Save it as "CSV UTF-8"') from error
    except (ValueError, OSError, csv.Error) as error:
        raise CohortError(f"cannot be read as a table: {error}", where=path.name, remedy="Check the file") from error
    table.columns = [str(column).strip() for column in table.columns]
    if bids_ids:
        table = _rename_bids_ids(table, path, notes)
    table = table.rename(columns=cohort_names(table.columns))
    for column in _TEXT:
        if column in table:
            table[column] = pd.Series([_as_text(v) for v in table[column]], index=table.index, dtype=object)
    notes += _mixed_columns_to_text(table)
    for column in table.columns:  # pandas would keep missing text as NaN, which is not None
        if pd.api.types.is_string_dtype(table[column].dtype) or table[column].dtype == object:
            values = [None if is_missing(value) else value for value in table[column]]
            table[column] = pd.Series(values, index=table.index, dtype=object)
    return table


def _read_text(path: Path, notes: list[str]) -> pd.DataFrame:
    content = path.read_bytes()
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    blank = re.match(r"(?:[ \t]*\r?\n)*", text)
    start = blank.end() if blank else 0
    num_blank_lines, text = text.count("\n", 0, start), text[start:]
    first = text.partition("\n")[0]
    expected = "," if path.suffix.lower() == ".csv" else "\t"
    separator = next((separator for separator in (expected, *_SEPARATORS) if separator in first), expected)
    if separator != expected:
        notes.append(f"{path.name}: the columns are separated by {_SEPARATORS[separator]}")
    _require_fields(text, separator, path, num_blank_lines)
    header = [column.strip() for column in pd.read_csv(io.StringIO(first), sep=separator).columns]
    dtypes = {index: str for index, name in enumerate(header) if _cohort_name(name) in _TEXT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # empty fields at the end of a row, checked above
        return pd.read_csv(io.StringIO(text), sep=separator, dtype=dtypes, **_READ_OPTIONS)


def _require_fields(text: str, separator: str, path: Path, first_line: int) -> None:
    """Refuse rows with more fields than the header (``45,5`` in a comma-separated table), which would shift values."""
    rows = csv.reader(io.StringIO(text), delimiter=separator)
    header = next(rows, [])
    for row in rows:
        if any(field.strip() for field in row[len(header) :]):
            raise CohortError(
                "a row has more fields than the header",
                where=f"{path.name}, line {rows.line_num + first_line}",
                got=f"{len(row)} fields",
                expected=f"{len(header)}",
                remedy="Put values that hold a separator in quotes",
            )


def _cohort_name(column: str) -> str:
    lower = column.lower()
    return _RENAMED.get(lower, lower if lower in _KNOWN else column)


def cohort_names(columns: Iterable[str]) -> dict[str, str]:
    """The columns to rename, with their cohort names; a name that is already in use is not assigned again."""
    columns = list(columns)
    taken = set(columns)
    names: dict[str, str] = {}
    for column in columns:
        name = _cohort_name(column)
        if name not in taken:
            names[column] = name
            taken.add(name)
    return names


def _rename_bids_ids(table: pd.DataFrame, path: Path, notes: list[str]) -> pd.DataFrame:
    names: dict[str, str] = {}
    for identifier, name in (("participant_id", "subject"), ("session_id", "session")):
        column = next((column for column in table.columns if column.lower() == identifier), None)
        if column is None:
            continue
        others = [other for other in table.columns if other != column and _cohort_name(other) == name]
        names[column] = name
        for number, other in enumerate(others, start=2):
            names[other] = f"{name}_{number}"
            notes.append(f"{path.name}: {identifier} names the {name}; the column {other!r} is kept as {names[other]}")
    return table.rename(columns=names)


def strip_session_prefix(values: Iterable[Any]) -> list[str | None]:
    """Session names without ``ses-``; missing ones stay None."""
    names = [_as_text(value) for value in values]
    return [None if name is None else name.removeprefix("ses-") for name in names]


def _as_text(value: Any) -> str | None:
    """An identifier as text: 7 and 7.0 of a binary table become "7"; missing values and blanks become None."""
    if is_missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _mixed_columns_to_text(table: pd.DataFrame) -> list[str]:
    """Convert columns of mixed types, dates or lists to text, in place; return notes."""
    mixed = []
    for column in table.columns:
        values = table[column]
        if pd.api.types.is_datetime64_any_dtype(values):
            table[column] = [None if pd.isna(value) else value.isoformat() for value in values]
        elif values.dtype == object:
            types = {type(value) for value in values if not is_missing(value)}
            if len(types) > 1 or types - {str, int, float, bool}:
                table[column] = [None if is_missing(value) else _format_cell(value) for value in values]
                mixed.append(column)
    return [f"column {column!r} holds values of several kinds and is read as text" for column in mixed]


def is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))


def _format_cell(value: Any) -> str:
    if isinstance(value, date):
        return value.isoformat()
    return str(_as_text(value)) if isinstance(value, float) else str(value)


def read_json(file: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """A JSON object; {} if the file is missing or holds something else. A note reports invalid JSON, once."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        note = f"{file.name} is not valid JSON and was not used ({type(error).__name__})"
        if notes is not None and note not in notes:
            notes.append(note)
        return {}
    return content if isinstance(content, dict) else {}


def parse_ages(table: pd.DataFrame, path: Path, notes: list[str] | None = None) -> pd.DataFrame:
    """``age_years`` as float; "89+" (ages masked for privacy, BIDS) is 89. CohortError for other invalid ages.

    Pass `notes` for a published index, which the user cannot correct: its invalid ages then become missing, and a note
    counts them.
    """
    if "age_years" not in table:
        return table
    ages, not_numbers = _parse_numbers(table["age_years"])
    out_of_range = ages[ages.notna() & ~((ages >= 0) & (ages <= 150))]
    if notes is not None:
        num_unusable = sum(text.lower() not in _NO_AGE for text in not_numbers) + len(out_of_range)
        if num_unusable:
            notes.append(f"{path.name}: {num_unusable} ages are not used: they are not a number of years")
        return table.assign(age_years=ages.drop(out_of_range.index).reindex(ages.index))
    if not not_numbers.empty:
        first = not_numbers.iloc[0]
        comma = re.fullmatch(r"\d+,\d+", first)
        remedy = f"Write a point: {first.replace(',', '.')}" if comma else "Write years or n/a"
        raise CohortError("an age is not a number", where=path.name, got=repr(first), remedy=remedy)
    if not out_of_range.empty:
        what, got = "an age is not between 0 and 150 years", f"{out_of_range.iloc[0]:g}"
        raise CohortError(what, where=path.name, got=got, remedy="Write years or n/a")
    return table.assign(age_years=ages)


def _parse_numbers(values: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Ages as floats, and the values that are not numbers as text; "89+" is 89."""
    ages = pd.to_numeric(values, errors="coerce").astype(float)
    not_numbers = values[ages.isna() & values.notna()].astype(str).str.strip()
    masked = not_numbers[not_numbers.str.fullmatch(r"\d+\s*\+")]
    ages.loc[masked.index] = masked.str.rstrip(" +").astype(float)
    return ages, not_numbers.drop(masked.index)


def convert_ages_to_years(
    table: pd.DataFrame, path: Path, notes: list[str], inherited: Sequence[Path] = (), name: str = ""
) -> pd.DataFrame:
    """Convert ages from the unit in the table's JSON sidecar, or in an `inherited` one. Notes call the table `name`."""
    if "age_years" not in table:
        return table
    name = name or path.name
    units = (_age_unit(file, notes) for file in (path.with_suffix(".json"), *inherited))
    unit = next((unit for unit in units if unit is not None), "year")
    note = ""
    if unit in _UNITS_PER_YEAR and unit != "year":
        ages, not_numbers = _parse_numbers(table["age_years"])
        years = (ages / _UNITS_PER_YEAR[unit]).astype(object)
        years.loc[not_numbers.index] = not_numbers  # `parse_ages` refuses them
        table["age_years"] = years
        note = f"{name}: ages are given in {unit}s and were turned into years"
    elif unit not in (*_UNITS_PER_YEAR, "y", "yr", "yo", ""):
        note = f"{name}: the unit of ages is not known ({unit!r}); taken as years"
    if note and note not in notes:
        notes.append(note)
    return table


def _age_unit(file: Path, notes: list[str]) -> str | None:
    """``"month"`` and the like; None if the file is missing or does not describe ages."""
    columns = {str(name).lower(): description for name, description in read_json(file, notes).items()}
    names = ("age_years", "age", "age_at_scan", "ageatscan")
    description = next((columns[name] for name in names if name in columns), None)
    if not isinstance(description, dict) or "Units" not in description:
        return None
    return str(description["Units"]).lower().strip().rstrip("s")


def sort_by_session(rows: list[dict[str, Any]], order: Callable[[Path], Any]) -> None:
    """Sort rows of scans in place by subject, session and the `order` of their files."""
    names = ("subject", "session")
    rows.sort(key=lambda row: (*(natural_sort_key(row[name]) for name in names), order(Path(row["path"]))))


def join(
    table: pd.DataFrame, facts: pd.DataFrame, keys: Sequence[str], path: Path, notes: list[str] | None = None
) -> pd.DataFrame:
    """Join covariates to scans. Values of `facts` replace those of the table unless they are missing.

    With `notes`, rows without a scan are counted: session ``1`` in a table does not match the folder ``ses-01``.
    """
    facts = facts.drop_duplicates().dropna(subset=list(keys))
    repeated = facts[facts.duplicated(subset=list(keys))]
    if not repeated.empty:
        what = f"{path.name} lists a {'subject' if len(keys) == 1 else 'session'} twice"
        got = " ".join(str(repeated.iloc[0][key]) for key in keys)
        raise CohortError(what, where=path.name, got=got, remedy="Keep one row each")
    if notes is not None:
        scanned = set(table[list(keys)].itertuples(index=False, name=None))
        num_unmatched = sum(key not in scanned for key in facts[list(keys)].itertuples(index=False, name=None))
        if num_unmatched:
            notes.append(f"{num_unmatched} of {len(facts)} rows of {path.name} match no scan and are not used")
    reserved = ("contrast", "path", "mask", "subject", "session")
    facts = facts.drop(columns=[column for column in reserved if column in facts and column not in keys])
    joined = table.merge(facts, on=list(keys), how="left", suffixes=("", "__new"))
    updated = [column for column in joined.columns if column.endswith("__new")]
    for column in updated:
        old = column.removesuffix("__new")
        joined[old] = joined[column].where(joined[column].notna(), joined[old])
    return joined.drop(columns=updated)


def join_label_maps(table: pd.DataFrame, label_maps: Iterable[LabelMapRow], unused: UnusedFiles) -> tuple[str, ...]:
    """Add one column per kind of label map, with the first map of each session; the others go into `unused`.

    `label_maps` are in order of preference. Returns the columns, which always include ``mask``.
    """
    keys = list(zip(table["subject"], table["session"], strict=True))
    known = set(keys)
    kept: dict[str, dict[SessionKey, Path]] = {"mask": {}}
    for column, key, file in label_maps:
        if key not in known:
            unused.append((file, "a label map of a session without scans"))
        elif key in kept.setdefault(column, {}):
            unused.append((file, f"a further label map ({column}) of its session"))
        else:
            kept[column][key] = file
    columns = tuple(column for column, files in kept.items() if files or column == "mask")
    for column in columns:
        table[column] = [str(kept[column][key]) if key in kept[column] else None for key in keys]
    return columns
