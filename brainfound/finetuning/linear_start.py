"""A decoder whose last layer starts from the frozen model's own answer, as a head does.

The last layer of every decoder is linear in its input and is followed by nothing but an interpolation, so the best
one for given features is a logistic regression of pixels. A part of the pixels is learnt from, as many of each class
as there are; weights give each class its own number back.

Axis legend: N slices, F feature channels of the last layer, H W pixels, n chosen pixels, K classes or labels.

Linear models on frozen embeddings: their strength is chosen within the training part, subjects kept together.

Axis legend: n embedded volumes, D width, K classes.

A head that starts from the frozen backbone's own answer: linear probing, then fine-tuning.

A random head sends large, aimless gradients into the backbone and distorts features that were good; a head that
was fitted first does not (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022). The fit is a ridge or logistic regression on the training part alone, its
strength chosen by cross-validation within that part, all views of a subject's sessions in one fold. Class weights
count in it as they do in training; a head over bins starts as a Gaussian around the regression's answer.

Axis legend: n embedded volumes (training sessions × passes), D width, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge, RidgeCV
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from torch import Tensor, nn

from brainfound.data.batches import evenly_spaced_slices
from brainfound.errors import TrainingError
from brainfound.finetuning.targets import Target
from brainfound.finetuning.volumes import EmbeddedReader, VolumeAugmentation, VolumeReader, augment_volumes
from brainfound.models.heads import bin_edges
from brainfound.training.randomness import VIEWS, StepKey, numpy_generator

_PENALTIES = np.logspace(-1, 5, 13)


def subject_group_indices(subjects: Sequence[str], sessions: np.ndarray) -> np.ndarray:
    """A number per embedded volume that is the same for all sessions of a subject: the first one's index."""
    first: dict[str, int] = {}
    for session in sorted(set(sessions.tolist())):
        first.setdefault(subjects[session], session)
    return np.array([first[subjects[session]] for session in sessions])


