"""Probes of frozen embeddings: whether they encode the site, and how well they repeat over two sessions of a subject.

Axes: N sessions, D width, U subjects.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfound.data.splits.dividing import k_folds, label_text, to_numeric_or_none
from brainfound.errors import UsageError
from brainfound.metrics.classification import balanced_accuracy
from brainfound.metrics.input_checks import finite_array
from brainfound.metrics.regression import r2
from brainfound.metrics.statistics import NUM_RESAMPLES, Interval, bootstrap_interval


@dataclass(frozen=True)
class SiteProbe:
    """Cross-validated scores of linear models that predict site and label from the same embeddings.

    The chance levels are the scores of uninformative embeddings. What was not probed is None.
    """

    site: Interval | None
    """Balanced accuracy, with its bootstrap interval over subjects."""
    site_chance: float | None
    label: Interval | None
    """Balanced accuracy, or R² for a numeric label, whose chance level is 0."""
    label_metric: str | None
    """``"balanced_accuracy"`` or ``"r2"``."""
    label_chance: float | None
    num_folds: int


@dataclass(frozen=True)
class TestRetest:
    """Agreement of the embeddings of two sessions of each subject."""

    icc: np.ndarray
    """(D,) ICC(3,1) of each dimension, the share of its variance between subjects; ``nan`` for a constant one."""
    median_icc: float
    """Over the dimensions that vary."""
    identification: float
    """Share of sessions whose nearest neighbour among the other visits belongs to the same subject."""
    chance: float
    """1 / U, the identification rate of uninformative embeddings."""
    num_subjects: int
    """U, the number of subjects with two sessions."""


def site_probe(
    embeddings: Float[np.ndarray, "N D"],
    site: Sequence[Any] | None,
    label: Sequence[Any] | None,
    subjects: Sequence[Any],
    seed: int,
    num_folds: int = 5,
    num_resamples: int = NUM_RESAMPLES,
) -> SiteProbe:
    """Predict site and label from the same embeddings, over the same folds by subject.

    A high site score means that the embeddings encode the scanner, not that predictions depend on it. Where site
    and label are confounded (patients at one site, controls at the other), each predicts the other.

    Args:
        embeddings: one row per session.
        site: the site or scanner of each session; None: not probed.
        label: the label of each session; numbers with more than ten distinct values are regressed, others are classes;
            None: not probed.
        subjects: the subject of each session; training and test parts share no subject.
        seed: for the folds and the bootstrap.
        num_folds: reduced if there are fewer subjects.

    Raises:
        UsageError: the lengths differ, a value is missing, a site or class is the only one or has a single subject, or
            numbers are of a single subject.

    Source: the site test of B. Glocker et al., "Machine learning with multi-site imaging data", arXiv:1910.04597.
    """
    given = {"site": site, "label": label, "subjects": subjects}
    features = _embeddings(embeddings, {name: column for name, column in given.items() if column is not None})
    owners, sites, labels = validate_probe_columns(site, label, subjects)
    numeric = labels is not None and np.issubdtype(labels.dtype, np.floating)
    num_folds = min(num_folds, len(set(owners)))
    columns = {name: own.tolist() for name, own in (("site", sites), ("label", labels)) if own is not None}
    folds = k_folds(owners.tolist(), num_folds, seed, columns)
    options: dict[str, Any] = {"subjects": owners, "seed": seed, "num_resamples": num_resamples}

    def score(truth: np.ndarray | None, metric: Any, make_model: Any) -> Interval | None:
        if truth is None:
            return None
        return bootstrap_interval(metric, truth, cross_val_predict(features, truth, folds, make_model), **options)

    def chance(classes: np.ndarray | None) -> float | None:
        return None if classes is None else 1 / len(set(classes))

    metric = r2 if numeric else balanced_accuracy
    return SiteProbe(
        site=score(sites, balanced_accuracy, linear_classifier),
        site_chance=chance(sites),
        label=score(labels, metric, linear_regressor if numeric else linear_classifier),
        label_metric=None if labels is None else metric.__name__,
        label_chance=0.0 if numeric else chance(labels),
        num_folds=num_folds,
    )


def validate_probe_columns(
    site: Sequence[Any] | None, label: Sequence[Any] | None, subjects: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Subjects, sites and labels (N,) of a site probe; labels that are numbers are float64. A column may be None.

    Raises as `site_probe`; call it to find faults before anything is embedded.
    """
    owners = np.array([label_text(subject) for subject in subjects])
    sites = None if site is None else _classes(site, owners, "site")
    if label is None:
        return owners, sites, None
    numbers = to_numeric_or_none(list(label))
    if numbers is None:
        return owners, sites, _classes(label, owners, "label")
    if np.isnan(numbers).any():
        raise UsageError("a value is missing", where="label", remedy="Leave out the sessions without a label")
    if len(set(owners)) < 2:
        raise UsageError("a single subject is too few for training and test", where="label")
    return owners, sites, numbers


