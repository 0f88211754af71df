"""Options, notes, progress bars and tables that the verbs share."""

from __future__ import annotations

import codecs
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from brainfound.errors import BrainFoundError, UsageError

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated.")
]


def _silence_libraries(quiet: bool) -> bool:
    """Silence progress bars and reports of transformers, imported or not."""
    if quiet:
        os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if "transformers" in sys.modules:
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
    return quiet


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bar, results only.", callback=_silence_libraries)
]
Hooks = Annotated[
    list[str] | None,
    typer.Option(
        "--hook", help="A tool to run on each scan first: deepbet, synthstrip, hd-bet, or a YAML file; repeatable."
    ),
]
KeepIds = Annotated[bool, typer.Option("--keep-ids", help="Show identifiers and file names in messages and pictures.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


_SIGNS = {
    **{"×": "x", "✓": "ok", "✗": "X", "·": ".", "–": "-", "—": "-", "−": "-", "→": "->", "←": "<-", "…": "..."},
    **{"²": "2", "³": "3", "±": "+-", "≤": "<=", "≥": ">=", "°": " deg", "µ": "u", "σ": "sigma", "∞": "inf"},
    **{"━": "-", "╸": "-", "╺": "-", "─": "-", "•": "*"},
}
"""Sign → what stands for it where the terminal's encoding lacks it."""


def _replace_signs(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "registered for output only"
    signs = error.object[error.start : error.end]
    return "".join(_SIGNS.get(sign) or ascii(sign)[1:-1] for sign in signs), error.end


def make_output_encodable() -> None:
    """Let standard output and error write every text, whatever the encoding of the terminal, pipe or file.

    A sign that the encoding lacks is replaced by a plain one (× by x), another character by its escape (``\\xfc``).
    A closed stream becomes the null device.
    """
    codecs.register_error("brainfound-signs", _replace_signs)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="brainfound-signs")


def require_new_run(out: Path | None, recipe: str, resume: bool) -> None:
    """Refuse a folder that holds a run at once, before torch is imported and data are read.

    UsageError as from `brainfound.training.run_folder.lock_run_folder`, which checks the rest.
    """
    folder = out if out is not None else Path("runs") / Path(recipe).stem
    if out is not None:
        require_folder(out)
    if not resume and (folder / "recipe.yaml").is_file():
        remedy = "Give --resume to go on, or another --out"
        raise UsageError("this folder already holds a run", where=folder, remedy=remedy)


def require_folder(out: Path) -> None:
    """Refuse an output folder that cannot be made or written, before anything is read or computed.

    UsageError: a file is in the way. BrainFoundError: there is no permission to write.
    """
    place = next((folder for folder in (out, *out.absolute().parents) if folder.exists()), out)
    if not place.is_dir():
        raise UsageError("a file is in the way of the output folder", where=place, remedy="Give another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        remedy = "Give another --out, or change the permissions"
        raise BrainFoundError("no permission to write here", where=place, remedy=remedy)


def require_picture(file: Path) -> None:
    """Refuse a picture that would replace a folder, or whose folder cannot be written."""
    if file.is_dir():
        raise UsageError("this is a folder, not a picture", where=file, remedy=f"Give a file: {file / 'seen.png'}")
    require_folder(file.parent)


def parse_list(text: str | None) -> list[str]:
    """The parts of a comma-separated list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def parse_counts(option: str, text: str | None) -> list[int | None]:
    """``"1,5,all"`` → [1, 5, None].

    Raises:
        UsageError: a part is neither a whole number nor ``all``.
    """
    if text is not None and not parse_list(text):
        raise UsageError("an empty list", where=option, expected="1,5,10 or 1,5,all")
    try:
        return [None if word == "all" else int(word) for word in parse_list(text)]
    except ValueError:
        raise UsageError("not a list of whole numbers", where=option, got=text, expected="1,5,10 or 1,5,all") from None


def get_command_line() -> str:
    """The command line for a page that others will read: paths without their folders."""
    return shlex.join(["brainfound", *(_without_folders(word) for word in sys.argv[1:])])


def _without_folders(word: str) -> str:
    """``--model=ours=/home/me/runs/vits14/export`` → ``--model=ours=vits14/export``."""
    before, equals, path = word.rpartition("=")
    file = Path(path)
    # A Hub id looks like a path of two parts, but it does not exist as one.
    if not (file.is_absolute() or (file.exists() and len(file.parts) > 1)):
        return word
    return before + equals + "/".join(file.parts[-2:] if file.name == "export" else file.parts[-1:])


def print_note(line: str) -> None:
    """Print one line to standard error."""
    print("brainfound: " + " ".join(line.split()), file=sys.stderr)


def note_absent_contrasts(wanted: Iterable[str], num_sessions: Mapping[str, int]) -> None:
    """Print a note on wanted contrasts that no session has, given the number of sessions of each contrast."""
    if absent := [name for name in wanted if not num_sessions.get(name)]:
        there = ", ".join(f"{name} {count}" for name, count in num_sessions.items() if count)
        print_note(f"no session has {' or '.join(absent)} (there are {there or 'none'})")


@contextmanager
def progress_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar as a callback ``(done, total)``; None when quiet."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


FEW_SUBJECTS = 20
"""A bootstrap interval of fewer subjects is often too narrow."""


def format_number(value: float | None) -> str:
    """A score as text; an undefined one as a dash."""
    return "–" if value is None else f"{value:.3f}"


def with_interval(score: str, value: float | None, low: float | None, high: float | None) -> str:
    """A score with its interval, if it has one: ``0.812 [0.741, 0.880]``."""
    from brainfound.metrics.registry import format_score

    if low is None or high is None:
        return format_score(score, value)
    return f"{format_score(score, value)} [{format_score(score, low)}, {format_score(score, high)}]"


def score_with_interval(result: Mapping[str, Any], name: str) -> str:
    """A score of `SessionScores.to_dict`, with its interval."""
    ends = result.get("intervals", {}).get("scores", {}).get(name, {})
    return with_interval(name, result["scores"].get(name), ends.get("low"), ends.get("high"))


def scores_line(result: Mapping[str, Any]) -> str:
    """One line for the scores of a run with their intervals and baselines."""
    from brainfound.metrics.registry import TABLE_METRICS, format_score

    baselines = [name for name in ("trivial", "frozen") if name in result]
    parts = []
    for name in result["scores"]:
        if name in TABLE_METRICS[result["task"]]:
            texts = (f"{baseline} {format_score(name, result[baseline].get(name))}" for baseline in baselines)
            parts.append(f"{name} {score_with_interval(result, name)} ({', '.join(texts)})")
    where = "" if result.get("part", "test") == "test" else f" of the {result['part']}"
    return f"{result['task']}, {result['num_sessions']} sessions{where}: " + ", ".join(parts)


def intervals_line(results: Iterable[Mapping[str, Any]]) -> str | None:
    """One line on the intervals of some results, with a warning for few subjects."""
    drawn = [result["intervals"] for result in results if result.get("intervals", {}).get("scores")]
    if not drawn:
        return None
    ends = [ends for intervals in drawn for ends in intervals["scores"].values()]
    return describe_intervals(ends, drawn[0]["confidence"], drawn[0]["num_resamples"])


def describe_intervals(intervals: Iterable[Mapping[str, Any]], confidence: float, num_resamples: int) -> str:
    """How intervals were computed, with a warning for few subjects, and why some are missing.

    Each interval has ``low``, None where it is missing, and ``num_subjects``.
    """
    from brainfound.metrics.statistics import explain_missing_interval

    intervals, parts = list(intervals), []
    if counts := [own["num_subjects"] for own in intervals if own["low"] is not None]:
        subjects = " to ".join(map(str, sorted({min(counts), max(counts)})))
        parts.append(f"[…]: {confidence:.0%} interval, bootstrap over {subjects} subjects, {num_resamples} resamples")
        if min(counts) < FEW_SUBJECTS:
            parts.append(f"fewer than {FEW_SUBJECTS} are too few to trust it")
    if missing := [own["num_subjects"] for own in intervals if own["low"] is None]:
        parts.append(explain_missing_interval(min(missing), confidence))
    return "; ".join(parts)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table to standard output; plain text outside a terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title or None, box=SIMPLE, title_justify="left")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 150
    Console(width=width, highlight=False).print(table)


LookupTable = Annotated[
    Path | None, typer.Option(help="A file with the names of label codes (FreeSurferColorLUT.txt, .tsv, .csv).")
]


def label_lines(codes: Mapping[int, int], lookup_table: Path | None) -> list[str]:
    """A line per code of a label map: its name, and the number of sessions that have it."""
    from brainfound.data.label_names import read_lookup_table, unique_names

    names = unique_names(list(codes), {} if lookup_table is None else read_lookup_table(lookup_table))
    width = max(map(len, names), default=0)
    return [
        f"{code:>6}  {name:<{width}}  {count} session{'s' * (count > 1)}"
        for (code, count), name in zip(codes.items(), names, strict=True)
    ]
