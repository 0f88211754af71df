"""``brainfound predict``, ``embed`` and ``explain``: files in; answers, embeddings or explanation maps out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brainfound.cli.terminal import (
    Hooks,
    Quiet,
    parse_counts,
    parse_list,
    print_note,
    print_table,
    progress_bar,
    require_folder,
)
from brainfound.errors import EXIT_FAILED, EXIT_SOME_REJECTED, UsageError

if TYPE_CHECKING:
    from brainfound.data.checking.rules import Level
    from brainfound.inference.cohort import Outcome
    from brainfound.inference.explanation import Explanation
    from brainfound.inference.prediction import Prediction
    from brainfound.inference.predictor import Predictor

Strict = Annotated[
    bool, typer.Option("--strict", help="Do not answer for a session that is unfit for the model (✗), but refuse it.")
]

Inputs = Annotated[
    list[str], typer.Argument(help="The scans of one session (FILE or CONTRAST=FILE), or one BIDS folder or manifest.")
]


def predict(
    model: Annotated[
        str, typer.Argument(help="A fine-tuning run, its export, a bundle, or runs over folds and seeds.")
    ],
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for the answers.")],
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write probability maps.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict again what exists.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Segmentation: average with left and right exchanged.")] = False,
    overlap: Annotated[bool, typer.Option("--overlap", help="Segmentation: average over moved patch grids.")] = False,
    min_volume_mm3: Annotated[float, typer.Option(help="Segmentation: remove smaller pieces; 0 keeps all.")] = 0.0,
    strict: Strict = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    hook: Hooks = None,
    quiet: Quiet = False,
) -> None:
    """Predict one session or a whole cohort: a JSON each, and for segmentations a NIfTI on the input's own grid.

    The scans are compared with those of the training, as by `check`: ✗ does not fit the model, ! needs a look. Exit
    code 3 if something has a ✗, if some sessions failed, or if some scans could not be used.
    """
    _require_new(inputs, out, ".json", overwrite)
    from brainfound.inference.loading import load
    from brainfound.inference.segmentation import SegmentationOptions

    options = SegmentationOptions(flips=flip, overlap=overlap, min_volume_mm3=min_volume_mm3)
    predictor = load(model, device, hook or (), options).as_strict(strict)
    _predict_inputs(predictor, inputs, out, probabilities, overwrite, quiet)


def embed(
    model: Annotated[
        str, typer.Argument(help="A run, its export folder, or the folder or Hub id of an encoder or ViT.")
    ],
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for the embeddings.")],
    slices: Annotated[bool, typer.Option("--slices", help="Also write the embedding of each slice.")] = False,
    patches: Annotated[bool, typer.Option("--patches", help="Also write the patch tokens of each slice.")] = False,
    layers: Annotated[
        str | None, typer.Option(help="Also write the patch tokens after these blocks, such as 3,6,9,12.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A plain ViT: the store or model whose preprocessing its scans get.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Predict again what exists.")] = False,
    strict: Strict = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    hook: Hooks = None,
    quiet: Quiet = False,
) -> None:
    """Embed one session or a whole cohort: one vector (.npy) and a JSON each. Exit codes are those of predict.

    A classification or regression model gives the volume embedding that its head reads. A plain ViT gives the mean CLS
    token. Tokens go into one file (.npz) per session.
    """
    _require_new(inputs, out, ".json", overwrite)
    numbers = parse_counts("--layers", layers) if layers is not None else []
    if None in numbers:
        raise UsageError("not a block", where="--layers", got="all", expected="numbers such as 3,6,9,12")
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.inference.loading import bundle_folder, load_encoder
    from brainfound.inference.tokens import TokenOptions

    preprocessing = None if like is None else Preprocessing.load(bundle_folder(like))
    predictor = load_encoder(model, preprocessing, device, hook or ())
    if preprocessing is not None and predictor.preprocessing != preprocessing:
        remedy = "Leave --like out: the model carries its preprocessing"
        raise UsageError("the model was trained with another preprocessing", where="--like", got=like, remedy=remedy)
    tokens = TokenOptions(slices, patches, tuple(number for number in numbers if number is not None))
    predictor = predictor.as_encoder(tokens).as_strict(strict)
    _predict_inputs(predictor, inputs, out, False, overwrite, quiet)


def _predict_inputs(
    predictor: Predictor, inputs: list[str], out: Path, probabilities: bool, overwrite: bool, quiet: bool
) -> None:
    """Predict one session or a cohort; write and print the answers."""
    from brainfound.data.given_scans import parse_inputs

    _note_missing_contract(predictor)
    paths, contrast_paths = parse_inputs(inputs)
    if is_cohort(paths, contrast_paths):
        from brainfound.inference.cohort import predict as predict_cohort

        with progress_bar("predicting sessions", quiet) as progress:
            outcomes = predict_cohort(
                predictor, paths[0], out, probabilities=probabilities, overwrite=overwrite, progress=progress
            )
        _report_cohort("answer", [(o, o.reason if o.result is None else _summary(o.result)) for o in outcomes])
        return
    if probabilities and predictor.per_voxel:
        predictor = predictor.with_options(replace(predictor.options, class_probabilities=True))
    prediction = predictor.predict(*paths, **contrast_paths)
    name = _file_name(paths, contrast_paths)
    files = prediction.save(out, name, probabilities=probabilities, overwrite=overwrite)
    print(_summary(prediction))
    _print_files(files, prediction)


def _require_new(inputs: list[str], out: Path, ending: str, overwrite: bool) -> None:
    """Refuse files that do not exist, and to replace those of one session, before the model is loaded."""
    from brainfound.data.given_scans import parse_inputs
    from brainfound.data.reading.archives import require_given

    require_folder(out)
    paths, contrast_paths = parse_inputs(inputs)
    if is_cohort(paths, contrast_paths):
        return
    for path in (*paths, *contrast_paths.values()):
        require_given(path)
    if overwrite:
        return
    file = out / f"{_file_name(paths, contrast_paths)}{ending}"
    if file.exists():
        remedy = "Give another --out, or --overwrite"
        raise UsageError("an answer of this name already exists", where=file, remedy=remedy)


def is_cohort(paths: list[Path], contrast_paths: dict[str, Path]) -> bool:
    """Whether the inputs are one folder or manifest rather than scans."""
    from brainfound.data.reading.image_names import is_image

    return not contrast_paths and len(paths) == 1 and (paths[0].is_dir() or not is_image(paths[0]))


def _note_missing_contract(predictor: Predictor) -> None:
    if predictor.contract is None:
        print_note("the model carries no input contract: the scans are not compared with those of its training")


def _file_name(paths: list[Path], contrast_paths: dict[str, Path]) -> str:
    from brainfound.data.reading.image_names import stem

    return stem([*paths, *contrast_paths.values()][0])


def _print_files(files: list[Path], result: Prediction | Explanation) -> None:
    for file in files:
        print(file)
    for line in result.notes:
        print_note(line)
    if result.input_level == "fail":
        print_note("✗ the scans are unfit for the model: do not use this answer; --strict refuses it")
        raise typer.Exit(EXIT_SOME_REJECTED)


def _report_cohort(title: str, outcomes: list[tuple[Outcome[Any], str]]) -> None:
    """Print the table of outcomes with what the input contract found, report failures, and exit accordingly."""
    from brainfound.data.checking.rules import LEVEL_SYMBOLS

    rows = []
    for outcome, text in outcomes:
        level: Level | None = outcome.result.input_level if outcome.result is not None else None
        found = _contract_notes(outcome)
        more = f" (+{len(found) - 1})" if len(found) > 1 else ""
        line = f"{found[0]}{more}" if found else LEVEL_SYMBOLS[level]
        rows.append((outcome.subject, outcome.session, "refused" if outcome.refused else text, line))
    print_table(("subject", "session", title, "input"), rows)
    unfit = _report_contract([outcome for outcome, _ in outcomes])
    failed = [o.reason for o, _ in outcomes if o.result is None and o.reason != "already done" and not o.refused]
    rejected = [(o.subject, line) for o, _ in outcomes if o.result is not None for line in o.result.rejected]
    if failed:
        print_note(f"{len(failed)} of {len(outcomes)} sessions could not be done; the first: {failed[0]}")
        raise typer.Exit(EXIT_FAILED if len(failed) == len(outcomes) else EXIT_SOME_REJECTED)
    if rejected:
        print_note(f"all sessions done, but {len(rejected)} scans rejected; the first: {': '.join(rejected[0])}")
    if rejected or unfit:
        raise typer.Exit(EXIT_SOME_REJECTED)


def _contract_notes(outcome: Outcome[Any]) -> list[str]:
    """What the input contract found in a session, the gravest first."""
    if outcome.refused:
        return [f"✗ {outcome.reason}"]
    notes = () if outcome.result is None else outcome.result.notes
    return [line for line in notes if line.startswith(("✗ ", "! "))]


def _report_contract(outcomes: list[Outcome[Any]]) -> int:
    """Print how many sessions are unfit or need a look, with an example of each; returns the number of the unfit."""
    unfit = [o for o in outcomes if o.refused or (o.result is not None and o.result.input_level == "fail")]
    doubtful = [o for o in outcomes if o.result is not None and o.result.input_level == "warn"]
    refused = f" ({count} refused)" if (count := sum(o.refused for o in outcomes)) else ""
    for sessions, text in ((unfit, f"unfit for the model{refused}"), (doubtful, "in need of a look")):
        if sessions:
            first = _contract_notes(sessions[0])[0]
            print_note(f"{len(sessions)} of {len(outcomes)} sessions {text}; the first: {first}")
    return len(unfit)


def _summary(prediction: Prediction) -> str:
    answer = prediction.answer
    missing = f" (without {', '.join(prediction.missing)})" if prediction.missing else ""
    if "class" in answer:
        return f"{answer['class']} {answer['probabilities'][answer['class']]:.2f}{missing}"
    if "present" in answer:
        return (", ".join(answer["present"]) or f"none of {answer['target']}") + missing
    if "value" in answer:
        ends = answer.get("interval")
        interval = f" [{ends['low']:.2f}, {ends['high']:.2f}]" if ends else ""
        return f"{answer['target']} {answer['value']:.2f}{interval}{missing}"
    if "volumes_mm3" in answer:
        return ", ".join(f"{name} {volume:.0f} mm³" for name, volume in answer["volumes_mm3"].items()) + missing
    return f"{answer['dimensions']} dimensions{missing}"


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
    strict: Strict = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    hook: Hooks = None,
    quiet: Quiet = False,
) -> None:
    """Explain one session or a whole cohort: maps as NIfTI on the input's own grid, and a JSON each.

    Explanations are not evidence: they do not show that an answer is right. Exit codes are those of predict.
    """
    _require_new(inputs, out, "_explanation.json", overwrite)
    from brainfound.data.given_scans import parse_inputs
    from brainfound.inference.explanation import choose_methods
    from brainfound.inference.loading import load

    predictor = load(model, device, hook or ()).as_strict(strict)
    _note_missing_contract(predictor)
    methods = choose_methods(
        predictor.model, predictor.target, None if method is None else parse_list(method), class_name
    )
    paths, contrast_paths = parse_inputs(inputs)
    if is_cohort(paths, contrast_paths):
        from brainfound.inference.cohort import explain_cohort

        with progress_bar("explaining sessions", quiet) as progress:
            outcomes = explain_cohort(
                predictor, paths[0], out, method=methods, class_name=class_name, overwrite=overwrite, progress=progress
            )
        _report_cohort("maps", [(o, o.reason or ", ".join(methods)) for o in outcomes])
        return
    explanation = predictor.explain(*paths, method=methods, class_name=class_name, **contrast_paths)
    _print_files(explanation.save(out, _file_name(paths, contrast_paths), overwrite=overwrite), explanation)
