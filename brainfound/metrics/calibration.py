"""Calibration: how well confidence matches accuracy, and corrections that are fitted on held-out data.

Fit a temperature, a bias correction or the width of an interval on a validation part and report scores on another
part; the functions cannot check this. Labels are class indices (n,), probabilities (n, K) have rows that sum to
1, targets and predictions are (n,); anything else, or no cases, raises `UsageError`.

Axes: n cases, K classes, M bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from brainfound.errors import UsageError
from brainfound.metrics.input_checks import finite_array

TEMPERATURE_RANGE = (0.01, 100.0)
"""An optimum outside of this range means that the cases do not determine a temperature."""
MIN_SLOPE = 0.1
"""A bias correction multiplies errors by 1 / slope; smaller slopes are refused."""
MIN_CASES = 10
"""Needed to fit a bias correction; with fewer cases its slope is mostly chance."""


@dataclass(frozen=True)
class ReliabilityBins:
    """Confidence and accuracy of a model in M bins of equal width."""

    edges: np.ndarray
    """``(M + 1,)`` from 0 to 1; a bin includes its upper edge."""
    confidence: np.ndarray
    """``(M,)`` mean probability of the predicted class; ``nan`` in an empty bin."""
    accuracy: np.ndarray
    """``(M,)`` share of correct predictions; ``nan`` in an empty bin."""
    count: np.ndarray


@dataclass(frozen=True)
class BiasCorrection:
    """The line of predicted over true age; its inverse, (prediction − intercept) / slope, corrects a prediction."""

    slope: float
    intercept: float

    def apply(self, prediction: Any) -> np.ndarray:
        """Corrected predictions ``(n,)``."""
        return (_finite(prediction, "prediction") - self.intercept) / self.slope


@dataclass(frozen=True)
class ConformalInterval:
    """Half-width of a prediction interval, or with ``normalised`` the factor of the predicted standard deviation."""

    half_width: float
    confidence: float
    normalised: bool

    def apply(self, prediction: Any, std: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends, in the unit of the prediction; `std` only for a normalised interval."""
        values = _finite(prediction, "prediction")
        if (std is not None) != self.normalised:
            wanted = "one per prediction" if self.normalised else "none: the interval was fitted without"
            raise UsageError("standard deviations do not fit the interval", where="std", expected=wanted)
        width = self.half_width * (np.ones_like(values) if std is None else _positive(std, values))
        return values - width, values + width


def fit_temperature(logits: Any, labels: Any) -> float:
    """The temperature T that maximises the likelihood of ``softmax(logits / T)``; above 1 for an overconfident model.

    It changes neither accuracy nor the AUROC of two classes. Logits (n, K) may be log probabilities.

    Raises:
        UsageError: there is only one class, scores are constant over classes, or there is no optimum: all
            predictions are correct (T → 0), or no better than chance (T → ∞).

    Source: C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    scores, truth = _scores_and_labels(logits, labels, "logits")
    if len(np.unique(truth)) < 2:
        raise UsageError("a temperature needs cases of two classes", where="labels", got="one class")
    if np.ptp(scores, axis=1).max() == 0:
        raise UsageError("a temperature needs scores that differ between classes", where="logits", got="constant rows")

    def mean_loss(log_temperature: float) -> float:
        scaled = scores * math.exp(-log_temperature)
        return float(np.mean(special.logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]))

    # Convex in 1/T, hence with a single minimum in log T.
    low, high = map(math.log, TEMPERATURE_RANGE)
    optimum = optimize.minimize_scalar(mean_loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    best = min((low, float(optimum.x), high), key=mean_loss)
    if not low + 0.01 < best < high - 0.01:
        all_correct = bool((scores.argmax(axis=1) == truth).all())
        reason = "every answer is right" if all_correct else "the scores do not determine one"
        got, remedy = f"{len(truth)} cases", "Give more cases, or leave the scores as they are"
        raise UsageError(f"there is no best temperature: {reason}", where="labels", got=got, remedy=remedy)
    return math.exp(best)


def apply_temperature(logits: Any, temperature: float) -> np.ndarray:
    """``softmax(logits / temperature)``, ``(n, K)``; the temperature is positive."""
    if not 0 < temperature < math.inf:
        raise UsageError("a temperature must be positive", where="temperature", got=temperature)
    scores = _finite(logits, "logits")
    if scores.ndim != 2:
        raise UsageError("not the scores of classes", where="logits", got=scores.shape, expected="(n, K)")
    return special.softmax(scores / temperature, axis=1)


def reliability_bins(probabilities: Any, labels: Any, num_bins: int = 15) -> ReliabilityBins:
    """Sort cases by the probability of the predicted (most probable) class into bins of equal width.

    Source: Guo et al. 2017, section 2, after Niculescu-Mizil and Caruana, ICML 2005.
    """
    if num_bins < 1:
        raise UsageError("must be 1 or more", where="num_bins", got=num_bins)
    shares, truth = _shares_and_labels(probabilities, labels)
    confidence, correct = shares.max(axis=1), shares.argmax(axis=1) == truth
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    bins = np.searchsorted(edges[1:-1], confidence, side="left")
    count = np.bincount(bins, minlength=num_bins)
    filled = np.where(count > 0, count, np.nan)
    mean_confidence, accuracy = (np.bincount(bins, values, num_bins) / filled for values in (confidence, correct))
    return ReliabilityBins(edges, mean_confidence, accuracy, count)


def expected_calibration_error(probabilities: Any, labels: Any, num_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over `reliability_bins`, weighted by cases; 0 is best.

    Biased upwards with few cases: with 15 bins, a perfectly calibrated two-class model scores about 0.19 on 20 cases,
    0.09 on 100 and 0.03 on 1,000. Compare models on the same cases.

    Source: M. P. Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015; Guo et al.
    2017, eq. 3.
    """
    bins = reliability_bins(probabilities, labels, num_bins)
    shares = bins.count / bins.count.sum()
    return float(np.nansum(shares * np.abs(bins.confidence - bins.accuracy)))


def brier_score(probabilities: Any, labels: Any) -> float:
    """Mean squared distance between probabilities and truth, summed over classes; 0 is best.

    For two classes half the sum, (p − y)², as is usual and as in scikit-learn.

    Source: G. W. Brier, "Verification of forecasts expressed in terms of probability", Mon Weather Rev 1950.
    """
    shares, truth = _shares_and_labels(probabilities, labels)
    num_classes = shares.shape[1]
    squares = ((shares - np.eye(num_classes)[truth]) ** 2).sum(axis=1)
    return float(squares.mean() / (2 if num_classes == 2 else 1))


def fit_bias_correction(target: Any, prediction: Any) -> BiasCorrection:
    """Fit prediction = slope · target + intercept, whose inverse removes the regression to the mean of a brain age.

    The form of Cole et al., "Brain age predicts mortality", Mol Psychiatry 2018, compared by de Lange and Cole
    ("Commentary: Correction procedures in brain-age prediction", NeuroImage Clin 2020) with that of Beheshti et al.
    (NeuroImage Clin 2019). The latter subtracts slope · *true age*: it leaks the target, so that a constant prediction
    gets an error of 0. This form needs no true age and applies to a new person. It removes the bias and multiplies the
    scatter by 1 / slope, so its error is most often larger than the raw one. Report both.

    Raises:
        UsageError: there are fewer than ten cases, the target does not vary, or the slope is below 0.1.
    """
    truth, answers = _pair(target, prediction)
    if len(truth) < MIN_CASES:
        raise UsageError("a bias correction needs more cases", got=len(truth), expected=f"{MIN_CASES} or more")
    if np.ptp(truth) == 0:
        raise UsageError("a bias correction needs targets that vary", where="target", got=f"all {truth[0]:g}")
    line = stats.linregress(truth, answers)
    if line.slope < MIN_SLOPE:
        what = "the predictions do not follow the target, so there is no bias to correct"
        expected = f"{MIN_SLOPE:g} or more"
        raise UsageError(what, where="prediction", got=f"slope {line.slope:.3g}", expected=expected)
    return BiasCorrection(float(line.slope), float(line.intercept))


def conformal_interval(target: Any, prediction: Any, std: Any = None, *, confidence: float = 0.9) -> ConformalInterval:
    """Split conformal prediction: an interval that covers a new case with at least the given probability.

    Coverage holds for any model and distribution on average over exchangeable cases, but not at another site or at
    every age. Give one session per subject. With predicted standard deviations `std` ``(n,)`` the intervals scale with
    them.

    Raises:
        UsageError: the confidence is outside of 0–1, a standard deviation is not positive, or there are too few cases.

    Source: J. Lei et al., "Distribution-Free Predictive Inference for Regression", JASA 2018, algorithm 2, and section
    5.2 for the normalised form.
    """
    truth, answers = _pair(target, prediction)
    distances = np.abs(truth - answers)
    if std is not None:
        distances = distances / _positive(std, answers)
    rank = _conformal_rank(len(truth), confidence)
    return ConformalInterval(float(np.sort(distances)[rank - 1]), confidence, std is not None)


