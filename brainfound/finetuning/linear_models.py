"""Linear models on frozen features: ridge and logistic regressions, with the penalty chosen by cross-validation.

Folds lie within the training part and keep all volumes of a subject together.

Axis legend: n embedded volumes, pixels or patches, D features, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import svd
from scipy.special import expit, logsumexp
from sklearn.cross_decomposition import PLSRegression
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from brainfound.errors import TrainingError

_PENALTIES = np.logspace(-1, 5, 13)
_PATCH_PENALTIES = np.logspace(-1, 5, 7)
_PIXEL_PENALTY = 1.0  # small against the sum over pixels: it only bounds weights that no pixel determines
_MAX_COMPONENTS = 8
_THRESHOLDS = np.linspace(0.05, 0.95, 19)


Linear = tuple[np.ndarray, np.ndarray]
"""Weights (rows, D) and biases (rows,) of a linear model."""


class LabelledFeatures(NamedTuple):
    """Standardised embeddings of volumes."""

    features: Float[np.ndarray, "n D"]
    labels: np.ndarray
    subject_groups: np.ndarray
    """The same number for all volumes of a subject."""


def standardise(
    features: Sequence[np.ndarray], source: str
) -> tuple[Float[np.ndarray, "n D"], Float[np.ndarray, "D"], Float[np.ndarray, "D"]]:
    """Join arrays (…, D) → float64 features of mean 0 and variance 1, and their former mean and standard deviation.

    Raises:
        TrainingError: a value is not finite; the message begins with ``source``.
    """
    joined = np.concatenate(features).astype(np.float64)
    if not np.isfinite(joined).all():
        raise TrainingError(f"{source} that are not finite", remedy="Start from another model")
    mean, std = joined.mean(axis=0), joined.std(axis=0)
    std = np.where(std > 1e-8, std, 1.0)
    return (joined - mean) / std, mean, std


def subject_group_indices(subjects: Sequence[str], sessions: np.ndarray) -> np.ndarray:
    """A number per embedded volume, shared by all sessions of a subject: the index of the subject's first session."""
    first: dict[str, int] = {}
    for session in sorted(set(sessions.tolist())):
        first.setdefault(subjects[session], session)
    return np.array([first[subjects[session]] for session in sessions])


