"""Heads: volume embeddings → predictions.

Axis legend: B volumes, D width, K classes or labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brainfound.models.configuration import BrainFoundConfig

# Keeps exp(−log variance) finite while the mean is still far off.
_LOG_VARIANCE_LIMIT = 10.0


class _LinearHead(nn.Module):
    """Layer norm unless `config.head_norm` is "none", dropout, and one linear layer.

    It computes in the dtype of its weights even under autocast.

    A head fitted to frozen embeddings has large weights whose products cancel: in bfloat16 the rounding error is as
    large as the differences between subjects.
    """

    def __init__(self, config: BrainFoundConfig, num_outputs: int) -> None:
        super().__init__()
        width = config.volume_embedding_size
        self.norm = nn.LayerNorm(width) if config.head_norm == "layer" else nn.Identity()
        self.dropout = nn.Dropout(config.head_dropout)
        self.score = nn.Linear(width, num_outputs)

    def compute_scores(self, embedding: Float[Tensor, "volumes width"]) -> Float[Tensor, "volumes outputs"]:
        with torch.autocast(embedding.device.type, enabled=False):
            return self.score(self.dropout(self.norm(embedding.to(self.score.weight.dtype))))


class ClassificationHead(_LinearHead):
    """(B, D) → class scores (B, K)."""

    def __init__(self, config: BrainFoundConfig) -> None:
        super().__init__(config, config.num_classes)

    def forward(self, embedding: Float[Tensor, "volumes width"]) -> Float[Tensor, "volumes classes"]:
        return self.compute_scores(embedding)


class RegressionHeadOutput(NamedTuple):
    """Output of a regression head, in standardised units."""

    mean: Float[Tensor, "volumes"]
    log_variance: Float[Tensor, "volumes"] | None = None
    """With the head "gaussian"."""
    bin_logits: Float[Tensor, "volumes bins"] | None = None
    """With the head "bins": logits of the distribution whose expectation is `mean`."""
    std: Float[Tensor, "volumes"] | None = None
    """Standard deviation of the prediction; None with the head "point"."""


class RegressionHead(_LinearHead):
    """(B, D) → a number per volume (B,), with or without uncertainty.

    Depending on `config.regression_head` it outputs the number itself, mean and log variance of a Gaussian (Nix and
    Weigend 1994), or logits of bins over the target's range, whose expectation is the prediction (Peng et al.,
    "Accurate brain age prediction with lightweight deep neural networks", Med Image Anal 2021).
    """

    def __init__(self, config: BrainFoundConfig) -> None:
        super().__init__(config, {"point": 1, "gaussian": 2, "bins": config.regression_bins}[config.regression_head])
        self.config = config

    def forward(self, embedding: Float[Tensor, "volumes width"]) -> RegressionHeadOutput:
        outputs = self.compute_scores(embedding).float()
        if self.config.regression_head == "point":
            return RegressionHeadOutput(outputs[:, 0])
        if self.config.regression_head == "gaussian":
            log_variance = outputs[:, 1].clamp(-_LOG_VARIANCE_LIMIT, _LOG_VARIANCE_LIMIT)
            return RegressionHeadOutput(outputs[:, 0], log_variance, std=torch.exp(0.5 * log_variance))
        edges = bin_edges(self.config).to(outputs.device)
        centres, bin_width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
        probabilities = outputs.softmax(dim=1)
        # Not a matrix product: autocast would round an age of 70.2 years to 70.
        mean = (probabilities * centres).sum(dim=1)
        # The last term is the variance within a bin, over which the density is flat.
        variance = (probabilities * (centres - mean[:, None]) ** 2).sum(dim=1) + bin_width**2 / 12
        return RegressionHeadOutput(mean, bin_logits=outputs, std=variance.sqrt())


def bin_edges(config: BrainFoundConfig) -> Float[Tensor, "edges"]:
    """The `regression_bins` + 1 edges of the bins in standardised units, on the CPU."""
    assert config.regression_range is not None, "the configuration was checked"
    low, high = ((edge - config.target_mean) / config.target_std for edge in config.regression_range)
    return torch.linspace(low, high, config.regression_bins + 1)
