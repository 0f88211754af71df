"""The verdict on a model: its label and its line, for models that are good, useless or collapsed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from torch import nn

from brainfound.finetuning.best_step import BestStep
from brainfound.finetuning.scoring import SessionScores
from brainfound.finetuning.tasks.classification import Classification
from brainfound.finetuning.tasks.regression import Regression
from brainfound.finetuning.tasks.segmentation import Segmentation
from brainfound.finetuning.verdict import judge
from brainfound.metrics.registry import classification_scores, regression_scores

AGE = Regression("age_years", mean=47.0, std=15.0)
SEX = Classification("sex", ("F", "M"), shares=(0.5, 0.5))
NUM_SUBJECTS = 30
TRUTH = np.linspace(20, 74, NUM_SUBJECTS)
ERRORS = np.random.default_rng(0).normal(0, 1, NUM_SUBJECTS)


def ages(prediction: np.ndarray, truth: np.ndarray = TRUTH) -> SessionScores:
    cases = pd.DataFrame({"subject": [f"s{k}" for k in range(len(truth))], "truth": truth, "prediction": prediction})
    trivial = regression_scores(truth, np.full(len(truth), AGE.mean))
    return SessionScores("regression", regression_scores(truth, prediction), trivial, cases)


def sexes(p: np.ndarray) -> SessionScores:
    labels = np.arange(len(p)) % 2
    shares = np.stack([1 - p, p], axis=1)
    cases = pd.DataFrame({"subject": [f"s{k}" for k in range(len(p))], "truth": [SEX.names[k] for k in labels]})
    cases = cases.assign(**{"p(F)": 1 - p, "p(M)": p})
    trivial = classification_scores(labels.tolist(), np.full((len(p), 2), 0.5))
    return SessionScores("classification", classification_scores(labels.tolist(), shares), trivial, cases)


def test_a_clearly_better_model():
    verdict = judge(AGE, ages(TRUTH + 2 * ERRORS), ages(TRUTH + 8 * ERRORS[::-1]), None)
    assert verdict.label == "better"
    assert verdict.text.startswith("Clearly better than its baselines: mean error ")
    assert "on 30 test subjects; a linear model on the frozen features " in verdict.text
    assert "; the same answer for everybody 13.9" in verdict.text
    assert "\n" not in verdict.text


def test_subjects_that_took_part_in_the_choice_are_named():
    verdict = judge(AGE, ages(TRUTH + 2 * ERRORS), None, None, "validation")
    assert "on 30 validation subjects" in verdict.text
    assert verdict.text.endswith("These subjects took part in choosing it: test it on another cohort.")
    assert "left out in turn" in judge(AGE, ages(TRUTH + 2 * ERRORS), None, None, "inner folds").text


def test_a_difference_that_may_be_chance():
    verdict = judge(AGE, ages(TRUTH + 4.0 * ERRORS), ages(TRUTH + 4.1 * ERRORS[::-1]), None)
    assert verdict.label == "unclear"
    assert verdict.text.startswith("Better than its baselines, but the difference may be chance: ")


def test_a_model_that_loses_to_the_linear_one():
    worse = judge(AGE, ages(TRUTH + 8 * ERRORS), ages(TRUTH + 2 * ERRORS[::-1]), None)
    assert (worse.label, worse.text[:60]) == (
        "not better", "Clearly worse than a linear model on the frozen features: me"[:60],
    )  # fmt: skip
    equal = judge(AGE, ages(TRUTH + 4 * ERRORS), ages(TRUTH + 4 * ERRORS), None)
    assert equal.text.startswith("Not better than a linear model on the frozen features: ")


def test_a_model_that_loses_to_the_trivial_answer_and_to_the_linear_one_is_compared_with_the_former():
    verdict = judge(AGE, ages(TRUTH[::-1]), ages(TRUTH + ERRORS), None)
    assert verdict.text.startswith("Clearly worse than the same answer for everybody: ")


def test_answers_that_shrink_to_the_mean_are_named():
    """Well correlated and useless: the case of a LoRA that answers 57 for everybody."""
    shrunk = AGE.mean + 0.05 * (TRUTH - AGE.mean)
    verdict = judge(AGE, ages(shrunk), ages(TRUTH + 4 * ERRORS), None)
    assert verdict.label == "collapsed"
    assert verdict.text.startswith("Do not use this model: ")
    assert "All subjects get nearly the same age_years: answers have a standard deviation of 0.8" in verdict.text
    assert judge(AGE, ages(AGE.mean + 0.5 * (TRUTH - AGE.mean)), None, None).label == "better"


def test_probabilities_that_are_the_same_for_all():
    rng = np.random.default_rng(1)
    labels = np.arange(NUM_SUBJECTS) % 2
    good = 0.3 + 0.4 * labels + rng.uniform(-0.05, 0.05, NUM_SUBJECTS)
    assert judge(SEX, sexes(good), sexes(rng.uniform(size=NUM_SUBJECTS)), None).label == "better"
    flat = judge(SEX, sexes(0.5 + 0.01 * (labels - 0.5)), None, None)
    assert flat.label == "collapsed"
    assert "All subjects get nearly the same probabilities" in flat.text
    chance = judge(SEX, sexes(np.tile([0.2, 0.2, 0.8, 0.8], 8)[:NUM_SUBJECTS]), None, None)
    assert chance.label in ("not better", "unclear")


def test_few_subjects_are_never_clear():
    truth = TRUTH[::6]
    verdict = judge(AGE, ages(truth, truth), None, None)
    assert verdict.label == "unclear"
    assert "on 5 test subjects" in verdict.text


def test_a_segmentation_that_marks_nothing():
    task = Segmentation("mask", names=("background", "lesion"), codes=(0, 1))
    cases = pd.DataFrame(
        {"subject": ["a", "b", "c", "d"], "reference_pixels": [9, 9, 9, 0], "dice": [0.0, 0, 0, np.nan]}
    )
    scores = SessionScores("segmentation", {"dice": 0.0}, {"dice": 0.05}, cases.assign(predicted_pixels=0))
    assert "Nothing is marked in 3 of the 3 sessions that have the structure" in judge(task, scores, None, None).text
    better = replace(scores, scores={"dice": 0.6}, cases=cases.assign(predicted_pixels=9, dice=[0.6, 0.6, 0.6, np.nan]))
    verdict = judge(task, better, None, None)
    assert (verdict.label, "the whole head 0.050" in verdict.text) == ("unclear", True)


@pytest.mark.parametrize(("last", "remark"), [(4.3, False), (7.0, True)])
def test_rising_validation_is_named(last, remark):
    best = BestStep(nn.Linear(1, 1), "mae", 0, 0.0)
    best.add(0, 4.0)
    best.add(25, last)
    text = judge(AGE, ages(TRUTH + ERRORS), None, best).text
    line = (
        "Training made it worse, so an earlier step is exported: step 0 of 25: validation mae 4.000 (7.000 at step 25)."
    )
    assert text.endswith(line) is remark
