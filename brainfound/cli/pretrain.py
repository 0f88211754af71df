"""``brainfound pretrain``: continue the self-supervised pretraining of a 2-D ViT on a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import Overrides, Quiet, require_new_run


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`brainfound list recipes`) or file.")],
    data: Annotated[Path | None, typer.Option(help="The store; default: `data` of the recipe.")] = None,
    init: Annotated[
        str | None, typer.Option(help='A Hub id, a folder, or "none" for new weights; default: of the recipe.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default: runs/RECIPE.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in the run folder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Two steps, then report speed and memory.")] = False,
    gpus: Annotated[int | None, typer.Option(help="With --dry-run: estimate for this many GPUs of --gpu.")] = None,
    gpu: Annotated[str | None, typer.Option(help="With --dry-run: a kind of GPU, such as A100-80GB or H100.")] = None,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Pretrain on the slices of a store; on many GPUs with `accelerate launch -m brainfound pretrain …`.

    The run folder holds recipe, log, curves, checkpoints and, under export/, the teacher (for masked autoencoding the
    student).
    """
    if not dry_run:
        require_new_run(out, recipe, resume)
    from accelerate import PartialState

    from brainfound.pretraining.pretrain import pretrain as run

    folder = run(
        recipe, data, init, out, resume=resume, overrides=set_ or (), quiet=quiet, dry_run=dry_run, gpus=gpus, gpu=gpu
    )
    if not dry_run and PartialState().is_main_process:
        print(folder / "export")
