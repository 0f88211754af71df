"""How far a model's answers can be believed: fitted on the validation part when training has ended, never on the test.

Of a classification a temperature; of a regression a bias correction and a conformal interval. They stand beside the
raw answers and never replace them: in scores.json with what they do on the test part, in the bundle so that
`brainfound predict` can give them too. What the validation part is too small for is left out, and said.

Axes: n sessions, K classes or labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

import numpy as np
import pandas as pd

from brainfound.errors import UsageError
from brainfound.finetuning.scoring import PREDICTION_STD, SessionScores, probability_column
from brainfound.finetuning.targets import Target
from brainfound.metrics.calibration import (
    BiasCorrection,
    ConformalInterval,
    ReliabilityBins,
    apply_temperature,
    brier_score,
    conformal_interval,
    coverage,
    expected_calibration_error,
    fit_bias_correction,
    fit_temperature,
    reliability_bins,
)
from brainfound.metrics.scores import regression_scores
from brainfound.models.infer import StackPrediction

NUM_BINS = 15
_FLOAT32_STEP = float(np.finfo(np.float32).eps) / 2
Fitted = TypeVar("Fitted")


@dataclass(frozen=True)
class AnswerCalibration:
    """What was fitted on the validation part; None where it could not be, or is of another task.

    Attributes:
        num_sessions: of the validation part.
        left_out: what could not be fitted, and why.
    """

    num_sessions: int = 0
    temperature: float | None = None
    bias_correction: BiasCorrection | None = None
    interval: ConformalInterval | None = None
    left_out: tuple[str, ...] = ()

    @classmethod
    def fit(cls, validation: SessionScores, target: Target, confidence: float = 0.9) -> Self:
        """Fit what the task has.

        Args:
            validation: a model's answers on the validation part.
            target: what it learnt.
            confidence: of the prediction interval.
        """
        cases, left_out = validation.cases, []

        def where_possible(name: str, fit: Callable[[], Fitted]) -> Fitted | None:
            try:
                return fit()
            except UsageError as error:
                left_out.append(f"{name}: {error}")
                return None

        fitted: dict[str, Any] = {}
        if target.task == "classification":
            fitted["temperature"] = where_possible("temperature", lambda: _fit_temperature(cases, target))
        elif target.task == "regression":
            fitted["bias_correction"] = where_possible(
                "bias correction", lambda: fit_bias_correction(cases["truth"], cases["prediction"])
            )
            # Sessions of a subject are not new cases.
            first = cases.drop_duplicates("subject")
            std = first.get(PREDICTION_STD)
            fitted["interval"] = where_possible(
                "interval",
                lambda: conformal_interval(first["truth"], first["prediction"], std, confidence=confidence),
            )
        return cls(len(cases), left_out=tuple(left_out), **fitted)

    def report(self, test: SessionScores, target: Target) -> dict[str, Any]:
        """What the calibration does on another part, beside the raw answers; plain values for JSON."""
        common = {"fitted_on": "validation", "num_sessions": self.num_sessions, "left_out": list(self.left_out)}
        if target.task == "classification":
            return common | self._report_classification(test.cases, target)
        if target.task == "regression":
            return common | self._report_regression(test.cases)
        return {}

    def _report_classification(self, cases: pd.DataFrame, target: Target) -> dict[str, Any]:
        measures: dict[str, Callable[..., float]] = {
            "ece": lambda probabilities, truth: expected_calibration_error(probabilities, truth, NUM_BINS),
            "brier": brier_score,
        }
        questions = _probabilities_and_truth(cases, target)
        content: dict[str, Any] = {"temperature": self.temperature}
        for name, measure in measures.items():
            raw = float(np.mean([measure(probabilities, truth) for probabilities, truth in questions]))
            content[name] = {"raw": raw, "calibrated": None}
            if self.temperature is not None:
                after = [
                    measure(_apply_temperature(probabilities, self.temperature), truth)
                    for probabilities, truth in questions
                ]
                content[name]["calibrated"] = float(np.mean(after))
        return content

    def _report_regression(self, cases: pd.DataFrame) -> dict[str, Any]:
        truth, prediction = cases["truth"].to_numpy(), cases["prediction"].to_numpy()
        content: dict[str, Any] = {"bias_correction": None, "interval": None}
        if self.bias_correction is not None:
            scores = regression_scores(truth.tolist(), self.bias_correction.apply(prediction).tolist())
            plain = {name: None if np.isnan(value) else float(value) for name, value in scores.items()}
            content["bias_correction"] = {**asdict(self.bias_correction), "scores": plain}
        if self.interval is not None:
            low, high = self.interval.apply(prediction, cases.get(PREDICTION_STD))
            measured = {"coverage": coverage(truth, low, high), "mean_width": float(np.mean(high - low))}
            content["interval"] = {**asdict(self.interval), **measured}
        return content

    def reliability(self, test: SessionScores, target: Target) -> dict[str, ReliabilityBins]:
        """Of a classification: how sure and how right it was on another part, raw and calibrated; labels together."""
        questions = _probabilities_and_truth(test.cases, target)
        probabilities, truth = (np.concatenate(arrays) for arrays in zip(*questions, strict=True))
        curves = {"raw": reliability_bins(probabilities, truth, NUM_BINS)}
        if self.temperature is not None:
            name = f"temperature {self.temperature:.3g}"
            curves[name] = reliability_bins(_apply_temperature(probabilities, self.temperature), truth, NUM_BINS)
        return curves

    def calibrate_answer(self, answer: StackPrediction, target: Target) -> dict[str, Any]:
        """What one answer gains, as plain values for JSON; nothing where nothing was fitted."""
        content: dict[str, Any] = {}
        if target.task == "classification" and self.temperature is not None:
            assert answer.probabilities is not None
            probabilities = np.asarray(answer.probabilities, dtype=np.float64)
            if target.multi_label:
                tempered = _apply_temperature(_binary_probabilities(probabilities), self.temperature)[:, 1]
            else:
                tempered = _apply_temperature(probabilities[None], self.temperature)[0]
            content["calibrated_probabilities"] = dict(zip(target.names, map(float, tempered), strict=True))
        if target.task == "regression":
            assert answer.value is not None
            value = np.array([answer.value])
            if self.bias_correction is not None:
                content["bias_corrected"] = float(self.bias_correction.apply(value)[0])
            if self.interval is not None:
                std = np.array([answer.value_std]) if self.interval.normalised else None
                low, high = self.interval.apply(value, std)
                content["interval"] = {
                    "low": float(low[0]),
                    "high": float(high[0]),
                    "confidence": self.interval.confidence,
                }
        return content

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "left_out": list(self.left_out)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any] | None) -> Self:
        """From `to_dict`; of None, which bundles without a calibration give, one that adds nothing."""
        fields = dict(content or {})
        for name, kind in (("bias_correction", BiasCorrection), ("interval", ConformalInterval)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        return cls(**{**fields, "left_out": tuple(fields.get("left_out", ()))})


def _fit_temperature(cases: pd.DataFrame, target: Target) -> float:
    questions = _probabilities_and_truth(cases, target)
    probabilities = np.concatenate([probabilities for probabilities, _ in questions])
    return fit_temperature(_log(probabilities), np.concatenate([truth for _, truth in questions]))


def _probabilities_and_truth(cases: pd.DataFrame, target: Target) -> list[tuple[np.ndarray, np.ndarray]]:
    """Probabilities ``(n, K)`` and class indices ``(n,)``: one pair, or of several labels a yes-or-no one each."""
    probabilities = cases[[probability_column(name) for name in target.names]].to_numpy(dtype=np.float64)
    if not target.multi_label:
        # Float32 rows have sum 1 to seven digits.
        return [
            (
                probabilities / probabilities.sum(axis=1, keepdims=True),
                cases["truth"].map(target.names.index).to_numpy(),
            )
        ]
    return [
        (_binary_probabilities(probabilities[:, k]), cases[f"truth({name})"].to_numpy(dtype=int))
        for k, name in enumerate(target.names)
    ]


def _binary_probabilities(probabilities: np.ndarray) -> np.ndarray:
    # A float32 sigmoid is 1 from about 17 on: beyond that nothing is known of how sure the model was.
    yes = np.clip(probabilities, _FLOAT32_STEP, 1 - _FLOAT32_STEP)
    return np.stack([1 - yes, yes], axis=1)


def _apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    return apply_temperature(_log(probabilities), temperature)


def _log(probabilities: np.ndarray) -> np.ndarray:
    # Log probabilities are class scores but for a constant per row, which a softmax does not see.
    return np.log(np.clip(probabilities, 1e-38, None))
