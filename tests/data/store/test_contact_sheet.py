"""The contact sheet: which sessions and slices are shown, and what is on the page."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store.contact_sheet import (
    card_from_stack,
    choose_sessions,
    choose_slices,
    draw_contact_sheet,
    write_contact_sheet,
)

YELLOW, ORANGE, RED = (255, 208, 0), (255, 157, 46), (255, 90, 79)


class _Store:
    """What the sheet reads of a store: grey discs whose brightness is 100 + 10 × the contrast's number."""

    def __init__(self, num_sessions=4, contrasts=("T1w", "FLAIR"), size=48, num_slices=9, bits=8, spacing=(2, 2, 2)):
        self.contrasts, self.size, self.count, self.bits = contrasts, size, num_slices, bits
        self.preprocessing = Preprocessing(contrasts=contrasts, size=(size, size), spacing_mm=spacing)
        self.sessions = pd.DataFrame({"subject": [f"ann{i}" for i in range(num_sessions)], "session": "1"})
        self.present = np.ones((num_sessions, len(contrasts)), bool)
        self.slice_positions_mm = np.tile(np.arange(num_slices) - num_slices // 2, num_sessions) * 2.0
        self.quality = pd.DataFrame(
            {"subject": self.sessions["subject"], "session": "1", "contrast": contrasts[0], "notes": ""}
        )
        self.rejected = pd.DataFrame({name: [] for name in ("file", "subject", "session", "contrast", "reason")})
        self.masks = {}
        self.read = []

    def __len__(self):
        return len(self.sessions)

    def session_rows(self, row):
        return np.arange(row * self.count, (row + 1) * self.count)

    def read_masks(self, row):
        return self.masks.get(row)

    def read_slices(self, rows):
        self.read += rows.tolist()
        y, x = np.indices((self.size, self.size)) - self.size / 2 + 0.5
        disc = (x**2 + y**2 < (0.4 * self.size) ** 2).astype(np.uint16)
        values = disc * np.array([100 + 10 * c for c in range(len(self.contrasts))])[:, None, None]
        pixels = np.broadcast_to(values, (len(rows), *values.shape))
        return (pixels * 256 + 255 * disc).astype(np.uint16) if self.bits == 16 else pixels.astype(np.uint8)


def _pixels(path):
    return np.asarray(Image.open(path))


def _count(page, colour, tolerance=0):
    return int((np.abs(page.astype(int) - colour).max(axis=-1) <= tolerance).sum())


def test_flagged_sessions_come_first_and_the_rest_is_spread():
    assert choose_sessions(5, [], 60) == [0, 1, 2, 3, 4]
    assert choose_sessions(5, [4, 2], 60) == [2, 4, 0, 1, 3]
    shown = choose_sessions(1000, [7, 500], 10)
    assert shown[:2] == [7, 500]
    assert len(shown) == len(set(shown)) == 10
    gaps = np.diff(shown[2:])
    assert gaps.min() > 100
    assert gaps.max() < 150


def test_many_flagged_sessions_leave_room_for_others():
    shown = choose_sessions(100, range(80), 40)
    assert len(shown) == len(set(shown)) == 40
    assert sum(row >= 80 for row in shown) == 10
    assert choose_sessions(100, range(100), 40)[:3] == [1, 3, 6]
    assert len(choose_sessions(100, range(100), 40)) == 40


def test_slices_at_thirds_and_where_the_mask_is_largest():
    assert choose_slices(10) == [3, 5, 6]
    assert choose_slices(91) == [30, 45, 60]
    assert choose_slices(1) == [0]
    assert choose_slices(2) == [0, 1]
    mask = np.zeros((91, 8, 8), np.uint8)
    assert choose_slices(91, mask) == [30, 45, 60]
    mask[70, :2, :2] = mask[71, :4, :4] = 5
    assert choose_slices(91, mask) == [30, 45, 71]
    mask[3] = 1
    assert choose_slices(91, mask) == [3, 45, 60]


def test_a_page_reads_only_the_slices_that_it_shows(tmp_path):
    store = _Store(num_sessions=3)
    page = _pixels(write_contact_sheet(store, tmp_path / "new" / "sheet.png"))
    assert sorted(store.read) == [3, 4, 5, 12, 13, 14, 21, 22, 23]
    first, second = _count(page, (100,) * 3), _count(page, (110,) * 3)
    assert first > 10_000
    assert first == pytest.approx(second, rel=0.05)
    assert not any(_count(page, colour) for colour in (YELLOW, ORANGE, RED))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["sheet.png"], "nothing half-written is left"


@pytest.mark.parametrize("size", [8, 32, 512])
@pytest.mark.parametrize("num_contrasts", [1, 5])
def test_every_size_and_number_of_contrasts_is_drawn(tmp_path, size, num_contrasts):
    names = ("T1w", "T1ce", "T2w", "FLAIR", "DWI")[:num_contrasts]
    page = _pixels(write_contact_sheet(_Store(2, names, size), tmp_path / "sheet.png"))
    for number in range(num_contrasts):
        assert _count(page, (100 + 10 * number,) * 3) > 2000
    assert page.shape[0] * page.shape[1] < 8e6


def test_sixteen_bits_look_as_eight(tmp_path):
    eight = _pixels(write_contact_sheet(_Store(), tmp_path / "8.png"))
    np.testing.assert_array_equal(_pixels(write_contact_sheet(_Store(bits=16), tmp_path / "16.png")), eight)


def test_the_mask_is_outlined_and_not_filled(tmp_path):
    store = _Store()
    mask = np.zeros((9, 48, 48), np.uint8)
    mask[:, 16:32, 16:32] = 1
    store.masks[1] = mask
    outline = _count(_pixels(write_contact_sheet(store, tmp_path / "a.png")), YELLOW)
    assert outline > 500
    store.masks[1] = mask * np.arange(1, 10, dtype=np.uint8)[:, None, None]
    mask[:, 16:32, 24:32] *= 3
    store.masks[1] = mask
    assert 1.2 * outline < _count(_pixels(write_contact_sheet(store, tmp_path / "b.png")), YELLOW) < 2 * outline, (
        "two labels: the border between them too"
    )
    store.masks[1] = np.zeros_like(mask)
    assert _count(_pixels(write_contact_sheet(store, tmp_path / "c.png")), YELLOW) == 0


def test_notes_and_refused_scans_are_marked(tmp_path):
    store = _Store()
    store.quality.loc[2, "notes"] = "12% of the foreground is outside of the stack"
    noted = _pixels(write_contact_sheet(store, tmp_path / "a.png"))
    assert _count(noted, ORANGE) > 500
    assert _count(noted, RED) == 0
    store = _Store()
    store.present[3, 1] = False
    absent = _pixels(write_contact_sheet(store, tmp_path / "b.png"))
    assert _count(absent, ORANGE) == _count(absent, RED) == 0
    store.rejected.loc[0] = ["f.nii", "ann3", "1", "FLAIR", "truncated"]
    refused = _pixels(write_contact_sheet(store, tmp_path / "c.png"))
    assert _count(refused, RED) > 200
    assert _count(refused, ORANGE) > 100


def test_a_refused_file_of_another_contrast_or_mask_is_no_flag(tmp_path):
    store = _Store()
    plain = _pixels(write_contact_sheet(store, tmp_path / "a.png"))
    store.rejected.loc[0] = ["f.nii", "ann3", "1", "SWI", "truncated"]
    np.testing.assert_array_equal(_pixels(write_contact_sheet(store, tmp_path / "b.png")), plain)


def test_identifiers_are_on_the_page_only_if_requested(tmp_path, monkeypatch):
    from PIL import ImageDraw

    said = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, at, text, **k: (said.append(text), draw(self, at, text, **k))
    )
    write_contact_sheet(_Store(), tmp_path / "a.png")
    assert not any("ann" in text for text in said)
    assert {"0", "3", "T1w", "FLAIR"} <= set(said)
    write_contact_sheet(_Store(), tmp_path / "b.png", keep_ids=True)
    assert "ann3" in said


