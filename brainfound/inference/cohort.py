"""Prediction and explanation of a whole cohort: the model is loaded once, and a failing session stops no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from brainfound.data.cohort import Cohort, Session
from brainfound.errors import BrainFoundError, RefusedInputError, UsageError
from brainfound.inference.explanation import Explanation, choose_methods
from brainfound.inference.loading import load
from brainfound.inference.prediction import Prediction, file_stem
from brainfound.inference.predictor import Predictor, PredictorInput
from brainfound.training.data_loading import map_in_background

_Result = TypeVar("_Result", Prediction, Explanation)


@dataclass(frozen=True)
class Outcome(Generic[_Result]):
    """The prediction or explanation of one session, or the reason why there is none.

    ``refused``: the session is unfit for the model, and the predictor is strict.
    """

    subject: str
    session: str
    result: _Result | None
    reason: str = ""
    refused: bool = False


def predict(
    model: str | Path | Predictor,
    source: str | Path | Cohort,
    out: str | Path | None = None,
    *,
    probabilities: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome[Prediction]]:
    """Predict each session of a cohort.

    A background thread prepares one session ahead of the model, except with hooks: their process groups receive an
    interrupt through the main thread only.

    Args:
        model: a predictor, or a model that `load` reads.
        source: a cohort, or a path that `Cohort.read` recognises.
        out: the folder for the files of each session; None writes nothing. With a folder, outcomes hold no images.
        probabilities: also write the probability maps of a segmentation.
        overwrite: predict again; otherwise sessions with a JSON in ``out`` are skipped, and it is an error
            of the session if that answer has another model or other options.
        progress: called with (sessions done, number of sessions).
    """
    predictor = model if isinstance(model, Predictor) else load(model)
    if probabilities and predictor.per_voxel:
        predictor = predictor.with_options(replace(predictor.options, class_probabilities=True))

    def answer(ready: PredictorInput, name: str) -> Prediction:
        prediction = predictor.predict_prepared(ready)
        if out is None:
            return prediction
        prediction.save(out, name, probabilities=probabilities, overwrite=True)
        return prediction.without_images()

    done = None
    if out is not None and not overwrite:
        settings = predictor.prediction_settings | {"probabilities": probabilities and predictor.per_voxel}
        done = _Done(Path(out), ".json", predictor, settings)
    return _answer_sessions(predictor, source, done, answer, progress)


def explain_cohort(
    model: str | Path | Predictor,
    source: str | Path | Cohort,
    out: str | Path,
    *,
    method: str | Sequence[str] | None = None,
    class_name: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome[Explanation]]:
    """Explain each session of a cohort and write its files at once.

    Maps are large, so outcomes hold only their numbers, not the images.

    Args:
        model, source, progress: as for `predict`.
        method, class_name: see `brainfound.inference.explanation.choose_methods`.
        overwrite: explain again; otherwise sessions with an explanation in ``out`` are skipped, as for
            `predict`.
    """
    predictor = model if isinstance(model, Predictor) else load(model)
    methods = choose_methods(predictor.model, predictor.target, method, class_name)

    def answer(ready: PredictorInput, name: str) -> Explanation:
        explanation = predictor.explain_prepared(ready, methods, class_name)
        explanation.save(out, name, overwrite=True)
        return replace(explanation, maps={})

    settings = predictor.explanation_settings(methods, class_name)
    done = None if overwrite else _Done(Path(out), "_explanation.json", predictor, settings)
    return _answer_sessions(predictor, source, done, answer, progress)


@dataclass(frozen=True)
class _Done:
    """The answers that a folder already has, by the ending of their files."""

    folder: Path
    ending: str
    predictor: Predictor
    settings: dict[str, Any]

    def has(self, session: Session) -> bool:
        """Whether a session need not be answered again; UsageError if its answer has another model or options."""
        file = self.folder / f"{file_stem(session.subject, session.session)}{self.ending}"
        if not file.is_file():
            return False
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        content = content if isinstance(content, dict) else {}
        remedy = "Give another folder, or overwrite"
        if content.get("model_hash") != self.predictor.model_hash:
            raise UsageError(
                "the folder has an answer of another model", where=self.folder, got=file.name, remedy=remedy
            )
        saved = content.get("settings")
        if saved != self.settings:
            saved = saved if isinstance(saved, dict) else {}
            names = [name for name in {**self.settings, **saved} if saved.get(name) != self.settings.get(name)]
            got, expected = (", ".join(f"{k} {of.get(k)}" for k in names) for of in (saved, self.settings))
            what = "the folder has an answer with other options"
            raise UsageError(what, where=self.folder, got=got, expected=expected, remedy=remedy)
        return not (self.predictor.strict and content.get("input_level") == "fail")


def _answer_sessions(
    predictor: Predictor,
    source: str | Path | Cohort,
    done: _Done | None,
    answer: Callable[[PredictorInput, str], _Result],
    progress: Callable[[int, int], None] | None,
) -> list[Outcome[_Result]]:
    """Answer each session from its input and name, unless it is `done`."""
    cohort = source if isinstance(source, Cohort) else Cohort.read(source)
    sessions = list(cohort.sessions())

    answered = {file_stem(s.subject, s.session) for s in sessions if done is not None and done.has(s)}

    def prepare(session: Session) -> PredictorInput | BrainFoundError | str:
        if file_stem(session.subject, session.session) in answered:
            return "already done"
        try:
            return predictor.prepare(session)
        except BrainFoundError as error:
            return error

    ahead = (prepare(s) for s in sessions) if predictor.hooks else map_in_background(sessions, prepare, ahead=1)
    outcomes: list[Outcome[_Result]] = []
    # Also closed on an interrupt: the thread then stops after its current session.
    with closing(ahead) as prepared:
        for count, session in enumerate(sessions, start=1):
            ready = next(prepared)
            result, reason = None, ""
            refused = isinstance(ready, RefusedInputError)
            if isinstance(ready, str | BrainFoundError):
                reason = str(ready)
            else:
                try:
                    result = answer(ready, file_stem(session.subject, session.session))
                except BrainFoundError as error:
                    reason = str(error)
            # Free the session before the thread starts on the next one.
            del ready
            outcomes.append(Outcome(session.subject, session.session, result, reason, refused))
            if progress:
                progress(count, len(sessions))
    return outcomes
