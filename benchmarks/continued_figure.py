"""The figure of the benchmark: the guard's probes under the safe ladder and under bad settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SAFE, _UNSAFE = "#0072B2", "#D55E00"
_KINDS = (("ladder", _SAFE, "safe ladder"), ("unsafe", _UNSAFE, "settings of dinov2#204"))
_NUM_COLUMNS = 5


def draw_probes(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], file: Path) -> Path:
    """A block of panels per cohort, a panel per probe, a line per run; a cross where the guard stopped it.

    Args:
        runs: cohort → "ladder" and "unsafe" → runs as `continued_runs.read_run` gives them.
    """
    blocks = {cohort: _probe_names(kinds) for cohort, kinds in runs.items()}
    num_rows = sum(-(-len(names) // _NUM_COLUMNS) for names in blocks.values())
    figure = Figure(figsize=(2.5 * _NUM_COLUMNS, 2.2 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False)
    first_row = 0
    for cohort, names in blocks.items():
        block_panels = panels[first_row : first_row + -(-len(names) // _NUM_COLUMNS)]
        first_row += len(block_panels)
        for axes, name in zip(block_panels.flat, names, strict=False):
            _draw(axes, runs[cohort], name)
        block_panels[0][0].set_ylabel(cohort, fontsize=9)
        for axes in block_panels.flat[len(names) :]:
            axes.set_axis_off()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)
    return file


def _probe_names(kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The probe's target, and the retention probes that every run has."""
    runs = [run for of_kind in kinds.values() for run in of_kind]
    return ["", *(name for name in runs[0]["retention"] if all(name in run["retention"] for run in runs))]


def _draw(axes: Axes, kinds: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> None:
    for kind, colour, label in _KINDS:
        for number, run in enumerate(kinds[kind]):
            probe = run["probe"]
            scores = run["retention"][name]["scores"] if name else probe["linear"]
            axes.plot(probe["steps"], scores, color=colour, marker="o", markersize=2, linewidth=1.1,
                      label=label if number == 0 else None)  # fmt: skip
            if run["status"].startswith("stopped"):
                axes.plot(probe["steps"][-1], scores[-1], marker="x", markersize=7, markeredgewidth=1.8, color=colour,
                          linestyle="none", label="stopped by the guard" if number == 0 else None)  # fmt: skip
    title = name or str(next(run["probe"]["target"] for of_kind in kinds.values() for run in of_kind))
    axes.set_title(title.replace("_", " ") + ("" if name else " (the target)"), fontsize=9)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
