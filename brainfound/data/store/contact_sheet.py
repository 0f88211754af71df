"""Contact sheets: a few slices of every scan on one page, as a grid of session cards.

`write_contact_sheet` draws a store; `card_from_stack` and `draw_contact_sheet` draw stacks in memory. Identifiers and
file names appear only on request: a session is labelled with its row in the store.

Axis legend: S slices, C contrasts, H rows (anterior → posterior), W columns (left → right).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Num
from PIL import Image, ImageDraw, ImageFont

from brainfound.data.preprocessing.grids import bounding_box
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.sources.tables import SessionKey
from brainfound.data.store.folder import session_keys
from brainfound.data.store.reader import StoreReader
from brainfound.files import writing

HEIGHTS = (1 / 3, 1 / 2, 2 / 3)
"""Heights of the slices on a card, as shares of the stack."""
SHARE_FOR_QUIET = 0.25
"""Share of a page reserved for sessions without notes when not all sessions fit."""

_PAPER, _FRAME, _TEXT, _FAINT = "#0B0C0E", "#26292E", "#E8E8E8", "#8A8F98"
_FLAG, _REFUSED, _OUTLINE = "#FF9D2E", "#FF5A4F", (255, 208, 0)
_TILE_WIDTHS = (176, 144, 120, 104, 88, 72, 60)
_MAX_PAGE_PIXELS = 7_000_000
_PAGE_ASPECT = 1.4
"""Width over height of an ideal page."""
_MARGIN, _TILE_GAP, _GROUP_GAP, _CARD_GAP, _COLUMN_GAP = 20, 2, 8, 8, 32
_LABEL_WIDTH, _NOTE_HEIGHT, _HEAD_HEIGHT, _EMPTY_GROUP_WIDTH = 44, 17, 26, 64
_WINDOW_MARGIN = 3
_MAX_OUTLINED_LABELS = 8


@dataclass(frozen=True)
class SessionCard:
    """The slices and notes of one session on the sheet."""

    label: str
    images: tuple[Num[np.ndarray, "n H W"] | None, ...]
    """The n slices of each contrast; None for an absent one."""
    heights_mm: tuple[float, ...]
    """Heights of the n slices; 0 is the middle of the stack."""
    pixel_mm: tuple[float, float] = (1.0, 1.0)
    """Distance of rows and of columns."""
    outlines: Num[np.ndarray, "n H W"] | None = None
    """Label codes of the mask."""
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Remarks per contrast; "" for the session as a whole."""
    refused: frozenset[str] = frozenset()
    """Contrasts whose scan could not be used."""

    @property
    def is_flagged(self) -> bool:
        return bool(self.refused) or any(self.notes.values())


def write_contact_sheet(
    store: StoreReader, path: str | Path, *, keep_ids: bool = False, max_sessions: int = 60
) -> Path:
    """Write a page with three slices of every scan of a store, with outlines of its mask.

    Sessions with notes or refused scans come first; the others that fit are spread evenly. With ``keep_ids`` subject
    and session stand next to the row number.
    """
    rejected = store.rejected[store.rejected["contrast"].isin(store.contrasts)]
    refused = {key: frozenset(group) for key, group in rejected.groupby(["subject", "session"])["contrast"]}
    notes: dict[SessionKey, dict[str, tuple[str, ...]]] = {}
    scans = store.quality[["subject", "session", "contrast", "notes"]]
    for subject, session, contrast, text in scans[scans["notes"] != ""].itertuples(index=False):
        notes.setdefault((subject, session), {})[contrast] = tuple(text.split("; "))
    keys = session_keys(store.sessions)
    flagged = [row for row, key in enumerate(keys) if notes.get(key) or refused.get(key)]
    chosen = choose_sessions(len(store), flagged, max_sessions)
    cards = []
    for row in chosen:
        label = " ".join((str(row), *keys[row])) if keep_ids else str(row)
        refused_here = refused.get(keys[row], frozenset())
        cards.append(_card_from_row(store, row, label, notes.get(keys[row], {}), refused_here))
    spacing = " × ".join("own" if length is None else f"{length:g}" for length in store.preprocessing.spacing_mm)
    foot = f"{len(chosen)} of {len(store)} sessions shown"
    if flagged:
        foot += f"; {len(set(chosen) & set(flagged))} of {len(flagged)} with notes or refused scans (orange)"
    foot += f". Numbers are rows of the store, from 0; spacing {spacing} mm."
    return draw_contact_sheet(cards, store.contrasts, path, foot)


def choose_sessions(num_sessions: int, flagged: Sequence[int], max_sessions: int) -> list[int]:
    """Rows to show, flagged ones first; each kind is spread evenly if not all fit.

    >>> choose_sessions(10, [7], 4)
    [7, 1, 4, 8]
    """
    marked = set(flagged)
    quiet = [row for row in range(num_sessions) if row not in marked]
    room_for_quiet = max(max_sessions - len(marked), min(len(quiet), int(SHARE_FOR_QUIET * max_sessions)))
    first = _spread(sorted(marked), max_sessions - min(room_for_quiet, len(quiet)))
    return first + _spread(quiet, max_sessions - len(first))


def choose_slices(num_slices: int, mask: Num[np.ndarray, "S H W"] | None = None) -> list[int]:
    """Slices at `HEIGHTS`; the slice with the largest area of mask replaces the one closest to it."""
    chosen = sorted({int(height * (num_slices - 1) + 0.5) for height in HEIGHTS})
    if mask is not None and mask.any():
        largest = int(np.count_nonzero(mask, axis=(1, 2)).argmax())
        nearest = min(range(len(chosen)), key=lambda place: abs(chosen[place] - largest))
        chosen[nearest] = largest
    return sorted(chosen)


def card_from_stack(
    stack: Stack, label: str, notes: Mapping[str, tuple[str, ...]] | None = None, refused: frozenset[str] = frozenset()
) -> SessionCard:
    """A card of a stack in memory."""
    chosen = choose_slices(len(stack.pixels), stack.mask)
    outlines = None if stack.mask is None else stack.mask[chosen]
    pixel_mm = (float(stack.spacing_mm[1]), float(stack.spacing_mm[2]))
    images = _eight_bit_images(stack.pixels[chosen], stack.present)
    heights_mm = tuple(stack.positions_mm[chosen].tolist())
    return SessionCard(label, images, heights_mm, pixel_mm, outlines, notes or {}, refused)


def _card_from_row(
    store: StoreReader, row: int, label: str, notes: Mapping[str, tuple[str, ...]], refused: frozenset[str]
) -> SessionCard:
    rows = store.session_rows(row)
    mask = store.read_masks(row)
    chosen = choose_slices(len(rows), mask)
    column_mm, row_mm, _ = store.preprocessing.spacing_mm
    if column_mm is None or row_mm is None:
        _, row_mm, column_mm = (float(mm) for mm in np.linalg.norm(store.table.affine[row][:3, :3], axis=0))
    outlines = None if mask is None else mask[chosen]
    images = _eight_bit_images(store.read_slices(rows[chosen]), store.present[row])
    heights_mm = tuple(store.slice_positions_mm[rows[chosen]].tolist())
    return SessionCard(label, images, heights_mm, (row_mm, column_mm), outlines, notes, refused)


def _eight_bit_images(
    pixels: Num[np.ndarray, "n C H W"], present: Bool[np.ndarray, "C"]
) -> tuple[Num[np.ndarray, "n H W"] | None, ...]:
    """The images of each contrast; sixteen bits are reduced to the upper eight."""
    eight = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    return tuple(eight[:, channel] if here else None for channel, here in enumerate(present))


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """At most ``count`` rows: the middles of equal parts."""
    if count >= len(rows):
        return list(rows)
    return [rows[int((part + 0.5) * len(rows) / count)] for part in range(max(count, 0))]


@dataclass(frozen=True)
class _Layout:
    """Sizes of a page in pixels."""

    tile: tuple[int, int]  # width and height of one slice
    slices: int
    filled: tuple[bool, ...]  # per contrast, whether any card has it; the group of a missing contrast is narrow
    columns: int
    label_width: int
    heights: tuple[int, ...]  # of each card

    def width(self, group: int) -> int:
        width = self.slices * self.tile[0] + (self.slices - 1) * _TILE_GAP
        return width if self.filled[group] else _EMPTY_GROUP_WIDTH

    def left(self, group: int) -> int:
        """The left border of a group within its card."""
        return self.label_width + sum(self.width(g) + _GROUP_GAP for g in range(group))

    @property
    def card_width(self) -> int:
        return self.left(len(self.filled)) - _GROUP_GAP

    @property
    def cards_per_column(self) -> int:
        return max(math.ceil(len(self.heights) / self.columns), 1)

    def page(self) -> tuple[int, int]:
        per = self.cards_per_column
        columns = [self.heights[first : first + per] for first in range(0, max(len(self.heights), 1), per)]
        tallest = max(sum(heights) + _CARD_GAP * len(heights) for heights in columns)
        width = 2 * _MARGIN + len(columns) * (self.card_width + _COLUMN_GAP) - _COLUMN_GAP
        return max(width, 640), 2 * _MARGIN + _HEAD_HEIGHT + tallest + 3 * _NOTE_HEIGHT


