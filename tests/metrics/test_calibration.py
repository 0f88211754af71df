"""Calibration against independent formulas, scikit-learn and scipy, and what cannot be calibrated."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, special
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from brainfound.errors import UsageError
from brainfound.metrics.calibration import (
    TEMPERATURE_RANGE,
    apply_temperature,
    brier_score,
    conformal_interval,
    coverage,
    cv_plus_interval,
    expected_calibration_error,
    fit_bias_correction,
    fit_temperature,
    reliability_bins,
)


def too_sure(num_cases: int, num_classes: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is right only after a division by the temperature, and labels drawn from it."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 1.5, (num_cases, num_classes))
    shares = special.softmax(honest, axis=1)
    labels = (rng.random(num_cases)[:, None] > shares.cumsum(axis=1)).sum(axis=1)
    return honest * temperature, labels.clip(max=num_classes - 1)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_found_again(num_classes, temperature):
    logits, labels = too_sure(8000, num_classes, temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.07)
    # Another parameter, another method, another implementation of the loss.
    best = optimize.minimize(
        lambda beta: log_loss(labels, special.softmax(logits * beta[0], axis=1)), [1.0], method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-12},
    )  # fmt: skip
    assert found == pytest.approx(1 / best.x[0], rel=1e-3)
    after = apply_temperature(logits, found)
    assert np.array_equal(after.argmax(axis=1), logits.argmax(axis=1))
    assert log_loss(labels, after) <= log_loss(labels, special.softmax(logits, axis=1)) + 1e-12
    # Log probabilities say the same as scores.
    assert fit_temperature(special.log_softmax(logits, axis=1), labels) == pytest.approx(found, rel=1e-6)


def test_temperature_mends_what_is_measured():
    logits, labels = too_sure(8000, 3, 3.0)
    raw = special.softmax(logits, axis=1)
    mended = apply_temperature(logits, fit_temperature(logits[:4000], labels[:4000]))
    assert expected_calibration_error(mended[4000:], labels[4000:]) < 0.03
    assert expected_calibration_error(raw[4000:], labels[4000:]) > 0.1
    assert brier_score(mended[4000:], labels[4000:]) < brier_score(raw[4000:], labels[4000:])


def test_cases_without_a_best_temperature_are_refused():
    """Of answers that are all right the likelihood rises to the end of the range: certainty out of three cases."""
    logits = np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    with pytest.raises(UsageError, match="every answer is right .got 3 cases"):
        fit_temperature(logits, [0, 1, 0])
    with pytest.raises(UsageError, match="no best temperature: the scores do not determine one"):
        fit_temperature(logits, [1, 0, 1])
    assert TEMPERATURE_RANGE[0] < fit_temperature(logits, [0, 1, 1]) < TEMPERATURE_RANGE[1]


def test_calibration_error_against_a_loop():
    rng = np.random.default_rng(1)
    shares, labels = rng.dirichlet([1, 1, 1], 400), rng.integers(0, 3, 400)
    expected, low = 0.0, 0.0
    for high in (np.arange(10) + 1) / 10:
        inside = [i for i in range(400) if low < shares[i].max() <= high]
        if inside:
            right = np.mean([shares[i].argmax() == labels[i] for i in inside])
            expected += len(inside) / 400 * abs(right - np.mean([shares[i].max() for i in inside]))
        low = high
    assert expected_calibration_error(shares, labels, num_bins=10) == pytest.approx(expected)


def test_reliability_bins_against_scikit_learn():
    rng = np.random.default_rng(2)
    positive, labels = rng.random(300), rng.integers(0, 2, 300)
    shares = np.stack([1 - positive, positive], axis=1)
    bins = reliability_bins(shares, labels, num_bins=8)
    right = (shares.argmax(axis=1) == labels).astype(int)
    accuracy, confidence = calibration_curve(right, shares.max(axis=1), n_bins=8)
    filled = bins.count > 0
    assert bins.count.sum() == 300
    assert not filled[:4].any(), "the more probable of two classes has at least one half"
    np.testing.assert_allclose(bins.accuracy[filled], accuracy)
    np.testing.assert_allclose(bins.confidence[filled], confidence)
    assert np.isnan(bins.accuracy[~filled]).all()


def test_a_bin_holds_its_upper_edge():
    shares = np.array([[0.5, 0.5], [1.0, 0.0]])
    assert reliability_bins(shares, [0, 0], num_bins=2).count.tolist() == [1, 1]
    assert expected_calibration_error(shares, [0, 0], num_bins=2) == pytest.approx(0.25)
    assert expected_calibration_error(shares[1:], [0]) == 0
    assert expected_calibration_error(shares[1:], [1]) == 1


def test_brier_against_scikit_learn():
    rng = np.random.default_rng(3)
    positive, labels = rng.random(50), rng.integers(0, 2, 50)
    shares = np.stack([1 - positive, positive], axis=1)
    assert brier_score(shares, labels) == pytest.approx(brier_score_loss(labels, positive))
    three, classes = rng.dirichlet([1, 2, 3], 60), rng.integers(0, 3, 60)
    expected = brier_score_loss(classes, three, labels=[0, 1, 2])
    assert brier_score(three, classes) == pytest.approx(expected)
    assert brier_score(np.eye(3), [0, 1, 2]) == 0
    assert brier_score(np.eye(3), [1, 2, 0]) == 2


def test_bias_correction_takes_the_slope_out():
    rng = np.random.default_rng(4)
    age = rng.uniform(20, 90, 200)
    predicted = 0.6 * age + 22 + rng.normal(0, 4, 200)
    correction = fit_bias_correction(age, predicted)
    slope, intercept = np.polyfit(age, predicted, 1)
    assert (correction.slope, correction.intercept) == pytest.approx((slope, intercept))
    corrected = correction.apply(predicted)
    np.testing.assert_allclose(corrected, (predicted - intercept) / slope)
    assert np.polyfit(age, corrected, 1) == pytest.approx([1, 0], abs=1e-9)
    assert np.corrcoef(age, corrected - age)[0, 1] == pytest.approx(0, abs=1e-9)
    assert np.corrcoef(age, corrected)[0, 1] == pytest.approx(np.corrcoef(age, predicted)[0, 1])
    # The scatter grows by 1 / slope: the correction is no way to a smaller error.
    assert np.std(corrected - age) == pytest.approx(np.std(predicted - (slope * age + intercept)) / slope)


def test_the_half_width_is_the_right_residual():
    target, prediction = np.zeros(19), np.arange(1.0, 20.0) * np.tile([1, -1], 10)[:19]
    interval = conformal_interval(target, prediction, confidence=0.9)  # the ⌈20 · 0.9⌉ = 18th of 19
    assert (interval.half_width, interval.normalised) == (18.0, False)
    assert [end.tolist() for end in interval.apply([1.0, 50.0])] == [[-17.0, 32.0], [19.0, 68.0]]
    assert conformal_interval(target[:9], prediction[:9], confidence=0.9).half_width == 9
    with pytest.raises(UsageError, match="needs more cases .got 8, expected 9 or more"):
        conformal_interval(target[:8], prediction[:8], confidence=0.9)
    of_own_width = conformal_interval([0.0, 0.0, 0.0], [2.0, 4.0, 1.0], [1.0, 4.0, 0.25], confidence=0.5)
    assert of_own_width.half_width == 2  # of 2, 1 and 4
    low, high = of_own_width.apply([10.0, 10.0], [1.0, 3.0])
    assert (low.tolist(), high.tolist()) == ([8.0, 4.0], [12.0, 16.0])


@pytest.mark.parametrize("normalised", [False, True])
def test_intervals_cover_what_they_promise(normalised):
    """Over many calibration parts the mean coverage lies between the confidence and 1/(n + 1) above it."""
    rng = np.random.default_rng(5)
    measured, widths = [], []
    for _ in range(600):
        spread = rng.uniform(0.2, 3, 130)
        truth = rng.standard_t(3, 130) * spread
        std = spread if normalised else None
        halves = slice(0, 30), slice(30, None)
        fitted = conformal_interval(
            truth[halves[0]], np.zeros(30), None if std is None else std[halves[0]], confidence=0.8
        )
        low, high = fitted.apply(np.zeros(100), None if std is None else std[halves[1]])
        measured.append(coverage(truth[halves[1]], low, high))
        widths.append(np.mean(high - low))
    assert 0.79 < np.mean(measured) < 0.8 + 1 / 31 + 0.01
    assert np.std(widths) > 0


def test_coverage_counts_the_ends():
    assert coverage([0, 1, 2, 3], [0, 2, 0, 0], [0, 3, 2, 1]) == 0.5


NOTHING = np.empty((0, 2))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fit_temperature([[1.0, 2.0], [3.0, 1.0]], [0, 0]), "two classes"),
        (lambda: fit_temperature([[1.0, 1.0], [2.0, 2.0]], [0, 1]), "differ between classes"),
        (lambda: fit_temperature(NOTHING, []), "no cases"),
        (lambda: fit_temperature([[1.0, np.nan], [0.0, 1.0]], [0, 1]), "1 of 4 values are not finite"),
        (lambda: fit_temperature([[1.0, 2.0], [0.0, 1.0]], [0, 2]), "unknown class label"),
        (lambda: fit_temperature([1.0, 2.0], [0, 1]), "do not fit"),
        (lambda: fit_temperature([["a", "b"]], [0]), "not numbers"),
        (lambda: apply_temperature([[1.0, 2.0]], 0), "must be positive"),
        (lambda: apply_temperature([1.0, 2.0], 1), "not the scores of classes"),
        (lambda: brier_score([[0.7, 0.7]], [0]), "not probabilities"),
        (lambda: brier_score([[1.2, -0.2]], [0]), "not probabilities"),
        (lambda: expected_calibration_error(NOTHING, []), "no cases"),
        (lambda: reliability_bins([[0.5, 0.5]], [0], num_bins=0), "num_bins: must be 1 or more"),
        (lambda: fit_bias_correction([5] * 10, range(10)), "vary"),
        (lambda: fit_bias_correction(range(10), [5] * 10), "do not follow the target"),
        (lambda: fit_bias_correction(range(10), range(9, -1, -1)), "got slope -1"),
        (lambda: fit_bias_correction(range(9), range(9)), "got 9, expected 10 or more"),
        (lambda: fit_bias_correction([1, 2, np.inf], [1, 2, 3]), "not finite"),
        (lambda: fit_bias_correction([1, 2, 3], [[1], [2], [3]]), "do not fit"),
        (lambda: conformal_interval([1, 2], [1, 2], confidence=1.0), "not a share"),
        (lambda: conformal_interval([], []), "no cases"),
        (lambda: conformal_interval([1, 2], [1, 2], [1, 0], confidence=0.5), "standard deviations"),
        (lambda: conformal_interval([1, 2], [1, 2], confidence=0.5).apply([1.0], [1.0]), "fitted without"),
        (lambda: conformal_interval([1, 2], [1, 2], [1, 1], confidence=0.5).apply([1.0]), "one per prediction"),
        (lambda: coverage([1, 2], [1], [2]), "do not fit"),
    ],
)
def test_what_cannot_be_used_is_one_line(call, said):
    with pytest.raises(UsageError, match=said) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_cv_plus_by_hand():
    # α = 0.4 of four cases: the 2nd smallest lower end and the 3rd smallest upper end.
    low, high = cv_plus_interval([1, 2, 3, 4], [10, 20, 10, 20], confidence=0.6)
    assert (low, high) == (9, 22)  # lower ends 9, 18, 7, 16; upper ends 11, 22, 13, 24
    one_model = conformal_interval([1, 2, 3, 4], [0, 0, 0, 0], confidence=0.6)
    low, high = cv_plus_interval([1, 2, 3, 4], [5, 5, 5, 5], confidence=0.6)
    assert (low, high) == (5 - one_model.half_width, 5 + one_model.half_width)


@pytest.mark.parametrize(
    ("residuals", "confidence", "message"),
    [([1, 2, 3], 0.9, "needs more cases"), ([1, -2, 3], 0.5, "negative"), ([1, 2, 3], 1.0, "not a share")],
)
def test_what_cv_plus_refuses(residuals, confidence, message):
    with pytest.raises(UsageError, match=message):
        cv_plus_interval(residuals, [0.0, 0.0, 0.0], confidence=confidence)


def test_cv_plus_covers_new_cases_of_a_least_squares_fit():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        features, noise = rng.normal(size=(41, 3)), rng.normal(size=41)
        target = features @ [1.0, -2.0, 0.5] + noise
        fold = np.arange(40) % 5
        models = [np.linalg.lstsq(features[:40][fold != k], target[:40][fold != k], rcond=None)[0] for k in range(5)]
        coefficients = np.stack(models)[fold]
        residuals = np.abs(target[:40] - (features[:40] * coefficients).sum(axis=1))
        low, high = cv_plus_interval(residuals, coefficients @ features[40], confidence=0.9)
        covered.append(low <= target[40] <= high)
    assert 0.86 <= np.mean(covered) <= 0.97
