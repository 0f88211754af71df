"""``brainfound probe``: linear probes of frozen embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brainfound.cli.terminal import AsJson, Quiet, progress_bar

if TYPE_CHECKING:
    from brainfound.metrics.statistics import Interval


def probe(
    model: Annotated[str, typer.Argument(help="A run, its export folder, or the Hub id of an encoder.")],
    data: Annotated[Path, typer.Option(help="The store.")],
    label: Annotated[str | None, typer.Option(help="A column of the store (age_years, diagnosis, …).")] = None,
    site: Annotated[str, typer.Option(help="The column of the site or scanner.")] = "site",
    slices: Annotated[int, typer.Option(min=1, help="Evenly spaced slices of each session.")] = 32,
    cache: Annotated[Path | None, typer.Option(help="A folder for embeddings, reused by further probes.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of folds and bootstrap.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Probe frozen embeddings for a label and the site, with linear models cross-validated by subject.

    Where subjects have two sessions, also test-retest reliability (ICC), and how often the nearest other session
    belongs to the same subject.
    """
    from brainfound.cli.terminal import format_number, print_table
    from brainfound.inference.probing import probe as run

    with progress_bar("embedding sessions", quiet) as progress:
        found = run(model, data, label, site=site, num_slices=slices, seed=seed, cache=cache, progress=progress)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
        return
    rows = []
    if found.probed is not None:
        scores = found.probed
        label_words = {"balanced_accuracy": "balanced accuracy", "r2": "R²"}[scores.label_metric]
        rows.append(
            [
                str(label),
                label_words,
                _with_interval(scores.label),
                format_number(scores.label_chance),
                str(found.num_probed),
            ]
        )
        rows.append(
            [
                site,
                "balanced accuracy",
                _with_interval(scores.site),
                format_number(scores.site_chance),
                str(found.num_probed),
            ]
        )
    if found.retest is not None:
        sessions = str(2 * found.retest.num_subjects)
        rows.append(["the subject", "nearest session", format_number(found.retest.identification),
                     format_number(found.retest.chance), sessions])  # fmt: skip
        rows.append(
            ["test and retest", "median ICC", format_number(found.retest.median_icc), format_number(0.0), sessions]
        )
    print_table(
        ["what they tell", "score", "value (95% interval)", "knowing nothing", "sessions"], rows, title=str(model)
    )


def _with_interval(interval: Interval) -> str:
    from brainfound.cli.terminal import format_number

    return f"{format_number(interval.estimate)} ({format_number(interval.low)} to {format_number(interval.high)})"
