"""A head that starts from the frozen backbone's own answer: linear probing, then fine-tuning.

A random head sends large, aimless gradients into the backbone and distorts features that were good; a head that
was fitted first does not (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022). The fit is a ridge or logistic regression on the training part alone, its
strength chosen by cross-validation within that part, all views of a subject's sessions in one fold. Class weights
count in it as they do in training; a head over bins starts as a Gaussian around the regression's answer.

Axis legend: n embedded volumes (training sessions × passes), D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from brainfound.models.heads import bin_edges
from brainfound.train.linear_fits import fit_logistic, fit_ridge, subject_numbers
from brainfound.train.objectives.base import StepKey
from brainfound.train.targets import Target
from brainfound.train.volumes import EmbeddedReader, VolumeAugmentation, VolumeReader, augment_volumes

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
    for volumes, indices in augmented_passes(reader, augmentation, num_passes, batch_size, seed, device):
        embeddings = model.brainfound(**volumes.inputs()).volume_embedding
        features.append(model.head.norm(embeddings).double().cpu().numpy())
        sessions.append(indices)
    everything = np.concatenate(features)
    mean, std = everything.mean(axis=0), everything.std(axis=0)
    std = np.where(std > 1e-8, std, 1.0)
    order = np.concatenate(sessions)
    people = subject_numbers(reader.store.sessions["subject"].tolist(), order)
    labels = target.values(reader.store, order.tolist())
    weight, bias = _fit((everything - mean) / std, labels, people, target, model.config)
    weight = weight / std
    bias = bias - weight @ mean
    rows = len(weight)
    model.head.score.weight[:rows] = torch.from_numpy(weight).to(model.head.score.weight)
    model.head.score.bias[:rows] = torch.from_numpy(bias).to(model.head.score.bias)


def augmented_passes(
    reader: VolumeReader | EmbeddedReader,
    augmentation: VolumeAugmentation,
    num_passes: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[Any, np.ndarray]]:
    """Batches of augmented volumes, and the session index of each; arguments as for `fit_head`."""
    count = len(reader.sessions)
    for number in range(num_passes):
        for first in range(0, count, batch_size):
            key = StepKey(seed, HEAD_FIT_STEP, number * count + first, 0)
            volumes, indices = reader.read(range(first, min(first + batch_size, count)), key)
            yield augment_volumes(volumes.to(device), augmentation, key), indices


def _fit(
    features: Float[np.ndarray, "n D"], labels: np.ndarray, people: np.ndarray, target: Target, config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of the head's last layer; of its first row alone where the second is a log variance."""
    weights = config.class_weights if target.task == "classification" else None
    if target.multi_label:
        rows = [
            _log_odds(features, labels[:, k], people, None if weights is None else {0: 1.0, 1: weights[k]})
            for k in range(labels.shape[1])
        ]
        return np.stack([weight for weight, _ in rows]), np.array([bias for _, bias in rows])
    if target.task == "classification":
        return _logistic(features, labels, people, None if weights is None else dict(enumerate(weights)))
    weight, bias, variance = fit_ridge(features, (labels - target.mean) / target.std, people)
    if config.regression_head == "bins":
        return _as_bins(weight, bias, variance, config)
    return weight[None], np.array([bias])


def _as_bins(weight: np.ndarray, bias: float, variance: float, config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores of bins whose softmax is a Gaussian around a linear answer, cut into the bins.

    −(c − m)² / 2σ² of a bin at c differs from c·m / σ² − c² / 2σ² by what is the same for all bins, and the latter
    is linear in the answer m, hence in the features.

    Args:
        weight, bias: of the linear answer, ``(D,)`` and a number.
        variance: of its error, σ².
    """
    edges = bin_edges(config).double().numpy()
    centres = (edges[1:] + edges[:-1]) / 2
    variance = max(variance, float(edges[1] - edges[0]) ** 2)
    return np.outer(centres, weight) / variance, (centres * bias - centres**2 / 2) / variance


def _logistic(
    features: Float[np.ndarray, "n D"], classes: np.ndarray, people: np.ndarray, weights: dict[int, float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(K, D)`` and bias ``(K,)``."""
    fitted = fit_logistic(features, classes, people, weights)
    weight, bias = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)
    if len(weight) == 1:
        # Two classes: scikit-learn gives the log odds of the second; a softmax takes half for each side.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def _log_odds(
    features: Float[np.ndarray, "n D"], labels: np.ndarray, people: np.ndarray, weights: dict[int, float] | None
) -> tuple[np.ndarray, float]:
    """Weights ``(D,)`` and bias for the log odds of one label of several."""
    fitted = fit_logistic(features, labels.astype(int), people, weights)
    return fitted.coef_[0], float(fitted.intercept_[0])
