"""report.md: an experiment on one page, from the files of its folder alone.

The question, the data, the settings, the scores beside the baselines, the paired comparison, what to be careful about,
and the command.

report.png: an experiment in one picture.

A few-shot curve where the numbers of training subjects differ, bars where contrasts are absent, else one point per run.
The trivial baseline and any other are horizontal (of bars, vertical) lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from brainfound.experiments.folder import COMPARISON_FILE, FIGURE_FILE, PAGE_FILE, ExperimentFolder
from brainfound.metrics.scores import HIGHER_IS_BETTER
from brainfound.metrics.summaries import TRIVIAL
from brainfound.report.cards import format_count, format_number, format_p_value, format_table

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BASELINE, _DPI = "#777777", 140
_LINES = ("--", ":", "-.", (0, (5, 1, 1, 1)))
_LABELS = {"none": "nothing absent", "test": "absent in the test only", "training": "absent in training too"}


def draw_figure(experiment: ExperimentFolder) -> Path | None:
    """Draw report.png into the folder; None where there is nothing to see in a picture: fewer than two scores."""
    rows = pd.DataFrame(experiment.summary["scores"])
    partial = pd.DataFrame(experiment.summary.get("partial_input", []))
    format_table = experiment.table
    if partial.empty and (format_table.empty or format_table[experiment.headline].notna().sum() < 2):
        return None
    figure = Figure(figsize=(6.4, 3.6), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if not partial.empty:
        figure.set_size_inches(6.4, 1.2 + 0.42 * partial["contrasts"].nunique())
        _bars(figure.add_subplot(), partial, experiment)
    elif rows["group"].nunique() > 1:
        _curve(figure.add_subplot(), rows[rows["score"] == experiment.headline], experiment)
    else:
        _points(figure.add_subplot(), format_table, experiment)
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


def _points(axes: Axes, format_table: pd.DataFrame, experiment: ExperimentFolder) -> None:
    """One point per run, its fold's place from left to right; a bar at the mean of each system."""
    names = experiment.system_names if "system" in format_table else []
    parts = [(name, format_table[format_table["system"] == name]) for name in names] if names else [("", format_table)]
    folds = list(dict.fromkeys(format_table["fold"]))
    place = dict(zip(folds, np.linspace(-0.25, 0.25, len(folds)) if len(folds) > 1 else [0.0], strict=True))
    for k, (_, part) in enumerate(parts):
        x = k + np.array([place[fold] for fold in part["fold"]])
        y, colour = part[experiment.headline].to_numpy(float), _COLOURS[k % len(_COLOURS)]
        axes.scatter(x, y, s=22, color=colour, alpha=0.75, linewidths=0, zorder=3)
        axes.hlines(np.nanmean(y) if not np.isnan(y).all() else np.nan, k - 0.35, k + 0.35, color=colour, linewidth=2)
    for k, name in enumerate(experiment.baselines):
        level = format_table[f"{name} {experiment.headline}"].mean()
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


_FEW_SESSIONS = 30
"""A test part smaller than this gets a caution."""
_ABSENCE = {"none": "nothing", "test": "in the test only", "training": "in training too"}


def write_experiment_page(folder: str | Path) -> Path:
    """Write report.md into the folder of an experiment, with report.png and comparison.tsv where there is something.

    Returns:
        The page.

    Raises:
        UsageError, BrainFoundError: as `ExperimentFolder.read`.
    """
    experiment = ExperimentFolder.read(folder)
    compared = experiment.comparison()
    if not compared.empty:
        compared.to_csv(experiment.path / COMPARISON_FILE, sep="\t", index=False)
    picture = draw_figure(experiment)
    parts = [
        f"# {_title(experiment.summary)}",
        _question(experiment.summary),
        "## Scores\n\n" + _scores(experiment),
        "" if picture is None else f"![scores in a picture]({picture.name})",
        _comparison_section(compared),
        "## Data\n\n" + _data(experiment.summary),
        _settings(experiment.summary),
        "## What to be careful about\n\n" + "\n".join(f"- {line}" for line in _cautions(experiment, compared)),
        _command_section(experiment.summary),
    ]
    path = experiment.path / PAGE_FILE
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _title(summary: Mapping[str, Any]) -> str:
    return f"{summary['target']}: {_describe_experiment(summary)}"


def _describe_experiment(summary: Mapping[str, Any]) -> str:
    kind, split = summary["kind"], summary.get("split", {})
    if kind == "evaluation":
        which = "every subset of the contrasts" if summary.get("partial_input") else "scores"
        return f"{which} of {summary['model']} on {summary['on']}"
    ways = {
        "k-fold": f"{split.get('num_folds')}-fold cross-validation",
        "few shots per class": "few-shot curve",
        "few subjects": "curve over the number of training subjects",
        "leave one site out": "each site left out in turn",
    }
    folds = split.get("num_folds", 1)
    way = ways.get(split.get("kind"), "one division of the subjects" if folds == 1 else f"{folds} divisions of a file")
    before = {"comparison": "comparison, ", "partial input": "partial input, "}.get(kind, "")
    return before + way


