"""``brainfound predict``: files in, answers in native space out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brainfound.cli.terminal import Quiet, progress_bar
from brainfound.errors import EXIT_FAILED, EXIT_SOME_REJECTED

Inputs = Annotated[
    list[str],
    typer.Argument(help="The scans of one session (FILE or CONTRAST=FILE), or one BIDS folder or manifest."),
]


def predict(
    model: Annotated[str, typer.Argument(help="A fine-tuning run, its export folder, or a bundle.")],
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for the answers.")],
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write probability maps.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do again what is there already.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    quiet: Quiet = False,
) -> None:
    """Predict one session or a whole cohort: a JSON each, and for segmentations a NIfTI on the input's own grid.

    Exit code 3 if some sessions could not be done; the others are.
    """
    from brainfound.cli.tables import print_table
    from brainfound.predict.predictor import load, parse_inputs
    from brainfound.predict.predictor import predict as predict_cohort

    predictor = load(model, device)
    paths, named = parse_inputs(inputs)
    if named or len(paths) != 1 or not (paths[0].is_dir() or paths[0].suffix in (".tsv", ".csv", ".parquet")):
        prediction = predictor.predict(*paths, **named)
        first = paths[0] if paths else next(iter(named.values()))
        name = first.name.split(".")[0]
        if probabilities and prediction.probability is not None:
            from brainfound.predict.native_space import write_image

            out.mkdir(parents=True, exist_ok=True)
            write_image(prediction.probability, out / f"{name}_probability.nii.gz")
        for path in prediction.save(out, name):
            print(path)
        return
    with progress_bar("predicting sessions", quiet) as progress:
        outcomes = predict_cohort(
            predictor, paths[0], out, probabilities=probabilities, overwrite=overwrite, progress=progress
        )
    rows = [(o.subject, o.session, _summary(o)) for o in outcomes]
    print_table(("subject", "session", "answer"), rows)
    failed = [o for o in outcomes if o.prediction is None and o.reason != "already done"]
    if failed:
        print(f"{len(failed)} of {len(outcomes)} sessions could not be done")
        raise typer.Exit(EXIT_FAILED if len(failed) == len(outcomes) else EXIT_SOME_REJECTED)


def _summary(outcome) -> str:
    if outcome.prediction is None:
        return outcome.reason
    answer = outcome.prediction.answer
    missing = f" (without {', '.join(outcome.prediction.missing)})" if outcome.prediction.missing else ""
    if "class" in answer:
        return f"{answer['class']} {answer['probabilities'][answer['class']]:.2f}{missing}"
    if "value" in answer:
        return f"{answer['target']} {answer['value']:.2f}{missing}"
    if "volumes_mm3" in answer:
        return ", ".join(f"{name} {volume:.0f} mm³" for name, volume in answer["volumes_mm3"].items()) + missing
    return f"{answer['dimensions']} dimensions{missing}"
