"""reliability.png: how often a classification is right, over how sure it is.

Axis legend: M bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from brainfound.errors import UsageError
from brainfound.evaluate.calibration import ReliabilityBins

# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
_DPI = 140


def reliability_png(curves: Mapping[str, ReliabilityBins], *, path: str | Path, title: str | None = None) -> Path:
    """Draw accuracy over confidence, one line per name, and below it how many cases each bin has.

    On the diagonal certainty is deserved; below it the model is too sure. Points of few cases say little, so a
    point's area grows with its cases.

    Args:
        curves: name → bins of `brainfound.evaluate.calibration.reliability_bins`, up to four.
        path: the PNG to write.
        title: text above.

    Raises:
        UsageError: nothing to draw, or more than four curves.
    """
    if not 1 <= len(curves) <= len(_COLOURS):
        raise UsageError("curves cannot be drawn", where="curves", got=len(curves), expected=f"1 to {len(_COLOURS)}")
    figure = Figure(figsize=(4.2, 5.2), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1)
    for (name, bins), colour in zip(curves.items(), _COLOURS, strict=False):
        filled = bins.count > 0
        area = 20 + 120 * bins.count[filled] / bins.count.max()
        above.plot(bins.confidence[filled], bins.accuracy[filled], color=colour, linewidth=1, alpha=0.6)
        above.scatter(bins.confidence[filled], bins.accuracy[filled], s=area, color=colour, label=name, alpha=0.8)
        heights = np.append(bins.count, bins.count[-1])
        below.step(bins.edges, heights, where="post", color=colour, linewidth=1.2)
    above.set(xlim=(0, 1), ylim=(-0.03, 1.03), ylabel="share of right answers")
    below.set(xlabel="probability of the answer", ylabel="cases", ylim=(0, None))
    above.legend(frameon=False, fontsize=8, loc="upper left")
    if title:
        above.set_title(title, fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
    return path