def subject_folds(subject_groups: np.ndarray, classes: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Folds that keep all volumes of a subject together; None if there are too few subjects."""
    if classes is None:
        num_folds = min(5, len(np.unique(subject_groups)))
        return list(GroupKFold(num_folds).split(subject_groups, groups=subject_groups)) if num_folds > 1 else None
    num_folds = min(5, *(len(np.unique(subject_groups[classes == k])) for k in np.unique(classes)))
    if num_folds < 2:
        return None
    return list(StratifiedGroupKFold(num_folds).split(subject_groups, classes, groups=subject_groups))


def fit_ridge(
    features: Float[np.ndarray, "n D"], values: np.ndarray, subject_groups: np.ndarray
) -> tuple[np.ndarray, float, float]:
    """Weights ``(D,)``, bias and mean squared error of a ridge regression; the error is on left-out subjects if any."""
    folds = subject_folds(subject_groups, None)
    if not folds:
        ridge = Ridge(alpha=len(features)).fit(features, values)
        return ridge.coef_, float(ridge.intercept_), float(np.mean((ridge.predict(features) - values) ** 2))
    errors = np.mean([_ridge_errors(features, values, *fold) for fold in folds], axis=0)
    best = int(errors.argmin())
    ridge = Ridge(alpha=_PENALTIES[best]).fit(features, values)
    return ridge.coef_, float(ridge.intercept_), float(errors[best])


def _ridge_errors(
    features: np.ndarray, values: np.ndarray, train: np.ndarray, test: np.ndarray
) -> Float[np.ndarray, "penalties"]:
    """Mean squared errors on a fold for every penalty, from one decomposition (a fit per penalty takes fifty times)."""
    mean, centre = features[train].mean(axis=0), values[train].mean()
    left, sizes, right = svd(features[train] - mean, full_matrices=False)
    shrunk = sizes / (sizes**2 + _PENALTIES[:, None]) * (left.T @ (values[train] - centre))
    predicted = shrunk @ right @ (features[test] - mean).T + centre
    return np.mean((predicted - values[test]) ** 2, axis=1)


def fit_pls(
    features: Float[np.ndarray, "n D"], values: np.ndarray, subject_groups: np.ndarray
) -> tuple[np.ndarray, float]:
    """Weights ``(D,)`` and bias of partial least squares (Wold 1975); left-out subjects choose the components."""
    folds = subject_folds(subject_groups, None)
    number, most = 1, min(_MAX_COMPONENTS, features.shape[1], *(len(train) - 1 for train, _ in folds or ()))
    if folds and most > 1:
        errors = np.zeros(most)
        for train, test in folds:
            rows, bias = _pls_of_each_size(features[train], values[train], len(errors))
            errors += np.mean((features[test] @ rows.T + bias - values[test, None]) ** 2, axis=0)
        number = int(errors.argmin()) + 1
    rows, bias = _pls_of_each_size(features, values, number)
    return rows[-1], float(bias[-1])


def _pls_of_each_size(
    features: np.ndarray, values: np.ndarray, number: int
) -> tuple[Float[np.ndarray, "number D"], Float[np.ndarray, "number"]]:
    """Weights and biases with 1, 2, … components, which for one target are those of a single fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer components explain the target completely
        fitted = PLSRegression(n_components=number, scale=False).fit(features, values)
    rows = np.cumsum(fitted.x_rotations_ * fitted.y_loadings_, axis=1).T
    return rows, values.mean() - rows @ features.mean(axis=0)


def fit_logistic(
    features: np.ndarray, classes: np.ndarray, subject_groups: np.ndarray, weights: dict[int, float] | None
) -> Any:
    """Fit a scikit-learn classifier to class indices; ``weights`` maps a class to its weight."""
    folds = subject_folds(subject_groups, classes)
    common: dict[str, Any] = {"max_iter": 2000, "class_weight": weights}
    if folds:
        options = {"scoring": "neg_log_loss", "l1_ratios": (0,), "use_legacy_attributes": False, **common}
        return LogisticRegressionCV(Cs=1 / _PENALTIES, cv=folds, **options).fit(features, classes)
    return LogisticRegression(C=1 / len(features), **common).fit(features, classes)


def softmax_rows(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One row per class. For two classes scikit-learn gives only the log odds of the second; each class takes half."""
    if len(weight) == 1:
        return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def fit_pixel_logistic(
    features: Float[np.ndarray, "n D"], classes: Int[np.ndarray, "n"], weights: np.ndarray, num_classes: int
) -> tuple[Float[np.ndarray, "K D"], Float[np.ndarray, "K"]]:
    """Weights and biases of a softmax fitted to pixels; a class without pixels gets a mean probability of 1/n."""
    present = np.unique(classes)
    weight, bias = np.zeros((num_classes, features.shape[1])), np.zeros(num_classes)
    if len(present) > 1:
        fitted = _fit_weighted(features, classes, weights, _PIXEL_PENALTY)
        weight[present], bias[present] = softmax_rows(fitted.coef_, fitted.intercept_)
    absent = np.setdiff1d(np.arange(num_classes), present)
    # Its probability at a pixel is exp(bias) / Σ exp(scores), which should be 1/n on average.
    log_total = logsumexp(features @ weight[present].T + bias[present], axis=1)
    bias[absent] = -logsumexp(-log_total)
    return weight, bias


def fit_patch_label(
    features: Float[np.ndarray, "n D"],
    label_fractions: Float[np.ndarray, "n"],
    weights: np.ndarray,
    subject_groups: np.ndarray,
) -> tuple[np.ndarray, float, float]:
    """Weights ``(D,)`` and bias for the fraction of a patch's pixels with a label, and the threshold of best Dice."""
    penalty = _choose_penalty(features, label_fractions, weights, subject_groups)
    weight, bias = fit_fractions(features, label_fractions, weights, penalty)
    probabilities = expit(features @ weight + bias)
    marked = probabilities[:, None] > _THRESHOLDS
    total = (weights * label_fractions).sum() + weights @ marked  # 0 for a label without sampled patches
    dice = ((weights * label_fractions) @ marked) * 2 / np.maximum(total, 1e-12)
    return weight, bias, float(_THRESHOLDS[dice.argmax()])


def _choose_penalty(
    features: np.ndarray, label_fractions: np.ndarray, weights: np.ndarray, subject_groups: np.ndarray
) -> float:
    """The penalty with the smallest cross-entropy on left-out subjects; the middle one if there is a single subject."""
    num_folds = min(3, len(np.unique(subject_groups)))
    if num_folds < 2:
        return float(_PATCH_PENALTIES[len(_PATCH_PENALTIES) // 2])
    losses = np.zeros(len(_PATCH_PENALTIES))
    for train, test in GroupKFold(num_folds).split(features, groups=subject_groups):
        for number, penalty in enumerate(_PATCH_PENALTIES):
            weight, bias = fit_fractions(features[train], label_fractions[train], weights[train], penalty)
            scores = features[test] @ weight + bias
            # −s log σ(z) − (1 − s) log(1 − σ(z)) = log(1 + eᶻ) − s z
            losses[number] += (weights[test] * (np.logaddexp(0, scores) - label_fractions[test] * scores)).sum()
    return float(_PATCH_PENALTIES[losses.argmin()])


def fit_fractions(
    features: np.ndarray, label_fractions: np.ndarray, weights: np.ndarray, penalty: float
) -> tuple[np.ndarray, float]:
    """Logistic regression of a fraction: each patch counts as positive by its fraction, as negative by the rest."""
    positive, negative = label_fractions > 0, label_fractions < 1
    if not positive.any() or not negative.any():
        return np.zeros(features.shape[1]), 20.0 if positive.any() else -20.0
    rows = np.concatenate([features[positive], features[negative]])
    labels = np.repeat([1, 0], [positive.sum(), negative.sum()])
    counts = np.concatenate([(weights * label_fractions)[positive], (weights * (1 - label_fractions))[negative]])
    fitted = _fit_weighted(rows, labels, counts, penalty)
    return fitted.coef_[0], float(fitted.intercept_[0])


def _fit_weighted(features: np.ndarray, classes: np.ndarray, weights: np.ndarray, penalty: float) -> LogisticRegression:
    with warnings.catch_warnings():
        # Unconverged weights are good enough as a baseline or as a start of training.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1 / penalty, max_iter=300).fit(features, classes, sample_weight=weights)
