"""How scores are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def number(value: float | None, digits: int = 3) -> str:
    """A score as text; an undefined one as a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def scores_line(result: Mapping[str, Any]) -> str:
    """One line for the scores of a test part and of its trivial baseline."""
    from brainfound.evaluate.scores import IN_TABLES

    shown = IN_TABLES[result["task"]]
    parts = [
        f"{name} {number(value)} (trivial {number(result['trivial'].get(name))})"
        for name, value in result["scores"].items()
        if name in shown
    ]
    return f"{result['task']}, {result['num_sessions']} sessions: " + ", ".join(parts)


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
