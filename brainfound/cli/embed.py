"""``brainfound embed``: files in, volume embeddings out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.predict import Inputs, predict_inputs
from brainfound.cli.terminal import Hooks, Quiet


def embed(
    model: Annotated[str, typer.Argument(help="A run, its export folder, or the Hub id of an encoder.")],
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for the embeddings.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do again what is there already.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    hook: Hooks = None,
    quiet: Quiet = False,
) -> None:
    """Embed one session or a whole cohort: one vector (.npy) and a JSON each.

    A classification or regression model gives the volume embedding that its head reads.
    """
    from brainfound.inference.loading import load

    predict_inputs(load(model, device, hook or ()).as_encoder(), inputs, out, False, overwrite, quiet)
