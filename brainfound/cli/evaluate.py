"""``brainfound evaluate`` and ``probe``: a fine-tuned model on a store, and linear probes of frozen embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brainfound.cli.terminal import (
    AsJson,
    Quiet,
    describe_intervals,
    format_number,
    get_command_line,
    intervals_line,
    parse_list,
    print_note,
    print_table,
    progress_bar,
    require_folder,
    score_with_interval,
    with_interval,
)

if TYPE_CHECKING:
    from brainfound.inference.probing import ProbedEmbeddings


def evaluate(
    model: Annotated[Path, typer.Argument(help="A fine-tuning run, a bundle, or an experiment.")],
    data: Annotated[Path, typer.Option(help="The store.")],
    without: Annotated[str, typer.Option(help="Contrasts to withhold, comma-separated.")] = "",
    partial_input: Annotated[bool, typer.Option("--partial-input", help="Score each subset of the contrasts.")] = False,
    part: Annotated[str, typer.Option(help="Part of the run's own split: test, validation or train.")] = "test",
    frozen: Annotated[
        bool, typer.Option(help="Also score the linear model on the frozen backbone; doubles the time.")
    ] = True,
    base: Annotated[
        str | None, typer.Option(help="The starting model, after full fine-tuning (for the frozen baseline).")
    ] = None,
    surface_mm: Annotated[
        float | None,
        typer.Option(help="Segmentation: also surface Dice at this tolerance, HD95 and lesion F1; slower."),
    ] = None,
    empty: Annotated[
        str | None, typer.Option(help="Segmentation: Dice of an empty mask: left_out, nan, one or zero.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the page of this evaluation, report.md.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a fine-tuned model, with a trivial baseline and a linear model on the frozen backbone.

    On the store of its own run, the test part is scored; on another store, all labelled sessions except those of
    training subjects. An experiment over folds and seeds answers with the mean of its runs.
    """
    from brainfound.contrasts import parse_contrast
    from brainfound.experiments.folder import PAGE_FILE
    from brainfound.inference.evaluation import compute_drops
    from brainfound.inference.evaluation import evaluate as run

    if out is not None:
        require_folder(out)
    options: dict[str, Any] = {
        "without": [parse_contrast(name) for name in parse_list(without)],
        "partial_input": partial_input,
        "part": part,
        "out": out,
        "frozen": frozen,
        "base": base,
        "surface_mm": surface_mm,
        "empty": empty,
    }
    with progress_bar("scoring sessions", quiet) as progress:
        results = run(model, data, **options, command=get_command_line(), progress=progress)
    for note in dict.fromkeys(note for result in results for note in result.notes):
        print_note(note)
    contents = [result.with_intervals().to_dict() for result in results]
    if as_json:
        print(json.dumps(contents, indent=1))
        return
    if partial_input:
        _print_partial(contents, compute_drops(results), str(model))
    else:
        _print(contents, str(model))
    if line := intervals_line(contents):
        print(line)
    if (verdict := results[0].verdict) is not None:
        print(verdict["text"])
    if out is not None:
        print(out / PAGE_FILE)


def _print(results: list[dict[str, Any]], title: str) -> None:
    from brainfound.experiments.folder import get_baselines
    from brainfound.metrics.registry import format_score

    names, baselines = _select_metrics(results[0]), list(get_baselines(results[0]))
    rows = []
    for result in results:
        cells = []
        for name in names:
            baseline_scores = "; ".join(format_score(name, result[baseline].get(name)) for baseline in baselines)
            cells.append(f"{score_with_interval(result, name)} ({baseline_scores})")
        rows.append([_input(result), str(result["num_sessions"]), *cells])
    columns = [f"{name} ({'; '.join(baselines)})" for name in names]
    print_table(["input", "sessions", *columns], rows, title=title)


