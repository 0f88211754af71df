"""report.png: an experiment in one picture.

A few-shot curve where the numbers of training subjects differ, bars where contrasts are absent, else one point per run.
The trivial baseline and any other are horizontal (of bars, vertical) lines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from brainfound.evaluate.score_files import TRIVIAL
from brainfound.report.experiment import FIGURE_FILE, ExperimentFolder

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BASELINE, _DPI = "#777777", 140
_LINES = ("--", ":", "-.", (0, (5, 1, 1, 1)))
_LABELS = {"none": "nothing absent", "test": "absent in the test only", "training": "absent in training too"}


def draw_figure(experiment: ExperimentFolder) -> Path | None:
    """Draw report.png into the folder; None where there is nothing to see in a picture: fewer than two scores."""
    rows = pd.DataFrame(experiment.summary["scores"])
    partial = pd.DataFrame(experiment.summary.get("partial_input", []))
    table = experiment.table
    if partial.empty and (table.empty or table[experiment.headline].notna().sum() < 2):
        return None
    figure = Figure(figsize=(6.4, 3.6), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if not partial.empty:
        figure.set_size_inches(6.4, 1.2 + 0.42 * partial["contrasts"].nunique())
        _bars(figure.add_subplot(), partial, experiment)
    elif rows["group"].nunique() > 1:
        _curve(figure.add_subplot(), rows[rows["score"] == experiment.headline], experiment)
    else:
        _points(figure.add_subplot(), table, experiment)
    path = experiment.path / FIGURE_FILE
    # Written beside and renamed, so that a reader never sees half a picture.
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path


def _curve(axes: Axes, rows: pd.DataFrame, experiment: ExperimentFolder) -> None:
    """The headline score over the sessions that were learnt from; the band is the standard deviation over seeds."""
    several = "system" in rows
    for k, (name, part) in enumerate(rows.groupby("system", sort=False) if several else [("mean", rows)]):
        part = part.sort_values("num_train")
        x, y = part["num_train"].to_numpy(float), part["mean"].to_numpy(float)
        colour = _COLOURS[k % len(_COLOURS)]
        axes.plot(x, y, marker="o", markersize=4, color=colour, label=str(name) if several else "fine-tuned")
        spread = part["std_seeds"].to_numpy(float)
        axes.fill_between(x, y - spread, y + spread, color=colour, alpha=0.15, linewidth=0)
    first = rows.drop_duplicates("num_train").sort_values("num_train")
    for k, name in enumerate(experiment.baselines):
        style, grey = _LINES[k % len(_LINES)], _BASELINE
        axes.plot(first["num_train"], first[name], linestyle=style, color=grey, linewidth=1, label=name)
    axes.set_xscale("log")
    ticks = sorted(set(rows["num_train"]))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.set(xlabel="sessions learnt from", ylabel=experiment.headline)
    _finish(axes)


def _points(axes: Axes, table: pd.DataFrame, experiment: ExperimentFolder) -> None:
    """One point per run, its fold's place from left to right; a bar at the mean of each system."""
    names = experiment.system_names if "system" in table else []
    parts = [(name, table[table["system"] == name]) for name in names] if names else [("", table)]
    folds = list(dict.fromkeys(table["fold"]))
    place = dict(zip(folds, np.linspace(-0.25, 0.25, len(folds)) if len(folds) > 1 else [0.0], strict=True))
    for k, (_, part) in enumerate(parts):
        x = k + np.array([place[fold] for fold in part["fold"]])
        y, colour = part[experiment.headline].to_numpy(float), _COLOURS[k % len(_COLOURS)]
        axes.scatter(x, y, s=22, color=colour, alpha=0.75, linewidths=0, zorder=3)
        axes.hlines(np.nanmean(y) if not np.isnan(y).all() else np.nan, k - 0.35, k + 0.35, color=colour, linewidth=2)
    for k, name in enumerate(experiment.baselines):
        level = table[f"{name} {experiment.headline}"].mean()
        axes.axhline(level, color=_BASELINE, linestyle=_LINES[k % len(_LINES)], linewidth=1, label=name)
    axes.set_xticks(range(len(parts)), [name for name, _ in parts], rotation=20 if len(parts) > 4 else 0, fontsize=8)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    what = f"folds 1–{len(folds)} from left to right" if len(folds) > 1 else "one point per seed"
    axes.set(ylabel=experiment.headline, xlabel=what)
    _finish(axes)


def _bars(axes: Axes, rows: pd.DataFrame, experiment: ExperimentFolder) -> None:
    """A group of bars per subset, one for each kind of absence; whiskers are the standard deviation over folds, or
    where there is one fold over seeds."""
    subsets = list(dict.fromkeys(rows["contrasts"]))
    kinds = [kind for kind in _LABELS if kind in set(rows["absence"])]
    height = 0.36
    for k, kind in enumerate(kinds):
        part = rows[rows["absence"] == kind].set_index("contrasts")
        offset = 0.0 if kind == "none" else height * (0.5 if kind == "training" else -0.5)
        y = np.array([subsets.index(name) for name in part.index]) + offset
        whiskers = part["std_folds"].fillna(part["std_seeds"]).fillna(0).to_numpy(float)
        axes.barh(
            y, part["mean"], height, xerr=whiskers, color=_COLOURS[k], label=_LABELS[kind], alpha=0.85,
            error_kw={"linewidth": 1, "ecolor": "#333333"},
        )  # fmt: skip
        for baseline in experiment.baselines:
            if baseline != TRIVIAL and baseline in part and part[baseline].notna().any():
                label = baseline if k == 0 else "_nolegend_"
                axes.scatter(part[baseline], y, marker="|", s=90, color="#333333", zorder=3, label=label)
    axes.axvline(rows[TRIVIAL].mean(), color=_BASELINE, linestyle=_LINES[0], linewidth=1, label=TRIVIAL)
    axes.set_yticks(range(len(subsets)), [name.replace(", ", " + ") for name in subsets], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(experiment.headline)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
