"""``brainfound prepare``: a cohort becomes a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import Overrides, Quiet, progress_bar
from brainfound.errors import EXIT_SOME_REJECTED


def prepare(
    source: Annotated[Path, typer.Argument(help="A BIDS folder, or a manifest (.tsv, .csv, .parquet).")],
    store: Annotated[Path, typer.Argument(help="The folder to make.")],
    contrasts: Annotated[str | None, typer.Option(help="Comma-separated, for example T1w,T2w,FLAIR.")] = None,
    mask: Annotated[str, typer.Option(help="The label-map column that becomes the mask (mask, dseg, …).")] = "mask",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    like: Annotated[Path | None, typer.Option(help="Prepare exactly as a model's training data: its folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store made of something else.")] = False,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Prepare a cohort: check, orient, resample, scale, and store every session as slices.

    Exit code 3 if some files were rejected; STORE/rejected.tsv says which and why.
    """
    from brainfound.data.cohort import Cohort
    from brainfound.data import prepare as preparing
    from brainfound.data.preprocessing import Preprocessing
    from brainfound.recipes import validate

    overrides = list(set_ or [])
    if contrasts:
        overrides.insert(0, f"contrasts=[{contrasts}]")
    base = {} if like is None else Preprocessing.load(like / "export" if (like / "export").is_dir() else like)
    content = base if isinstance(base, dict) else base.model_dump(mode="json")
    preprocessing = validate(Preprocessing, content, overrides, where="preprocessing")
    cohort = Cohort.read(source)
    with progress_bar("preparing sessions", quiet) as progress:
        made = preparing.prepare(
            cohort, store, preprocessing, workers, mask=mask, overwrite=overwrite, progress=progress
        )
    print(made)
    if len(made.rejected):
        print(f"{len(made.rejected)} files rejected, see {store / 'rejected.tsv'}; the first: {made.rejected['reason'][0]}")
        raise typer.Exit(EXIT_SOME_REJECTED)
