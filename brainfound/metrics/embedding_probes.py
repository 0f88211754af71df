"""What frozen embeddings know that they should not, and whether they say the same of a subject twice.

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
from brainfound.metrics.regression import r2
from brainfound.metrics.statistics import Interval, bootstrap_interval
from brainfound.metrics.values import finite_array


@dataclass(frozen=True)
class SiteProbe:
    """How well a linear model tells site and label from the same embeddings, on subjects that it did not learn from.

    Attributes:
        site: balanced accuracy, with its bootstrap interval over subjects.
        site_chance: what embeddings without information reach.
        label: balanced accuracy, or R² of a number.
        label_metric: ``"balanced_accuracy"`` or ``"r2"``.
        label_chance: what embeddings without information reach; 0 for R².
        num_folds: folds of the cross-validation.
    """

    site: Interval
    site_chance: float
    label: Interval
    label_metric: str
    label_chance: float
    num_folds: int


@dataclass(frozen=True)
class TestRetest:
    """Two sessions of each subject, embedded.

    Attributes:
        icc: (D,) ICC(3,1) of each dimension: the share of its variance that is between subjects; ``nan`` where it does
            not vary.
        median_icc: the median of those that vary.
        identification: share of sessions whose nearest neighbour among the other sessions' is of the same subject.
        chance: 1 / U, what embeddings without information reach.
        num_subjects: U, those with two sessions.
    """

    icc: np.ndarray
    median_icc: float
    identification: float
    chance: float
    num_subjects: int


def site_probe(
    embeddings: Float[np.ndarray, "N D"],
    site: Sequence[Any],
    label: Sequence[Any],
    subjects: Sequence[Any],
    seed: int,
    num_folds: int = 5,
    num_resamples: int = 2000,
) -> SiteProbe:
    """Predict site and label from the same embeddings, over the same folds by subject.

    A high score of site says that the scanner is in the embeddings, not that an answer made from them follows it. Where
    site and label go together (patients at one site, controls at the other) each of them tells the other: look at their
    table before the scores.

    Args:
        embeddings: one row per session.
        site: the site or scanner of each session.
        label: numbers with more than ten different values are predicted as numbers, all else as classes.
        subjects: the subject of each session; no subject is learnt from and tested on.
        seed: of the folds and of the bootstrap.
        num_folds: fewer if there are fewer subjects.
        num_resamples: of the bootstrap.

    Raises:
        UsageError: if the lengths differ, a value is missing or not finite, there are fewer than two sites or classes,
            or one of them has a single subject.

    Source: the site test of B. Glocker et al., "Machine learning with multi-site imaging data", arXiv:1910.04597.
    """
    features = _embeddings(embeddings, {"site": site, "label": label, "subjects": subjects})
    owners, sites, labels, numeric = validate_probe_columns(site, label, subjects)
    num_folds = min(num_folds, len(set(owners)))
    folds = k_folds(owners.tolist(), num_folds, seed, {"site": sites.tolist(), "label": labels.tolist()})
    told_site = cross_val_predict(features, sites, folds, linear_classifier)
    told_label = cross_val_predict(features, labels, folds, linear_regressor if numeric else linear_classifier)
    metric = r2 if numeric else balanced_accuracy
    drawing: dict[str, Any] = {"subjects": owners, "seed": seed, "num_resamples": num_resamples}
    return SiteProbe(
        site=bootstrap_interval(balanced_accuracy, sites, told_site, **drawing),
        site_chance=1 / len(set(sites)),
        label=bootstrap_interval(metric, labels, told_label, **drawing),
        label_metric=metric.__name__,
        label_chance=0.0 if numeric else 1 / len(set(labels)),
        num_folds=num_folds,
    )


def validate_probe_columns(
    site: Sequence[Any], label: Sequence[Any], subjects: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """What a site probe makes of its columns: subjects, sites, labels (N,), and whether the labels are numbers.

    Raises:
        UsageError: as `site_probe`; here before anything is embedded.
    """
    owners = np.array([label_text(subject) for subject in subjects])
    sites = _classes(site, owners, "site")
    numbers = to_numeric_or_none(list(label))
    if numbers is not None and np.isnan(numbers).any():
        raise UsageError("a value is missing", where="label", remedy="Leave out the sessions without a label")
    return owners, sites, _classes(label, owners, "label") if numbers is None else numbers, numbers is not None


def test_retest(embeddings: Float[np.ndarray, "N D"], subjects: Sequence[Any], sessions: Sequence[Any]) -> TestRetest:
    """How alike two sessions of a subject are embedded, beside how alike different subjects are.

    Of each subject with several sessions the first two by name are taken; the others are left out. ICC(3,1) forgives a
    shift that all second sessions share. Neighbours are nearest by cosine, sought among one session of every subject,
    both ways; of several that are equally near each counts its share, so embeddings that are all the same reach chance.

    Args:
        embeddings: one row per session.
        subjects: the subject of each session.
        sessions: the name or number of each session.

    Raises:
        UsageError: if the lengths differ, a value is not finite, a session is there twice, or fewer than two subjects
            have two sessions.

    Source: P. E. Shrout and J. L. Fleiss, "Intraclass correlations", Psychol Bull 1979, case 3; identification: E. S.
    Finn et al., "Functional connectome fingerprinting", Nat Neurosci 2015.
    """
    features = _embeddings(embeddings, {"subjects": subjects, "sessions": sessions})
    visits: dict[str, dict[Any, int]] = {}
    for row, (subject, session) in enumerate(zip(subjects, sessions, strict=True)):
        of_subject = visits.setdefault(label_text(subject), {})
        if session in of_subject:
            raise UsageError("a session is there twice", where="sessions", got=f"{subject}, {session}")
        of_subject[session] = row
    pairs = [
        [of[session] for session in sorted(of, key=label_text)[:2]] for _, of in sorted(visits.items()) if len(of) > 1
    ]
    if len(pairs) < 2:
        raise UsageError(
            "test and retest need two subjects with two sessions", where="sessions", got=f"{len(pairs)} such subjects"
        )
    twice = features[np.array(pairs)]  # (U, 2, D)
    icc = _icc_3_1(twice)
    varies = icc[~np.isnan(icc)]
    lengths = np.linalg.norm(twice, axis=2, keepdims=True)
    directions = twice / np.where(lengths > 0, lengths, 1)
    alike = directions[:, 0] @ directions[:, 1].T  # (U, U), first sessions by second ones
    return TestRetest(
        icc=icc,
        median_icc=float(np.median(varies)) if varies.size else float("nan"),
        identification=(_share_found(alike) + _share_found(alike.T)) / 2,
        chance=1 / len(pairs),
        num_subjects=len(pairs),
    )


def linear_classifier(num_samples: int) -> LogisticRegression:
    """The linear model of a probe of classes, for any number of samples; rare ones weigh as much as frequent ones."""
    return LogisticRegression(C=1.0, class_weight="balanced", max_iter=500)


def linear_regressor(num_samples: int) -> RidgeCV:
    """The linear model of a probe of numbers, for any number of samples; the training part chooses its penalty."""
    return RidgeCV(alphas=np.logspace(-1, 5, 7))


def cross_val_predict(
    features: Float[np.ndarray, "N D"],
    labels: np.ndarray,
    folds: Sequence[Mapping[str, np.ndarray]],
    make_model: Callable[[int], Any],
) -> np.ndarray:
    """Each sample's label as predicted by a model of standardised features that did not learn from its fold.

    Args:
        features: finite.
        labels: (N,) classes; or float64, where predictions are kept within the range of the training part.
        folds: each with the samples of ``train`` and ``test``.
        make_model: makes an untrained scikit-learn model, given the number of training samples.
    """
    predicted = np.empty_like(labels)
    for fold in folds:
        train, test = fold["train"], fold["test"]
        if len(set(labels[train])) == 1:
            predicted[test] = labels[train][0]
            continue
        model = make_pipeline(StandardScaler(), make_model(len(train)))
        with warnings.catch_warnings():
            # A probe compares features; a solver that stops at 500 iterations compares them as well.
            warnings.simplefilter("ignore", ConvergenceWarning)
            predicted[test] = model.fit(features[train], labels[train]).predict(features[test])
        if np.issubdtype(labels.dtype, np.floating):
            # Nobody is older than all that were seen: without this, one bad extrapolation is the whole score.
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
        raise UsageError("there is nothing to tell apart", where=where, got=f"only {names[0]}")
    for name in names:
        if len(set(owners[classes == name])) < 2:
            raise UsageError(
                f"{name} has a single subject, who cannot be learnt from and tested on",
                where=where,
                remedy="Leave it out or merge it with another",
            )
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


def _share_found(alike: Float[np.ndarray, "U U"]) -> float:
    """How many rows are nearest to the column of their own subject; equally near ones share the hit."""
    nearest = alike >= alike.max(axis=1, keepdims=True) - 1e-12
    return float((nearest.diagonal() / nearest.sum(axis=1)).mean())
