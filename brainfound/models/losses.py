"""The losses of classification, regression and segmentation.

Segmentation: a region term (Dice, Tversky) is computed over all slices together, because most slices lack most
structures and a term per slice would reward empty predictions; it is averaged over the foreground classes or labels.
A pixel term (cross-entropy, focal) is averaged over the labelled pixels. Losses of classes and of overlapping labels
ignore the label −100, and are 0 if there is no other.

Axis legend: B volumes, K classes or overlapping labels, N slices, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from brainfound.errors import ModelError
from brainfound.models.configuration import BrainFoundConfig

IGNORED_LABEL = -100
_LABELS_REMEDY = "Give one label per volume, a row per volume where several may hold, or a map of the images' size"
# Powers below one have an infinite slope at 0.
_SMALLEST_BASE = 1e-6


def soft_labels(
    target: Float[Tensor, "volumes"], edges: Float[Tensor, "edges"], label_width: float
) -> Float[Tensor, "volumes bins"]:
    """The mass per bin of a Gaussian around each target, with a sigma of `label_width` bins (Peng et al. 2021).

    The mass beyond the range belongs to the outermost bins, so that each row sums to 1.
    """
    sigma = label_width * (edges[1] - edges[0])
    below = torch.special.ndtr((edges[1:-1] - target[:, None]) / sigma)
    return torch.diff(F.pad(F.pad(below, (1, 0), value=0.0), (0, 1), value=1.0), dim=1)


def classification_loss(
    logits: Float[Tensor, "volumes classes"],
    labels: Tensor,
    problem_type: str | None,
    class_weights: Sequence[float] | None = None,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Cross-entropy for labels (B,), or binary cross-entropy for multi-label targets (B, K); a mean over known labels.

    Args:
        class_weights: (K,) weight of each class, or of the positives of each label. The sum is divided by the number
            of known labels, not by their weights, which would cancel out in a batch of one class.
        focal_gamma: each term is multiplied by (1 − p)^γ, where p is the probability of the truth (Lin et al., "Focal
            Loss for Dense Object Detection", ICCV 2017, eq. 4).
    """
    multi_label = problem_type == "multi_label_classification"
    _require_labels(labels, logits.shape if multi_label else logits.shape[:1])
    logits, known = logits.float(), labels != IGNORED_LABEL
    if multi_label:
        truth = labels.float() * known
        if bool(((truth < 0) | (truth > 1)).any()):
            what, got = "a label among several is 0, 1 or a share between them", truth.aminmax()
            remedy = f"Write {IGNORED_LABEL} for an unknown label"
            raise ModelError(what, where="labels", got=f"{got.min:g} to {got.max:g}", remedy=remedy)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        weights = 1 + truth * (_as_tensor(class_weights, logits) - 1)
    else:
        labels = labels.long()
        if class_weights is None and focal_gamma == 0:
            return F.cross_entropy(logits, labels, reduction="sum") / known.sum().clamp(min=1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        weights = _as_tensor(class_weights, logits)[labels.clamp(min=0)]
    return _masked_mean(weights * _focal(losses, focal_gamma), known)


def _masked_mean(costs: Tensor, known: Tensor) -> Tensor:
    """The mean of the costs where the label is known; 0 if none is."""
    return (costs * known).sum() / known.sum().clamp(min=1)


def _require_labels(labels: Tensor, shape: torch.Size) -> None:
    if labels.shape != shape:
        got, expected = f"shape {tuple(labels.shape)}", f"shape {tuple(shape)}"
        raise ModelError("labels do not fit", where="labels", got=got, expected=expected, remedy=_LABELS_REMEDY)


def _as_tensor(class_weights: Sequence[float] | None, logits: Tensor) -> Tensor:
    return logits.new_ones(logits.shape[1]) if class_weights is None else logits.new_tensor(list(class_weights))


def _focal(losses: Tensor, gamma: float) -> Tensor:
    """Cross-entropies times (1 − p)^γ."""
    # expm1 keeps the digits of 1 − p near p = 1; a power below 1 has no finite slope at 0.
    smallest = torch.finfo(losses.dtype).eps
    return losses if gamma == 0 else (-torch.expm1(-losses)).clamp(min=smallest) ** gamma * losses


def regression_loss(
    mean: Float[Tensor, "volumes"],
    log_variance: Float[Tensor, "volumes"] | None,
    target: Float[Tensor, "volumes"],
    kind: str = "smooth_l1",
    huber_delta: float = 1.0,
) -> Tensor:
    """Loss of standardised points, or with a log variance the Gaussian negative log-likelihood (Nix and Weigend 1994).

    `kind` of point loss: ``"smooth_l1"`` (Huber's with delta 1), ``"l1"`` or ``"huber"`` (Huber 1964).
    """
    _require_labels(target, mean.shape)
    if log_variance is not None:
        return 0.5 * (log_variance + (target - mean) ** 2 * torch.exp(-log_variance)).mean()
    if kind == "huber":
        return F.huber_loss(mean, target, delta=huber_delta)
    return F.l1_loss(mean, target) if kind == "l1" else F.smooth_l1_loss(mean, target)


def bins_loss(
    bin_logits: Float[Tensor, "volumes bins"],
    target: Float[Tensor, "volumes"],
    edges: Float[Tensor, "edges"],
    label_width: float = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence of the soft labels from the predicted distribution (Peng et al. 2021)."""
    _require_labels(target, bin_logits.shape[:1])
    soft_target = soft_labels(target, edges, label_width)
    return F.kl_div(bin_logits.float().log_softmax(dim=1), soft_target, reduction="batchmean")


def segmentation_loss(
    logits: Float[Tensor, "slices classes height width"],
    labels: Int[Tensor, "slices height width"] | Int[Tensor, "slices classes height width"],
    overlapping: bool = False,
) -> Tensor:
    """Cross-entropy plus soft Dice of the foreground classes (Milletari et al. 2016, eq. 3), over labelled pixels.

    With `overlapping`, each label is 0 or 1 independently (sigmoid), and there is no background class.
    """
    return _cross_entropy(logits, labels, overlapping) + dice_loss(logits, labels, overlapping)


def dice_loss(logits: Tensor, labels: Tensor, overlapping: bool = False) -> Tensor:
    """One minus the soft Dice, averaged over the foreground classes or labels."""
    probabilities, reference = _probabilities_and_targets(logits, labels, overlapping)
    overlap = (probabilities * reference).sum(dim=(0, 2, 3))
    sizes = (probabilities + reference).sum(dim=(0, 2, 3))
    if not overlapping:
        overlap, sizes = overlap[1:], sizes[1:]
    # One pixel of smoothing: a class that is neither present nor predicted scores 1.
    dice = (2 * overlap + 1) / (sizes + 1)
    return (1 - dice).mean()


def tversky_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.3, beta: float = 0.7, gamma: float = 1.0, overlapping: bool = False
) -> Tensor:
    """One minus the Tversky index (Salehi et al. 2017, eq. 3), to the power 1/gamma (Abraham and Khan 2019, eq. 4).

    `alpha` is the weight of false positives, `beta` of false negatives. With alpha = beta = 0.5 and gamma = 1 it is
    the Dice loss. A gamma above 1 gives more weight to classes with a high Tversky index.
    """
    probabilities, reference = _probabilities_and_targets(logits, labels, overlapping)
    hits = (probabilities * reference).sum(dim=(0, 2, 3))
    false_alarms = probabilities.sum(dim=(0, 2, 3)) - hits
    misses = reference.sum(dim=(0, 2, 3)) - hits
    # Half a pixel of smoothing equals the one pixel of Dice, where the overlap counts twice.
    index = (hits + 0.5) / (hits + alpha * false_alarms + beta * misses + 0.5)
    losses = 1 - (index if overlapping else index[1:])
    return losses.mean() if gamma == 1 else (losses.clamp(min=_SMALLEST_BASE) ** (1 / gamma)).mean()


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0, overlapping: bool = False) -> Tensor:
    """Cross-entropy of each pixel times (1 − probability of the truth)^gamma (Lin et al. 2017, eq. 4)."""
    costs, known = _pixel_costs(logits, labels, overlapping)
    return _masked_mean(_focal(costs, gamma), known)


def compute_segmentation_loss(config: BrainFoundConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss selected by `config.segmentation_loss`."""
    overlapping = config.overlapping_labels
    if config.segmentation_loss == "dice_cross_entropy":
        return segmentation_loss(logits, labels, overlapping)
    if config.segmentation_loss == "dice_focal":
        return focal_loss(logits, labels, config.focal_gamma, overlapping) + dice_loss(logits, labels, overlapping)
    gamma = config.tversky_gamma if config.segmentation_loss == "focal_tversky" else 1.0
    return tversky_loss(logits, labels, config.tversky_alpha, config.tversky_beta, gamma, overlapping)


def _probabilities_and_targets(logits: Tensor, labels: Tensor, overlapping: bool) -> tuple[Tensor, Tensor]:
    """Both (N, K, H, W), and zero where the label is unknown."""
    labels, logits = labels.long(), logits.float()
    known = labels != IGNORED_LABEL
    if overlapping:
        return logits.sigmoid() * known, labels.clamp(min=0) * known
    reference = F.one_hot(labels.clamp(min=0), logits.shape[1]).movedim(-1, 1)
    return logits.softmax(dim=1) * known[:, None], reference * known[:, None]


def _cross_entropy(logits: Tensor, labels: Tensor, overlapping: bool) -> Tensor:
    if overlapping:
        costs, known = _pixel_costs(logits, labels, overlapping)
        return _masked_mean(costs, known)
    labels = labels.long()
    summed = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return summed / (labels != IGNORED_LABEL).sum().clamp(min=1)


def _pixel_costs(logits: Tensor, labels: Tensor, overlapping: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each pixel or label, zero where the label is unknown, and the mask of known labels."""
    labels, logits = labels.long(), logits.float()
    known = labels != IGNORED_LABEL
    if overlapping:
        truth = labels.clamp(min=0).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * known, known
    return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none"), known
