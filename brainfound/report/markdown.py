"""Small pieces of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what stands in a cell cannot end it."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in cells)


def number(value: Any, digits: int = 3, sign: bool = False) -> str:
    """A score as text; an undefined one as a dash."""
    if value is None or math.isnan(float(value)):
        return "–"
    return f"{float(value):{'+' if sign else ''}.{digits}f}"


def count(value: Any) -> str:
    """A mean number of sessions: whole where it is."""
    if value is None or math.isnan(float(value)):
        return "–"
    return f"{float(value):.0f}" if float(value).is_integer() else f"{float(value):.1f}"


def p_value(value: Any) -> str:
    """As papers write it."""
    if value is None or math.isnan(float(value)):
        return "–"
    return "< 0.001" if float(value) < 0.001 else f"{float(value):.3f}"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
