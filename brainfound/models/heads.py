"""Heads: volume embeddings → answers, with their losses.

Axis legend: B volumes, D width, K classes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from brainfound.errors import ModelError
from brainfound.models.configuration import BrainFoundConfig

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
