"""How scores are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FEW_SUBJECTS = 20
"""Below so many subjects a bootstrap interval is too narrow more often than it says."""


def number(value: float | None, digits: int = 3) -> str:
    """A score as text; an undefined one as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A score with the ends of its interval, where it has one: ``0.812 [0.741, 0.880]``."""
    if low is None or high is None:
        return number(value, digits)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def score_with_interval(result: Mapping[str, Any], name: str) -> str:
    """A score of what `SessionScores.to_dict` gives, with its interval."""
    ends = result.get("intervals", {}).get("scores", {}).get(name, {})
    return with_interval(result["scores"].get(name), ends.get("low"), ends.get("high"))


def scores_line(result: Mapping[str, Any]) -> str:
    """One line for the scores of a test part with their intervals and baselines."""
    from brainfound.evaluate.scores import IN_TABLES

    baselines = [name for name in ("trivial", "frozen") if name in result]
    parts = []
    for name in result["scores"]:
        if name in IN_TABLES[result["task"]]:
            beside = ", ".join(f"{baseline} {number(result[baseline].get(name))}" for baseline in baselines)
            parts.append(f"{name} {score_with_interval(result, name)} ({beside})")
    return f"{result['task']}, {result['num_sessions']} sessions: " + ", ".join(parts)


def intervals_line(results: Iterable[Mapping[str, Any]]) -> str | None:
    """What the intervals of some results are, in one line, and whether they are of too few subjects to be trusted."""
    found = [result["intervals"] for result in results if result.get("intervals", {}).get("scores")]
    if not found:
        return None
    counts = [ends["num_subjects"] for intervals in found for ends in intervals["scores"].values()]
    return about_intervals(min(counts), max(counts), found[0]["confidence"], found[0]["num_resamples"])


def about_intervals(fewest: int, most: int, confidence: float, num_resamples: int) -> str:
    """What an interval is, and a warning where it is of few subjects."""
    subjects = str(most) if fewest == most else f"{fewest} to {most}"
    line = f"[…]: {confidence:.0%} interval, bootstrap over {subjects} subjects, {num_resamples} resamples"
    few = f"; fewer than {FEW_SUBJECTS} are too few to trust it" if fewest < FEW_SUBJECTS else ""
    return line + few


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """A table on standard output; plain text where that is not a terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title or None, box=SIMPLE, title_justify="left")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False).print(table)