def _print_partial(results: list[dict[str, Any]], drops: list[float], title: str) -> None:
    """One row per subset: scores, drop of the primary metric against full input, and the baselines."""
    from brainfound.experiments.folder import get_baselines
    from brainfound.metrics.registry import PRIMARY_METRIC, format_score

    names, baselines = _select_metrics(results[0]), list(get_baselines(results[0]))
    headline = PRIMARY_METRIC[results[0]["task"]]
    rows = []
    for result, drop in zip(results, drops, strict=True):
        scores = [score_with_interval(result, name) for name in names]
        baseline_scores = [format_score(headline, result[baseline].get(headline)) for baseline in baselines]
        rows.append(
            [_input(result), str(result["num_sessions"]), *scores, format_score(headline, drop), *baseline_scores]
        )
    columns = [*names, f"drop in {headline}", *(f"{baseline} {headline}" for baseline in baselines)]
    print_table(["input", "sessions", *columns], rows, title=title)


def _select_metrics(result: dict[str, Any]) -> list[str]:
    from brainfound.metrics.registry import TABLE_METRICS

    return [name for name in TABLE_METRICS[result["task"]] if name in result["scores"]]


def _input(result: dict[str, Any]) -> str:
    return "without " + ", ".join(result["without"]) if result["without"] else "all contrasts"


def probe(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Runs, exports, or folders or Hub ids of encoders or plain ViTs."),
    ],
    data: Annotated[Path, typer.Option(help="The store.")],
    label: Annotated[str | None, typer.Option(help="A column of the store (age_years, diagnosis, …).")] = None,
    site: Annotated[str, typer.Option(help="The column of the site or scanner.")] = "site",
    slices: Annotated[int, typer.Option(min=1, help="Evenly spaced slices of each session.")] = 32,
    cache: Annotated[Path | None, typer.Option(help="A folder for embeddings, reused by further probes.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds and bootstrap.")] = 0,
    floor: Annotated[bool, typer.Option("--floor", help="Also probe the first model with new weights.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Probe frozen embeddings for a label and the site, with linear models cross-validated by subject.

    A plain ViT that was never trained here is probed with the preprocessing of the store. Several models stand in one
    table, on the same folds. A column that cannot be probed, such as a single site, is left out with a note.

    Where subjects have two sessions, also test-retest reliability (ICC), and how often the nearest other session
    belongs to the same subject.
    """
    from brainfound.inference.probing import probe_models
    from brainfound.metrics.statistics import CONFIDENCE, NUM_RESAMPLES

    with progress_bar("embedding sessions", quiet) as progress:
        results = probe_models(
            models,
            data,
            label,
            site=site,
            num_slices=slices,
            seed=seed,
            cache=cache,
            floor=floor,
            progress=progress,
            notify=print_note,
        )
    if as_json:
        contents = {name: result.to_dict() for name, result in results.items()}
        print(json.dumps(contents if len(contents) > 1 else next(iter(contents.values())), indent=1))
        return
    rows, intervals = [], []
    for name, result in results.items():
        own_rows, own_intervals = _probe_rows(result)
        rows += [[name, *row] if len(results) > 1 else row for row in own_rows]
        intervals += own_intervals
    columns = ["target", "score", "value", "chance level", "sessions"]
    if len(results) > 1:
        print_table(["model", *columns], rows, title=data.name)
    else:
        print_table(columns, rows, title=next(iter(results)))
    if line := describe_intervals(intervals, CONFIDENCE, NUM_RESAMPLES):
        print(line)


def _probe_rows(result: ProbedEmbeddings) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Rows of the table, and the intervals in them."""
    content = result.to_dict()
    rows, intervals = [], []
    if scores := content.get("probed"):
        metrics = {"label": scores["label_metric"], "site": "balanced_accuracy"}
        for column, metric in metrics.items():
            if own := scores[column]:
                words = {"balanced_accuracy": "balanced accuracy", "r2": "R²"}[metric]
                value = with_interval(metric, own["estimate"], own["low"], own["high"])
                chance = format_number(scores[f"{column}_chance"])
                rows.append([content[column], words, value, chance, str(result.num_probed)])
                intervals.append(own)
    if result.retest is not None:
        sessions = str(2 * result.retest.num_subjects)
        found, chance = format_number(result.retest.identification), format_number(result.retest.chance)
        rows += [
            ["the subject", "nearest session", found, chance, sessions],
            ["test and retest", "median ICC", format_number(result.retest.median_icc), format_number(0.0), sessions],
        ]
    return rows, intervals
