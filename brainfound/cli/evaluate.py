"""``brainfound evaluate``: a fine-tuned model on a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brainfound.cli.terminal import AsJson, Quiet, progress_bar, typed_command

if TYPE_CHECKING:
    from brainfound.train.session_scores import SessionScores


def evaluate(
    model: Annotated[Path, typer.Argument(help="A fine-tuning run, or a bundle.")],
    data: Annotated[Path, typer.Option(help="The store.")],
    without: Annotated[str, typer.Option(help="Contrasts to withhold, comma-separated.")] = "",
    partial_input: Annotated[bool, typer.Option("--partial-input", help="Every subset of the contrasts.")] = False,
    part: Annotated[str, typer.Option(help="Which part of the run's own split: test, validation or train.")] = "test",
    out: Annotated[Path | None, typer.Option(help="A folder for the page of this evaluation, report.md.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a model beside a baseline that never looks at an image.

    On the store of its own run only the test part is scored; on another store all labelled sessions but those of
    subjects that the run learnt from.
    """
    from brainfound.contrasts import parse_contrast
    from brainfound.errors import UsageError
    from brainfound.predict.evaluation import evaluate as run
    from brainfound.report.experiment import PAGE_FILE

    if part not in ("test", "validation", "train"):
        raise UsageError("unknown part", where="--part", got=part, expected="test, validation or train")
    absent = [parse_contrast(name) for name in without.split(",") if name.strip()]
    options: dict[str, Any] = {"without": absent, "partial_input": partial_input, "part": part, "out": out}
    with progress_bar("scoring sessions", quiet) as progress:
        results = run(model, data, **options, command=typed_command(), progress=progress)
    if as_json:
        print(json.dumps([result.to_dict() for result in results], indent=1))
        return
    if partial_input:
        _print_partial(results, str(model))
    else:
        _print(results, str(model))
    if out is not None:
        print(out / PAGE_FILE)


def _print(results: list[SessionScores], title: str) -> None:
    from brainfound.cli.tables import number, print_table
    from brainfound.evaluate.scores import IN_TABLES

    names = [name for name in IN_TABLES[results[0].task] if name in results[0].scores]
    rows = []
    for result in results:
        scores = [f"{number(result.scores.get(n))} ({number(result.trivial.get(n))})" for n in names]
        rows.append([_input(result), str(len(result.cases)), *scores])
    print_table(["input", "sessions", *(f"{name} (trivial)" for name in names)], rows, title=title)


def _print_partial(results: list[SessionScores], title: str) -> None:
    """One row per subset with the drop of the headline score against full input; below them each baseline."""
    from brainfound.cli.tables import number, print_table
    from brainfound.evaluate.score_files import baselines_of
    from brainfound.evaluate.scores import HEADLINE, IN_TABLES
    from brainfound.predict.evaluation_files import drops

    names = [name for name in IN_TABLES[results[0].task] if name in results[0].scores]
    rows = []
    for result, lost in zip(results, drops(results), strict=True):
        scores = [number(result.scores.get(name)) for name in names]
        rows.append([_input(result), str(len(result.cases)), *scores, number(lost)])
    for name, scores_of in baselines_of(results[0].to_dict()).items():
        of_all = [number(scores_of.get(metric)) for metric in names]
        rows.append([f"({name}, all contrasts)", str(len(results[0].cases)), *of_all, number(None)])
    print_table(["input", "sessions", *names, f"drop in {HEADLINE[results[0].task]}"], rows, title=title)


def _input(result: SessionScores) -> str:
    return "without " + ", ".join(result.without) if result.without else "all contrasts"
