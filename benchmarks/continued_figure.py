"""The picture of the benchmark: what the guard's probe saw under the safe ladder and under bad settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SAFE, _UNSAFE = "#0072B2", "#D55E00"


def draw_probes(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], file: Path) -> Path:
    """One panel per cohort, one line per run.

    Args:
        runs: cohort → "ladder" and "unsafe" → runs as `continued_runs.read_run` gives them.
    """
    figure = Figure(figsize=(4.6 * len(runs), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (cohort, kinds) in zip(panels, runs.items(), strict=True):
        for kind, colour, label in (("ladder", _SAFE, "safe ladder"), ("unsafe", _UNSAFE, "settings of dinov2#204")):
            for number, run in enumerate(kinds[kind]):
                probe = run["probe"]
                axes.plot(probe["steps"], probe["linear"], color=colour, marker="o", markersize=2.5, linewidth=1.3,
                          label=label if number == 0 else None)  # fmt: skip
                if run["status"].startswith("stopped"):
                    axes.plot(probe["steps"][-1], probe["linear"][-1], marker="x", markersize=9, markeredgewidth=2,
                              color=colour, label="stopped by the guard" if number == 0 else None)  # fmt: skip
        axes.set_title(cohort, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        first = next(run["probe"] for of_kind in kinds.values() for run in of_kind)
        axes.set_ylabel(f"probe of {str(first['target']).replace('_', ' ')} ({str(first['metric']).replace('_', ' ')})")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    return file
