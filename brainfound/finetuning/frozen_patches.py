"""A segmentation by the untouched backbone: a linear classifier says of each patch token what its pixels are.

One logistic regression per class, or per overlapping label, whose target is the share of a patch's pixels that have it.
A part of the patches is learnt from, with more of those that show the structure than there are; weights give each its
own number back. A class is marked where its probability is above the threshold with the best Dice on those patches, and
a pixel has the class of its patch.

Axis legend: S slices, H W pixels, P patches of a slice, n chosen patches, D width, K classes but the background (or
overlapping labels).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from torch import Tensor

from brainfound.data.batches import collate, evenly_spaced_slices, remove_contrasts
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.store import Store
from brainfound.errors import TrainingError
from brainfound.finetuning.linear_start import subject_group_indices
from brainfound.finetuning.targets import Target
from brainfound.models.infer import SEGMENTATION_CHUNK, StackPrediction
from brainfound.training.randomness import PROBE, numpy_generator

MAX_PATCHES, MAX_SESSIONS = 6000, 500
"""Patches that are learnt from, and the training sessions that they are taken of."""
_PENALTIES = np.logspace(-1, 5, 7)
_THRESHOLDS = np.linspace(0.05, 0.95, 19)
_STREAM = 3  # apart from the probes' own streams


@dataclass(frozen=True)
class PatchClassifier:
    """A linear classifier of a backbone's patch tokens.

    Attributes:
        model: the segmentation whose backbone is asked; its decoder is not.
        mean, std: (D,) of the tokens.
        weight, bias: (K, D) and (K,), on standardised tokens.
        thresholds: (K,) the probability above which a class is marked.
    """

    model: Any
    target: Target
    mean: np.ndarray
    std: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    thresholds: np.ndarray

    @classmethod
    def fit(
        cls, model: Any, store: Store, sessions: Sequence[int], target: Target, num_slices: int, seed: int
    ) -> PatchClassifier:
        """Learn from sessions with masks.

        Args:
            model: a `BrainFoundForSegmentation`; it stays as it is.
            num_slices: slices of each session to learn from, half of them through the structure if it has so many.
            seed: of the choice of patches.

        Raises:
            TrainingError: the tokens are not finite.
        """
        rng = numpy_generator(PROBE, seed, _STREAM)
        sessions = [sessions[i] for i in evenly_spaced_slices(len(sessions), MAX_SESSIONS)]
        per_session = max(8, MAX_PATCHES // len(sessions))
        tokens, label_fractions, weights, owners = [], [], [], []
        for session in sessions:
            stack = store[int(session)]
            labels = _labels(target, np.asarray(stack.mask))
            slices, slice_weight = _choose_slices(np.asarray(labels.any(axis=(1, 2, 3))), num_slices)
            in_patches = patch_label_fractions(labels[slices], model.encoder.patch_size)  # (S, P, K)
            chosen, weight = _choose_patches(in_patches, slice_weight, per_session, rng)
            flat = _tokens(model, stack, slices).reshape(-1, model.encoder.embed_dim)
            tokens.append(flat[chosen])
            label_fractions.append(in_patches.reshape(-1, in_patches.shape[-1])[chosen])
            weights.append(weight)
            owners += [int(session)] * len(chosen)
        everything = np.concatenate(tokens).astype(np.float64)
        if not np.isfinite(everything).all():
            raise TrainingError(
                "the backbone that the run starts from gives patch tokens that are not finite",
                remedy="Start from another model",
            )
        mean, std = everything.mean(axis=0), everything.std(axis=0)
        std = np.where(std > 1e-8, std, 1.0)
        subject_groups = subject_group_indices(store.sessions["subject"].tolist(), np.array(owners))
        of_patch, every_share = np.concatenate(weights), np.concatenate(label_fractions)
        features = (everything - mean) / std
        fits = [_fit(features, share, of_patch / of_patch.mean(), subject_groups) for share in every_share.T]
        rows, biases, thresholds = zip(*fits, strict=True)
        return cls(model, target, mean, std, np.stack(rows), np.array(biases), np.array(thresholds))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept to ask it again."""
        names = ("mean", "std", "weight", "bias", "thresholds")
        return {name: torch.from_numpy(np.asarray(getattr(self, name))) for name in names}

    def answer(self, session: int, stack: Stack, without: Sequence[str] = ()) -> StackPrediction:
        """Every pixel of a stack, in the form of a model's answer.

        Args:
            without: contrasts that are not to be seen.
        """
        stack = remove_contrasts(stack, without) if without else stack
        num_slices, height, width = stack.grid
        rows, columns = self.model.encoder.grid(height, width)
        marked = np.empty((num_slices, len(self.bias), height, width), dtype=bool)
        best = np.zeros((num_slices, height, width), dtype=np.uint8)
        chunk = num_slices if self.model.config.stem == "slices" else SEGMENTATION_CHUNK
        for first in range(0, num_slices, chunk):
            index = np.arange(first, min(first + chunk, num_slices))
            tokens = (_tokens(self.model, stack, index) - self.mean) / self.std
            probabilities = expit(tokens @ self.weight.T + self.bias)  # (S, P, K)
            above = np.where(probabilities > self.thresholds, probabilities, 0.0)
            per_patch = np.moveaxis(above, -1, 1).reshape(len(index), -1, rows, columns)
            per_pixel = per_patch.repeat(self.model.encoder.patch_size, 2).repeat(self.model.encoder.patch_size, 3)
            marked[index] = per_pixel > 0
            best[index] = np.where(per_pixel.any(axis=1), per_pixel.argmax(axis=1) + 1, 0)
        return StackPrediction(labels=marked) if self.target.regions else StackPrediction(classes=best)


