"""Collapse metrics of a batch of features, for the log and the guard.

Axis legend: ``N`` rows (crops), ``D`` width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MAX_HEALTH_IMAGES = 256
"""Enough for the metrics; a singular value decomposition of the rows of many ranks would take seconds."""


def effective_rank(features: Float[Tensor, "N D"]) -> float:
    """exp(entropy of normalised singular values) of centred features (Roy and Vetterli 2007), at most min(N − 1, D).

    0 for constant features, NaN if any is not finite.
    """
    if not torch.isfinite(features).all():
        return math.nan
    centred = features.double() - features.double().mean(dim=0)
    # Smaller differences are rounding errors of the features themselves.
    if len(features) < 2 or centred.abs().max() <= 1e-6 * features.abs().max():
        return 0.0
    singular = torch.linalg.svdvals(centred)
    fractions = singular / singular.sum()
    return math.exp(-torch.special.xlogy(fractions, fractions).sum().item())


def mean_cosine(features: Float[Tensor, "N D"]) -> float:
    """Mean cosine between different rows; 1 for fewer than two rows, NaN if any feature is not finite."""
    if len(features) < 2:
        return 1.0 if torch.isfinite(features).all() else math.nan
    unit = F.normalize(features.double(), dim=-1)
    total = unit.sum(dim=0).square().sum() - unit.square().sum()
    return (total / (len(unit) * (len(unit) - 1))).item()


def view_margin(features: Float[Tensor, "N D"], images: Int[Tensor, "N"]) -> float:
    """Mean cosine between centred rows of one image, minus that between rows of different images.

    About 0 if features do not depend on the image (or are constant), at most 1. NaN for fewer than two images, if
    none has two rows, or if a feature is not finite.
    """
    ids, image_index = torch.unique(images, return_inverse=True)
    counts = torch.bincount(image_index).double()
    num_same, num_all = (counts * (counts - 1)).sum(), len(images) * (len(images) - 1)
    if len(ids) < 2 or num_same == 0:
        return math.nan
    unit = F.normalize(features.double() - features.double().mean(dim=0), dim=-1)
    # Sums over pairs are squares of sums, so no N × N matrix is needed.
    diagonal = unit.square().sum()
    image_sums = unit.new_zeros(len(ids), unit.shape[1]).index_add(0, image_index, unit)
    same_image = image_sums.square().sum() - diagonal
    all_pairs = unit.sum(dim=0).square().sum() - diagonal
    return (same_image / num_same - (all_pairs - same_image) / (num_all - num_same)).item()


def feature_health_metrics(features: Float[Tensor, "N D"], images: Int[Tensor, "N"] | None = None) -> dict[str, float]:
    """All metrics of a batch of CLS features, from at most `MAX_HEALTH_IMAGES` images; NaN if one is not finite.

    Without `images` (the image number of each row) each row is a different image, and there is no view margin.
    """
    features = features.detach().cpu()
    rows = torch.arange(len(features)) if images is None else images.cpu()
    ids = torch.unique(rows)[:MAX_HEALTH_IMAGES]
    if len(ids) == MAX_HEALTH_IMAGES:
        chosen = rows <= ids[-1]
        features, rows = features[chosen], rows[chosen]
    metrics = {
        "effective_rank": effective_rank(features),
        # Of images, not rows: features that tell images apart but ignore crops have n − 1 directions.
        "highest_rank": float(min(len(ids) - 1, features.shape[1])),
        "mean_cosine": mean_cosine(features),
    }
    if len(rows) > len(ids) > 1:
        metrics["view_margin"] = view_margin(features, rows)
    return metrics