def _question(summary: Mapping[str, Any]) -> str:
    kind, split = summary["kind"], summary.get("split", {}).get("kind")
    if kind == "comparison":
        return "Which starting point and which way of adapting it does best, on the same subjects, steps and seeds?"
    if kind == "partial input":
        return (
            "What does it cost that contrasts are missing: in the test only, where the model has learnt with all of "
            "them, or in training too, where it never saw them?"
        )
    if kind == "evaluation":
        if summary.get("partial_input"):
            return "What does it cost the model that contrasts are missing in the test?"
        return "How well does the model do on these sessions, beside a baseline that never looks at an image?"
    of = {
        "few shots per class": "How many subjects of each class does it take to learn this?",
        "few subjects": "How many subjects does it take to learn this?",
        "leave one site out": "How well does it do at a site that it never saw?",
        "k-fold": "How well is this learnt, and how much does that hang on who is tested?",
    }
    return of.get(split, "How well is this learnt, and how much do the scores vary?")


def _scores(experiment: ExperimentFolder) -> str:
    partial = experiment.summary.get("partial_input")
    return _partial_table(partial, experiment) if partial else _score_table(experiment)


def _score_table(experiment: ExperimentFolder) -> str:
    rows = experiment.table_rows
    several = any("system" in row for row in rows)
    spread = experiment.kind != "evaluation"
    header = [*(["system"] if several else []), "runs on", "score", "mean" if spread else "value"]
    header += ["± folds", "± seeds", "range"] if spread else []
    header += [*experiment.baselines, "learnt from", "tested on"] if spread else [*experiment.baselines, "sessions"]
    lines = []
    for row in rows:
        line = [*([str(row["system"])] if several else []), row["group"], row["score"], format_number(row["mean"])]
        if spread:
            line += [format_number(row["std_folds"]), format_number(row["std_seeds"])]
            line += [f"{format_number(row['lowest'])} to {format_number(row['highest'])}"]
        line += [format_number(row.get(name)) for name in experiment.baselines]
        line += [format_count(row["num_train"])] if spread else []
        lines.append([*line, format_count(row["num_test"])])
    words = [f"{name}: {'higher' if _higher_is_better(name) else 'lower'} is better." for name in _names(rows)]
    if spread:
        words.append("Sessions are means over runs.")
    return format_table(header, lines) + "\n\n" + " ".join(words)


def _partial_table(rows: Sequence[Mapping[str, Any]], experiment: ExperimentFolder) -> str:
    trained = experiment.kind == "partial input"
    header = ["contrasts", *(["others absent"] if trained else []), experiment.headline]
    header += ["± folds", "± seeds"] if trained else []
    header += ["drop", *(["± drop"] if trained else []), *experiment.baselines]
    header += [*(["learnt from"] if trained else []), "sessions"]
    lines = []
    for row in rows:
        line = [row["contrasts"], *([_ABSENCE[row["absence"]]] if trained else []), format_number(row["mean"])]
        line += [format_number(row["std_folds"]), format_number(row["std_seeds"])] if trained else []
        line += [format_number(row["drop"], sign=True), *([format_number(row["std_drop"])] if trained else [])]
        line += [format_number(row.get(name)) for name in experiment.baselines]
        lines.append([*line, *([format_count(row["num_train"])] if trained else []), format_count(row["num_test"])])
    better = "higher" if _higher_is_better(experiment.headline) else "lower"
    rule = (
        "All rows are of the same sessions: the test sessions that have every contrast."
        if trained
        else "A session counts where it has one of the contrasts; the drop is against full input on the very same "
        "sessions."
    )
    return (
        f"{format_table(header, lines)}\n\n{experiment.headline}: {better} is better. The drop says how much worse it is than "
        f"with full input (a negative one: better). {rule}"
    )


def _comparison_section(compared: pd.DataFrame) -> str:
    if compared.empty:
        return ""
    several = compared["group"].nunique() > 1
    header = [*(["runs on"] if several else []), "system", "value", "95% interval", "difference", "95% interval", "p"]
    header += ["p (Holm)", "cases", "subjects"]
    lines = []
    for row in compared.to_dict(orient="records"):
        line = [str(row["group"])] if several else []
        line += [
            row["system"],
            format_number(row["value"]),
            f"{format_number(row['low'])} to {format_number(row['high'])}",
        ]
        differs = not pd.isna(row["difference"])
        interval = (
            f"{format_number(row['difference_low'])} to {format_number(row['difference_high'])}" if differs else "–"
        )
        line += [
            format_number(row["difference"], sign=True),
            interval,
            format_p_value(row["p"]),
            format_p_value(row["p_holm"]),
        ]
        lines.append([*line, str(row["num_cases"]), str(row["num_subjects"])])
    first, metric = compared["system"].iloc[0], compared["metric"].iloc[0]
    return (
        f"## Against {first}, by {metric}\n\n{format_table(header, lines)}\n\nThe cases of all test parts together; "
        "scores are means over seeds. Intervals are bootstraps over subjects; p is of a permutation that exchanges two "
        "systems' answers within subjects, corrected by Holm for the number of systems."
    )


