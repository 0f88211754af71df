"""`brainfound phantom`: a synthetic multi-contrast BIDS cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import Quiet, progress_bar


def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    subjects: Annotated[int, typer.Option("--subjects", "-n", help="Number of subjects.")] = 20,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    spacing_mm: Annotated[float, typer.Option("--spacing-mm", help="Grid in mm; sites vary around it.")] = 1.0,
    contrasts: Annotated[str, typer.Option(help="Comma-separated contrasts.")] = "T1w,T1ce,T2w,FLAIR,DWI,ADC",
    sites: Annotated[int, typer.Option(help="Number of sites (scanners).")] = 3,
    missing: Annotated[float, typer.Option(help="Probability that a scan is missing.")] = 0.1,
    min_age: Annotated[float, typer.Option(help="Youngest age in years.")] = 20.0,
    max_age: Annotated[float, typer.Option(help="Oldest age in years.")] = 90.0,
    label_maps: Annotated[
        Path | None, typer.Option("--label-maps", help="Paint these FreeSurfer-numbered label volumes instead.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Write a synthetic multi-contrast BIDS cohort with ages, sites, lesion masks and missing scans."""
    from brainfound.phantom import write_phantom_cohort

    with progress_bar("simulating subjects", quiet) as progress:
        write_phantom_cohort(
            out,
            subjects,
            seed,
            spacing_mm=spacing_mm,
            contrasts=[name.strip() for name in contrasts.split(",") if name.strip()],
            missing_probability=missing,
            age_range_years=(min_age, max_age),
            num_sites=sites,
            label_maps=label_maps,
            workers=workers,
            progress=progress,
        )
    typer.echo(f"{out}: {subjects} subjects")
