"""Files that are whole or absent, JSON files that must be there, and numbers that JSON lacks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brainfound.errors import BrainFoundError

PARTIAL_PREFIX = ".partial-"
"""Begins the name of a file that is being written; a killed process may leave one behind."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` at the end, so that a reader sees the old content or the new one."""
    temporary = path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, flushed to the disk, in place of the old one."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)


def require_json(
    path: Path, remedy: str, error_class: type[BrainFoundError] = BrainFoundError, content_type: type = dict
) -> Any:
    """The content of a JSON file; one line of `error_class` if it cannot be read or has another type."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_class(f"cannot be read: {error.strerror}", where=path, remedy=remedy) from error
    except ValueError as error:
        raise error_class(f"not valid JSON: {error}", where=path, remedy=remedy) from error
    if not isinstance(content, content_type):
        got, expected = f"a {type(content).__name__}", f"a {content_type.__name__}"
        raise error_class("the file has other content", where=path, got=got, expected=expected, remedy=remedy)
    return content


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def nan_as_none(value: Any) -> Any:
    """A number, or a mapping of numbers, for JSON: undefined values (nan) become null."""
    if isinstance(value, dict):
        return {key: nan_as_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
