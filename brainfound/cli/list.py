"""``brainfound list``: recipes, adapters, contrasts, or the contents of a cohort."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brainfound.cli.terminal import AsJson, LookupTable, label_lines
from brainfound.errors import EXIT_SOME_REJECTED, UsageError, did_you_mean

if TYPE_CHECKING:
    from brainfound.data.cohort import Cohort, Session
    from brainfound.data.store import Store

_MAX_VALUES = 12
KINDS = ("recipes", "adapters", "contrasts", "cohort")
_COUNTED_COLUMNS = ("sex", "site", "diagnosis", "label", "field_strength_t", "manufacturer", "scanner")


def list_(
    kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(KINDS)}.")] = "recipes",
    path: Annotated[Path | None, typer.Argument(help="With `cohort`: the source to look at.")] = None,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="With `cohort`: also a line per session, with its names.")
    ] = False,
    labels: Annotated[
        bool, typer.Option("--labels", help="With `cohort`: also the codes of its label maps, which are read.")
    ] = False,
    lookup_table: LookupTable = None,
    as_json: AsJson = False,
) -> None:
    """List recipes, adapters, contrasts, or what a cohort holds."""
    if kind not in KINDS:
        raise UsageError(f"cannot list {kind!r}", remedy=did_you_mean(kind, KINDS))
    if lookup_table is not None and not labels:
        raise UsageError("names of codes, and no codes", where="--lookup-table", remedy="Add --labels")
    if kind == "cohort":
        _list_cohort(path, sessions=sessions, labels=labels, lookup_table=lookup_table, as_json=as_json)
        return
    if path is not None:
        raise UsageError(f"{kind} have no path", got=path, remedy="brainfound list cohort PATH, or leave it out")
    for option, given in (("--sessions", sessions), ("--labels", labels), ("--lookup-table", lookup_table)):
        if given:
            raise UsageError(f"{option} goes with `cohort` only", remedy=f"brainfound list cohort PATH {option}")
    rows: list[dict[str, Any]] = list(_contrasts() if kind == "contrasts" else _recipes(kind))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(str(value) for value in row.values() if value not in ("", None)))


def _recipes(kind: str) -> list[dict[str, str]]:
    from brainfound.recipes import Room, available

    room: Room = "train" if kind == "recipes" else "adapters"
    rows = []
    for name, file in available(room).items():
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        rows.append({"name": f"{name:<28}", "about": first.removeprefix("#").strip() if first.startswith("#") else ""})
    return rows


def _contrasts() -> list[dict[str, str]]:
    from brainfound.contrasts import CONTRASTS

    return [
        {"name": f"{c.name:<8}", "about": c.description, "aliases": "(" + ", ".join(c.aliases) + ")"}
        for c in CONTRASTS.values()
    ]


def _list_cohort(path: Path | None, *, sessions: bool, labels: bool, lookup_table: Path | None, as_json: bool) -> None:
    """Print the summary of a source, with ``sessions`` a line per session, with ``labels`` a line per code.

    JSON always has the sessions.

    The summary names no files but the first that is missing; the lines per session and the JSON have all names. Exit
    code 3 if files are missing, or if a data set of a collection cannot be read.
    """
    from brainfound.data.cohort import Cohort
    from brainfound.data.reading.archives import fetch_remedy
    from brainfound.data.sources.tables import count_noun

    if path is None:
        raise UsageError("the path of the cohort is missing", remedy="Write brainfound list cohort PATH")
    with tempfile.TemporaryDirectory() as work:  # for converted DICOM
        cohort = Cohort.read(path, work=Path(work) / "converted")
        missing = cohort.missing_files()
        summary = summarise_cohort(cohort) | {"num_missing_files": len(missing)}
        rows = session_rows(cohort) if sessions or as_json else []
        codes = cohort.label_codes() if labels else {}
    if as_json:
        absent = [(file, "no such file") for file in missing]
        lists = {"unused_files": cohort.unused, "missing_files": absent, "rejected": cohort.rejected}
        files = {key: [{"file": str(file), "reason": why} for file, why in rows] for key, rows in lists.items()}
        found = {"label_codes": codes} if labels else {}
        print(json.dumps({**summary, **found, "sessions": rows, **files}, indent=1))
    else:
        for line in _lines(summary):
            print(line)
        if missing:
            what = f"{len(missing)} of {count_noun(summary['num_scans'] + sum(summary['label_maps'].values()), 'file')}"
            remedy = fetch_remedy(missing[0]) or "Check the paths, or copy the files there"
            print(f"{'files missing':<17} {what}; the first: {missing[0]}. {remedy}")
        for column, own in codes.items():
            print(f"\ncodes of {column}")
            for line in label_lines(own, lookup_table):
                print(line)
        if sessions:
            print()
            for row in rows:
                print("  ".join(_cell(value) for value in row.values() if value not in ("", None, [])))
    if cohort.rejected or missing:
        raise typer.Exit(EXIT_SOME_REJECTED)


def summarise_cohort(cohort: Cohort) -> dict[str, Any]:
    """Counts of a cohort, as plain values for a terminal or JSON."""
    sessions = list(cohort.sessions())
    ages = sorted(float(age) for age in _known(sessions, "age_years"))
    combinations = Counter("+".join(sorted(session.scans)) for session in sessions)
    summary: dict[str, Any] = {
        "layout": cohort.source,
        "num_subjects": int(cohort.table["subject"].nunique()),
        "num_sessions": len(sessions),
        "num_scans": len(cohort.table),
        "scans_of_contrast": dict(Counter(cohort.table["contrast"]).most_common()),
        "sessions_with": dict(combinations.most_common()),
        "num_further_scans": sum(len(session.extra_scans) for session in sessions),
        "age_years": {"min": ages[0], "median": statistics.median(ages), "max": ages[-1]} if ages else None,
        "sessions_without_age": len(sessions) - len(ages),
        "label_maps": dict(Counter(column for session in sessions for column in session.masks)),
    }
    for column in _COUNTED_COLUMNS:
        known = _known(sessions, column)
        if known:
            summary[column] = dict(Counter(str(value) for value in known).most_common())
            if len(known) < len(sessions):
                summary[column]["not known"] = len(sessions) - len(known)
    summary["unused"] = dict(Counter(reason for _, reason in cohort.unused).most_common())
    summary["notes"] = list(cohort.notes)
    return summary


def _known(sessions: list[Session], column: str) -> list[Any]:
    values = (session.covariates.get(column) for session in sessions)
    return [value for value in values if value is not None]


def session_rows(cohort: Cohort) -> list[dict[str, Any]]:
    """One row per session, with names."""
    return [
        {
            "subject": session.subject,
            "session": session.session,
            "contrasts": sorted(session.scans),
            "further_scans": len(session.extra_scans) or None,
            **{column: session.covariates.get(column) for column in ("age_years", "sex", "site")},
            "label_maps": list(session.masks),
        }
        for session in cohort.sessions()
    ]


def _lines(summary: dict[str, Any]) -> list[str]:
    from brainfound.data.sources.tables import count_noun

    ages, missing, further = summary["age_years"], summary["sessions_without_age"], summary["num_further_scans"]
    known = f"{ages['min']:g}–{ages['max']:g} years, median {ages['median']:g}" if ages else "not known"
    lines = [
        ("layout", summary["layout"]),
        (
            "subjects",
            f"{summary['num_subjects']}, in {count_noun(summary['num_sessions'], 'session')} "
            f"with {count_noun(summary['num_scans'], 'scan')}",
        ),
        ("scans", _counts(summary["scans_of_contrast"])),
        ("sessions with", _counts(summary["sessions_with"])),
        *([("further scans", f"{further} of a contrast that is there already")] if further else []),
        ("age", known + (f", {count_noun(missing, 'session')} without" if ages and missing else "")),
        ("label maps", _counts(summary["label_maps"]) or "none"),
    ]
    for column in _COUNTED_COLUMNS:
        if column in summary:
            lines.append((column, _counts(summary[column])))
    total = sum(summary["unused"].values())
    lines.append(("files not used", f"{total}" if total else "none"))
    lines += [("", f"{count} × {reason}") for reason, count in summary["unused"].items()]
    lines += [("note", line) for line in summary["notes"]]
    return [f"{name:<17} {text}" for name, text in lines]


def store_lines(store: Store) -> list[str]:
    """What a store holds, a line each; no names."""
    from brainfound.data.sources.tables import count_noun

    table, own = store.sessions, store.preprocessing
    spacing = "as acquired" if own.spacing_mm is None else f"{' × '.join(f'{mm:g}' for mm in own.spacing_mm)} mm"
    lines = [
        ("subjects", f"{table['subject'].nunique()}, in {count_noun(len(store), 'session')}"),
        ("slices", f"{store.num_slices} of {own.size[0]} × {own.size[1]} pixels; voxels {spacing}"),
        ("contrasts", _counts(store.contrast_counts)),
        ("masks", f"in {count_noun(int((table['mask_dtype'] != '').sum()), 'session')}"),
    ]
    if "age_years" in store.covariates:
        ages = store.covariate("age_years").dropna().astype(float)
        known = f"{ages.min():g}–{ages.max():g} years, median {ages.median():g}" if len(ages) else "not known"
        lines.append(("age", known + (f", {len(store) - len(ages)} without" if 0 < len(ages) < len(store) else "")))
    for column in (name for name in store.covariates if name != "age_years"):
        values = store.covariate(column).dropna()
        if 0 < values.nunique() <= _MAX_VALUES:
            lines.append((column, _counts(values.astype(str).value_counts().to_dict())))
    others = [name for name in store.covariates if name not in dict(lines) and name != "age_years"]
    if others:
        lines.append(("other columns", ", ".join(others)))
    return [f"{name:<17} {text}" for name, text in lines]


def _counts(counts: dict[str, int]) -> str:
    listed = [f"{name} {count}" for name, count in list(counts.items())[:_MAX_VALUES]]
    more = len(counts) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more > 0 else "")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
