"""``brainfound embed``: files in, volume embeddings out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.predict import Inputs, predict
from brainfound.cli.terminal import Quiet


def embed(
    model: Annotated[str, typer.Argument(help="The export of a pretraining run, or a Hub id of one.")],
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for the embeddings.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do again what is there already.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    quiet: Quiet = False,
) -> None:
    """Embed one session or a whole cohort with an encoder: one vector (.npy) and a JSON each."""
    predict(model, inputs, out, False, overwrite, device, quiet)
