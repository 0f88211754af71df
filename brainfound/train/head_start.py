"""A head that starts from the frozen backbone's own answer: linear probing, then fine-tuning.

A random head sends large, aimless gradients into the backbone and distorts features that were good; a head that
was fitted first does not (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022). The fit is a ridge or logistic regression on the training part alone, its
strength chosen by cross-validation within that part, all views of a subject's sessions in one fold.

Axis legend: n embedded volumes (training sessions × passes), D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge, RidgeCV
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from brainfound.train.objectives.base import StepKey
from brainfound.train.targets import Target
from brainfound.train.volumes import EmbeddedReader, VolumeAugmentation, VolumeReader, augment_volumes

_STRENGTHS = np.logspace(-1, 5, 13)
HEAD_FIT_STEP = 2_000_000_000
"""The step under which the fit draws its random numbers: none of training's own."""


@torch.no_grad()
def fit_head(
    model: Any,
    reader: VolumeReader | EmbeddedReader,
    augmentation: VolumeAugmentation,
    target: Target,
    num_passes: int,
    batch_size: int,
    seed: int,
) -> None:
    """Set the last layer of a classification or regression head to the best linear answer on frozen embeddings.

    The embeddings are of augmented volumes, as training will show them: weights fitted to clean ones alone
    would lean on differences that augmentation and withheld contrasts do not leave standing.

    Args:
        model: a BrainFound model with a head, before an adapter is attached; changed in place.
        reader: reads the training part.
        augmentation: of the volumes.
        target: what is learnt.
        num_passes: how often the training part is embedded, each time with other slices and augmentation.
        batch_size: volumes per forward pass.
        seed: of slices and augmentation.
    """
    device = model.head.score.weight.device
    model.eval()
    features, sessions = [], []
    count = len(reader.sessions)
    for number in range(num_passes):
        for first in range(0, count, batch_size):
            key = StepKey(seed, HEAD_FIT_STEP, number * count + first, 0)
            volumes, indices = reader.read(range(first, min(first + batch_size, count)), key)
            volumes = augment_volumes(volumes.to(device), augmentation, key)
            embeddings = model.brainfound(**volumes.inputs()).volume_embedding
            features.append(model.head.norm(embeddings).double().cpu().numpy())
            sessions.append(indices)
    everything = np.concatenate(features)
    mean, std = everything.mean(axis=0), everything.std(axis=0)
    std = np.where(std > 1e-8, std, 1.0)
    order = np.concatenate(sessions)
    fit = _ridge if target.task == "regression" else _logistic
    people = _subject_numbers(reader.store.sessions["subject"].tolist(), order)
    weight, bias = fit((everything - mean) / std, target.values(reader.store, order.tolist()), people, target)
    weight = weight / std
    bias = bias - weight @ mean
    rows = len(weight)
    model.head.score.weight[:rows] = torch.from_numpy(weight).to(model.head.score.weight)
    model.head.score.bias[:rows] = torch.from_numpy(bias).to(model.head.score.bias)


def _subject_numbers(subjects: Sequence[str], sessions: np.ndarray) -> np.ndarray:
    """A number per embedded volume that is the same for all sessions of a subject: the first one's index."""
    first: dict[str, int] = {}
    for session in sorted(set(sessions.tolist())):
        first.setdefault(subjects[session], session)
    return np.array([first[subjects[session]] for session in sessions])


def _folds(people: np.ndarray, classes: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Folds that keep all volumes of a subject together; None where a class has one subject only."""
    if classes is None:
        num_folds = min(5, len(np.unique(people)))
        return list(GroupKFold(num_folds).split(people, groups=people)) if num_folds > 1 else None
    num_folds = min(5, *(len(np.unique(people[classes == k])) for k in np.unique(classes)))
    if num_folds < 2:
        return None
    return list(StratifiedGroupKFold(num_folds).split(people, classes, groups=people))


def _ridge(
    features: Float[np.ndarray, "n D"], values: np.ndarray, people: np.ndarray, target: Target
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(1, D)`` and bias ``(1,)`` for the standardised value."""
    standardised = (values - target.mean) / target.std
    folds = _folds(people, None)
    if folds:
        ridge = RidgeCV(alphas=_STRENGTHS, cv=folds, scoring="neg_mean_squared_error")
    else:
        ridge = Ridge(alpha=len(features))
    ridge.fit(features, standardised)
    return ridge.coef_[None], np.array([ridge.intercept_])


def _logistic(
    features: Float[np.ndarray, "n D"], classes: np.ndarray, people: np.ndarray, target: Target
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(K, D)`` and bias ``(K,)``."""
    folds = _folds(people, classes)
    if folds:
        fitted = LogisticRegressionCV(
            Cs=1 / _STRENGTHS,
            cv=folds,
            scoring="neg_log_loss",
            max_iter=2000,
            l1_ratios=(0,),
            use_legacy_attributes=False,
        )
    else:
        fitted = LogisticRegression(C=1 / len(features), max_iter=2000)
    fitted.fit(features, classes)
    weight, bias = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)
    if len(weight) == 1:
        # Two classes: scikit-learn gives the log odds of the second; a softmax takes half for each side.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias
