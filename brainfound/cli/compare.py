"""``brainfound compare``: fine-tuned systems on the same test sessions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from brainfound.cli.terminal import AsJson, describe_intervals, parse_list, print_table, with_interval

NUM_PERMUTATIONS = 5000


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of finished runs (one, or many folds and seeds) or of evaluate --out.")
    ],
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Compare all pairs; default: all with the first.")
    ] = False,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated metrics; default: those of the score tables.")
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Add the frozen baseline of the first run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs on the same test sessions: scores with intervals, differences with intervals and p values.

    Tests: paired permutation over subjects, DeLong for AUROC, Holm's correction over the compared systems. Folds are
    pooled; scores of several seeds are averaged.
    """
    from brainfound.experiments.folder import to_json_records
    from brainfound.experiments.systems import read_compared_runs
    from brainfound.metrics.comparison import compare as compare_with_first
    from brainfound.metrics.comparison import compare_pairs, score_intervals
    from brainfound.metrics.statistics import CONFIDENCE, NUM_RESAMPLES

    compared = read_compared_runs(runs, frozen=frozen)
    systems, chosen = compared.systems, parse_list(metrics) if metrics else compared.metrics
    bootstrap: dict[str, Any] = {"num_resamples": NUM_RESAMPLES, "confidence": CONFIDENCE}
    first = next(iter(systems))
    if all_pairs:
        tested = compare_pairs(systems, chosen, num_permutations=NUM_PERMUTATIONS, **bootstrap)
        tables = [score_intervals(seeds, chosen, **bootstrap).assign(system=name) for name, seeds in systems.items()]
        rows = [row for table in tables for row in to_json_records(table)]
    else:
        tested = compare_with_first(systems, first, chosen, num_permutations=NUM_PERMUTATIONS, **bootstrap)
        rows = to_json_records(tested)
    pairs = to_json_records(tested) if all_pairs else []
    content = {
        "task": compared.task,
        "target": compared.target,
        "num_seeds": {name: len(seeds) for name, seeds in systems.items()},
        "against": None if all_pairs else first,
        "confidence": CONFIDENCE,
        "num_resamples": NUM_RESAMPLES,
        "num_permutations": NUM_PERMUTATIONS,
        "scores": rows,
    } | ({"pairs": pairs} if all_pairs else {})
    if as_json:
        print(json.dumps(content, indent=1))
        return
    _print(content, rows, pairs, chosen)


def _print(
    content: dict[str, Any], rows: list[dict[str, Any]], pairs: list[dict[str, Any]], metrics: list[str]
) -> None:
    sessions = max((row["num_cases"] for row in rows), default=0)
    subjects = [row["num_subjects"] for row in rows if row["num_subjects"]]
    title = f"{content['task']} of {content['target']}: {sessions} sessions of {max(subjects, default=0)} subjects"
    order = {name: k for k, name in enumerate(metrics)}
    rows = sorted(rows, key=lambda row: order[row["metric"]])
    if pairs:
        print_table(["score", "system", "value", "subjects"], [_score_cells(row) for row in rows], title)
        cells = [[row["metric"], row["system"], row["against"], *_test_cells(row, pairs)] for row in pairs]
        print_table(["score", "system", "against", "difference", *_test_columns(pairs)], cells)
    else:
        difference = f"difference from {content['against']}"
        columns = ["score", "system", "value", "subjects", difference, *_test_columns(rows)]
        print_table(columns, [[*_score_cells(row), *_test_cells(row, rows)] for row in rows], title)
    scored = [row for row in rows if row["value"] is not None]
    if line := describe_intervals(scored, content["confidence"], content["num_resamples"]):
        print(line)
    num_tests = len(pairs or rows) // max(len(metrics), 1) - (0 if pairs else 1)
    print(
        f"p: two-sided paired permutation test that exchanges systems within subjects; Holm: corrected over "
        f"{num_tests} comparison{'s' if num_tests != 1 else ''} of a score"
    )
    seeds = {count for count in content["num_seeds"].values()}
    if max(seeds) > 1:
        print(f"scores are means over {max(seeds)} seeds")


def _score_cells(row: dict[str, Any]) -> list[str]:
    from brainfound.metrics.registry import METRICS, metric_name

    better = METRICS[metric_name(row["metric"])].better
    value = with_interval(row["metric"], row["value"], row["low"], row["high"])
    return [f"{row['metric']} ({better} is better)", row["system"], value, str(row["num_subjects"])]


def _test_columns(rows: list[dict[str, Any]]) -> list[str]:
    """The columns of p values, with DeLong's for AUROC."""
    delong = any(row["p_delong"] is not None for row in rows)
    return ["p", "p (Holm)", *(["DeLong", "DeLong (Holm)"] if delong else [])]


def _test_cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    names = ["p", "p_holm", *(["p_delong", "p_delong_holm"] if len(_test_columns(rows)) > 2 else [])]
    difference = with_interval(row["metric"], row["difference"], row["difference_low"], row["difference_high"])
    return [difference, *(_format_p(row[name]) for name in names)]


def _format_p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
