"""Linear models on frozen embeddings: their strength is chosen within the training part, subjects kept together.

Axis legend: n embedded volumes, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge, RidgeCV
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

_STRENGTHS = np.logspace(-1, 5, 13)


def subject_numbers(subjects: Sequence[str], sessions: np.ndarray) -> np.ndarray:
    """A number per embedded volume that is the same for all sessions of a subject: the first one's index."""
    first: dict[str, int] = {}
    for session in sorted(set(sessions.tolist())):
        first.setdefault(subjects[session], session)
    return np.array([first[subjects[session]] for session in sessions])


def subject_folds(people: np.ndarray, classes: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Folds that keep all volumes of a subject together; None where a class has one subject only."""
    if classes is None:
        num_folds = min(5, len(np.unique(people)))
        return list(GroupKFold(num_folds).split(people, groups=people)) if num_folds > 1 else None
    num_folds = min(5, *(len(np.unique(people[classes == k])) for k in np.unique(classes)))
    if num_folds < 2:
        return None
    return list(StratifiedGroupKFold(num_folds).split(people, classes, groups=people))


def fit_ridge(
    features: Float[np.ndarray, "n D"], values: np.ndarray, people: np.ndarray
) -> tuple[np.ndarray, float, float]:
    """Weights ``(D,)``, bias and mean squared error (of subjects left out, where folds can be made) for a value."""
    folds = subject_folds(people, None)
    if folds:
        ridge = RidgeCV(alphas=_STRENGTHS, cv=folds, scoring="neg_mean_squared_error")
        ridge.fit(features, values)
        return ridge.coef_, float(ridge.intercept_), -float(ridge.best_score_)
    ridge = Ridge(alpha=len(features)).fit(features, values)
    error = float(np.mean((ridge.predict(features) - values) ** 2))
    return ridge.coef_, float(ridge.intercept_), error


def fit_logistic(
    features: np.ndarray, classes: np.ndarray, people: np.ndarray, weights: dict[int, float] | None
) -> Any:
    """A fitted scikit-learn classifier of class indices; ``weights`` are of the classes."""
    folds = subject_folds(people, classes)
    if folds:
        fitted = LogisticRegressionCV(
            Cs=1 / _STRENGTHS,
            cv=folds,
            scoring="neg_log_loss",
            max_iter=2000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
            class_weight=weights,
        )
    else:
        fitted = LogisticRegression(C=1 / len(features), max_iter=2000, class_weight=weights)
    return fitted.fit(features, classes)