def test_retest(embeddings: Float[np.ndarray, "N D"], subjects: Sequence[Any], sessions: Sequence[Any]) -> TestRetest:
    """Compare the embeddings of two sessions of a subject with those of different subjects.

    The first two sessions by name of each subject with several are used. ICC(3,1) ignores a shift that all second
    sessions share. The nearest neighbour by cosine is searched among the other visits of all subjects, in both
    directions; ties share the hit, so that constant embeddings reach chance.

    Raises:
        UsageError: the lengths differ, a session is given twice, or fewer than two subjects have two sessions.

    Source: P. E. Shrout and J. L. Fleiss, "Intraclass correlations", Psychol Bull 1979, case 3; identification: E. S.
    Finn et al., "Functional connectome fingerprinting", Nat Neurosci 2015.
    """
    features = _embeddings(embeddings, {"subjects": subjects, "sessions": sessions})
    visits: dict[str, dict[Any, int]] = {}
    for row, (subject, session) in enumerate(zip(subjects, sessions, strict=True)):
        rows_by_session = visits.setdefault(label_text(subject), {})
        if session in rows_by_session:
            raise UsageError("a session is given twice", where="sessions", got=f"{subject}, {session}")
        rows_by_session[session] = row
    several = [rows for _, rows in sorted(visits.items()) if len(rows) > 1]
    pairs = [[rows[name] for name in sorted(rows, key=label_text)[:2]] for rows in several]
    if len(pairs) < 2:
        what = "test and retest need two subjects with two sessions"
        raise UsageError(what, where="sessions", got=f"{len(pairs)} such subjects")
    twice = features[np.array(pairs)]  # (U, 2, D)
    icc = _icc_3_1(twice)
    varies = icc[~np.isnan(icc)]
    lengths = np.linalg.norm(twice, axis=2, keepdims=True)
    directions = twice / np.where(lengths > 0, lengths, 1)
    similarity = directions[:, 0] @ directions[:, 1].T  # (U, U), first by second sessions
    return TestRetest(
        icc=icc,
        median_icc=float(np.median(varies)) if varies.size else float("nan"),
        identification=(_identification_rate(similarity) + _identification_rate(similarity.T)) / 2,
        chance=1 / len(pairs),
        num_subjects=len(pairs),
    )


def linear_classifier(num_samples: int) -> LogisticRegression:
    """The linear model of a probe of classes, which all weigh the same; `num_samples` is not used."""
    return LogisticRegression(C=1.0, class_weight="balanced", max_iter=500)


def linear_regressor(num_samples: int) -> RidgeCV:
    """The linear model of a probe of numbers, with a penalty fitted in training; `num_samples` is not used."""
    return RidgeCV(alphas=np.logspace(-1, 5, 7))


def cross_val_predict(
    features: Float[np.ndarray, "N D"],
    labels: np.ndarray,
    folds: Sequence[Mapping[str, np.ndarray]],
    make_model: Callable[[int], Any],
) -> np.ndarray:
    """Predict the label of each sample with a model of standardised features that was trained on the other folds.

    Args:
        labels: (N,) classes; or float64, for which predictions are clipped to the range of the training part.
        folds: each with the indices of its ``train`` and ``test`` samples.
        make_model: returns an untrained scikit-learn model, given the number of training samples.
    """
    predicted = np.empty_like(labels)
    for fold in folds:
        train, test = fold["train"], fold["test"]
        if len(set(labels[train])) == 1:
            predicted[test] = labels[train][0]
            continue
        model = make_pipeline(StandardScaler(), make_model(len(train)))
        with warnings.catch_warnings():
            # Stopping the solver at 500 iterations is accurate enough to compare features.
            warnings.simplefilter("ignore", ConvergenceWarning)
            predicted[test] = model.fit(features[train], labels[train]).predict(features[test])
        if np.issubdtype(labels.dtype, np.floating):
            # Without this, one bad extrapolation dominates the score.
            predicted[test] = predicted[test].clip(labels[train].min(), labels[train].max())
    return predicted


def _embeddings(embeddings: Any, columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    features = finite_array(embeddings, "embeddings")
    if features.ndim != 2 or features.size == 0:
        raise UsageError("not embeddings", where="embeddings", got=features.shape, expected="(N, D)")
    for name, column in columns.items():
        if len(column) != len(features):
            raise UsageError("not one value per embedding", where=name, got=len(column), expected=len(features))
        if name != "label" and any(label_text(value) == "missing" for value in column):
            raise UsageError("a value is missing", where=name, remedy="Leave out such sessions")
    return features


def _classes(values: Sequence[Any], owners: np.ndarray, where: str) -> np.ndarray:
    classes = np.array([label_text(value) for value in values])
    if "missing" in classes:
        raise UsageError("a value is missing", where=where, remedy="Leave out the sessions without one")
    names = np.unique(classes)
    if len(names) < 2:
        raise UsageError("a single class cannot be predicted", where=where, got=f"only {names[0]}")
    for name in names:
        if len(set(owners[classes == name])) < 2:
            what = f"{name} has a single subject, too few for training and test"
            raise UsageError(what, where=where, remedy="Leave it out or merge it with another")
    return classes


def _icc_3_1(twice: Float[np.ndarray, "U 2 D"]) -> Float[np.ndarray, "D"]:
    num_subjects, num_sessions, _ = twice.shape
    of_subject, of_session = twice.mean(axis=1, keepdims=True), twice.mean(axis=0, keepdims=True)
    mean = twice.mean(axis=(0, 1), keepdims=True)
    between = num_sessions * np.square(of_subject - mean).sum(axis=(0, 1)) / (num_subjects - 1)
    rest = twice - of_subject - of_session + mean
    error = np.square(rest).sum(axis=(0, 1)) / ((num_subjects - 1) * (num_sessions - 1))
    varies = (np.ptp(twice, axis=(0, 1)) > 0) & (between + error > 0)
    total = np.where(varies, between + (num_sessions - 1) * error, 1)
    return np.where(varies, (between - error) / total, np.nan)


def _identification_rate(similarity: Float[np.ndarray, "U U"]) -> float:
    """Share of rows that are nearest to the column of their own subject; ties share the hit."""
    nearest = similarity >= similarity.max(axis=1, keepdims=True) - 1e-12
    return float((nearest.diagonal() / nearest.sum(axis=1)).mean())
