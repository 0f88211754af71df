"""``brainfound prepare``: turn a cohort into a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from brainfound.cli.terminal import (
    Hooks,
    KeepIds,
    Overrides,
    Quiet,
    note_absent_contrasts,
    parse_list,
    print_note,
    progress_bar,
)
from brainfound.errors import EXIT_SOME_REJECTED, UsageError

if TYPE_CHECKING:
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store import Store
    from brainfound.data.store.prepare import Executor


def prepare(
    source: Annotated[Path, typer.Argument(help="A folder of scans (BIDS, challenge layouts, DICOM), or a manifest.")],
    store: Annotated[Path, typer.Argument(help="The folder to create.")],
    contrasts: Annotated[str | None, typer.Option(help="Comma-separated, for example T1w,T2w,FLAIR.")] = None,
    mask: Annotated[str, typer.Option(help="The label-map column that becomes the mask (mask, dseg, …).")] = "mask",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    like: Annotated[Path | None, typer.Option(help="A model folder: prepare exactly like its training data.")] = None,
    hook: Hooks = None,
    hooks_done: Annotated[
        bool, typer.Option("--hooks-done", help="With --like: the model's hooks already ran on the files.")
    ] = False,
    executor: Annotated[str, typer.Option(help="processes, or dask for a cluster.")] = "processes",
    scheduler: Annotated[str | None, typer.Option(help="Address of dask's scheduler: tcp://HOST:8786.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store with other settings; follow a changed source.")
    ] = False,
    keep_ids: KeepIds = False,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Prepare a cohort: check, orient, resample, scale, and store every session as slices.

    A repeated call prepares only new files. STORE/contact_sheet.png and quality.tsv show the result. Exit code 3 if
    some files were rejected; STORE/rejected.tsv names them with the reason.
    """
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store import prepare as store_preparation
    from brainfound.recipes import validate

    overrides = list(set_ or [])
    content: dict[str, Any] = {}
    model: Preprocessing | None = None
    if like is not None:
        model = Preprocessing.load(like / "export" if (like / "export").is_dir() else like)
        content = model.model_dump(mode="json")
    elif hooks_done:
        raise UsageError("the hooks that are done are those of a model", where="--hooks-done", remedy="Give --like too")
    if contrasts is not None:
        content["contrasts"] = parse_list(contrasts)
    preprocessing = validate(Preprocessing, content, overrides, where="preprocessing")
    if model is not None:
        _require_alike(preprocessing, model)
    with progress_bar("preparing sessions", quiet) as progress:
        made = store_preparation.prepare(
            source,
            store,
            preprocessing,
            workers,
            mask=mask,
            hooks=hook or (),
            hooks_done=hooks_done,
            overwrite=overwrite,
            keep_ids=keep_ids,
            executor=cast("Executor", executor),
            scheduler=scheduler,
            progress=progress,
        )
    print(made)
    if contrasts or like is not None or any(text.partition("=")[0].strip() == "contrasts" for text in overrides):
        note_absent_contrasts(made.contrasts, made.contrast_counts)
    _report(made, store, keep_ids)


def _require_alike(preprocessing: Preprocessing, model: Preprocessing) -> None:
    """Raise a UsageError if other options ask for another preprocessing than that of --like."""
    given, own = preprocessing.model_dump(mode="json"), model.model_dump(mode="json")
    for name, value in given.items():
        if value != own[name]:
            raise UsageError(
                "another option contradicts --like",
                where=name,
                got=_plain(value),
                expected=_plain(own[name]),
                remedy="Leave the option or --like out",
            )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _report(made: Store, folder: Path, keep_ids: bool) -> None:
    """Print findings that need a look to standard error."""
    if len(made.further_scans):
        print(f"{len(made.further_scans)} further scans of a contrast not used, see {folder / 'rejected.tsv'}")
    if len(made.unused_files):
        print(f"{len(made.unused_files)} files of the source are no scans of the cohort, see {folder / 'rejected.tsv'}")
    for line in made.facts.get("source_notes", ()):
        print_note(f"the source: {line}")
    noted = int((made.quality["notes"] != "").sum())
    if noted:
        print_note(f"{noted} scans with notes, see {folder / 'quality.tsv'} and contact_sheet.png")
    for group in made.duplicates:
        print_note(f"the sessions {', '.join(map(str, group))} have the same images: keep them in one part of a split")
    if len(made.rejected):
        first = made.rejected.iloc[0]
        which = f"{first.file}: " if keep_ids else ""
        print_note(
            f"{len(made.rejected)} files rejected, see {folder / 'rejected.tsv'}; the first: {which}{first.reason}"
        )
        raise typer.Exit(EXIT_SOME_REJECTED)
