"""Reading tables (CSV, TSV and Parquet, as people and Excel write them), and joining them to the table of scans.

Covariates are joined by subject, or by subject and session; rows that contradict each other are refused. Each kind of
label map gets a column. Whatever is ignored or ambiguous is reported in a note without identifiers.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.data.sources.file_names import UnusedFiles, describe_label_map, natural_sort_key, rater_of
from brainfound.errors import CohortError

SessionKey = tuple[str, str]
"""(subject, session)."""
LabelMapRow = tuple[str, SessionKey, Path]
"""(column, session, file) of one label map."""

COLUMNS = ("subject", "session", "contrast", "path", "mask", "age_years", "sex", "site", "diagnosis")
"""The columns of every cohort table; further columns are kept."""
_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
_RENAMED = {
    **dict.fromkeys(("age", "age_at_scan", "ageatscan", "alter", "edad", "età", "âge", "leeftijd"), "age_years"),
    **dict.fromkeys(("group", "dx"), "diagnosis"),
    **dict.fromkeys(("gender", "biological_sex", "biologicalsex", "sex_at_birth"), "sex"),
    **dict.fromkeys(("geschlecht", "sexe", "sexo", "sesso", "geslacht"), "sex"),
    **{"participant_id": "subject", "subject_id": "subject", "session_id": "session"},
}
_KNOWN = (*COLUMNS, "dataset")
_TEXT = ("subject", "session", "dataset", "filename")
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}
MISSING = ("", "n/a", "N/A", "#N/A", "NA", "NaN", "nan", "null", "NULL")
"""Spellings of a missing value. The word ``None`` is not one: it is a label in some tables."""
_READ_OPTIONS: dict[str, Any] = dict(low_memory=False, index_col=False, keep_default_na=False, na_values=list(MISSING))


@dataclass(eq=False)
class SourceTable:
    """The scans of a source, as the reader of its layout returns them. `Cohort` describes the fields."""

    table: pd.DataFrame
    root: Path
    source: str = "table"
    mask_columns: tuple[str, ...] = ("mask",)
    notes: list[str] = field(default_factory=list)
    unused: UnusedFiles = field(default_factory=list)
    rejected: UnusedFiles = field(default_factory=list)

    def __post_init__(self) -> None:
        # All of `COLUMNS` come first, empty where the source has none.
        rest = [column for column in self.table.columns if column not in COLUMNS]
        table = self.table.assign(**{column: None for column in COLUMNS if column not in self.table})
        self.table = table[[*COLUMNS, *rest]].reset_index(drop=True)


@dataclass(frozen=True)
class SourceLayout:
    """One row of the registry."""

    name: str
    layout_hint: str
    """One line for the error when no layout fits."""
    can_read: Callable[[Path], bool]
    read: Callable[[Path, Path | None], SourceTable]


def read_table(path: Path, notes: list[str], *, bids_ids: bool = False) -> pd.DataFrame:
    """Read a table, with the cohort's column names; `notes` receives anything unusual about the file.

    The encoding (`decode_text`) and an unexpected separator are handled. Names of subjects and sessions stay text (007
    is not 7). Known columns are matched in any case, and ``age``, ``gender``, ``participant_id``, ``session_id`` and
    ``group`` are renamed. The index is the line of the file (Parquet: the row). With ``bids_ids`` (tables of BIDS and
    FOMO) ``participant_id`` and ``session_id`` are the identifiers, and other columns called ``subject`` or ``session``
    are kept as ``subject_2`` and ``session_2``. Missing text is None.
    """
    try:
        if path.suffix.lower() == ".parquet":
            table = pd.read_parquet(path)
            table.index = pd.RangeIndex(1, len(table) + 1, name="row")
        elif path.suffix.lower() in _TABLE_SUFFIXES:
            table = _read_text(path, notes)
        else:
            expected = "a .csv, .tsv or .parquet manifest, OpenMind's .json, or a folder"
            remedy = "Give the folder or the manifest"
            raise CohortError("not a source of scans", where=path.name, expected=expected, remedy=remedy)
    except UnicodeDecodeError as error:
        what = "the encoding of the text is not recognised"
        raise CohortError(what, where=path.name, remedy='Save it as "CSV UTF-8"') from error
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
            values = [_without_blanks(value) for value in table[column]]
            table[column] = pd.Series(values, index=table.index, dtype=object)
    return table


def _without_blanks(value: Any) -> Any:
    """A cell without blanks around it; None if it is missing or blank."""
    return None if is_missing(value) else (value.strip() or None) if isinstance(value, str) else value


def decode_text(content: bytes, name: str, notes: list[str]) -> str:
    """The text of a file in UTF-8, in UTF-16 or UTF-32 with a byte-order mark, in UTF-16 without one, or Windows-1252.

    A note reports the last two, which are inferred. Raises a UnicodeDecodeError for other encodings.
    """
    for mark, encoding in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")):
        if content.startswith(mark):
            return content.decode(encoding)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    if b"\0" in content:  # separators, line ends and digits have one zero byte in UTF-16, and none in UTF-8
        zeros = [content[start::2].count(0) for start in (0, 1)]
        encoding = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
        if min(zeros) > max(zeros) / 4 or max(zeros) < len(content) / 20:
            raise UnicodeDecodeError(encoding, content[:1], 0, 1, "zero bytes")
        text = content.decode(encoding)
        notes.append(f"{name}: read as UTF-16, inferred from its zero bytes")
        return text
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252")
        notes.append(f"{name}: not UTF-8; read as Windows-1252 (Latin-1). If letters are wrong, save it as UTF-8")
        return text


def _read_text(path: Path, notes: list[str]) -> pd.DataFrame:
    text = decode_text(path.read_bytes(), path.name, notes).replace("\r\n", "\n").replace("\r", "\n")
    content = re.sub(r"\A(?:[ \t]*\n)+", "", text)
    num_blank_lines, text = text.count("\n") - content.count("\n"), content
    first = text.partition("\n")[0]
    expected = "," if path.suffix.lower() == ".csv" else "\t"
    separator = next((separator for separator in (expected, *_SEPARATORS) if separator in first), expected)
    if separator != expected:
        notes.append(f"{path.name}: the columns are separated by {_SEPARATORS[separator]}")
    lines = _require_fields(text, separator, path, num_blank_lines)
    header = [column.strip() for column in pd.read_csv(io.StringIO(first), sep=separator).columns]
    dtypes = {index: str for index, name in enumerate(header) if _cohort_name(name) in _TEXT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # empty fields at the end of a row, checked above
        table = pd.read_csv(io.StringIO(text), sep=separator, dtype=dtypes, **_READ_OPTIONS)
    table.index = pd.Index(lines if len(lines) == len(table) else range(2, len(table) + 2), name="line")
    return table


def _require_fields(text: str, separator: str, path: Path, first_line: int) -> list[int]:
    """The line on which each row ends.

    Rows with more fields than the header (``45,5`` in a comma-separated table), which would shift values, are refused.
    """
    rows = csv.reader(io.StringIO(text), delimiter=separator)
    header = next(rows, [])
    lines = []
    for row in rows:
        if any(row) and (len(row) > 1 or row[0].strip()):
            lines.append(rows.line_num + first_line)
        if any(field.strip() for field in row[len(header) :]):
            raise CohortError(
                "a row has more fields than the header",
                where=f"{path.name}, line {rows.line_num + first_line}",
                got=f"{len(row)} fields",
                expected=f"{len(header)}",
                remedy="Put values that hold a separator in quotes",
            )
    return lines


def _cohort_name(column: str) -> str:
    lower = column.lower()
    return _RENAMED.get(lower, lower if lower in _KNOWN else column)


def spellings(name: str) -> tuple[str, ...]:
    """The names by which tables call a column of the cohort, in lower case; the first is its own."""
    return (name, *(other for other, renamed in _RENAMED.items() if renamed == name))


def cohort_names(columns: Iterable[str]) -> dict[str, str]:
    """The columns to rename, with their cohort names; a name that is already in use is not assigned again."""
    columns = list(columns)
    taken = set(columns)
    names: dict[str, str] = {}
    for column in sorted(columns, key=lambda column: column.lower() not in _KNOWN):  # Sex outranks gender
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
    found: list[str] = []
    content: Any = None
    try:
        content = json.loads(decode_text(file.read_bytes(), file.name, found))
    except (OSError, ValueError) as error:
        found = [f"{file.name} is not valid JSON and was not used ({type(error).__name__})"]
    if notes is not None:
        notes += [note for note in found if note not in notes]
    return content if isinstance(content, dict) else {}


def sort_by_session(rows: list[dict[str, Any]], order: Callable[[Path], Any]) -> None:
    """Sort rows of scans in place by subject, session and the `order` of their files."""
    names = ("subject", "session")
    rows.sort(key=lambda row: (*(natural_sort_key(row[name]) for name in names), order(Path(row["path"]))))


def contradictions(table: pd.DataFrame, keys: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Whether a cell of `columns` differs from the first known one of its `keys`: a table of booleans."""
    cells = table[list(columns)]
    if cells.empty:
        return cells.astype(bool)
    first = table.groupby(list(keys), sort=False)[list(columns)].transform("first")
    return cells.notna() & (cells != first)