def subject_folds(subject_groups: np.ndarray, classes: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Folds that keep all volumes of a subject together; None where a class has one subject only."""
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
    """Weights ``(D,)``, bias and mean squared error (of subjects left out, where folds can be made) for a value."""
    folds = subject_folds(subject_groups, None)
    if folds:
        ridge = RidgeCV(alphas=_PENALTIES, cv=folds, scoring="neg_mean_squared_error")
        ridge.fit(features, values)
        return ridge.coef_, float(ridge.intercept_), -float(ridge.best_score_)
    ridge = Ridge(alpha=len(features)).fit(features, values)
    error = float(np.mean((ridge.predict(features) - values) ** 2))
    return ridge.coef_, float(ridge.intercept_), error


def fit_logistic(
    features: np.ndarray, classes: np.ndarray, subject_groups: np.ndarray, weights: dict[int, float] | None
) -> Any:
    """A fitted scikit-learn classifier of class indices; ``weights`` are of the classes."""
    folds = subject_folds(subject_groups, classes)
    if folds:
        fitted = LogisticRegressionCV(
            Cs=1 / _PENALTIES,
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
    for volumes, indices in iterate_augmented_passes(reader, augmentation, num_passes, batch_size, seed, device):
        embeddings = model.brainfound(**volumes.inputs()).volume_embedding
        features.append(model.head.norm(embeddings).double().cpu().numpy())
        sessions.append(indices)
    everything = np.concatenate(features)
    mean, std = everything.mean(axis=0), everything.std(axis=0)
    std = np.where(std > 1e-8, std, 1.0)
    order = np.concatenate(sessions)
    subject_groups = subject_group_indices(reader.store.sessions["subject"].tolist(), order)
    labels = target.values(reader.store, order.tolist())
    weight, bias = _fit((everything - mean) / std, labels, subject_groups, target, model.config)
    weight = weight / std
    bias = bias - weight @ mean
    rows = len(weight)
    model.head.score.weight[:rows] = torch.from_numpy(weight).to(model.head.score.weight)
    model.head.score.bias[:rows] = torch.from_numpy(bias).to(model.head.score.bias)


def iterate_augmented_passes(
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
    features: Float[np.ndarray, "n D"], labels: np.ndarray, subject_groups: np.ndarray, target: Target, config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of the head's last layer; of its first row alone where the second is a log variance."""
    weights = config.class_weights if target.task == "classification" else None
    if target.multi_label:
        rows = [
            _fit_binary_logistic(
                features, labels[:, k], subject_groups, None if weights is None else {0: 1.0, 1: weights[k]}
            )
            for k in range(labels.shape[1])
        ]
        return np.stack([weight for weight, _ in rows]), np.array([bias for _, bias in rows])
    if target.task == "classification":
        return _logistic(features, labels, subject_groups, None if weights is None else dict(enumerate(weights)))
    weight, bias, variance = fit_ridge(features, (labels - target.mean) / target.std, subject_groups)
    if config.regression_head == "bins":
        return _linear_to_bin_logits(weight, bias, variance, config)
    return weight[None], np.array([bias])


def _linear_to_bin_logits(
    weight: np.ndarray, bias: float, variance: float, config: Any
) -> tuple[np.ndarray, np.ndarray]:
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
    features: Float[np.ndarray, "n D"],
    classes: np.ndarray,
    subject_groups: np.ndarray,
    weights: dict[int, float] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(K, D)`` and bias ``(K,)``."""
    fitted = fit_logistic(features, classes, subject_groups, weights)
    weight, bias = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)
    if len(weight) == 1:
        # Two classes: scikit-learn gives the log odds of the second; a softmax takes half for each side.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def _fit_binary_logistic(
    features: Float[np.ndarray, "n D"], labels: np.ndarray, subject_groups: np.ndarray, weights: dict[int, float] | None
) -> tuple[np.ndarray, float]:
    """Weights ``(D,)`` and bias for the log odds of one label of several."""
    fitted = fit_logistic(features, labels.astype(int), subject_groups, weights)
    return fitted.coef_[0], float(fitted.intercept_[0])


MAX_VOLUMES, MAX_PIXELS, MAX_PIXELS_PER_CLASS = 500, 60_000, 60
"""Volumes (sessions × passes) and pixels that are learnt from; and how many pixels of a class in one volume, where
neighbours say the same. More would take long and tell little."""
_L2_PENALTY = 1.0  # of the penalty, against as many terms as pixels: it bounds weights that no pixel asks for


@torch.no_grad()
def fit_decoder(
    model: Any,
    reader: VolumeReader,
    augmentation: VolumeAugmentation,
    target: Target,
    num_passes: int,
    batch_size: int,
    seed: int,
) -> None:
    """Set the last layer of a segmentation's decoder to the best linear answer on the features that it reads.

    A class that no chosen pixel shows keeps no weight and a small share of its own.

    Args:
        model: a `BrainFoundForSegmentation`, before an adapter is attached; changed in place.
        reader: reads the training part.
        augmentation: of the volumes.
        target: what is learnt.
        num_passes: how often the training part is read, each time with other slices and augmentation; fewer times, and
            of a large cohort a part of it, where that would be more than `MAX_VOLUMES`.
        batch_size: volumes per forward pass.
        seed: of slices, augmentation and the choice of pixels.

    Raises:
        TrainingError: the features are not finite.
    """
    model.eval()
    score = model.decoder.score
    rng = numpy_generator(VIEWS, seed, HEAD_FIT_STEP)
    num_passes = min(num_passes, max(1, MAX_VOLUMES // len(reader.sessions)))
    if len(reader.sessions) > MAX_VOLUMES:
        reader = reader.of(reader.sessions[evenly_spaced_slices(len(reader.sessions), MAX_VOLUMES)])
    num_volumes = num_passes * len(reader.sessions)
    wanted = min(MAX_PIXELS_PER_CLASS, max(1, MAX_PIXELS // (num_volumes * len(target.names))))
    features, truth, weights = [], [], []
    for volumes, _ in iterate_augmented_passes(reader, augmentation, num_passes, batch_size, seed, score.weight.device):
        maps = _capture_layer_input(score, model, volumes.inputs())
        of_pixels = _labels(target, np.asarray(volumes.to("cpu").masks)[volumes.slice_mask.cpu().numpy()])
        first = 0
        for count in volumes.slice_mask.sum(dim=1).tolist():
            own = slice(first, first + count)
            chosen, weight = _choose_pixels(of_pixels[own], wanted, rng)
            features.append(_sample_at_pixels(maps[own], chosen, of_pixels.shape[1:3]))
            truth.append(of_pixels[own][tuple(chosen)])
            weights.append(weight)
            first += count
    everything = np.concatenate(features).astype(np.float64)
    if not np.isfinite(everything).all():
        raise TrainingError(
            "the model that the run starts from gives features that are not finite", remedy="Start from another model"
        )
    mean, std = everything.mean(axis=0), everything.std(axis=0)
    std = np.where(std > 1e-8, std, 1.0)
    of_each = np.concatenate(weights)
    weight, bias = _fit_pixels((everything - mean) / std, np.concatenate(truth), of_each / of_each.mean(), target)
    weight = weight / std
    bias = bias - weight @ mean
    score.weight[:] = torch.from_numpy(weight)[:, :, None, None].to(score.weight)
    score.bias[:] = torch.from_numpy(bias).to(score.bias)


def _capture_layer_input(layer: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Float[Tensor, "N F h w"]:
    """What a layer reads while the model answers."""
    read: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return torch.cat(read)


def _labels(target: Target, masks: np.ndarray) -> Int[np.ndarray, "N H W K"]:
    """The class of each pixel (K = 1), or 0 and 1 of each overlapping label."""
    encoded = target.encode_mask(masks)
    return np.moveaxis(encoded, 1, -1) if target.regions else encoded[..., None]


def _choose_pixels(
    labels: Int[np.ndarray, "N H W K"], wanted: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "3 n"], Float[np.ndarray, "n"]]:
    """Pixels of a volume (slice, row, column), up to ``wanted`` of each class; and how many each stands for.

    Where labels overlap, pixels with the same labels are of one class.
    """
    flat = labels.reshape(-1, labels.shape[-1])
    # One number for what a pixel has: its class, or the sum of 2ᵏ over its labels.
    classes = flat.astype(np.int64) @ (1 << np.arange(flat.shape[1]))
    chosen, weights = [], []
    for k in np.unique(classes):
        members = np.flatnonzero(classes == k)
        drawn = np.sort(rng.choice(members, min(len(members), wanted), replace=False))
        chosen.append(drawn)
        weights.append(np.full(len(drawn), len(members) / len(drawn)))
    return np.stack(np.unravel_index(np.concatenate(chosen), labels.shape[:3])), np.concatenate(weights)


def _sample_at_pixels(
    maps: Float[Tensor, "N F h w"], pixels: Int[np.ndarray, "3 n"], size: tuple[int, int]
) -> Float[np.ndarray, "n F"]:
    """Maps interpolated to pixels, as the decoder does with its scores: the two orders give the same."""
    found = np.empty((pixels.shape[1], maps.shape[1]), dtype=np.float32)
    for number in np.unique(pixels[0]):
        here = pixels[0] == number
        fine = F.interpolate(maps[number : number + 1].float(), size=size, mode="bilinear", align_corners=False)[0]
        found[here] = fine[:, pixels[1][here], pixels[2][here]].T.cpu().numpy()
    return found


def _fit_pixels(
    features: Float[np.ndarray, "n F"], truth: Int[np.ndarray, "n K"], weights: np.ndarray, target: Target
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(K, F)`` and biases ``(K,)``."""
    if target.regions:
        rows = [_pixel_logistic(features, labels, weights, 2) for labels in truth.T]
        # Two scores of a softmax that differ by z are one of a sigmoid.
        return np.stack([weight[1] - weight[0] for weight, _ in rows]), np.array([b[1] - b[0] for _, b in rows])
    return _pixel_logistic(features, truth[:, 0], weights, len(target.names))


def _pixel_logistic(
    features: Float[np.ndarray, "n F"], classes: Int[np.ndarray, "n"], weights: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights ``(K, F)`` and biases ``(K,)`` of a softmax; a class that is not there gets one pixel in n."""
    present = np.unique(classes)
    weight, bias = np.zeros((num_classes, features.shape[1])), np.zeros(num_classes)
    if len(present) > 1:
        with warnings.catch_warnings():
            # Training goes on from here; a solver that stops at its last iteration is as good a start.
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = LogisticRegression(C=1 / _L2_PENALTY, max_iter=300).fit(features, classes, sample_weight=weights)
        coefficients, intercepts = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_)
        if len(present) == 2:
            # scikit-learn gives the log odds of the second; a softmax takes half for each side.
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercepts = np.concatenate([-intercepts, intercepts]) / 2
        weight[present], bias[present] = coefficients, intercepts
    absent = np.setdiff1d(np.arange(num_classes), present)
    # Its probability at a pixel is exp(bias) / Σ exp(scores), which shall be 1/n on average.
    in_all = logsumexp(features @ weight[present].T + bias[present], axis=1)
    bias[absent] = -logsumexp(-in_all)
    return weight, bias
