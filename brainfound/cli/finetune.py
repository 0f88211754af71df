"""``brainfound finetune``: fine-tune a model on a target of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brainfound.cli.terminal import (
    KeepIds,
    Overrides,
    Quiet,
    get_command_line,
    intervals_line,
    parse_counts,
    parse_list,
    print_table,
    require_new_run,
    scores_line,
)
from brainfound.errors import UsageError

if TYPE_CHECKING:
    from brainfound.experiments.folder import ExperimentFolder
    from brainfound.experiments.systems import SystemSpec


def finetune(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`brainfound list recipes`) or file.")],
    data: Annotated[Path, typer.Option(help="The store.")],
    model: Annotated[
        list[str],
        typer.Option(help="A Hub id or folder of a ViT, or the export of a pretraining run; repeat to compare."),
    ],
    target: Annotated[str, typer.Option(help='A column of the store (age_years, …), several of 0/1 (a,b), or "mask".')],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter recipe (or full,optim.lr=1e-5); default: the recipe's; repeat to compare."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; default: runs/RECIPE.")] = None,
    split: Annotated[Path | None, typer.Option(help="A split file, or the splits.json of another run.")] = None,
    fold: Annotated[str | None, typer.Option(help="The fold of a split file with several folds.")] = None,
    folds: Annotated[str | None, typer.Option(help='Cross-validation: a number, or "all" of --split.')] = None,
    shots: Annotated[str | None, typer.Option(help="Few-shot runs, training subjects per class: 1,5,all.")] = None,
    subjects: Annotated[
        str | None, typer.Option(help="Runs with this many training subjects in total: 10,20,all.")
    ] = None,
    leave_site_out: Annotated[bool, typer.Option("--leave-site-out", help="One run per site, tested on it.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Repeat with each of these seeds: 0,1,2.")] = None,
    partial_input: Annotated[
        bool, typer.Option("--partial-input", help="Also train one model per subset of the contrasts.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="auto: time for the candidates; default: the recipe's 30.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in the run folder.")
    ] = False,
    keep_ids: KeepIds = False,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune on a target: classification, regression, or segmentation of the mask.

    With the recipe auto, candidates from linear models of frozen features to full fine-tuning are compared by inner
    cross-validation, as far as --minutes allow, and the best one is exported.

    Subjects are divided into train, validation and test. The test part is scored once, with a trivial and a frozen
    baseline. `brainfound predict` reads the run folder. --folds, --shots, --subjects, --leave-site-out, --seeds,
    --partial-input, or several --model or --adapter, start many runs and write a page, report.md, with scores, spread
    and comparison.
    """
    require_new_run(out, recipe, resume)
    from brainfound.experiments.systems import parse_systems
    from brainfound.recipes import read_kind

    systems = parse_systems(model, adapter or ())
    is_auto = read_kind(recipe, "train") == "auto"
    if minutes is not None and not is_auto:
        raise UsageError("only the recipe auto has a time limit", where="--minutes", remedy="Leave --minutes out")
    if is_auto:
        several: dict[str, Any] = {
            "--folds": folds,
            "--shots": shots,
            "--subjects": subjects,
            "--leave-site-out": leave_site_out,
        }
        several |= {"--seeds": seeds, "--partial-input": partial_input, "--adapter": adapter}
        if given := [name for name, value in several.items() if value]:
            what, remedy = "auto is one run that chooses its adapter", "Leave it out, or give --split FILE --fold NAME"
            raise UsageError(what, where=given[0], remedy=remedy)
        if len(systems) > 1:
            raise UsageError("auto starts from one model", where="--model", got=len(systems), remedy="Give one --model")
        if minutes is not None and not minutes > 0:
            raise UsageError("there is no time for a candidate", where="--minutes", got=minutes, expected="above 0")
    elif folds or shots or subjects or leave_site_out or seeds or partial_input or len(systems) > 1:
        if fold is not None:
            raise UsageError("one fold and many runs", where="--fold", got=fold, remedy="Leave one of them out")
        if partial_input and (shots or subjects or len(systems) > 1):
            raise UsageError(
                "partial input is of one start and one adapter, with all training subjects",
                where="--partial-input",
                remedy="Give one --model and one --adapter, and neither --shots nor --subjects",
            )
        fold_options = {
            "folds": _num_folds(folds, split),
            "shots": parse_counts("--shots", shots),
            "num_subjects": parse_counts("--subjects", subjects),
            "leave_site_out": leave_site_out,
        }
        options: dict[str, Any] = {
            "seeds": _seeds(seeds),
            "resume": resume,
            "keep_ids": keep_ids,
            "overrides": list(set_ or ()),
            "command": get_command_line(),
            "quiet": quiet,
        }
        _run_experiment(recipe, data, systems, target, out, split, fold_options, folds == "all", partial_input, options)
        return
    (system,) = systems
    from accelerate import PartialState

    from brainfound.finetuning.scoring import read_scores

    place = data, system.model, target, out
    common: dict[str, Any] = {"split": split, "fold": fold, "resume": resume, "keep_ids": keep_ids, "quiet": quiet}
    common["overrides"] = [*(set_ or ()), *system.overrides]
    if is_auto:
        from brainfound.finetuning.auto.run import finetune_auto

        folder = finetune_auto(*place, recipe=recipe, minutes=minutes, **common)
    else:
        from brainfound.finetuning.finetune import finetune as run

        folder = run(recipe, *place, adapter=system.adapter, **common)
    if PartialState().is_main_process:
        scores = read_scores(folder)
        print(scores_line(scores))
        if line := intervals_line([scores]):
            print(line)
        if is_auto:
            print(scores["auto"]["text"])
        print(scores["verdict"]["text"])
        if scores["part"] != "test":
            print(f"no test part; to test it: brainfound evaluate {folder} --data OTHER_STORE --out FOLDER")
        print(folder / "export")


