"""``brainfound prepare``: a cohort becomes a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from brainfound.cli.terminal import Overrides, Quiet, note, progress_bar
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
    from brainfound.data import prepare as preparing
    from brainfound.data.cohort import Cohort
    from brainfound.data.preprocessing import Preprocessing
    from brainfound.recipes import validate

    overrides = list(set_ or [])
    if contrasts:
        overrides.insert(0, f"contrasts=[{contrasts}]")
    content: dict[str, Any] = {}
    if like is not None:
        content = Preprocessing.load(like / "export" if (like / "export").is_dir() else like).model_dump(mode="json")
    preprocessing = validate(Preprocessing, content, overrides, where="preprocessing")
    cohort = Cohort.read(source)
    with progress_bar("preparing sessions", quiet) as progress:
        made = preparing.prepare(
            cohort, store, preprocessing, workers, mask=mask, overwrite=overwrite, progress=progress
        )
    print(made)
    if len(made.further_scans):
        print(f"{len(made.further_scans)} further scans of a contrast not used, see {store / 'rejected.tsv'}")
    if len(made.rejected):
        first = made.rejected.iloc[0]
        listed = store / "rejected.tsv"
        note(f"{len(made.rejected)} files rejected, see {listed}; the first: {first.file}: {first.reason}")
        raise typer.Exit(EXIT_SOME_REJECTED)
