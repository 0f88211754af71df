"""Losses of a segmentation.

Axis legend: N slices, K classes (or overlapping labels), H W pixels.

A term over regions (Dice, Tversky) is taken over all slices together: most slices lack most structures, and a term
per slice would then reward nothing but empty answers. It is averaged over the classes but the background, or over
all overlapping labels. A term over pixels (cross-entropy, focal) is averaged over the labelled pixels. Pixels labelled
−100 count in no term.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from brainfound.models.configuration import BrainFoundConfig

IGNORED_LABEL = -100
# Powers below one have an infinite slope at 0.
_SMALLEST_BASE = 1e-6


def segmentation_loss(
    logits: Float[Tensor, "slices classes height width"],
    labels: Int[Tensor, "slices height width"] | Int[Tensor, "slices classes height width"],
    overlapping: bool = False,
) -> Tensor:
    """Cross-entropy plus soft Dice of the foreground classes (Milletari et al. 2016, eq. 3), over labelled pixels.

    Args:
        logits: class scores.
        labels: class indices, or with `overlapping` 0 or 1 for each label; −100 where unknown.
        overlapping: each label is a yes or no of its own (sigmoid), and there is no background class.
    """
    return _cross_entropy(logits, labels, overlapping) + dice_loss(logits, labels, overlapping)


def dice_loss(logits: Tensor, labels: Tensor, overlapping: bool = False) -> Tensor:
    """One minus the soft Dice, averaged over the foreground classes or labels; arguments as `segmentation_loss`."""
    probabilities, reference = _answer_and_truth(logits, labels, overlapping)
    overlap = (probabilities * reference).sum(dim=(0, 2, 3))
    sizes = (probabilities + reference).sum(dim=(0, 2, 3))
    if not overlapping:
        overlap, sizes = overlap[1:], sizes[1:]
    # One pixel of smoothing: a class that is neither present nor predicted scores 1.
    dice = (2 * overlap + 1) / (sizes + 1)
    return (1 - dice).mean()


def tversky_loss(
    logits: Tensor,
    labels: Tensor,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    overlapping: bool = False,
) -> Tensor:
    """One minus the Tversky index (Salehi et al. 2017, eq. 3), to the power 1/gamma (Abraham and Khan 2019, eq. 4).

    Where a structure is small, a large `beta` makes what is missed dearer than what is marked too much. With
    alpha = beta = 0.5 and gamma = 1 it is the Dice loss. With gamma above 1 classes that are nearly right weigh more.

    Args:
        logits, labels, overlapping: as for `segmentation_loss`.
        alpha: weight of false positives.
        beta: weight of false negatives.
        gamma: focus.
    """
    probabilities, reference = _answer_and_truth(logits, labels, overlapping)
    found = (probabilities * reference).sum(dim=(0, 2, 3))
    too_much = probabilities.sum(dim=(0, 2, 3)) - found
    missed = reference.sum(dim=(0, 2, 3)) - found
    # Half a pixel of smoothing: the same as the one pixel of Dice, whose overlap counts twice.
    index = (found + 0.5) / (found + alpha * too_much + beta * missed + 0.5)
    lacking = 1 - (index if overlapping else index[1:])
    return lacking.mean() if gamma == 1 else (lacking.clamp(min=_SMALLEST_BASE) ** (1 / gamma)).mean()


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0, overlapping: bool = False) -> Tensor:
    """Cross-entropy of each pixel times (1 − probability of the truth)^gamma (Lin et al. 2017, eq. 4).

    Pixels that are right already, nearly all of them where a lesion is small, count for little. With gamma = 0 it is
    the cross-entropy. Arguments as for `segmentation_loss`.
    """
    costs, known = _pixel_costs(logits, labels, overlapping)
    doubts = (-torch.expm1(-costs)).clamp(min=_SMALLEST_BASE)
    return (doubts**gamma * costs).sum() / known.sum().clamp(min=1)


def configured_segmentation_loss(config: BrainFoundConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that `config.segmentation_loss` names; tensors as for `segmentation_loss`."""
    overlapping = config.overlapping_labels
    if config.segmentation_loss == "dice_cross_entropy":
        return segmentation_loss(logits, labels, overlapping)
    if config.segmentation_loss == "dice_focal":
        return focal_loss(logits, labels, config.focal_gamma, overlapping) + dice_loss(logits, labels, overlapping)
    gamma = config.tversky_gamma if config.segmentation_loss == "focal_tversky" else 1.0
    return tversky_loss(logits, labels, config.tversky_alpha, config.tversky_beta, gamma, overlapping)


def _answer_and_truth(logits: Tensor, labels: Tensor, overlapping: bool) -> tuple[Tensor, Tensor]:
    """Probabilities and truth (N, K, H, W), both zero where the label is unknown."""
    labels, logits = labels.long(), logits.float()
    known = labels != IGNORED_LABEL
    if overlapping:
        return logits.sigmoid() * known, labels.clamp(min=0) * known
    reference = F.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1)
    return logits.softmax(dim=1) * known[:, None], reference * known[:, None]


def _cross_entropy(logits: Tensor, labels: Tensor, overlapping: bool) -> Tensor:
    if overlapping:
        costs, known = _pixel_costs(logits, labels, overlapping)
        return costs.sum() / known.sum().clamp(min=1)
    labels = labels.long()
    summed = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return summed / (labels != IGNORED_LABEL).sum().clamp(min=1)


def _pixel_costs(logits: Tensor, labels: Tensor, overlapping: bool) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each pixel (or of each of its labels), zero where the label is unknown; and which are known.

    It is minus the logarithm of the probability of the truth.
    """
    labels, logits = labels.long(), logits.float()
    known = labels != IGNORED_LABEL
    if overlapping:
        truth = labels.clamp(min=0).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * known, known
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none"), known
