"""What is fitted on a validation part, and what it says of another one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import special

from brainfound.finetuning.scoring import SessionScores
from brainfound.finetuning.tasks import Classification, Regression, RegressionRecipe
from brainfound.finetuning.tasks.base import AnswerCalibration
from brainfound.finetuning.tasks.classification import MultiLabelClassification
from brainfound.metrics.calibration import expected_calibration_error, fit_temperature
from brainfound.models.stack_prediction import StackPrediction

AGES = Regression("age_years", mean=50.0, std=10.0)
WORDS = Classification("diagnosis", names=("healthy", "patient", "unsure"))
LABELS = MultiLabelClassification("edema,lesion", names=("edema", "lesion"))


def with_confidence(confidence: float) -> Regression:
    return replace(AGES, settings=RegressionRecipe(interval_confidence=confidence))


def ages(count: int, seed: int, spread: bool = False, sessions: int = 1) -> SessionScores:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(20, 90, count)
    cases = pd.DataFrame({"subject": [f"s{n // sessions}" for n in range(count)], "truth": truth})
    std = rng.uniform(1, 9, count)
    cases["prediction"] = 0.5 * truth + 25 + rng.normal(0, 1, count) * std
    if spread:
        cases["prediction_std"] = std
    return SessionScores("regression", {}, {}, cases)


def words(count: int, seed: int) -> tuple[SessionScores, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 1.5, (count, 3))
    index = (rng.random(count)[:, None] > special.softmax(honest, axis=1).cumsum(axis=1)).sum(axis=1).clip(max=2)
    shares = special.softmax(3 * honest, axis=1).astype(np.float32)
    columns = {f"p({name})": shares[:, k].astype(float) for k, name in enumerate(WORDS.names)}
    cases = pd.DataFrame({"truth": [WORDS.names[k] for k in index], **columns})
    return SessionScores("classification", {}, {}, cases), 3 * honest, index


@pytest.mark.parametrize("spread", [False, True])
def test_regression(spread):
    fitted = with_confidence(0.8).fit_calibration(ages(300, 0, spread).cases)
    assert fitted.left_out == ()
    report = fitted.report(AGES.calibration_effect(fitted, ages(2000, 1, spread).cases))
    assert report["interval"]["normalised"] is spread
    assert report["interval"]["coverage"] == pytest.approx(0.8, abs=0.06)
    assert report["bias_correction"]["slope"] == pytest.approx(0.5, abs=0.05)
    assert set(report["bias_correction"]["scores"]) >= {"mae", "r2", "pearson"}
    json.dumps(report, allow_nan=False)

    again = AnswerCalibration.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert again == fitted
    answer = AGES.calibrate(again, StackPrediction(value=60.0, value_std=2.0 if spread else None))
    width = fitted.interval.half_width * (2 if spread else 1)
    assert answer["interval"] == {"low": 60 - width, "high": 60 + width, "confidence": 0.8}
    line = fitted.bias_correction
    assert answer["bias_corrected"] == pytest.approx((60 - line.intercept) / line.slope)


def test_sessions_of_a_subject_are_one_case():
    thrice = ages(12, 0, sessions=3)
    fitted = with_confidence(0.75).fit_calibration(thrice.cases)  # 4 subjects: the 4th of their distances
    first = thrice.cases.iloc[::3]
    assert fitted.interval.half_width == (first["truth"] - first["prediction"]).abs().max()
    assert with_confidence(0.9).fit_calibration(thrice.cases).interval is None


def test_what_is_too_small_is_left_out_and_reported():
    few = ages(3, 0)
    few.cases["prediction"] = 50.0
    fitted = AGES.fit_calibration(few.cases)
    assert (fitted.interval, fitted.bias_correction) == (None, None)
    assert [line.split(":")[0] for line in fitted.left_out] == ["bias correction", "interval"]
    report = fitted.report(AGES.calibration_effect(fitted, ages(5, 1).cases))
    assert (report["interval"], report["bias_correction"], len(report["left_out"])) == (None, None, 2)
    assert AGES.calibrate(fitted, StackPrediction(value=1.0)) == {}
    assert AGES.calibrate(AnswerCalibration.from_dict(None), StackPrediction(value=1.0)) == {}
    one_class = words(40, 0)[0]
    one_class.cases["truth"] = "healthy"
    without = WORDS.fit_calibration(one_class.cases)
    assert without.temperature is None
    report = without.report(WORDS.calibration_effect(without, words(40, 1)[0].cases))
    assert report["ece"]["raw"] > 0
    assert report["ece"]["calibrated"] is None
    assert list(WORDS.reliability(without, words(40, 1)[0].cases)) == ["raw"]


def test_classification():
    validation, logits, index = words(3000, 0)
    fitted = WORDS.fit_calibration(validation.cases)
    assert fitted.temperature == pytest.approx(fit_temperature(logits, index), rel=1e-3)
    test, logits, index = words(3000, 1)
    report = fitted.report(WORDS.calibration_effect(fitted, test.cases))
    raw = expected_calibration_error(special.softmax(logits, axis=1), index)
    assert report["ece"]["raw"] == pytest.approx(raw, abs=1e-4)
    assert report["ece"]["calibrated"] < 0.3 * report["ece"]["raw"]
    assert report["brier"]["calibrated"] < report["brier"]["raw"]
    assert [bins.count.sum() for bins in WORDS.reliability(fitted, test.cases).values()] == [3000, 3000]
    shares = special.softmax(logits[0]).astype(np.float32)
    answer = WORDS.calibrate(fitted, StackPrediction(probabilities=shares))["calibrated_probabilities"]
    expected = special.softmax(logits[0] / fitted.temperature)
    assert list(answer.values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert list(answer) == list(WORDS.names)


def test_several_labels_share_a_temperature():
    rng = np.random.default_rng(0)
    honest = rng.normal(0, 1.5, (3000, 2))
    truth = (rng.random((3000, 2)) < special.expit(honest)).astype(int)
    columns = {f"truth({name})": truth[:, k] for k, name in enumerate(LABELS.names)}
    columns |= {f"p({name})": special.expit(2 * honest[:, k]) for k, name in enumerate(LABELS.names)}
    scored = SessionScores("classification", {}, {}, pd.DataFrame(columns))
    fitted = LABELS.fit_calibration(scored.cases)
    assert fitted.temperature == pytest.approx(2, rel=0.1)
    report = fitted.report(LABELS.calibration_effect(fitted, scored.cases))
    assert report["brier"]["calibrated"] < report["brier"]["raw"]
    answer = LABELS.calibrate(fitted, StackPrediction(probabilities=np.array([0.9, 1.0], dtype=np.float32)))
    calibrated = answer["calibrated_probabilities"]
    assert calibrated["edema"] == pytest.approx(special.expit(special.logit(0.9) / fitted.temperature), abs=1e-4)
    assert 0.99 < calibrated["lesion"] < 1