def _cell(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def merge_rows(
    table: pd.DataFrame, keys: Sequence[str], path: Path, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Fill empty cells of `columns` (default: all but the `keys`) from other rows of the same subject or session.

    Raises a CohortError with both lines and the column if two rows contradict each other.
    """
    columns = [column for column in table.columns if column not in keys] if columns is None else list(columns)
    if not table.duplicated(list(keys)).any() or not columns:
        return table
    lines, table = table.index, table.reset_index(drop=True)
    differs = contradictions(table, keys, columns)
    if differs.to_numpy().any():
        row, column = next(
            (int(row), name) for row in differs.index[differs.any(axis=1)] for name in columns if differs.at[row, name]
        )
        same = (table[list(keys)] == table.loc[row, list(keys)]).all(axis=1) & table[column].notna()
        other = int(same.idxmax())
        raise CohortError(
            f"rows of one {'subject' if 'session' not in keys else 'session'} contradict each other",
            where=f"{path.name}, {lines.name} {lines[row]}, column {column!r}",
            got=f"{_cell(table.at[row, column])}, but {_cell(table.at[other, column])} in {lines.name} {lines[other]}",
            remedy="Correct one of them, or give each visit its own session",
        )
    first = table.groupby(list(keys), sort=False)[columns].transform("first")
    for column in columns:
        table[column] = table[column].where(table[column].notna(), first[column])
    return table.set_axis(lines)


def join(
    table: pd.DataFrame, facts: pd.DataFrame, keys: Sequence[str], path: Path, notes: list[str] | None = None
) -> pd.DataFrame:
    """Join covariates to scans. Values of `facts` replace those of the table unless they are missing.

    With `notes`, rows without a scan are counted: session ``1`` in a table does not match the folder ``ses-01``.
    """
    reserved = ("contrast", "path", "mask", "subject", "session")
    facts = facts.drop(columns=[column for column in reserved if column in facts and column not in keys])
    facts = merge_rows(facts.dropna(subset=list(keys)), keys, path).drop_duplicates(list(keys))
    if notes is not None:
        scanned = set(table[list(keys)].itertuples(index=False, name=None))
        num_unmatched = sum(key not in scanned for key in facts[list(keys)].itertuples(index=False, name=None))
        if num_unmatched:
            notes.append(f"{num_unmatched} of {len(facts)} rows of {path.name} match no scan and are not used")
    joined = table.merge(facts, on=list(keys), how="left", suffixes=("", "__new"))
    updated = [column for column in joined.columns if column.endswith("__new")]
    for column in updated:
        old = column.removesuffix("__new")
        joined[old] = joined[column].where(joined[column].notna(), joined[old])
    return joined.drop(columns=updated)


def count_noun(count: int, noun: str) -> str:
    """``1 session``, ``2 sessions``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def join_label_maps(
    table: pd.DataFrame, label_maps: Iterable[LabelMapRow], unused: UnusedFiles, notes: list[str]
) -> tuple[str, ...]:
    """Add one column per kind of label map, with the first map of each session; the others go into `unused`.

    `label_maps` are in order of preference. Returns the columns, which always include ``mask``. A note counts each
    choice between maps whose names say that they show different things.
    """
    label_maps = _separate_raters(list(label_maps), notes)
    choices: Counter[tuple[str, str, str]] = Counter()
    keys = list(zip(table["subject"], table["session"], strict=True))
    known = set(keys)
    kept: dict[str, dict[SessionKey, Path]] = {"mask": {}}
    for column, key, file in label_maps:
        if key not in known:
            unused.append((file, "a label map of a session without scans"))
        elif key in kept.setdefault(column, {}):
            unused.append((file, f"a further label map ({column}) of its session"))
            taken, other = describe_label_map(kept[column][key]), describe_label_map(file)
            choices[column, taken, other] += taken != other
        else:
            kept[column][key] = file
    notes += [
        f"{column}: {taken!r} is used and not {other!r} of the same session ({count} times)"
        for (column, taken, other), count in choices.items()
        if count
    ]
    columns = tuple(column for column, files in kept.items() if files or column == "mask")
    for column in columns:
        table[column] = [str(kept[column][key]) if key in kept[column] else None for key in keys]
    return columns


def _separate_raters(label_maps: list[LabelMapRow], notes: list[str]) -> list[LabelMapRow]:
    """A column per rater where sessions have maps of several; a consensus, or a map without a rater, keeps its own."""
    raters: dict[tuple[str, SessionKey], set[str]] = {}
    for column, key, file in label_maps:
        raters.setdefault((column, key), set()).add(rater_of(file))
    several = {column for (column, _), names in raters.items() if len(names) > 1}
    for column in sorted(several):
        names = [names for (other, _), names in raters.items() if other == column]
        num_without = sum("" not in found for found in names)
        found = ", ".join(f"{name}_{column}" for name in sorted(set().union(*names)) if name)
        choose = f"; {num_without} sessions have none in {column!r}: choose a column with --mask" if num_without else ""
        notes.append(f"label maps of several raters are the columns {found}{choose}")
    return [
        (f"{rater}_{column}" if column in several and (rater := rater_of(file)) else column, key, file)
        for column, key, file in label_maps
    ]