def draw_contact_sheet(cards: Sequence[SessionCard], contrasts: Sequence[str], path: str | Path, foot: str) -> Path:
    """Draw cards, column by column and with a group of slices per contrast, as a PNG; written atomically."""
    window = _window(cards)
    sizes_mm = [_window_mm(card, window) for card in cards]
    height_mm, width_mm = (max(sizes) for sizes in zip(*sizes_mm, strict=True)) if cards else (1.0, 1.0)
    layout = _layout(cards, len(contrasts), height_mm / width_mm)
    page = Image.new("RGB", layout.page(), _PAPER)
    draw = ImageDraw.Draw(page)
    top = _MARGIN + _HEAD_HEIGHT
    for number, card in enumerate(cards):
        left = _MARGIN + number // layout.cards_per_column * (layout.card_width + _COLUMN_GAP)
        if number % layout.cards_per_column == 0:
            top = _MARGIN + _HEAD_HEIGHT
            for group, contrast in enumerate(contrasts):
                middle = left + layout.left(group) + layout.width(group) / 2
                draw.text((middle, _MARGIN + 8), contrast, fill=_TEXT, font=_font(15), anchor="mm")
        share = (sizes_mm[number][1] / width_mm, sizes_mm[number][0] / height_mm)
        _draw_card(page, draw, card, contrasts, layout, (left, top), window, share)
        top += layout.heights[number] + _CARD_GAP
    _draw_foot(draw, page.size, foot, outlined=any(card.outlines is not None for card in cards))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        page.save(temporary, format="PNG", compress_level=4)
    return path


def _layout(cards: Sequence[SessionCard], groups: int, tile_aspect: float) -> _Layout:
    """The layout with the largest tiles that fits into `_MAX_PAGE_PIXELS`; tile height = width × tile_aspect."""
    slices = max((len(card.heights_mm) for card in cards), default=1)
    longest = max((_font(13).getlength(word) for card in cards for word in card.label.split()), default=0)
    label_width = max(_LABEL_WIDTH, min(int(longest) + 14, 220))
    filled = tuple(any(card.images[group] is not None for card in cards) for group in range(groups))
    for width in _TILE_WIDTHS:
        tile = (width, max(round(width * tile_aspect), 8))
        heights = tuple(tile[1] + (_NOTE_HEIGHT if card.is_flagged else 0) for card in cards)
        all_columns = range(1, max(min(len(cards), 12), 1) + 1)
        layouts = [_Layout(tile, slices, filled, columns, label_width, heights) for columns in all_columns]
        best = min(layouts, key=lambda layout: abs(math.log(layout.page()[0] / layout.page()[1] / _PAGE_ASPECT)))
        if math.prod(best.page()) <= _MAX_PAGE_PIXELS:
            break
    return best


def _window(cards: Sequence[SessionCard]) -> tuple[slice, ...]:
    """Rows and columns that any slice fills, with a margin: one scale for the whole page."""
    filled: Any = None
    for card in cards:
        for image in card.images:
            if image is not None:
                here = (image > 0).any(axis=0)
                filled = here if filled is None else filled | here
    return bounding_box(np.zeros((64, 64), dtype=bool) if filled is None else filled, _WINDOW_MARGIN)


def _window_mm(card: SessionCard, window: tuple[slice, ...]) -> tuple[float, float]:
    """Height and width of the window in a card's pixels."""
    rows, columns = ((part.stop - part.start) * mm for part, mm in zip(window, card.pixel_mm, strict=True))
    return rows, columns