def test_the_foot_counts_what_is_shown(tmp_path, monkeypatch):
    from brainfound.data.store import contact_sheet as contact_sheet_page

    feet = []
    monkeypatch.setattr(
        contact_sheet_page, "draw_contact_sheet", lambda cards, contrasts, path, foot: feet.append(foot)
    )
    store = _Store(20, spacing=(2, 2, None))
    store.quality.loc[[2, 3], "notes"] = "a note"
    write_contact_sheet(store, tmp_path / "a.png", max_sessions=5)
    assert feet[0].startswith("5 of 20 sessions shown; 2 of 2 with notes or refused scans (orange). ")
    assert "2 × 2 × own mm" in feet[0]


def test_left_stays_left_and_long_pixels_are_drawn_long(tmp_path):
    pixels = np.zeros((3, 1, 40, 40), np.uint8)
    pixels[:, :, 5:35, 5:35] = 60
    pixels[:, :, 5:15, 5:35] = 240  # anterior
    pixels[:, :, 15:35, 5:10] = 160  # left
    affine = np.array([[0, 0, 1.0, 0], [0, -2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    stack = Stack(pixels, ("T1w",), np.array([True]), np.zeros(3, np.float32), affine, (3, 3, 3), np.eye(4))
    page = _pixels(draw_contact_sheet([card_from_stack(stack, "1")], ("T1w",), tmp_path / "a.png", ""))[..., 0].astype(
        int
    )
    tile = page[46:-75, 64:235]  # the first slice
    anterior, left, rest = (np.argwhere(np.abs(tile - value) < 4) for value in (240, 160, 60))
    assert len(anterior) > 1000
    assert anterior[:, 0].mean() < left[:, 0].mean()
    assert left[:, 1].mean() < rest[:, 1].mean() - 20
    heights, widths = np.ptp(np.concatenate([anterior, left, rest]), axis=0)
    assert heights / widths == pytest.approx(2, rel=0.1), "rows are 2 mm apart and columns 1 mm"


def test_sessions_with_pixels_of_other_sizes_have_one_scale(tmp_path):
    cards = []
    for number, millimetres in enumerate((1.0, 2.0)):
        pixels = np.zeros((3, 1, 40, 40), np.uint8)
        pixels[:, :, 5:35, 5:35] = 240 - 80 * number
        affine = np.array([[0, 0, millimetres, 0], [0, -millimetres, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
        stack = Stack(pixels, ("T1w",), np.array([True]), np.zeros(3, np.float32), affine, (3, 3, 3), np.eye(4))
        cards.append(card_from_stack(stack, "1"))
    page = _pixels(draw_contact_sheet(cards, ("T1w",), tmp_path / "a.png", ""))[..., 0].astype(int)
    small, large = (np.count_nonzero(np.abs(page - value) < 4) for value in (240, 160))
    assert large / small == pytest.approx(4, rel=0.15), "the same square of pixels is twice as long and wide"


def test_a_card_of_a_stack_shows_what_is_absent():
    pixels = np.full((9, 2, 8, 8), 7, np.uint8)
    stack = Stack(pixels, ("T1w", "FLAIR"), np.array([True, False]), np.arange(9.0), np.eye(4), (3, 3, 3), np.eye(4))
    card = card_from_stack(stack, "1", {"T1w": ("odd",)})
    assert card.images[1] is None
    assert card.images[0].shape == (3, 8, 8)
    assert card.heights_mm == (3.0, 4.0, 5.0)
    assert card.is_flagged
    assert not card_from_stack(stack, "1", {"T1w": ()}).is_flagged


def test_no_sessions_and_black_sessions_are_no_failure(tmp_path):
    assert draw_contact_sheet([], ("T1w",), tmp_path / "a.png", "nothing").is_file()
    stack = SimpleNamespace(
        pixels=np.zeros((3, 1, 8, 8), np.uint8), present=[True], positions_mm=np.zeros(3), mask=None
    )
    stack.spacing_mm = np.ones(3)
    assert draw_contact_sheet([card_from_stack(stack, "1")], ("T1w",), tmp_path / "b.png", "black").is_file()
