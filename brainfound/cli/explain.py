"""``brainfound explain``: explanation maps on the input's own grid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brainfound.cli.predict import IMAGES, Inputs, exit_for_cohort
from brainfound.cli.terminal import Hooks, Quiet, parse_list, print_note, progress_bar

if TYPE_CHECKING:
    from brainfound.inference.predictor import Predictor


def explain(
    model: Annotated[str, typer.Argument(help="A run, its export folder, a bundle, or the Hub id of an encoder.")],
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for the maps.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="slice-attention, rollout, gradient, pca; several with commas. Default: all that fit the model."
        ),
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Follow the score of this class; default: the most probable one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Explain again what exists.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    hook: Hooks = None,
    quiet: Quiet = False,
) -> None:
    """Explain one session or a whole cohort: maps as NIfTI on the input's own grid, and a JSON each.

    Explanations are not evidence: they do not show that an answer is right. Exit codes as of predict.
    """
    from brainfound.inference.explanation import choose_methods
    from brainfound.inference.loading import load
    from brainfound.inference.scans import parse_inputs

    predictor = load(model, device, hook or ())
    methods = choose_methods(
        predictor.model, predictor.target, None if method is None else parse_list(method), class_name
    )
    paths, contrast_paths = parse_inputs(inputs)
    if not contrast_paths and len(paths) == 1 and not paths[0].name.endswith(IMAGES):
        _explain_cohort(predictor, paths[0], out, methods, class_name, overwrite, quiet)
        return
    explanation = predictor.explain(*paths, method=methods, class_name=class_name, **contrast_paths)
    first = paths[0] if paths else next(iter(contrast_paths.values()))
    for path in explanation.save(out, first.name.split(".")[0]):
        print(path)
    for line in explanation.notes:
        print_note(line)


def _explain_cohort(
    predictor: Predictor,
    source: Path,
    out: Path,
    methods: tuple[str, ...],
    class_name: str | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    from brainfound.cli.terminal import print_table
    from brainfound.inference.cohort import explain_cohort

    with progress_bar("explaining sessions", quiet) as progress:
        outcomes = explain_cohort(
            predictor, source, out, method=methods, class_name=class_name, overwrite=overwrite, progress=progress
        )
    rows = [(o.subject, o.session, o.reason or ", ".join(methods)) for o in outcomes]
    print_table(("subject", "session", "maps"), rows)
    failed = [o.reason for o in outcomes if o.explanation is None and o.reason != "already done"]
    rejected = [(o.subject, line) for o in outcomes if o.explanation is not None for line in o.explanation.rejected]
    exit_for_cohort(len(outcomes), failed, rejected)
