"""``brainfound phantom`` and ``demo``: a simulated cohort, and the whole pipeline on one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import Quiet, parse_list, print_table, progress_bar, require_folder
from brainfound.errors import UsageError


def demo(
    out: Annotated[Path, typer.Option(help="Folder for all files of the demo.")] = Path("demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes for simulation and preparation.")] = 2,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline on a phantom cohort, on a CPU, in minutes, and print a table of scores."""
    from brainfound.demo import WITHHELD_CONTRAST, run_demo

    def log(line: str) -> None:
        if not quiet:
            print(line, flush=True)

    require_folder(out)
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
        title=f"{rows[0].num_test} subjects of a phantom cohort, held out of the fine-tuning",
    )
    print(
        "trivial: knows the training labels and never looks at an image."
        " These brains are simulated: the table says nothing of real ones."
    )
    print(f"a segmentation in native space and its picture: {out / 'predictions'}")


_METRICS = {"auroc": "AUROC ↑", "mae": "MAE, years ↓", "dice": "Dice ↑"}


def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    subjects: Annotated[int, typer.Option("--subjects", "-n", min=1, help="Number of subjects.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    spacing_mm: Annotated[
        float, typer.Option("--spacing-mm", min=0.5, max=8, help="Grid in mm; sites vary around it.")
    ] = 1.0,
    contrasts: Annotated[str, typer.Option(help="Comma-separated contrasts.")] = "T1w,T1ce,T2w,FLAIR,DWI,ADC",
    sites: Annotated[int, typer.Option(min=1, help="Number of sites (scanners).")] = 3,
    missing: Annotated[float, typer.Option(min=0, max=1, help="Probability that a scan is missing.")] = 0.1,
    min_age: Annotated[float, typer.Option(min=18, max=110, help="Youngest age in years.")] = 20.0,
    max_age: Annotated[float, typer.Option(min=18, max=110, help="Oldest age in years.")] = 90.0,
    label_maps: Annotated[
        Path | None, typer.Option("--label-maps", help="Paint these FreeSurfer-numbered label volumes instead.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Write a synthetic multi-contrast BIDS cohort with ages, sites, lesion masks and missing scans."""
    from brainfound.phantom import write_phantom_cohort

    require_folder(out)
    if min_age > max_age:
        got, remedy = f"{min_age:g} above {max_age:g}", "Give --min-age below --max-age"
        raise UsageError("the youngest age is above the oldest", where="--min-age", got=got, remedy=remedy)
    with progress_bar("simulating subjects", quiet) as progress:
        write_phantom_cohort(
            out,
            subjects,
            seed,
            spacing_mm=spacing_mm,
            contrasts=parse_list(contrasts),
            missing_probability=missing,
            age_range_years=(min_age, max_age),
            num_sites=sites,
            label_maps=label_maps,
            workers=workers,
            progress=progress,
        )
    typer.echo(f"{out}: {subjects} subjects")
