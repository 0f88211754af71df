"""``brainfound finetune``: a model learns one target of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import KeepIds, Overrides, Quiet


def finetune(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`brainfound list recipes`) or file.")],
    data: Annotated[Path, typer.Option(help="The store.")],
    model: Annotated[str, typer.Option(help="A Hub id or folder of a ViT, or the export of a pretraining run.")],
    target: Annotated[str, typer.Option(help='A column of the store (age_years, …), several of 0/1 (a,b), or "mask".')],
    adapter: Annotated[str | None, typer.Option(help="An adapter recipe; default: of the recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default: runs/RECIPE.")] = None,
    split: Annotated[Path | None, typer.Option(help="A split file, or the splits.json of another run.")] = None,
    fold: Annotated[str | None, typer.Option(help="Which fold of a split file that holds several.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    keep_ids: KeepIds = False,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune on a target: classification, regression, or segmentation of the mask.

    Subjects are divided into train, validation and test; the test part is scored once, beside a baseline that
    never looks at an image. The run folder's export/ is what `brainfound predict` takes.
    """
    from accelerate import PartialState

    from brainfound.cli.tables import scores_line
    from brainfound.train.finetune import finetune as run
    from brainfound.train.session_scores import read_scores

    folder = run(
        recipe,
        data,
        model,
        target,
        out,
        adapter=adapter,
        split=split,
        fold=fold,
        resume=resume,
        keep_ids=keep_ids,
        overrides=set_ or (),
        quiet=quiet,
    )
    if PartialState().is_main_process:
        print(scores_line(read_scores(folder)))
        print(folder / "export")
