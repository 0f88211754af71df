"""A cohort through one predictor: the next session is prepared meanwhile, and nothing else changes."""

from __future__ import annotations

import shutil
import threading

import pandas as pd
import pytest

from brainfound.data.cohort import Cohort
from brainfound.errors import ModelError, ScanError
from brainfound.inference import predictor as predictor_module
from brainfound.inference.cohort import predict
from brainfound.inference.predictor import Predictor
from tests.tiny_runs import prefetch_threads

NUM_SESSIONS = 5
LONG = 60
"""Seconds after which a test that waits for another thread gives up."""


@pytest.fixture(scope="module")
def cohort(source, tmp_path_factory) -> Cohort:
    """Five sessions; nothing of s01 and one scan of s03 can be read."""
    folder = tmp_path_factory.mktemp("some")
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype=str).head(NUM_SESSIONS * 3).drop(columns="mask")
    for file in table["path"]:
        shutil.copy(source / file, folder / file)
    for name in ("s01_T1w", "s01_T2w", "s01_FLAIR", "s03_FLAIR"):
        (folder / f"{name}.nii.gz").write_bytes(b"not an image")
    table.to_csv(folder / "manifest.tsv", sep="\t", index=False)
    return Cohort.read(folder)


def bytes_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_answers_are_those_of_one_session_after_the_other(segmenter, predictor, cohort, tmp_path):
    for name, asked in (("classes", predictor), ("masks", segmenter)):
        outcomes = predict(asked, cohort, tmp_path / name)
        assert [outcome.subject for outcome in outcomes] == [f"s{n:02d}" for n in range(NUM_SESSIONS)]
        for session, outcome in zip(cohort.sessions(), outcomes, strict=True):
            stem = f"{session.subject}_ses-{session.session}"
            if session.subject == "s01":
                with pytest.raises(ScanError) as refused:
                    asked.predict_session(session)
                assert (outcome.result, outcome.reason) == (None, str(refused.value))
            else:
                asked.predict_session(session).save(tmp_path / f"{name} alone", stem)
                assert outcome.reason == ""
        assert bytes_of(tmp_path / name) == bytes_of(tmp_path / f"{name} alone")
        assert [outcome.subject for outcome in outcomes if outcome.result is None] == ["s01"]
        assert [bool(o.result and o.result.rejected) for o in outcomes] == [False, False, False, True, False]
        assert all(o.result.image is o.result.probability is None for o in outcomes if o.result)
    assert prefetch_threads() == []


def test_the_next_session_is_prepared_while_the_model_works(predictor, cohort, monkeypatch):
    begun, done = [threading.Event() for _ in range(NUM_SESSIONS)], set()
    prepare, infer = Predictor.prepare, predictor_module.infer
    order, ahead = [], []

    def watched_prepare(self, session):
        number = int(session.subject[1:])
        ahead.append(number - len(done))
        begun[number].set()
        if number == 1:
            # Nothing of it can be read, so the model will not be asked.
            done.add(number)
        return prepare(self, session)

    def watched_infer(model, stack, *how):
        number = int(stack.subject[1:])
        order.append(number)
        if number + 1 < NUM_SESSIONS:
            assert begun[number + 1].wait(LONG), "the next session waits until this one is answered"
        if number + 2 < NUM_SESSIONS:
            assert not begun[number + 2].is_set()
        done.add(number)
        return infer(model, stack, *how)

    monkeypatch.setattr(Predictor, "prepare", watched_prepare)
    monkeypatch.setattr(predictor_module, "infer", watched_infer)
    outcomes = predict(predictor, cohort)
    assert [outcome.result is not None for outcome in outcomes] == [True, False, True, True, True]
    assert order == [0, 2, 3, 4]
    assert max(ahead) <= 1


def test_an_interrupt_ends_the_thread_and_keeps_what_is_done(predictor, cohort, tmp_path, monkeypatch):
    infer = predictor_module.infer

    def interrupted(model, stack, *how):
        if stack.subject == "s02":
            raise KeyboardInterrupt
        return infer(model, stack, *how)

    monkeypatch.setattr(predictor_module, "infer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(predictor, cohort, tmp_path)
    assert prefetch_threads() == []
    assert sorted(bytes_of(tmp_path)) == ["s00_ses-1.json"]
    monkeypatch.setattr(predictor_module, "infer", infer)
    again = predict(predictor, cohort, tmp_path)
    assert [outcome.reason for outcome in again][::2] == ["already done", "", ""]


@pytest.mark.parametrize("fault", [ScanError("too dark"), ModelError("no contrast")])
def test_errors_stay_with_their_session(predictor, cohort, monkeypatch, fault):
    infer = predictor_module.infer

    def refuse(model, stack, *how):
        if stack.subject == "s02":
            raise fault
        return infer(model, stack, *how)

    monkeypatch.setattr(predictor_module, "infer", refuse)
    reasons = [outcome.reason for outcome in predict(predictor, cohort)]
    assert reasons[2] == str(fault)
    assert (reasons[0], reasons[3], reasons[4]) == ("", "", "")


def test_a_fault_of_the_program_is_not_hidden(predictor, cohort, monkeypatch):
    def broken(self, session):
        raise ZeroDivisionError

    monkeypatch.setattr(Predictor, "prepare", broken)
    with pytest.raises(ZeroDivisionError):
        predict(predictor, cohort)
    assert prefetch_threads() == []


def test_with_hooks_nothing_is_prepared_ahead(predictor, cohort, monkeypatch):
    """An interrupt ends a hook through the main thread only."""
    seen = []
    monkeypatch.setattr(predictor, "hooks", ("a hook",))

    def prepare(self, session):
        seen.append(threading.current_thread() is threading.main_thread())
        raise ScanError("not here")

    monkeypatch.setattr(Predictor, "prepare", prepare)
    assert {outcome.reason for outcome in predict(predictor, cohort)} == {"not here"}
    assert seen == [True] * NUM_SESSIONS
