"""``brainfound evaluate``: a fine-tuned model on a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import AsJson, Quiet, progress_bar


def evaluate(
    model: Annotated[Path, typer.Argument(help="A fine-tuning run, or a bundle.")],
    data: Annotated[Path, typer.Option(help="The store.")],
    without: Annotated[str, typer.Option(help="Contrasts to withhold, comma-separated.")] = "",
    partial_input: Annotated[bool, typer.Option("--partial-input", help="Every subset of the contrasts.")] = False,
    part: Annotated[str, typer.Option(help="Which part of the run's own split: test, validation or train.")] = "test",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a model beside a baseline that never looks at an image.

    On the store of its own run only the test part is scored; on another store all labelled sessions but those of
    subjects that the run learnt from.
    """
    from brainfound.cli.tables import intervals_line, number, print_table, score_with_interval
    from brainfound.contrasts import parse_contrast
    from brainfound.errors import UsageError
    from brainfound.evaluate.scores import IN_TABLES
    from brainfound.predict.evaluation import evaluate as run

    if part not in ("test", "validation", "train"):
        raise UsageError("unknown part", where="--part", got=part, expected="test, validation or train")
    absent = [parse_contrast(name) for name in without.split(",") if name.strip()]
    with progress_bar("scoring sessions", quiet) as progress:
        results = run(model, data, without=absent, partial_input=partial_input, part=part, progress=progress)
    shown = [result.with_intervals().to_dict() for result in results]
    if as_json:
        print(json.dumps(shown, indent=1))
        return
    names = [name for name in IN_TABLES[results[0].task] if name in results[0].scores]
    rows = []
    for result in shown:
        scores = [f"{score_with_interval(result, n)} ({number(result['trivial'].get(n))})" for n in names]
        rows.append(
            [
                "without " + ", ".join(result["without"]) if result["without"] else "all contrasts",
                str(result["num_sessions"]),
                *scores,
            ]
        )
    print_table(["input", "sessions", *(f"{name} (trivial)" for name in names)], rows, title=str(model))
    if line := intervals_line(shown):
        print(line)
