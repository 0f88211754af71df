"""Prediction and explanation of a whole cohort: the model is loaded once, and a failing session stops no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from brainfound.data.cohort import Cohort, Session
from brainfound.errors import BrainFoundError
from brainfound.inference.explanation import Explanation, choose_methods
from brainfound.inference.loading import load
from brainfound.inference.prediction import Prediction, file_stem
from brainfound.inference.predictor import Predictor, PredictorInput
from brainfound.training.data_loading import map_in_background


@dataclass(frozen=True)
class PredictionOutcome:
    """The prediction of one session, or the reason why there is none."""

    subject: str
    session: str
    prediction: Prediction | None
    reason: str = ""


def predict(
    model: str | Path | Predictor,
    source: str | Path | Cohort,
    out: str | Path | None = None,
    *,
    probabilities: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[PredictionOutcome]:
    """Predict each session of a cohort.

    A background thread prepares one session ahead of the model, except with hooks: their process groups receive an
    interrupt through the main thread only.

    Args:
        model: a predictor, or a model that `load` reads.
        source: a cohort, or a path that `Cohort.read` recognises.
        out: the folder for the files of each session; None writes nothing. With a folder, outcomes hold no images.
        probabilities: also write the probability maps of a segmentation.
        overwrite: predict again; otherwise sessions with a JSON in ``out`` are skipped.
        progress: called with (sessions done, number of sessions).
    """
    predictor = model if isinstance(model, Predictor) else load(model)
    if probabilities and predictor.per_voxel:
        predictor = predictor.with_options(replace(predictor.options, class_probabilities=True))
    cohort = source if isinstance(source, Cohort) else Cohort.read(source)
    sessions = list(cohort.sessions())
    folder = None if out is None else Path(out)

    def prepare(session: Session) -> PredictorInput | PredictionOutcome:
        name = file_stem(session.subject, session.session)
        if folder is not None and (folder / f"{name}.json").is_file() and not overwrite:
            return PredictionOutcome(session.subject, session.session, None, "already done")
        try:
            return predictor.prepare(session)
        except BrainFoundError as error:
            return PredictionOutcome(session.subject, session.session, None, str(error))

    outcomes = []
    ahead = (
        (prepare(session) for session in sessions) if predictor.hooks else map_in_background(sessions, prepare, ahead=1)
    )
    # Also closed on an interrupt: the thread then stops after its current session.
    with closing(ahead) as prepared:
        for done, session in enumerate(sessions, start=1):
            ready = next(prepared)
            if isinstance(ready, PredictorInput):
                outcome = _predict_session(predictor, session, ready, folder, probabilities)
            else:
                outcome = ready
            # Free the session before the thread starts on the next one.
            del ready
            outcomes.append(outcome)
            if progress:
                progress(done, len(sessions))
    return outcomes


def _predict_session(
    predictor: Predictor, session: Session, ready: PredictorInput, folder: Path | None, probabilities: bool
) -> PredictionOutcome:
    try:
        prediction = predictor.predict_prepared(ready)
    except BrainFoundError as error:
        return PredictionOutcome(session.subject, session.session, None, str(error))
    if folder is not None:
        prediction.save(folder, file_stem(session.subject, session.session), probabilities=probabilities)
        prediction = prediction.without_images()
    return PredictionOutcome(session.subject, session.session, prediction)


@dataclass(frozen=True)
class ExplanationOutcome:
    """The explanation of one session, or the reason why there is none."""

    subject: str
    session: str
    explanation: Explanation | None
    reason: str = ""


def explain_cohort(
    model: str | Path | Predictor,
    source: str | Path | Cohort,
    out: str | Path,
    *,
    method: str | Sequence[str] | None = None,
    class_name: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[ExplanationOutcome]:
    """Explain each session of a cohort and write its files at once.

    Maps are large, so outcomes hold only their numbers, not the images.

    Args:
        model: a predictor, or a model that `load` reads.
        source: a cohort, or a path that `Cohort.read` recognises.
        method, class_name: see `brainfound.inference.explanation.choose_methods`.
        overwrite: explain again; otherwise sessions with an explanation in ``out`` are skipped.
        progress: called with (sessions done, number of sessions).
    """
    predictor = model if isinstance(model, Predictor) else load(model)
    methods = choose_methods(predictor.model, predictor.target, method, class_name)
    cohort = source if isinstance(source, Cohort) else Cohort.read(source)
    sessions = list(cohort.sessions())
    outcomes = []
    for done, session in enumerate(sessions, start=1):
        name = file_stem(session.subject, session.session)
        explanation, reason = None, ""
        if (Path(out) / f"{name}_explanation.json").is_file() and not overwrite:
            reason = "already done"
        else:
            try:
                explanation = predictor.explain_prepared(predictor.prepare(session), methods, class_name)
            except BrainFoundError as error:
                reason = str(error)
        if explanation is not None:
            explanation.save(out, name)
            explanation = replace(explanation, maps={})
        outcomes.append(ExplanationOutcome(session.subject, session.session, explanation, reason))
        if progress:
            progress(done, len(sessions))
    return outcomes