def patch_label_fractions(labels: UInt8[np.ndarray, "S K H W"], patch_size: int) -> Float[np.ndarray, "S P K"]:
    """The share of each patch's pixels that have each label, patches row by row."""
    num_slices, num_labels, height, width = labels.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = labels.reshape(num_slices, num_labels, rows, patch_size, columns, patch_size)
    return np.moveaxis(tiles.mean(axis=(3, 5)).reshape(num_slices, num_labels, -1), 1, -1)


def _labels(target: Target, mask: np.ndarray) -> UInt8[np.ndarray, "S K H W"]:
    """0 or 1 of each class but the background, or of each overlapping label."""
    encoded = target.encode_mask(mask)
    if target.regions:
        return encoded
    return np.stack([encoded == k for k in range(1, len(target.names))], axis=1).astype(np.uint8)


@torch.inference_mode()
def _tokens(model: Any, stack: Stack, slices: Int[np.ndarray, "S"]) -> Float[np.ndarray, "S P D"]:
    """The backbone's patch tokens of some slices."""
    model.eval()
    device = next(model.parameters()).device
    # A stem that reads neighbours has to be shown them.
    whole = model.config.stem == "slices"
    batch = collate([stack], [np.arange(len(stack.pixels)) if whole else slices]).to(device)
    patches = model.brainfound(**batch.inputs(), output_patch_embeddings=True).patch_embeddings[0]
    return (patches[slices] if whole else patches).float().cpu().numpy()


def _choose_slices(shows: np.ndarray, wanted: int) -> tuple[Int[np.ndarray, "S"], Float[np.ndarray, "S"]]:
    """Evenly spaced slices, up to half of them of those that show the structure; and how many each stands for."""
    marked, others = np.flatnonzero(shows), np.flatnonzero(~shows)
    num_marked = min(len(marked), max(wanted - len(others), -(-wanted // 2)))
    chosen, weights = [], []
    for group, number in ((marked, num_marked), (others, min(len(others), wanted - num_marked))):
        if number > 0:
            chosen.append(group[evenly_spaced_slices(len(group), number)])
            weights.append(np.full(number, len(group) / number))
    order = np.argsort(np.concatenate(chosen))
    return np.concatenate(chosen)[order], np.concatenate(weights)[order]


def _choose_patches(
    label_fractions: Float[np.ndarray, "S P K"],
    slice_weight: Float[np.ndarray, "S"],
    wanted: int,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Patches of a session, as many of each class as there are; and how many each stands for."""
    flat = label_fractions.reshape(-1, label_fractions.shape[-1])
    strata = np.where(flat.any(axis=1), flat.argmax(axis=1) + 1, 0)
    present = np.unique(strata)
    chosen, weights = [], []
    for stratum in present:
        members = np.flatnonzero(strata == stratum)
        drawn = rng.permutation(members)[: max(1, wanted // len(present))]
        chosen.append(drawn)
        weights.append(np.full(len(drawn), len(members) / len(drawn)) * slice_weight[drawn // label_fractions.shape[1]])
    return np.concatenate(chosen), np.concatenate(weights)


def _fit(
    features: Float[np.ndarray, "n D"],
    label_fractions: Float[np.ndarray, "n"],
    weights: np.ndarray,
    subject_groups: np.ndarray,
) -> tuple[np.ndarray, float, float]:
    """Weights ``(D,)``, bias and threshold of one class."""
    weight, bias = _fit_fractions(
        features, label_fractions, weights, _choose_penalty(features, label_fractions, weights, subject_groups)
    )
    probabilities = expit(features @ weight + bias)
    marked = probabilities[:, None] > _THRESHOLDS
    in_all = (weights * label_fractions).sum() + weights @ marked  # 0 for a class that no chosen patch shows
    found = ((weights * label_fractions) @ marked) * 2 / np.maximum(in_all, 1e-12)
    return weight, bias, float(_THRESHOLDS[found.argmax()])


def _choose_penalty(
    features: np.ndarray, label_fractions: np.ndarray, weights: np.ndarray, subject_groups: np.ndarray
) -> float:
    """The strength with the smallest cross-entropy on subjects left out; a middle one where there is one subject."""
    num_folds = min(3, len(np.unique(subject_groups)))
    if num_folds < 2:
        return float(_PENALTIES[len(_PENALTIES) // 2])
    losses = np.zeros(len(_PENALTIES))
    for train, test in GroupKFold(num_folds).split(features, groups=subject_groups):
        for number, penalty in enumerate(_PENALTIES):
            weight, bias = _fit_fractions(features[train], label_fractions[train], weights[train], penalty)
            scores = features[test] @ weight + bias
            # −s log σ(z) − (1 − s) log(1 − σ(z)) = log(1 + eᶻ) − s z
            losses[number] += (weights[test] * (np.logaddexp(0, scores) - label_fractions[test] * scores)).sum()
    return float(_PENALTIES[losses.argmin()])


def _fit_fractions(
    features: np.ndarray, label_fractions: np.ndarray, weights: np.ndarray, penalty: float
) -> tuple[np.ndarray, float]:
    """A logistic regression of a share: each patch counts as yes with its share, and as no with the rest of it."""
    yes, no = label_fractions > 0, label_fractions < 1
    if not yes.any() or not no.any():
        return np.zeros(features.shape[1]), 20.0 if yes.any() else -20.0
    rows = np.concatenate([features[yes], features[no]])
    labels = np.repeat([1, 0], [yes.sum(), no.sum()])
    counts = np.concatenate([(weights * label_fractions)[yes], (weights * (1 - label_fractions))[no]])
    with warnings.catch_warnings():
        # A baseline whose solver stops at its last iteration is a baseline as well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=1 / penalty, max_iter=300).fit(rows, labels, sample_weight=counts)
    return fitted.coef_[0], float(fitted.intercept_[0])
