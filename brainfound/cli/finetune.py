"""``brainfound finetune``: a model learns one target of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from brainfound.cli.terminal import KeepIds, Overrides, Quiet, numbers_or_all, words
from brainfound.errors import UsageError


def finetune(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`brainfound list recipes`) or file.")],
    data: Annotated[Path, typer.Option(help="The store.")],
    model: Annotated[str, typer.Option(help="A Hub id or folder of a ViT, or the export of a pretraining run.")],
    target: Annotated[str, typer.Option(help='A column of the store (age_years, …), several of 0/1 (a,b), or "mask".')],
    adapter: Annotated[str | None, typer.Option(help="An adapter recipe; default: of the recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default: runs/RECIPE.")] = None,
    split: Annotated[Path | None, typer.Option(help="A split file, or the splits.json of another run.")] = None,
    fold: Annotated[str | None, typer.Option(help="Which fold of a split file that holds several.")] = None,
    folds: Annotated[str | None, typer.Option(help='Cross-validation: a number, or "all" of --split.')] = None,
    shots: Annotated[str | None, typer.Option(help="Few-shot runs, training subjects per class: 1,5,all.")] = None,
    subjects: Annotated[str | None, typer.Option(help="Runs with so many training subjects in all: 10,20,all.")] = None,
    leave_site_out: Annotated[bool, typer.Option("--leave-site-out", help="One run per site, tested on it.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Repeat with each of these seeds: 0,1,2.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    keep_ids: KeepIds = False,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune on a target: classification, regression, or segmentation of the mask.

    Subjects are divided into train, validation and test; the test part is scored once, beside a baseline that
    never looks at an image. The run folder's export/ is what `brainfound predict` takes. With --folds, --shots,
    --subjects, --leave-site-out or --seeds there are many runs, and the spread of their scores.
    """
    if folds or shots or subjects or leave_site_out or seeds:
        if fold is not None:
            raise UsageError("one fold and many runs", where="--fold", got=fold, remedy="Leave one of them out")
        wishes = {
            "folds": _num_folds(folds, split),
            "shots": numbers_or_all("--shots", shots),
            "num_subjects": numbers_or_all("--subjects", subjects),
            "leave_site_out": leave_site_out,
        }
        options: dict[str, Any] = {"adapter": adapter, "resume": resume, "keep_ids": keep_ids, "quiet": quiet}
        _repeat(
            recipe, data, model, target, out, split, wishes, _seeds(seeds), list(set_ or ()), folds == "all", options
        )
        return
    from accelerate import PartialState

    from brainfound.cli.tables import intervals_line, scores_line
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
        scores = read_scores(folder)
        print(scores_line(scores))
        if line := intervals_line([scores]):
            print(line)
        print(folder / "export")


def _repeat(
    recipe: str,
    data: Path,
    model: str,
    target: str,
    out: Path | None,
    split: Path | None,
    wishes: dict[str, Any],
    seeds: list[int] | None,
    overrides: list[str],
    every_fold: bool,
    options: dict[str, Any],
) -> None:
    from accelerate import PartialState

    from brainfound.cli.tables import number, print_table
    from brainfound.data.store import Store
    from brainfound.train.finetune_recipe import resolve_recipe
    from brainfound.train.repeated import finetune_over, folds_for, summarise

    store = Store.open(data)
    content = resolve_recipe(recipe, options["adapter"], overrides)
    folder = out or Path("runs") / content.name
    parts = folds_for(content, store, target, file=split, **wishes)
    if split is not None and len(parts.folds) > 1 and not every_fold:
        raise UsageError("the split file holds several folds", where=split, remedy="Give --folds all, or another file")
    table = finetune_over(parts, recipe, store, model, target, folder, seeds=seeds, overrides=overrides, **options)
    if not PartialState().is_main_process:
        return

    def text(value: float) -> str:
        return number(None if value != value else value)

    print_table(
        ["runs on", "score", "mean", "± over folds", "± over seeds", "range", "trivial", "folds", "seeds"],
        [
            [
                str(row.group),
                str(row.score),
                text(row.mean),
                text(row.std_folds),
                text(row.std_seeds),
                f"{text(row.lowest)} to {text(row.highest)}",
                text(row.trivial),
                str(row.num_folds),
                str(row.num_seeds),
            ]
            for row in summarise(table).itertuples()
        ],
        title=str(folder),
    )
    print(folder / "summary.json")


def _num_folds(text: str | None, split: Path | None) -> int | None:
    """The number of folds to make; None where those of a split file are taken, or none are asked for."""
    if text is None or (text == "all" and split is not None):
        return None
    if not text.isdecimal() or int(text) < 2:
        raise UsageError(
            "not a number of folds", where="--folds", got=text, expected='2 or more, or "all" with --split FILE'
        )
    return int(text)


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not words(text) or not all(word.isdecimal() for word in words(text)):
        raise UsageError("not a list of seeds", where="--seeds", got=text, expected="0,1,2")
    return [int(word) for word in words(text)]