def cv_plus_interval(residuals: Any, predictions: Any, *, confidence: float = 0.9) -> tuple[float, float]:
    """CV+: the prediction interval of one new case, from the models of a cross-validation.

    Args:
        residuals: ``(n,)`` absolute errors of calibration cases, each of the model whose fold left that case out. Give
            one case per subject.
        predictions: ``(n,)`` for each calibration case, the answer of that same model for the new case.
        confidence: 1 − α, the usual coverage. What theorem 4 proves for any distribution is less, 1 − 2α minus a term
            that vanishes with the size of the folds.

    Returns:
        The ends: the ⌊α(n + 1)⌋-th smallest of prediction − residual and the ⌈(1 − α)(n + 1)⌉-th smallest of
        prediction + residual.

    Raises:
        UsageError: the confidence is outside of 0–1, a residual is negative, the lengths differ, or there are too few
            cases.

    Source: R. F. Barber, E. J. Candès, A. Ramdas and R. J. Tibshirani, "Predictive inference with the jackknife+", Ann
    Stat 2021, section 3.
    """
    answers, distances = _pair(predictions, residuals)
    if distances.min() < 0:
        raise UsageError("a residual is negative", where="residuals", got=distances.min(), expected="absolute errors")
    rank = _conformal_rank(len(distances), confidence)
    low, high = np.sort(answers - distances)[len(distances) - rank], np.sort(answers + distances)[rank - 1]
    return float(low), float(high)


def _conformal_rank(num_cases: int, confidence: float) -> int:
    """⌈(n + 1) · confidence⌉, the rank of the error that bounds a new one; UsageError if there are fewer cases."""
    if not 0 < confidence < 1:
        raise UsageError("not a share", where="confidence", got=confidence, expected="between 0 and 1")
    # The slack undoes the rounding of products such as 10 · 0.9, which would require one more case.
    rank = max(1, math.ceil((num_cases + 1) * confidence - 1e-9))
    if rank > num_cases:
        expected = f"{math.ceil(confidence / (1 - confidence) - 1e-9)} or more"
        raise UsageError(f"an interval of {100 * confidence:g} % needs more cases", got=num_cases, expected=expected)
    return rank


def coverage(target: Any, low: Any, high: Any) -> float:
    """The share of targets within their intervals, ends included."""
    truth, lower = _pair(target, low)
    _, upper = _pair(target, high)
    return float(np.mean((lower <= truth) & (truth <= upper)))


def _finite(values: Any, where: str) -> np.ndarray:
    array = finite_array(values, where)
    if array.size == 0:
        raise UsageError("there are no cases", where=where)
    return array


def _pair(target: Any, prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    truth, answers = _finite(target, "target"), _finite(prediction, "prediction")
    if truth.ndim != 1 or truth.shape != answers.shape:
        got = f"{truth.shape} and {answers.shape}"
        raise UsageError("target and prediction do not fit", got=got, expected="(n,) and (n,)")
    return truth, answers


def _positive(std: Any, values: np.ndarray) -> np.ndarray:
    deviations = _finite(std, "std")
    if deviations.shape != values.shape or not (deviations > 0).all():
        got = f"shape {deviations.shape}, smallest {deviations.min():g}"
        raise UsageError("not standard deviations", where="std", got=got, expected=f"positive, {values.shape}")
    return deviations


def _scores_and_labels(values: Any, labels: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = _finite(values, where), _finite(labels, "labels")
    if scores.ndim != 2 or scores.shape[1] < 2 or truth.shape != scores.shape[:1]:
        got = f"{scores.shape} and {truth.shape}"
        raise UsageError(f"{where} and labels do not fit", got=got, expected="(n, K) and (n,)")
    if not np.isin(truth, np.arange(scores.shape[1])).all():
        known = f"whole numbers 0 to {scores.shape[1] - 1}"
        raise UsageError("unknown class label", where="labels", got=np.unique(truth)[:8].tolist(), expected=known)
    return scores, truth.astype(int)


def _shares_and_labels(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    shares, truth = _scores_and_labels(probabilities, labels, "probabilities")
    if shares.min() < 0 or np.abs(shares.sum(axis=1) - 1).max() > 1e-4:
        raise UsageError("not probabilities", where="probabilities", expected="rows of sum 1 without negative values")
    return shares, truth
