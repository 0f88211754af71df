"""``brainfound report``: the page of an experiment, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of finetune with several runs, or of evaluate --out.")],
) -> None:
    """Write report.md and report.png of an experiment again, from the files of its folder alone.

    No model and no store is needed. Of an experiment that is not finished the page says how far it is.
    """
    from brainfound.experiments.page import write_experiment_page

    print(write_experiment_page(folder))
