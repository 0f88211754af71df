"""Label maps joined to the sessions of a cohort's table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from brainfound.data.sources.folders import Unused

SessionKey = tuple[str, str]
"""(subject, session)."""


def join_label_maps(
    table: pd.DataFrame, label_maps: Iterable[tuple[str, SessionKey, Path]], unused: Unused
) -> tuple[str, ...]:
    """A column per kind of label map, with the first map of each session; the others go into ``unused``.

    Args:
        table: the scans; gets the columns.
        label_maps: (column, session, file), in the order of preference.
        unused: gets what is not joined, with the reason.

    Returns:
        The columns, with ``mask`` always among them.
    """
    keys = list(zip(table["subject"], table["session"], strict=True))
    known = set(keys)
    found: dict[str, dict[SessionKey, Path]] = {"mask": {}}
    for column, key, file in label_maps:
        if key not in known:
            unused.append((file, "a label map of a session without scans"))
        elif key in found.setdefault(column, {}):
            unused.append((file, f"a further label map ({column}) of its session"))
        else:
            found[column][key] = file
    columns = tuple(column for column, files in found.items() if files or column == "mask")
    for column in columns:
        table[column] = [str(found[column][key]) if key in found[column] else None for key in keys]
    return columns
