"""A stack of scans in memory, built as `prepare_session` builds one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.preprocessing.stack_builder import StackBuilder
from brainfound.data.reading.scan import Scan


def build_stack(
    preprocessing: Preprocessing, scans: Mapping[str, Scan], mask: Scan | None = None, **identity: Any
) -> Stack:
    """The stack of some scans; the first contrast of the preprocessing that is there is the reference scan."""
    first, *others = [contrast for contrast in preprocessing.contrasts if contrast in scans]
    builder = StackBuilder(preprocessing, first, scans[first])
    for contrast in others:
        builder.add(contrast, scans[contrast])
    if mask is not None:
        builder.add_mask(mask)
    return builder.build(**identity)
