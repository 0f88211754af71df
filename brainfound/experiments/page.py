"""The page of an experiment, report.md with report.png, built only from the files of its folder.

The page holds the question, the scores with their baselines, the paired comparison, the data, the settings, cautions
and the command. The picture shows a few-shot curve where the numbers of training subjects differ, bars where contrasts
are absent, the answers of an evaluation, and otherwise one point per run; baselines are grey lines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from brainfound.experiments.folder import COMPARISON_FILE, FIGURE_FILE, PAGE_FILE, TRIVIAL, VERDICT, ExperimentFolder
from brainfound.files import write_atomically
from brainfound.metrics.registry import METRICS, format_score, metric_name
from brainfound.metrics.statistics import explain_missing_interval
from brainfound.report.cards import format_table
from brainfound.report.figures import PALETTE, save_figure
from brainfound.report.run_page import plot_cases

_FEW_SESSIONS = 30
"""Smaller test parts get a caution."""
_ABSENCE = {"none": "nothing", "test": "in the test only", "training": "in training too"}
_ABSENCE_LABELS = {"none": "nothing absent", "test": "absent in the test only", "training": "absent in training too"}
_COLOURS = (*PALETTE, "#000000")
_BASELINE = "#777777"
_LINES = ("--", ":", "-.", (0, (5, 1, 1, 1)))


def write_experiment_page(folder: str | Path) -> Path:
    """Write report.md into the folder of an experiment, with report.png and comparison.tsv where they have content."""
    experiment = ExperimentFolder.read(folder)
    summary, compared = experiment.summary, experiment.comparison()
    if not compared.empty:
        compared.to_csv(experiment.path / COMPARISON_FILE, sep="\t", index=False)
    picture = draw_figure(experiment)
    parts = [
        f"# {summary['target']}: {_describe_experiment(summary)}",
        _question(summary),
        " ".join(_verdict(experiment)),
        "## Scores\n\n" + (_partial_table if summary.get("partial_input") else _score_table)(experiment),
        "" if picture is None else f"![scores in a picture]({picture.name})",
        _comparison_section(compared),
        "## Data\n\n" + _data(summary),
        _settings(summary),
        "## What to be careful about\n\n" + "\n".join(f"- {line}" for line in _cautions(experiment, compared)),
        _command_section(summary),
    ]
    path = experiment.path / PAGE_FILE
    write_atomically(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


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
            "What is the cost of missing contrasts: in the test only, for a model trained with all of them, or in "
            "training too, for a model that never read them?"
        )
    if kind == "evaluation":
        if summary.get("partial_input"):
            return "What is the cost of contrasts that are missing in the test?"
        return "How well does the model do on these sessions, compared with a baseline that never reads an image?"
    questions = {
        "few shots per class": "How many subjects of each class does it take to learn this?",
        "few subjects": "How many subjects does it take to learn this?",
        "leave one site out": "How well does it do at a site that was not in training?",
        "k-fold": "How well is this learnt, and how much does that depend on the subjects that are tested?",
    }
    return questions.get(split, "How well is this learnt, and how much do the scores vary?")


def _score_table(experiment: ExperimentFolder) -> str:
    rows = experiment.table_rows
    several = any("system" in row for row in rows)
    spread = experiment.kind != "evaluation"
    header = [*(["system"] if several else []), "runs on", "score", "mean" if spread else "value"]
    header += ["± folds", "± seeds", "range"] if spread else ["95% interval"]
    header += [*experiment.baselines, "learnt from", "tested on"] if spread else [*experiment.baselines, "sessions"]
    lines = []
    for row in rows:
        values = ["mean", *(["std_folds", "std_seeds"] if spread else [])]
        line = [*([str(row["system"])] if several else []), row["group"], row["score"], *_cells(row, *values)]
        ends = (row["lowest"], row["highest"]) if spread else _ends(row)
        line += [_interval(row["score"], *ends)]
        line += _cells(row, *experiment.baselines)
        line += [_count(row["num_train"])] if spread else []
        lines.append([*line, _count(row["num_test"])])
    names = dict.fromkeys(metric_name(row["score"]) for row in rows)
    words = [f"{name}: {METRICS[name].better} is better." for name in names]
    if spread:
        words.append("Sessions are means over runs.")
    elif found := [row["interval"] for row in rows if "interval" in row]:
        words.append("Intervals are bootstraps over subjects.")
        if missing := [own["num_subjects"] for own in found if own["low"] is None]:
            words.append(f"–: {explain_missing_interval(min(missing))}.")
    return format_table(header, lines) + "\n\n" + " ".join(words)


def _ends(row: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of a score of an evaluation; nan where it has none."""
    own = row.get("interval") or {"low": None, "high": None}
    low, high = (math.nan if own[end] is None else own[end] for end in ("low", "high"))
    return low, high


