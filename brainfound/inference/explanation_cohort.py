"""Explanations of a whole cohort: the model is loaded once, and a session that fails stops no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from brainfound.data.cohort import Cohort
from brainfound.errors import BrainFoundError
from brainfound.inference.explanation import Explanation, choose_methods
from brainfound.inference.loading import load
from brainfound.inference.prediction import file_stem
from brainfound.inference.predictor import Predictor


@dataclass(frozen=True)
class ExplanationOutcome:
    """What became of one session: an explanation, or the reason why there is none."""

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
    """Explain every session of a cohort and write its files as it is done.

    Maps are large, so that the outcomes hold their numbers and not the images.

    Args:
        model: a predictor, or what `load` reads.
        source: a cohort, or what `Cohort.read` recognises.
        out: where the files go.
        method, class_name: see `brainfound.inference.explanation.choose_methods`.
        overwrite: do again what is there; otherwise sessions with an explanation in ``out`` are skipped.
        progress: called with (sessions done, sessions in all).

    Raises:
        UsageError: a method is unknown, or the model cannot give it; or the model has no such class.
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
                ready = predictor.prepare(session)
                explanation = predictor.explain_stack(
                    ready.stack, ready.notes, ready.rejected, method=methods, class_name=class_name
                )
            except BrainFoundError as error:
                reason = str(error)
        if explanation is not None:
            explanation.save(out, name)
            explanation = replace(explanation, maps={})
        outcomes.append(ExplanationOutcome(session.subject, session.session, explanation, reason))
        if progress:
            progress(done, len(sessions))
    return outcomes
