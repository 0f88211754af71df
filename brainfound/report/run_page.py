"""The page of a single fine-tuning run, report.md with report.png, built only from the files of its folder.

Axes: n cases, K classes or structures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from brainfound.files import require_json, write_atomically
from brainfound.metrics.registry import METRICS, TABLE_METRICS, format_score
from brainfound.report.cards import format_table
from brainfound.report.figures import PALETTE, save_figure

PAGE_FILE, FIGURE_FILE = "report.md", "report.png"
_MAX_STRUCTURES = 20
_GREY = "#777777"


def write_run_page(folder: str | Path) -> Path:
    """Write report.md and report.png into the folder of a finished fine-tuning run; BrainFoundError if it is not."""
    folder, remedy = Path(folder), "Go on with the run: the same command and --resume"
    scores, facts = require_json(folder / "scores.json", remedy), require_json(folder / "run.json", remedy)
    cases = read_cases_table(folder / "cases.tsv")
    picture = plot_cases(cases, path=folder / FIGURE_FILE, target=facts["target"]["column"])
    parts = [
        f"# {facts['target']['column']}: {scores['task']}, {folder.name}",
        f"**{scores['verdict']['text']}**",
        _scores_section(scores),
        "" if picture is None else f"![answers of each case]({picture.name})",
        _tried_section(folder / "tried.tsv"),
        *(f"![{name}]({name}.png)" for name in ("curves", "reliability") if (folder / f"{name}.png").is_file()),
        _run_section(scores, facts),
    ]
    path = folder / PAGE_FILE
    write_atomically(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


def read_cases_table(file: Path) -> pd.DataFrame:
    """A table of cases; labels stay text."""
    return pd.read_csv(file, sep="\t", dtype={"truth": str}, keep_default_na=False, na_values=[""])


def _scores_section(scores: Mapping[str, Any]) -> str:
    baselines = [name for name in ("trivial", "frozen") if name in scores]
    intervals, rows = scores.get("intervals", {}), []
    for name in TABLE_METRICS[scores["task"]]:
        if name in scores["scores"]:
            ends = intervals.get("scores", {}).get(name, {})
            low, high = ends.get("low"), ends.get("high")
            reach = "–" if low is None else f"{format_score(name, low)} to {format_score(name, high)}"
            values = [format_score(name, scores[entry].get(name)) for entry in ("scores", *baselines)]
            rows.append([name, values[0], reach, *values[1:], METRICS[name].better])
    table = format_table(["score", "value", "95% interval", *baselines, "better"], rows)
    words = f"{scores['num_sessions']} sessions, {scores['part']}. Intervals are bootstraps over subjects."
    if missing := intervals.get("missing"):
        words += f" –: {missing}."
    return f"## Scores\n\n{table}\n\n{words}"


def _tried_section(file: Path) -> str:
    """What an automatic run tried; empty for another."""
    if not file.is_file():
        return ""
    table = pd.read_csv(file, sep="\t", keep_default_na=False)
    rows = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in table.to_numpy()]
    return "## Candidates, on inner folds\n\n" + format_table(list(map(str, table.columns)), rows)


def _run_section(scores: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    lines = {
        "starts from": facts["model"],
        "exported step": f"{scores['step']} of {scores['last_step']}",
        "data": f"{facts['num_sessions']} sessions (hash {facts['data_hash'][:12]})",
        "seed": facts["seed"],
        "device": facts["device"],
    }
    notes = [f"- {note}" for note in scores.get("notes", ())]
    return "## Run\n\n" + "\n".join([*(f"- {name}: {value}" for name, value in lines.items()), *notes])


def plot_cases(cases: pd.DataFrame, *, path: str | Path, target: str = "label") -> Path | None:
    """Draw the answers of a table of cases: None for several labels, or an empty table. ``target`` names an axis.

    A regression is drawn against its labels, two classes as the probability of the second, more as a confusion matrix,
    a segmentation as the Dice of each structure.
    """
    probabilities = [name for name in cases if str(name).startswith("p(")]
    figure = Figure(figsize=(4.8, 3.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if cases.empty or any(str(name).startswith("truth(") for name in cases):
        return None
    if "dice" in cases:
        _draw_dice(axes, cases)
    elif "prediction" in cases:
        _draw_regression(axes, cases, target)
    elif len(probabilities) == 2:
        _draw_two_classes(axes, cases, probabilities)
    elif probabilities:
        _draw_confusion(axes, cases, probabilities)
    else:
        return None
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def _draw_regression(axes: Axes, cases: pd.DataFrame, target: str) -> None:
    truth, answer = cases["truth"].astype(float).to_numpy(), cases["prediction"].to_numpy(dtype=float)
    ends = [min(truth.min(), answer.min()), max(truth.max(), answer.max())]
    axes.plot(ends, ends, color=_GREY, linewidth=1, label="answer = label")
    axes.axhline(answer.mean(), color=_GREY, linewidth=1, linestyle=":", label="mean answer")
    axes.scatter(truth, answer, s=18, color=PALETTE[0], alpha=0.7, linewidths=0)
    axes.set(xlabel=f"{target}, label", ylabel=f"{target}, answer")
    axes.legend(frameon=False, fontsize=8)


def _draw_two_classes(axes: Axes, cases: pd.DataFrame, columns: list[str]) -> None:
    names = [column[2:-1] for column in columns]
    spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(cases))
    place = cases["truth"].map({name: k for k, name in enumerate(names)}).to_numpy(dtype=float)
    colours = [PALETTE[0] if at == 0 else PALETTE[1] for at in place]
    axes.scatter(place + spread, cases[columns[1]], s=18, c=colours, alpha=0.7, linewidths=0)
    axes.axhline(0.5, color=_GREY, linewidth=1)
    counts = cases["truth"].value_counts()
    axes.set_xticks([0, 1], [f"{name} (n = {counts.get(name, 0)})" for name in names])
    axes.set(xlabel="label", ylabel=f"probability of {names[1]}", ylim=(-0.03, 1.03), xlim=(-0.5, 1.5))


def _draw_confusion(axes: Axes, cases: pd.DataFrame, columns: list[str]) -> None:
    names = [column[2:-1] for column in columns]
    truth = pd.Categorical(cases["truth"], names).codes
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (truth, cases[columns].to_numpy().argmax(axis=1)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, count, ha="center", va="center", color="white" if shares[row, column] > 0.5 else "black")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="answer", ylabel="label")


def _draw_dice(axes: Axes, cases: pd.DataFrame) -> None:
    structures = {str(name)[5:-1]: name for name in cases if str(name).startswith("dice(")} or {"": "dice"}
    shown = list(structures.items())[:_MAX_STRUCTURES]
    spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(cases))
    for place, (_, column) in enumerate(shown):
        axes.scatter(cases[column], place + spread, s=14, color=PALETTE[0], alpha=0.6, linewidths=0)
        if cases[column].notna().any():
            axes.vlines(cases[column].mean(), place - 0.3, place + 0.3, color=PALETTE[1], linewidth=2)
    more = len(structures) - len(shown)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="Dice of each case; bar: mean" + (f"; {more} structures are not drawn" if more else ""))
    axes.set_xlim(-0.02, 1.02)
