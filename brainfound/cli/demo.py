"""``brainfound demo``: the whole pipeline on a small phantom cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import Quiet


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all files of the demo.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes for simulation and preparation.")] = 2,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on a phantom cohort, on a CPU, in minutes, and print a table of scores."""
    from brainfound.cli.terminal import print_table
    from brainfound.demo import WITHHELD_CONTRAST, run_demo

    def log(line: str) -> None:
        if not quiet:
            print(line, flush=True)

    rows = run_demo(out, overwrite=overwrite, workers=workers, log=log)
    print_table(
        (
            "task",
            "metric",
            "trivial",
            "no pretraining",
            f"… without {WITHHELD_CONTRAST}",
            "continued pretraining",
            f"… without {WITHHELD_CONTRAST}",
        ),
        [
            (
                row.task,
                _METRICS[row.metric],
                f"{row.trivial:.2f}",
                *(f"{value:.2f}" for value in (*row.from_start, *row.adapted)),
            )
            for row in rows
        ],
        title=f"{rows[0].num_test} held-out subjects of a phantom cohort",
    )
    print(
        "trivial: knows the training labels and never looks at an image."
        " These brains are simulated: the table says nothing of real ones."
    )
    print(f"a segmentation in native space and its picture: {out / 'predictions'}")


_METRICS = {"auroc": "AUROC ↑", "mae": "MAE, years ↓", "dice": "Dice ↑"}
