"""Figures: contact sheets of stacks with outlines of masks, and reliability diagrams of classifications.

Axes: S slices, C contrasts, H rows, W columns, M bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from brainfound.data.preprocessing.grids import bounding_box
from brainfound.errors import UsageError
from brainfound.files import writing
from brainfound.metrics.calibration import ReliabilityBins

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""
_REFERENCE, _PREDICTION = "#FFD000", "#00E5FF"
_TILE_INCHES, _ABSENT_INCHES, _SIDE_INCHES = 1.7, 0.3, 0.6
_DPI = 140
_MARGIN_PIXELS = 4


def save_figure(figure: Figure, path: str | Path, **options: Any) -> Path:
    """Write a figure as PNG atomically, so that no reader sees half a picture; creates the folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", **options)
    return path


def plot_overlay(
    stack_pixels: Any,
    contrasts: Sequence[str],
    present: Sequence[bool],
    mask: Any = None,
    prediction: Any = None,
    *,
    path: str | Path,
) -> Path:
    """Write a contact sheet of a stack: one row per contrast, one column per slice, inferior at the left.

    Slices are spread over the outlined object where there is one, otherwise over the brain. An absent contrast is a
    thin labelled row, which cannot be mistaken for a black scan. The left of each tile is the subject's left and its
    top is anterior, as in a stack.

    Args:
        stack_pixels: (S, C, H, W) uint8.
        contrasts, present: (C,) names, and whether the session has the contrast.
        mask: (S, H, W) reference labels, outlined in yellow; 0 is background.
        prediction: (S, H, W) predicted labels, outlined in cyan, dashed.
    """
    pixels = np.asarray(stack_pixels)
    labels = [None if volume is None else np.asarray(volume) for volume in (mask, prediction)]
    slices = choose_slices(pixels, labels[0], labels[1])
    rows, columns = bounding_box(np.any(pixels > 0, axis=(0, 1)), _MARGIN_PIXELS)

    head, foot = 0.25, 0.3
    full_height = _TILE_INCHES * (rows.stop - rows.start) / (columns.stop - columns.start)
    heights = [full_height if is_present else _ABSENT_INCHES for is_present in present]
    width, height = _TILE_INCHES * len(slices) + _SIDE_INCHES, sum(heights) + head + foot
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="black")
    FigureCanvasAgg(figure)
    for row, contrast in enumerate(contrasts):
        bottom = (foot + sum(heights[row + 1 :])) / height
        for column, index in enumerate(slices):
            left = (_SIDE_INCHES + column * _TILE_INCHES) / width
            axes = figure.add_axes((left, bottom, _TILE_INCHES / width, heights[row] / height))
            axes.set_axis_off()
            if present[row]:
                tile = pixels[index, row, rows, columns]
                axes.imshow(tile, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
                if labels[0] is not None:
                    _outline(axes, labels[0][index, rows, columns], _REFERENCE, 1.3, "solid")
                if labels[1] is not None:
                    _outline(axes, labels[1][index, rows, columns], _PREDICTION, 0.9, "dashed")
            else:
                axes.text(0.5, 0.5, "absent", color="#888888", fontsize=8, ha="center", va="center")
            if row == 0:
                axes.set_title(f"slice {index}", fontsize=7, color="#BBBBBB", pad=2)
        x, y, rotation = _SIDE_INCHES / 2 / width, bottom + heights[row] / height / 2, 90 if present[row] else 0
        figure.text(x, y, contrast, va="center", ha="center", color="white", rotation=rotation)
    _annotate(figure, labels)
    return save_figure(figure, path, facecolor="black")


def choose_slices(
    pixels: np.ndarray, mask: np.ndarray | None = None, prediction: np.ndarray | None = None, num_slices: int = 6
) -> list[int]:
    """At most `num_slices` slices, in rising order: spread over the labelled slices if any, else over the brain."""
    labelled = [labels for labels in (mask, prediction) if labels is not None and labels.any()]
    if labelled:
        candidates = np.flatnonzero(labelled[0].any(axis=(1, 2)))
    else:
        area = np.any(pixels > 0, axis=1).sum(axis=(1, 2))
        # The vertex and the neck show little of the brain.
        candidates = np.flatnonzero(area > 0.25 * area.max()) if area.any() else np.arange(len(pixels))
    num_chosen = min(num_slices, len(candidates))
    # The middles of equal parts, which leave out the first and the last slice.
    places = (np.arange(num_chosen) + 0.5) * len(candidates) / num_chosen
    return [int(index) for index in candidates[places.astype(int)]]


def _outline(axes: Axes, labels: np.ndarray, colour: str, line_width: float, style: str) -> None:
    height, width = labels.shape
    for label in np.unique(labels[labels != 0]):
        # A border of background pixels closes the outline of an object at the edge.
        framed = np.pad(labels == label, 1).astype(float)
        x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
        axes.contour(x, y, framed, levels=[0.5], colors=[colour], linewidths=line_width, linestyles=style)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _annotate(figure: Figure, labels: Sequence[np.ndarray | None]) -> None:
    figure.text(0.01, 0.01, "left of the picture = subject's left, top = anterior", color="#888888", fontsize=6.5)
    x = 0.99
    for volume, name, colour in ((labels[1], "- - prediction", _PREDICTION), (labels[0], "— reference", _REFERENCE)):
        if volume is not None:
            figure.text(x, 0.01, name, color=colour, fontsize=8, ha="right")
            x -= 1.15 / figure.get_figwidth()


_CURVE_COLOURS = (PALETTE[1], PALETTE[0], *PALETTE[2:4])


def plot_reliability(curves: Mapping[str, ReliabilityBins], *, path: str | Path, title: str | None = None) -> Path:
    """Draw accuracy against confidence, one line per name, and below it the number of cases in each bin.

    A calibrated model lies on the diagonal, an overconfident one below it. The area of a point grows with its cases.
    `curves` maps up to four names to bins from `brainfound.metrics.calibration.reliability_bins`.
    """
    if not 1 <= len(curves) <= len(_CURVE_COLOURS):
        expected = f"1 to {len(_CURVE_COLOURS)}"
        raise UsageError("curves cannot be drawn", where="curves", got=len(curves), expected=expected)
    figure = Figure(figsize=(4.2, 5.2), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1)
    for (name, bins), colour in zip(curves.items(), _CURVE_COLOURS, strict=False):
        filled = bins.count > 0
        area = 20 + 120 * bins.count[filled] / bins.count.max()
        above.plot(bins.confidence[filled], bins.accuracy[filled], color=colour, linewidth=1, alpha=0.6)
        above.scatter(bins.confidence[filled], bins.accuracy[filled], s=area, color=colour, label=name, alpha=0.8)
        below.step(bins.edges, np.append(bins.count, bins.count[-1]), where="post", color=colour, linewidth=1.2)
    above.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share of right answers")
    below.set(xlabel="probability of the answer", ylabel="cases", ylim=(0, None))
    above.legend(frameon=False, fontsize=8, loc="upper left")
    if title:
        above.set_title(title, fontsize=10)
    return save_figure(figure, path)
