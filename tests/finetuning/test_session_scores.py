"""What stands beside a model's scores: a baseline of the training part, and notes on labels that were not learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from brainfound.finetuning.scoring import read_cases, score_predictions, write_cases
from brainfound.finetuning.tasks import Segmentation, resolve
from brainfound.models.stack_prediction import StackPrediction

SESSIONS = [6, 7, 8, 9, 10, 11]


def test_the_trivial_baseline_is_of_the_training_part_whoever_is_scored(small_store):
    target = resolve(small_store, [0, 1, 2], "age_years", "regression")
    scored = score_predictions(lambda session, stack: StackPrediction(value=0.0), small_store, SESSIONS, target)
    ages = small_store.covariate("age_years").to_numpy(float)
    assert scored.trivial["mae"] == pytest.approx(np.abs(ages[SESSIONS] - ages[:3].mean()).mean())
    assert scored.trivial["mae"] > 1.5 * np.abs(ages[SESSIONS] - ages[SESSIONS].mean()).mean(), "that would be unfair"


@pytest.mark.parametrize("train", [[0, 2, 4, 1], [1, 3, 5, 0]])
def test_shares_of_classes_are_those_of_the_training_part(small_store, train):
    target = resolve(small_store, train, "diagnosis", "classification")
    answer = StackPrediction(probabilities=np.array([0.5, 0.5]))
    scored = score_predictions(lambda session, stack: answer, small_store, SESSIONS, target)
    labels = small_store.covariate("diagnosis").to_numpy()
    common = max(set(labels[train]), key=labels[train].tolist().count)
    f1 = 2 * (labels[SESSIONS] == common).sum() / (len(SESSIONS) + (labels[SESSIONS] == common).sum())
    assert scored.trivial["macro_f1"] == pytest.approx(f1 / 2)
    assert scored.trivial["auroc"] == 0.5


def test_where_the_training_part_is_not_remembered_no_baseline_is_made_up(small_store):
    target = replace(resolve(small_store, [0, 1], "diagnosis", "classification"), shares=())
    answer = StackPrediction(probabilities=np.array([0.5, 0.5]))
    scored = score_predictions(lambda session, stack: answer, small_store, SESSIONS, target)
    assert np.isnan(list(scored.trivial.values())).all()
    assert scored.scores["auroc"] == 0.5
    assert scored.to_dict()["trivial"]["auroc"] is None


def test_codes_that_were_not_learnt_are_reported(small_store):
    """The lesions of six sessions, three of which have any, have the code 1; the model learnt 3."""
    mask = small_store[SESSIONS[0]].mask
    answer = StackPrediction(classes=np.zeros(mask.shape, dtype=np.uint8))
    target = Segmentation("mask", names=("background", "label 3"), codes=(0, 3))
    scored = score_predictions(lambda session, stack: answer, small_store, SESSIONS, target)
    assert scored.notes == ("mask code 1, in 3 sessions, was not learnt: counted as background",)
    for known in (replace(target, codes=(0, 1)), replace(target, codes=(0, 1), merge=True)):
        assert score_predictions(lambda session, stack: answer, small_store, SESSIONS, known).notes == ()


def test_cases_keep_their_classes_whatever_they_are_called(tmp_path):
    cases = pd.DataFrame({"row": [0, 1], "subject": ["007", "NA"], "session": ["1", "01"], "truth": ["NA", "01"]})
    cases["p(NA)"] = [0.5, np.nan]
    write_cases(tmp_path / "cases.tsv", cases, keep_ids=True)
    pd.testing.assert_frame_equal(read_cases(tmp_path / "cases.tsv"), cases)
