"""``brainfound split``: divide the subjects of a store into training, validation and test parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brainfound.cli.terminal import AsJson, parse_counts, parse_list, print_note, print_table
from brainfound.errors import UsageError

if TYPE_CHECKING:
    from brainfound.data.splits.split_file import Split


def split(
    store: Annotated[Path, typer.Argument(help="The store whose subjects are divided.")],
    out: Annotated[Path, typer.Argument(help="The split file to write (.json).")],
    test: Annotated[float, typer.Option(help="Share of subjects in the test part; 0 if tested elsewhere.")] = 0.2,
    validation: Annotated[float, typer.Option(help="Share of subjects in the validation part; 0 for none.")] = 0.1,
    folds: Annotated[int | None, typer.Option(min=2, help="Cross-validation: fold-1, fold-2, ….")] = None,
    shots: Annotated[str | None, typer.Option(help="Training subjects per class of the target: 1,5,all.")] = None,
    subjects: Annotated[str | None, typer.Option(help="Training subjects in total: 10,20,all.")] = None,
    leave_site_out: Annotated[bool, typer.Option("--leave-site-out", help="One fold per site, tested on it.")] = False,
    target: Annotated[str | None, typer.Option(help='Divide only sessions with this label, or "mask".')] = None,
    stratify: Annotated[str | None, typer.Option(help="Columns to balance, the most important first.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the division.")] = 0,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Take the parts from a file that you wrote or edited.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another split file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Divide the subjects of a store into disjoint parts and write them to a file.

    `brainfound finetune --split` reads the file. All sessions of a subject stay together, and so do subjects who share
    an image.
    """
    from brainfound.data.sources.tables import count_noun
    from brainfound.data.store import Store
    from brainfound.finetuning.splits import make_split, split_from_file

    opened = Store.open(store)
    columns = parse_list(stratify)
    if from_ is not None:
        if folds or shots or subjects or leave_site_out or target:
            raise UsageError("the parts of a file are taken as they are", where="--from", remedy="Leave out the rest")
        made = split_from_file(opened, from_, columns)
    else:
        made = make_split(
            opened,
            test=test,
            validation=validation,
            folds=folds,
            shots=parse_counts("--shots", shots),
            num_subjects=parse_counts("--subjects", subjects),
            leave_site_out=leave_site_out,
            target=target,
            stratify=columns or None,
            seed=seed,
        )
    _write(made, out, overwrite)
    rows = _rows(made)
    if as_json:
        print(json.dumps({"file": str(out), "sha256": made.to_dict()["sha256"], "parts": rows}, indent=1))
    else:
        _print(rows, out)
    for site in made.made.get("sites_without_fold", ()):
        print_note(f"site {site} has no fold: all of its subjects were seen at another site too")
    if linked := made.made.get("num_linked_subjects", 0):
        print_note(f"{count_noun(linked, 'subject')} with an image of another subject: kept in one part with it")


def _write(made: Split, out: Path, overwrite: bool) -> None:
    from brainfound.data.splits.split_file import Split

    if out.exists() and not overwrite:
        try:
            same = Split.load(out) == made
        except UsageError:
            same = False
        if not same:
            raise UsageError("another file has this name", where=out, remedy="Give another name, or --overwrite")
        return
    made.save(out)


def _rows(made: Split) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for fold, members in made.folds.items():
        for part, names in members.items():
            counts = made.counts[fold][part]
            labels = {column: value for column, value in counts.items() if column != "num_sessions"}
            sizes = {"subjects": len(names), "sessions": counts["num_sessions"]}
            rows.append({"fold": fold, "part": part, **sizes, "labels": labels})
        if made.num_left_out[fold]:
            rows.append({"fold": fold, "part": "left out", "subjects": made.num_left_out[fold]})
    return rows


def _print(rows: list[dict[str, Any]], out: Path) -> None:
    cells = []
    for row in rows:
        labels = "; ".join(f"{column}: {_label(value)}" for column, value in row.get("labels", {}).items())
        cells.append([row["fold"], row["part"], str(row["subjects"]), str(row.get("sessions", "–")), labels])
    print_table(["fold", "part", "subjects", "sessions", "labels"], cells, title=str(out))


def _label(value: dict[str, Any]) -> str:
    if "median" in value:
        missing = f", {value['missing']} missing" if value["missing"] else ""
        return f"{value['min']:g} to {value['max']:g}, median {value['median']:g}{missing}"
    return ", ".join(f"{name} {count}" for name, count in value.items())
