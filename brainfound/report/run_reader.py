"""Reading of a run folder: recipe.yaml and log.jsonl.

`log.jsonl` holds one JSON object per line with a `step` and any numbers. A truncated last line is ignored; any other
invalid line is an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from brainfound.errors import BrainFoundError, UsageError

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "log.jsonl"
CURVES_FILE = "curves.png"


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path
    recipe: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    """The lines of the log in order, without rollbacks."""
    rollbacks: tuple[dict[str, Any], ...] = ()
    """The log lines of rollbacks to an earlier step."""

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Read a run folder; a missing recipe.yaml reads as empty.

        Raises:
            UsageError: `path` is not a run folder: it has no log.
            BrainFoundError: a file cannot be read; the error names the file and the line.
        """
        path = Path(path)
        if not (path / LOG_FILE).is_file():
            raise UsageError(f"not a run folder: it has no {LOG_FILE}", where=path)
        records = _read_log(path / LOG_FILE)
        return cls(
            path=path,
            recipe=_read_recipe(path / RECIPE_FILE),
            records=tuple(line for line in records if "rolled_back_from" not in line),
            rollbacks=tuple(line for line in records if "rolled_back_from" in line),
        )

    def numeric_keys(self) -> list[str]:
        """The keys with a number in some line, in order of first appearance, without `step`."""
        keys = dict.fromkeys(key for record in self.records for key, value in record.items() if _is_number(value))
        return [key for key in keys if key != "step"]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (T,) and values (T,) of a key, where it was logged; ``nan`` where it was not finite."""
        points = [(record["step"], record[key]) for record in self.records if _is_number(record.get(key))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise BrainFoundError(f"cannot be read: {error}", where=path) from error
    if not isinstance(content, dict):
        raise BrainFoundError("must hold a mapping", where=path, got=type(content).__name__)
    return content


def _read_log(path: Path) -> list[dict[str, Any]]:
    # Bytes, because the line may end in the middle of a character.
    *complete, rest = path.read_bytes().split(b"\n")
    records = [_read_line(line, f"{path}:{number}") for number, line in enumerate(complete, start=1) if line.strip()]
    try:
        return records + ([_read_line(rest, str(path))] if rest.strip() else [])
    except BrainFoundError:  # the line is truncated
        return records


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BrainFoundError(f"not a line of JSON: {error}", where=where, remedy="Remove the line") from error
    if not isinstance(record, dict) or not _is_number(record.get("step")):
        raise BrainFoundError("not a log line", where=where, got=line[:60], expected='{"step": …}')
    # null is a number that was not finite.
    return {key: math.nan if value is None else value for key, value in record.items()}
