"""A whole cohort through one predictor: the next session is prepared while the model works on this one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from brainfound.data.cohort import Cohort, Session
from brainfound.errors import BrainFoundError
from brainfound.inference.loading import load
from brainfound.inference.prediction import Prediction, file_stem
from brainfound.inference.predictor import Predictor, PredictorInput
from brainfound.training.prefetch import map_in_background


@dataclass(frozen=True)
class PredictionOutcome:
    """What became of one session: a prediction, or the reason why there is none."""

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
    """Predict every session of a cohort; the model is loaded once, and a session that fails stops no other.

    While the model works on a session, a thread reads and prepares the next one, and no further one. Not with hooks:
    they have process groups of their own, which an interrupt reaches through the main thread only.

    Args:
        model: a predictor, or what `load` reads.
        source: a cohort, or what `Cohort.read` recognises.
        out: where each session's files go as it is done; None writes nothing. With a folder the images of a
            segmentation are only there, and not in the outcomes: those of a whole cohort would fill the memory.
        probabilities: also write the probability maps of a segmentation.
        overwrite: do again what is there; otherwise sessions with a JSON in ``out`` are skipped.
        progress: called with (sessions done, sessions in all).
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
    # Closed whatever happens, an interrupt too: then the thread ends with the session that it is at.
    with closing(ahead) as prepared:
        for done, session in enumerate(sessions, start=1):
            ready = next(prepared)
            if isinstance(ready, PredictorInput):
                outcome = _predict_session(predictor, session, ready, folder, probabilities)
            else:
                outcome = ready
            # What was read must be gone before the thread begins with another session.
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
