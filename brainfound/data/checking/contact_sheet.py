"""The contact sheet of a store: a few slices of every scan on one page, so that a person sees what went in.

Identifiers and file names are not on it unless they are asked for: a session is called by its row in the store.

Axis legend: S slices, C contrasts, H rows (anterior → posterior), W columns (left → right).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Num

from brainfound.data.stack import Stack

if TYPE_CHECKING:
    from brainfound.data.store import Store

HEIGHTS = (1 / 3, 1 / 2, 2 / 3)
"""Where in a stack the shown slices lie, from its lowest to its highest slice."""
SHARE_FOR_QUIET = 0.25
"""Of a page on which not all sessions fit, at least this part is kept for sessions without notes."""


@dataclass(frozen=True)
class Card:
    """What the sheet shows of one session.

    Attributes:
        label: what it is called, short.
        images: per contrast ``(n, H, W)``, or None where the contrast is not there.
        heights_mm: of the n slices, 0 in the middle of the stack.
        pixel_mm: distance of rows and of columns.
        outlines: ``(n, H, W)`` label codes of the mask, or None.
        notes: what to look at, per contrast; "" for the session as a whole.
        refused: contrasts that were there and could not be used.
    """

    label: str
    images: tuple[Num[np.ndarray, "n H W"] | None, ...]
    heights_mm: tuple[float, ...]
    pixel_mm: tuple[float, float] = (1.0, 1.0)
    outlines: np.ndarray | None = None
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()

    @property
    def is_flagged(self) -> bool:
        return bool(self.refused) or any(self.notes.values())


def write_contact_sheet(store: Store, path: str | Path, *, keep_ids: bool = False, max_sessions: int = 60) -> Path:
    """Write a page with three slices of every scan of a store, its mask outlined, what is absent said.

    Sessions with notes or refused scans come first; of the others as many as fit are taken, evenly spread.

    Args:
        store: what to show.
        path: the PNG to write.
        keep_ids: write subject and session beside the row number.
        max_sessions: most sessions on the page.
    """
    from brainfound.data.checking.contact_sheet_page import draw_page

    notes, refused = _notes_of(store), _refused_of(store)
    keys = list(zip(store.sessions["subject"], store.sessions["session"], strict=True))
    flagged = [row for row, key in enumerate(keys) if notes.get(key) or refused.get(key)]
    shown = choose_sessions(len(store), flagged, max_sessions)
    cards = [
        _card_of_row(
            store,
            row,
            f"{row} {keys[row][0]} {keys[row][1]}" if keep_ids else str(row),
            notes.get(keys[row], {}),
            frozenset(refused.get(keys[row], ())),
        )
        for row in shown
    ]
    foot = f"{len(shown)} of {len(store)} sessions shown"
    if flagged:
        foot += f"; {len(set(shown) & set(flagged))} of {len(flagged)} with notes or refused scans (orange)"
    foot += f". Numbers are rows of the store, from 0; spacing {_spacing_text(store)}."
    return draw_page(cards, store.contrasts, path, foot)


def choose_sessions(num_sessions: int, flagged: Sequence[int], max_sessions: int) -> list[int]:
    """Rows to show, the flagged first; each kind is spread evenly where not all fit.

    >>> choose_sessions(10, [7], 4)
    [7, 1, 4, 8]
    """
    marked = set(flagged)
    quiet = [row for row in range(num_sessions) if row not in marked]
    room_for_quiet = max(max_sessions - len(marked), min(len(quiet), int(SHARE_FOR_QUIET * max_sessions)))
    first = _spread(sorted(marked), max_sessions - min(room_for_quiet, len(quiet)))
    return first + _spread(quiet, max_sessions - len(first))


def choose_slices(num_slices: int, mask: Num[np.ndarray, "S H W"] | None = None) -> list[int]:
    """Slices at `HEIGHTS`; the one nearest to the largest cut through the mask gives way to it."""
    chosen = sorted({int(height * (num_slices - 1) + 0.5) for height in HEIGHTS})
    if mask is not None and mask.any():
        largest = int(np.count_nonzero(mask, axis=(1, 2)).argmax())
        nearest = min(range(len(chosen)), key=lambda place: abs(chosen[place] - largest))
        chosen[nearest] = largest
    return sorted(chosen)


def card_of_stack(
    stack: Stack, label: str, notes: Mapping[str, tuple[str, ...]] | None = None, refused: frozenset[str] = frozenset()
) -> Card:
    """A card of a stack in memory."""
    chosen = choose_slices(len(stack.pixels), stack.mask)
    return _card(
        stack.pixels[chosen],
        stack.present,
        stack.positions_mm[chosen],
        (float(stack.spacing_mm[1]), float(stack.spacing_mm[2])),
        None if stack.mask is None else stack.mask[chosen],
        label,
        notes or {},
        refused,
    )


def _card_of_row(
    store: Store, row: int, label: str, notes: Mapping[str, tuple[str, ...]], refused: frozenset[str]
) -> Card:
    rows = store.session_rows(row)
    mask = store.read_masks(row)
    chosen = choose_slices(len(rows), mask)
    positions = store.slice_positions_mm[rows[chosen]]
    column_mm, row_mm, _ = store.preprocessing.spacing_mm
    if column_mm is None or row_mm is None:
        _, row_mm, column_mm = (float(length) for length in store[row].spacing_mm)
    outlines = None if mask is None else mask[chosen]
    pixels = store.read_slices(rows[chosen])
    return _card(pixels, store.present[row], positions, (row_mm, column_mm), outlines, label, notes, refused)


def _card(
    pixels: np.ndarray,
    present: np.ndarray,
    positions_mm: np.ndarray,
    pixel_mm: tuple[float, float],
    outlines: np.ndarray | None,
    label: str,
    notes: Mapping[str, tuple[str, ...]],
    refused: frozenset[str],
) -> Card:
    # Sixteen bits are for measuring; a page shows the upper eight.
    eight = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    images = tuple(eight[:, channel] if here else None for channel, here in enumerate(present))
    return Card(label, images, tuple(float(p) for p in positions_mm), pixel_mm, outlines, notes, refused)


def _notes_of(store: Store) -> dict[tuple[str, str], dict[str, tuple[str, ...]]]:
    found: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}
    table = store.quality
    columns = (table["subject"], table["session"], table["contrast"], table["notes"])
    for subject, session, contrast, text in zip(*columns, strict=True):
        if isinstance(text, str) and text:
            found.setdefault((str(subject), str(session)), {})[str(contrast)] = tuple(text.split("; "))
    return found


def _refused_of(store: Store) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    table = store.rejected
    for subject, session, contrast in zip(table["subject"], table["session"], table["contrast"], strict=True):
        if contrast in store.contrasts:
            found.setdefault((subject, session), set()).add(contrast)
    return found


def _spacing_text(store: Store) -> str:
    spacing: Sequence[Any] = store.preprocessing.spacing_mm
    return " × ".join("own" if s is None else f"{s:g}" for s in spacing) + " mm"


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the rows: the middles of equal parts."""
    if count >= len(rows):
        return list(rows)
    return [rows[int((part + 0.5) * len(rows) / count)] for part in range(max(count, 0))]
