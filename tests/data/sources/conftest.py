"""Layouts of sources, written with empty files: only names matter to a cohort."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from brainfound.data.cohort import Cohort


@pytest.fixture
def layout(tmp_path: Path) -> Callable[..., Path]:
    """Write files into the test's folder: names for empty ones, ``name=content`` pairs as a dict for others."""

    def write(*names: str, content: dict[str, str] | None = None) -> Path:
        for name, text in {**dict.fromkeys(names, ""), **(content or {})}.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return tmp_path

    return write


@pytest.fixture
def contents() -> Callable[[Cohort], dict[tuple[str, str], list[str]]]:
    """(subject, session) → contrasts of a cohort, in the order of the table."""

    def of(cohort: Cohort) -> dict[tuple[str, str], list[str]]:
        groups = cohort.table.groupby(["subject", "session"])
        return {key: list(rows["contrast"]) for key, rows in groups}

    return of