def _data(summary: Mapping[str, Any]) -> str:
    data = summary["data"]
    there = ", ".join(f"{name} {number_there}" for name, number_there in data["contrasts"].items())
    lines = [
        f"- {data['num_sessions']} sessions of {data['num_subjects']} subjects in the store "
        f"(hash {data['data_hash'][:12]}); sessions with each contrast: {there}.",
    ]
    if "split" in summary:
        split = summary["split"]
        seed = "" if split["seed"] is None else f", seed {split['seed']}"
        lines.append(
            f"- Divided by subject: {split['kind'] or 'a file of their own'}, folds: {split['num_folds']}{seed}. Who "
            f"is where stands in `split.json` (hash {split['sha256'][:12]})."
        )
    if "on" in summary:
        lines.append(f"- Scored: {summary['on']}.")
    return "\n".join(lines)


def _settings(summary: Mapping[str, Any]) -> str:
    if summary["kind"] == "evaluation":
        return ""
    facts = {key: value for key, value in summary["recipe"].items() if value is not None}
    seeds = ", ".join(map(str, summary["seeds"]))
    lines = [f"- {key}: {value}" for key, value in facts.items()] + [f"- seeds: {seeds}"]
    systems = [
        [
            entry["name"] or entry["model"],
            entry["model"],
            entry["adapter"],
            ", ".join(entry["contrasts"]) if entry["contrasts"] else "all",
            ", ".join(entry["overrides"]) or "–",
        ]
        for entry in summary["systems"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    described = format_table(["system", "starts from", "adapter", "contrasts", "set for it alone"], systems)
    return "## Settings\n\n" + "\n".join(lines) + f"\n\n{described}\n\nMade with {versions}."


def _cautions(experiment: ExperimentFolder, compared: pd.DataFrame) -> list[str]:
    summary, lines = experiment.summary, []
    rows = summary.get("partial_input") or summary["scores"]
    tested = min(row["num_test"] for row in rows)
    if tested < _FEW_SESSIONS:
        lines.append(f"Tested on {format_count(tested)} sessions at a time: a few answers move the score.")
    lines += _list_not_better_than_trivial(experiment, rows)
    lines += summary.get("notes", ())
    if summary["kind"] == "evaluation":
        return [*lines, "One model, one set of sessions: nothing here says how another training would have done."]
    if summary["num_runs"] < summary["num_planned"]:
        lines.append(f"Not finished: {summary['num_runs']} of {summary['num_planned']} runs are done.")
    lines.append("± is a standard deviation between runs, not a confidence interval.")
    if len(summary["seeds"]) == 1:
        lines.append("One seed: how much chance in training matters is not known.")
    if summary["split"]["num_folds"] > 1 and summary["split"]["kind"] == "k-fold":
        lines.append("Folds share training subjects: their spread says too little about other cohorts.")
    left_out = max((row.get("num_left_out") or 0 for row in summary.get("partial_input", ())), default=0)
    if left_out:
        lines.append(f"Up to {format_count(left_out)} test sessions per fold lack a contrast and are not scored here.")
    learnt = {row["num_train"] for row in rows}
    if summary["kind"] == "partial input" and len(learnt) > 1:
        lines.append("Sessions without any contrast of a subset cannot be learnt from: see the column learnt from.")
    if summary["kind"] == "comparison":
        lines.append("The same steps are not the same cost: a frozen backbone trains faster than a whole one.")
        if any(entry["overrides"] for entry in summary["systems"]):
            lines.append("Some settings differ between systems: see the last column of the settings.")
        if compared.empty:
            lines.append("No paired comparison: the runs have no cases that can be compared.")
        elif experiment.headline == "auroc":
            lines.append("AUROC over all test parts also compares answers of different models: see each fold's own.")
    return lines


def _list_not_better_than_trivial(experiment: ExperimentFolder, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who is not better than the baseline that never looks at an image."""
    worse = []
    for row in rows:
        if row["score"] != experiment.headline or row["mean"] is None or row.get("trivial") is None:
            continue
        gain = (row["mean"] - row["trivial"]) * (1 if _higher_is_better(experiment.headline) else -1)
        if gain <= 0:
            absence = {"test": " (absent in the test)", "training": " (absent in training)"}
            name = f"{row['contrasts']}{absence.get(row['absence'], '')}" if "contrasts" in row else row["group"]
            worse.append(f"{row['system']}, {name}" if "system" in row else name)
    return [f"Not better than the trivial baseline: {'; '.join(worse)}."] if worse else []


def _command_section(summary: Mapping[str, Any]) -> str:
    if not summary.get("command"):
        return ""
    return (
        "## Made by\n\n"
        f"```\n{summary['command']}\n```\n\nOf files and folders only the names are shown. "
        "`brainfound report FOLDER` writes this page again."
    )


def _higher_is_better(score: str) -> bool:
    return HIGHER_IS_BETTER[score.partition("(")[0]]


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(row["score"]).partition("(")[0] for row in rows))
