"""Heads: volume embeddings or pixel scores → answers, with their losses.

Axis legend: B volumes, N slices, D width, K classes, H W pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfound.errors import ModelError
from brainfound.models.configuration import BrainFoundConfig

IGNORED_LABEL = -100
# Keeps exp(−log variance) finite while the mean is still far off.
_LOG_VARIANCE_LIMIT = 10.0


class ClassificationHead(nn.Module):
    """Layer norm, dropout, and one linear layer: (B, D) → class scores (B, K)."""

    def __init__(self, config: BrainFoundConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_classes)

    def forward(self, embedding: Float[Tensor, "volumes width"]) -> Float[Tensor, "volumes classes"]:
        return self.score(self.dropout(self.norm(embedding)))


class RegressionHead(nn.Module):
    """Layer norm, dropout, and one linear layer: (B, D) → standardised mean and, if asked, log variance (B,)."""

    def __init__(self, config: BrainFoundConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.score = nn.Linear(config.hidden_size, 2 if config.regression_uncertainty else 1)

    def forward(self, embedding: Float[Tensor, "volumes width"]) -> tuple[Tensor, Tensor | None]:
        answer = self.score(self.dropout(self.norm(embedding))).float()
        if answer.shape[1] == 1:
            return answer[:, 0], None
        return answer[:, 0], answer[:, 1].clamp(-_LOG_VARIANCE_LIMIT, _LOG_VARIANCE_LIMIT)


def classification_loss(logits: Float[Tensor, "volumes classes"], labels: Tensor, problem_type: str | None) -> Tensor:
    """Cross-entropy for labels (B,), or binary cross-entropy for multi-label targets (B, K).

    Raises:
        ModelError: if the shape of the labels does not fit.
    """
    multi_label = problem_type == "multi_label_classification"
    expected = tuple(logits.shape) if multi_label else tuple(logits.shape[:1])
    if tuple(labels.shape) != expected:
        raise ModelError("labels do not fit", got=f"shape {tuple(labels.shape)}", expected=f"shape {expected}")
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float(), labels.long())


def regression_loss(mean: Tensor, log_variance: Tensor | None, target: Float[Tensor, "volumes"]) -> Tensor:
    """Smooth L1, or with a log variance the Gaussian negative log-likelihood (Nix and Weigend 1994); all standardised.

    Raises:
        ModelError: if the shape of the target does not fit.
    """
    if target.shape != mean.shape:
        raise ModelError("labels do not fit", got=f"shape {tuple(target.shape)}", expected=f"shape {tuple(mean.shape)}")
    if log_variance is None:
        return F.smooth_l1_loss(mean, target)
    return 0.5 * (log_variance + (target - mean) ** 2 * torch.exp(-log_variance)).mean()


def segmentation_loss(
    logits: Float[Tensor, "slices classes height width"], labels: Int[Tensor, "slices height width"]
) -> Tensor:
    """Cross-entropy plus soft Dice of the foreground classes (Milletari et al. 2016, eq. 3), over labelled pixels.

    Dice is taken over all slices together: most slices lack most structures, and a Dice per slice would
    then reward nothing but empty answers. Pixels labelled −100 count in neither term.
    """
    labels = labels.long()
    known = labels != IGNORED_LABEL
    logits = logits.float()
    num_classes = logits.shape[1]
    summed = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    cross_entropy = summed / known.sum().clamp(min=1)
    probabilities = logits.softmax(dim=1) * known[:, None]
    reference = F.one_hot(labels.clamp(min=0), num_classes).movedim(-1, 1) * known[:, None]
    overlap = (probabilities * reference).sum(dim=(0, 2, 3))[1:]
    sizes = (probabilities + reference).sum(dim=(0, 2, 3))[1:]
    # One pixel of smoothing: a class that is neither present nor predicted scores 1.
    dice = (2 * overlap + 1) / (sizes + 1)
    return cross_entropy + (1 - dice).mean()