def _draw_card(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    card: SessionCard,
    contrasts: Sequence[str],
    layout: _Layout,
    corner: tuple[int, int],
    window: tuple[slice, ...],
    share: tuple[float, float],
) -> None:
    """Draw one card; its slices fill the given share of a tile's width and height."""
    left, top = corner
    width, height = layout.tile
    size = (max(round(width * share[0]), 1), max(round(height * share[1]), 1))
    colour = _FLAG if card.is_flagged else _TEXT
    codes = [] if card.outlines is None else np.unique(card.outlines[card.outlines != 0]).tolist()
    for line, word in enumerate(card.label.split()):
        text = _fitting(word, layout.label_width - 10, 13)
        draw.text((left, top + 2 + 17 * line), text, fill=colour if line == 0 else _FAINT, font=_font(13))
    if card.is_flagged:
        draw.rectangle((left - 8, top, left - 5, top + height), fill=_FLAG)
    for group, contrast in enumerate(contrasts):
        at, group_width = left + layout.left(group), layout.width(group)
        image = card.images[group]
        if image is None:
            word, ink = ("refused", _REFUSED) if contrast in card.refused else ("absent", _FAINT)
            box = (at, top, at + group_width - 1, top + height - 1)
            draw.rectangle(box, outline=_REFUSED if contrast in card.refused else _FRAME)
            draw.text((at + group_width / 2, top + height / 2), word, fill=ink, font=_font(13), anchor="mm")
            continue
        for place, pixels in enumerate(image):
            outline = None if card.outlines is None else card.outlines[place][window]
            x = at + place * (width + _TILE_GAP)
            draw.rectangle((x, top, x + width - 1, top + height - 1), fill="black")
            middle = (x + (width - size[0]) // 2, top + (height - size[1]) // 2)
            page.paste(_tile(pixels[window], outline, codes, size), middle)
            if group == 0 or all(other is None for other in card.images[:group]):
                height_text = f"{round(card.heights_mm[place]):+d}".replace("+0", "0")
                draw.text((x + 3, top + height - 2), height_text, **_small("ls"))
                if place == 0:
                    draw.text((x + 3, top + height / 2), "L", **_small("lm"))
        if card.notes.get(contrast):
            draw.rectangle((at - 2, top - 2, at + group_width + 1, top + height + 1), outline=_FLAG)
    if card.is_flagged:
        text = _fitting(_notes_text(card, contrasts), layout.card_width - layout.label_width, 11)
        draw.text((left + layout.label_width, top + height + 2), text, fill=_FLAG, font=_font(11))


def _small(anchor: str) -> dict[str, Any]:
    return {"fill": _FAINT, "font": _font(10), "anchor": anchor, "stroke_width": 1, "stroke_fill": "black"}


def _notes_text(card: SessionCard, contrasts: Sequence[str]) -> str:
    parts = [f"{name} refused" for name in contrasts if name in card.refused]
    parts += [f"{name}: {', '.join(notes)}".removeprefix(": ") for name, notes in card.notes.items() if notes]
    return "  ·  ".join(parts)


def _tile(pixels: np.ndarray, outline: np.ndarray | None, codes: Sequence[int], size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    if outline is None or not outline.any():
        return image
    # Many codes are an anatomical map: its outer border is enough.
    shapes = [outline == code for code in codes] if len(codes) <= _MAX_OUTLINED_LABELS else [outline != 0]
    painted = np.array(image)
    for shape in shapes:
        smooth = Image.fromarray(shape.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
        inside = np.pad(np.asarray(smooth) >= 128, 1)
        core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        painted[inside[1:-1, 1:-1] & ~core] = _OUTLINE
    return Image.fromarray(painted)


def _draw_foot(draw: ImageDraw.ImageDraw, size: tuple[int, int], foot: str, outlined: bool) -> None:
    width, height = size
    conventions = "Left of each picture = subject's left, top = anterior. Small numbers: height in mm from the middle."
    if outlined:
        conventions += " Yellow: the mask."
    for line, text in enumerate((foot, conventions)):
        at = (_MARGIN, height - _MARGIN - (2 - line) * _NOTE_HEIGHT)
        draw.text(at, _fitting(text, width - 2 * _MARGIN, 12), fill=_FAINT, font=_font(12))


def _fitting(text: str, width: float, size: int) -> str:
    """The text, cut with an ellipsis if it is wider than ``width`` pixels."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@cache
def _font(size: int) -> Any:
    # Matplotlib's font has most of the world's letters; Pillow's own lacks even ×.
    import matplotlib  # imported late: only drawing needs it

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