def _partial_table(experiment: ExperimentFolder) -> str:
    trained = experiment.kind == "partial input"
    header = ["contrasts", *(["others absent"] if trained else []), experiment.headline]
    header += ["± folds", "± seeds"] if trained else []
    header += ["drop", *(["± drop"] if trained else []), *experiment.baselines]
    header += [*(["learnt from"] if trained else []), "sessions"]
    lines = []
    for row in experiment.summary["partial_input"]:
        line = [row["contrasts"], *([_ABSENCE[row["absence"]]] if trained else [])]
        line += _cells(row, "mean", *(["std_folds", "std_seeds"] if trained else []))
        line += [format_score(row["score"], row["drop"], sign=True), *(_cells(row, "std_drop") if trained else [])]
        line += _cells(row, *experiment.baselines)
        lines.append([*line, *([_count(row["num_train"])] if trained else []), _count(row["num_test"])])
    rule = (
        "All rows are of the same sessions: the test sessions that have every contrast."
        if trained
        else "A session counts where it has one of the contrasts; the drop is against full input on the very same "
        "sessions."
    )
    better = METRICS[experiment.headline].better
    return (
        f"{format_table(header, lines)}\n\n{experiment.headline}: {better} is better. The drop says how much worse it "
        f"is than with full input (a negative one: better). {rule}"
    )


def _comparison_section(compared: pd.DataFrame) -> str:
    if compared.empty:
        return ""
    several = compared["group"].nunique() > 1
    first, score = compared["system"].iloc[0], compared["metric"].iloc[0]
    header = [*(["runs on"] if several else []), "system", "value", "95% interval", "difference", "95% interval", "p"]
    header += ["p (Holm)", "cases", "subjects"]
    lines = []
    for row in compared.to_dict(orient="records"):
        line = [str(row["group"])] if several else []
        line += [row["system"], format_score(score, row["value"]), _interval(score, row["low"], row["high"])]
        line.append(format_score(score, row["difference"], sign=True))
        ends = row["difference_low"], row["difference_high"]
        line.append(_interval(score, *ends))
        line += [_p_value(row["p"]), _p_value(row["p_holm"])]
        lines.append([*line, str(row["num_cases"]), str(row["num_subjects"])])
    missing = compared.loc[compared["value"].notna() & compared["low"].isna(), "num_subjects"]
    why = f"; {explain_missing_interval(int(missing.min()))}" if len(missing) else ""
    return (
        f"## Against {first}, by {score}\n\n{format_table(header, lines)}\n\nThe cases of all test parts together; "
        f"scores are means over seeds. Intervals are bootstraps over subjects{why}; p is of a permutation that "
        "exchanges two systems' answers within subjects, corrected by Holm for the number of systems."
    )


def _cells(row: Mapping[str, Any], *columns: str) -> list[str]:
    """Values of a row in the format of its score."""
    return [format_score(row["score"], row.get(column)) for column in columns]


def _interval(score: str, low: float, high: float) -> str:
    return "–" if pd.isna(low) else f"{format_score(score, low)} to {format_score(score, high)}"


