"""Contact sheets (what is shown, where, and in which colour) and reliability diagrams."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from brainfound.errors import UsageError
from brainfound.metrics.calibration import reliability_bins
from brainfound.report.figures import choose_slices, plot_overlay, plot_reliability


@pytest.fixture
def stack():
    pixels = np.zeros((9, 2, 32, 32), np.uint8)
    rows, columns = np.mgrid[:32, :32]
    disc = (rows - 16) ** 2 + (columns - 16) ** 2 < 100
    pixels[1:8, :, disc] = 120
    mask = np.zeros((9, 32, 32), np.uint8)
    mask[4:6, 10:15, 10:15] = 1
    return pixels, mask


def _num_pixels(picture, red, green, blue):
    return int((np.abs(picture[..., :3] * 255 - (red, green, blue)).max(-1) < 40).sum())


def test_outlines_have_their_colours(tmp_path, stack):
    pixels, mask = stack
    names, present = ("T1w", "FLAIR"), (True, True)
    plain = imread(plot_overlay(pixels, names, present, path=tmp_path / "plain.png"))
    with_mask = imread(plot_overlay(pixels, names, present, mask, path=tmp_path / "mask.png"))
    with_both = imread(plot_overlay(pixels, names, present, mask, np.roll(mask, 4, axis=2), path=tmp_path / "both.png"))
    yellow, cyan = (255, 208, 0), (0, 229, 255)
    assert _num_pixels(plain, *yellow) == _num_pixels(plain, *cyan) == 0
    assert _num_pixels(with_mask, *yellow) > 100
    assert _num_pixels(with_mask, *cyan) == 0
    assert _num_pixels(with_both, *cyan) > 100


def test_an_absent_contrast_is_not_drawn_as_a_black_scan(tmp_path, stack):
    pixels, mask = stack
    both = imread(plot_overlay(pixels, ("T1w", "FLAIR"), (True, True), mask, path=tmp_path / "a.png"))
    one = imread(plot_overlay(pixels, ("T1w", "FLAIR"), (True, False), mask, path=tmp_path / "b.png"))
    assert one.shape[0] < both.shape[0]
    assert _num_pixels(one, 255, 208, 0) < _num_pixels(both, 255, 208, 0)


def test_the_left_of_the_picture_is_column_zero_and_the_top_is_row_zero(tmp_path):
    pixels = np.full((1, 1, 40, 40), 60, np.uint8)
    pixels[0, 0, :10, :10] = 255
    picture = imread(plot_overlay(pixels, ("T1w",), (True,), path=tmp_path / "a.png"))[..., :3].mean(-1)
    bright_rows, bright_columns = np.nonzero(picture > 0.99)
    grey_rows, grey_columns = np.nonzero(np.abs(picture - 60 / 255) < 0.01)
    assert bright_rows.mean() < grey_rows.mean()
    assert bright_columns.mean() < grey_columns.mean()


def test_slices_are_spread_over_the_object_or_the_brain(stack):
    pixels, mask = stack
    assert choose_slices(pixels, mask, num_slices=6) == [4, 5]
    assert choose_slices(pixels, None, mask, num_slices=6) == [4, 5]
    assert choose_slices(pixels, num_slices=3) == [2, 4, 6]
    assert choose_slices(pixels, np.zeros_like(mask), num_slices=1) == [4]
    assert choose_slices(np.zeros_like(pixels), num_slices=20) == list(range(9))


def test_a_black_stack_is_drawn(tmp_path, stack):
    pixels, _ = stack
    path = tmp_path / "new" / "a.png"
    assert plot_overlay(np.zeros_like(pixels), ("T1w", "FLAIR"), (True, False), path=path).is_file()


def test_a_reliability_diagram_of_each_curve(tmp_path):
    rng = np.random.default_rng(0)
    shares, labels = rng.dirichlet([1, 1], 60), rng.integers(0, 2, 60)
    bins = reliability_bins(shares, labels)
    one = imread(plot_reliability({"raw": bins}, path=tmp_path / "deep" / "one.png", title="test part"))
    other = reliability_bins(shares**2 / (shares**2).sum(axis=1, keepdims=True), labels)
    two = imread(plot_reliability({"raw": bins, "calibrated": other}, path=tmp_path / "two.png"))
    assert min(*one.shape[:2]) > 400
    assert (one < 0.9).any()
    assert not np.array_equal(one, two)
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["one.png", "two.png"]


def test_no_curve_to_draw(tmp_path):
    with pytest.raises(UsageError, match="curves"):
        plot_reliability({}, path=tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