def _run_experiment(
    recipe: str,
    data: Path,
    systems: list[SystemSpec],
    target: str,
    out: Path | None,
    split: Path | None,
    fold_options: dict[str, Any],
    every_fold: bool,
    partial_input: bool,
    options: dict[str, Any],
) -> None:
    from accelerate import PartialState

    from brainfound.data.store import Store
    from brainfound.experiments.folder import PAGE_FILE, ExperimentFolder
    from brainfound.experiments.runs import finetune_subsets, finetune_systems, make_folds
    from brainfound.finetuning.recipe import resolve_recipe

    store = Store.open(data)
    content = resolve_recipe(recipe, systems[0].adapter, options["overrides"])
    folder = out or Path("runs") / content.name
    parts = make_folds(content, store, target, file=split, **fold_options)
    if split is not None and len(parts.folds) > 1 and not every_fold:
        raise UsageError("the split file holds several folds", where=split, remedy="Give --folds all, or another file")
    if partial_input:
        finetune_subsets(parts, recipe, store, systems[0], target, folder, **options)
    else:
        finetune_systems(parts, recipe, store, systems, target, folder, **options)
    if PartialState().is_main_process:
        _print(ExperimentFolder.read(folder))
        print(folder / PAGE_FILE)


def _print(experiment: ExperimentFolder) -> None:
    """Print the scores of an experiment as a table."""
    from brainfound.metrics.registry import format_score

    partial = experiment.summary.get("partial_input")
    rows = partial or experiment.table_rows
    named = ["contrasts", "absence"] if partial else [*(["system"] if "system" in rows[0] else []), "group"]
    named += ["score"]
    titles = {"group": "runs on", "absence": "others absent in"}
    after = ["drop"] if partial else []
    print_table(
        [
            *(titles.get(name, name) for name in named),
            *("mean", "± over folds", "± over seeds", *after, "range", *experiment.baselines, "folds", "seeds"),
        ],
        [
            [
                *(str(row[name]) for name in named),
                *(format_score(row["score"], row[name]) for name in ("mean", "std_folds", "std_seeds", *after)),
                f"{format_score(row['score'], row['lowest'])} to {format_score(row['score'], row['highest'])}",
                *(format_score(row["score"], row.get(name)) for name in experiment.baselines),
                str(row["num_folds"]),
                str(row["num_seeds"]),
            ]
            for row in rows
        ],
        title=str(experiment.path),
    )


def _num_folds(text: str | None, split: Path | None) -> int | None:
    """The number of folds to make; None for the folds of a split file, or without --folds."""
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
    words = parse_list(text)
    if not words or not all(word.isdecimal() for word in words):
        raise UsageError("not a list of seeds", where="--seeds", got=text, expected="0,1,2")
    return [int(word) for word in words]