def _count(value: float | None) -> str:
    """A mean number of sessions."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def _p_value(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _data(summary: Mapping[str, Any]) -> str:
    data = summary["data"]
    counts = ", ".join(f"{name} {count}" for name, count in data["contrasts"].items())
    lines = [
        f"- {data['num_sessions']} sessions of {data['num_subjects']} subjects in the store "
        f"(hash {data['data_hash'][:12]}); sessions with each contrast: {counts}."
    ]
    if "split" in summary:
        split = summary["split"]
        seed = "" if split["seed"] is None else f", seed {split['seed']}"
        lines.append(
            f"- Divided by subject: {split['kind'] or 'a file of their own'}, folds: {split['num_folds']}{seed}. The "
            f"parts are in `split.json` (hash {split['sha256'][:12]})."
        )
    if "on" in summary:
        lines.append(f"- Scored: {summary['on']}.")
    return "\n".join(lines)


def _settings(summary: Mapping[str, Any]) -> str:
    if summary["kind"] == "evaluation":
        return ""
    facts = {key: value for key, value in summary["recipe"].items() if value is not None}
    facts["seeds"] = ", ".join(map(str, summary["seeds"]))
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    systems = [
        [entry["name"] or entry["model"], entry["model"], entry["adapter"],
         ", ".join(entry["contrasts"] or ["all"]), ", ".join(entry["overrides"]) or "–"]
        for entry in summary["systems"]
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    described = format_table(["system", "starts from", "adapter", "contrasts", "set for it alone"], systems)
    return "## Settings\n\n" + "\n".join(lines) + f"\n\n{described}\n\nMade with {versions}."


def _cautions(experiment: ExperimentFolder, compared: pd.DataFrame) -> list[str]:
    summary, lines = experiment.summary, []
    rows = summary.get("partial_input") or summary["scores"]
    tested = min(row["num_test"] for row in rows)
    if tested < _FEW_SESSIONS:
        lines.append(f"Tested on {_count(tested)} sessions at a time: a few answers move the score.")
    lines += summary.get("notes", ())
    if summary["kind"] == "evaluation":
        return [*lines, "One model, one set of sessions: how much another training would differ is unknown."]
    if summary["num_runs"] < summary["num_planned"]:
        lines.append(f"Not finished: {summary['num_runs']} of {summary['num_planned']} runs are done.")
    lines.append("± is a standard deviation between runs, not a confidence interval.")
    if len(summary["seeds"]) == 1:
        lines.append("One seed: how much chance in training matters is unknown.")
    if summary["split"]["num_folds"] > 1 and summary["split"]["kind"] == "k-fold":
        lines.append("Folds share training subjects: their spread underestimates that of other cohorts.")
    left_out = max((row.get("num_left_out") or 0 for row in summary.get("partial_input", ())), default=0)
    if left_out:
        lines.append(f"Up to {_count(left_out)} test sessions per fold lack a contrast and are not scored here.")
    if summary["kind"] == "partial input" and len({row["num_train"] for row in rows}) > 1:
        lines.append("Sessions without any contrast of a subset are not trained on: see the column learnt from.")
    if summary["kind"] == "comparison":
        lines.append("The same steps are not the same cost: a frozen backbone trains faster than a whole one.")
        if any(entry["overrides"] for entry in summary["systems"]):
            lines.append("Some settings differ between systems: see the last column of the settings.")
        if compared.empty:
            lines.append("No paired comparison: the runs have no cases that can be compared.")
        elif experiment.headline == "auroc":
            lines.append("AUROC over all test parts also compares answers of different models: see that of each fold.")
    return lines


def _verdict(experiment: ExperimentFolder) -> list[str]:
    """Sentences on which baselines the mean scores beat, and on the verdicts of single runs."""
    if own := experiment.summary.get("verdict"):
        return [f"**{own['text']}**"]
    rows = experiment.summary.get("partial_input") or experiment.summary["scores"]
    rows = [row for row in rows if row["score"] == experiment.headline and row["mean"] is not None]
    several, sentences = len(rows) > 1, []
    for baseline in experiment.baselines:
        names = [_name(row) for row in rows if row.get(baseline) is not None and _is_as_good(row, baseline)]
        if names:
            which = f": {'; '.join(names)}" if several else ""
            sentences.append(f"**Not better than the {baseline} baseline{which}.**")
        elif any(row.get(baseline) is not None for row in rows):
            sentences.append(f"Better than the {baseline} baseline{' in every row' if several else ''}, on average.")
    if VERDICT in experiment.table:
        counts = experiment.table[VERDICT].value_counts()
        found = ", ".join(f"{label} in {count}" for label, count in counts.items())
        sentences.append(f"Verdict of each run (`scores.json`), of {counts.sum()}: {found}.")
    return sentences


def _is_as_good(row: Mapping[str, Any], baseline: str) -> bool:
    return METRICS[row["score"]].drop(row[baseline], row["mean"]) >= 0


def _name(row: Mapping[str, Any]) -> str:
    """A row of the scores in words: its system, and its group or contrasts."""
    absence = {"test": " (absent in the test)", "training": " (absent in training)"}
    name = f"{row['contrasts']}{absence.get(row['absence'], '')}" if "contrasts" in row else row["group"]
    return f"{row['system']}, {name}" if "system" in row else str(name)


def _command_section(summary: Mapping[str, Any]) -> str:
    if not summary.get("command"):
        return ""
    return (
        "## Made by\n\n"
        f"```\n{summary['command']}\n```\n\nOf files and folders only the names are shown. "
        "`brainfound report FOLDER` writes this page again."
    )


def draw_figure(experiment: ExperimentFolder) -> Path | None:
    """Draw report.png into the folder; None where there are fewer than two scores.

    Of an evaluation with full input the answers are drawn.
    """
    rows = pd.DataFrame(experiment.summary["scores"])
    partial = pd.DataFrame(experiment.summary.get("partial_input", []))
    runs = experiment.table
    if experiment.kind == "evaluation" and partial.empty:
        return plot_cases(experiment.cases, path=experiment.path / FIGURE_FILE, target=experiment.summary["target"])
    if partial.empty and (runs.empty or runs[experiment.headline].notna().sum() < 2):
        return None
    figure = Figure(figsize=(6.4, 3.6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    if not partial.empty:
        figure.set_size_inches(6.4, 1.2 + 0.42 * partial["contrasts"].nunique())
        _bars(figure.add_subplot(), partial, experiment)
    elif rows["group"].nunique() > 1:
        _curve(figure.add_subplot(), rows[rows["score"] == experiment.headline], experiment)
    else:
        _points(figure.add_subplot(), runs, experiment)
    return save_figure(figure, experiment.path / FIGURE_FILE)


def _curve(axes: Axes, rows: pd.DataFrame, experiment: ExperimentFolder) -> None:
    """The headline score over the number of training sessions, with a band of its standard deviation over seeds."""
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


def _points(axes: Axes, runs: pd.DataFrame, experiment: ExperimentFolder) -> None:
    """One point per run, folds from left to right, and a bar at the mean of each system."""
    names = experiment.system_names if "system" in runs else []
    parts = [(name, runs[runs["system"] == name]) for name in names] if names else [("", runs)]
    folds = list(dict.fromkeys(runs["fold"]))
    place = dict(zip(folds, np.linspace(-0.25, 0.25, len(folds)) if len(folds) > 1 else [0.0], strict=True))
    for k, (_, part) in enumerate(parts):
        x = k + np.array([place[fold] for fold in part["fold"]])
        y, colour = part[experiment.headline].to_numpy(float), _COLOURS[k % len(_COLOURS)]
        axes.scatter(x, y, s=22, color=colour, alpha=0.75, linewidths=0, zorder=3)
        axes.hlines(np.nanmean(y) if not np.isnan(y).all() else np.nan, k - 0.35, k + 0.35, color=colour, linewidth=2)
    for k, name in enumerate(experiment.baselines):
        level = runs[f"{name} {experiment.headline}"].mean()
        axes.axhline(level, color=_BASELINE, linestyle=_LINES[k % len(_LINES)], linewidth=1, label=name)
    axes.set_xticks(range(len(parts)), [name for name, _ in parts], rotation=20 if len(parts) > 4 else 0, fontsize=8)
    axes.set_xlim(-0.6, len(parts) - 0.4)
    meaning = f"folds 1–{len(folds)} from left to right" if len(folds) > 1 else "one point per seed"
    axes.set(ylabel=experiment.headline, xlabel=meaning)
    _finish(axes)


def _bars(axes: Axes, rows: pd.DataFrame, experiment: ExperimentFolder) -> None:
    """Bars per subset and kind of absence, with the standard deviation over folds, or over the seeds of one fold."""
    subsets = list(dict.fromkeys(rows["contrasts"]))
    kinds = [kind for kind in _ABSENCE_LABELS if kind in set(rows["absence"])]
    height = 0.36
    for k, kind in enumerate(kinds):
        part = rows[rows["absence"] == kind].set_index("contrasts")
        offset = 0.0 if kind == "none" else height * (0.5 if kind == "training" else -0.5)
        y = np.array([subsets.index(name) for name in part.index]) + offset
        whiskers = part["std_folds"].fillna(part["std_seeds"]).fillna(0).to_numpy(float)
        axes.barh(
            y, part["mean"], height, xerr=whiskers, color=_COLOURS[k], label=_ABSENCE_LABELS[kind], alpha=0.85,
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
