"""Frozen features of volumes, and linear models of them that fold into the head of one model.

The embedding of a volume is divided into blocks: for each statistic over slices, each backbone block, and each kind
(class token, mean of the patch tokens), D numbers. Every linear candidate reads some of the blocks.

Axis legend: n volumes, R head outputs, T statistics, L backbone blocks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from brainfound.finetuning.auto.recipe import LinearCandidate
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.models.aggregators import STATISTICS

ALL_STATISTICS = "mean_std_max"
_NAMES = STATISTICS[ALL_STATISTICS]
KINDS = ("cls", "patches")

Blocks = Float[np.ndarray, "n T L kinds D"]


def volume_features(cache: EmbeddingCache, sessions: Sequence[int]) -> Blocks:
    """The features of sessions from the cache of a model with `slice_features` "cls_and_patches"."""
    config = cache.model.config
    shape = len(config.feature_layers or ()), len(KINDS), config.hidden_size
    pooled = []
    for session in sessions:
        slices = cache.slices(session)
        # As `StatisticsAggregator` does, whose smallest standard deviation is 1e-6.
        std = np.sqrt(np.maximum(slices.var(axis=0), 1e-12))
        found = {"mean": slices.mean(axis=0), "std": std, "max": slices.max(axis=0)}
        pooled.append(np.stack([found[name].reshape(shape) for name in _NAMES]))
    return np.stack(pooled).astype(np.float64)


def choose_blocks(candidate: LinearCandidate, num_layers: int) -> Bool[np.ndarray, "T L kinds"]:
    """The blocks that a candidate reads."""
    chosen = np.zeros((len(_NAMES), num_layers, len(KINDS)), dtype=bool)
    layers = range(num_layers) if candidate.features == "layers" else [num_layers - 1]
    kinds = [k for k, kind in enumerate(KINDS) if kind in candidate.features or candidate.features == "layers"]
    statistics = [k for k, name in enumerate(_NAMES) if name in candidate.pooling.split("_")]
    chosen[np.ix_(statistics, list(layers), kinds)] = True
    return chosen


@dataclass(frozen=True)
class LinearModel:
    """A linear model of a volume's features."""

    weight: Float[np.ndarray, "R T L kinds D"]
    bias: Float[np.ndarray, "R"]

    def scores(self, features: Blocks) -> Float[np.ndarray, "n R"]:
        return features.reshape(len(features), -1) @ self.weight.reshape(len(self.weight), -1).T + self.bias

    @classmethod
    def constant(cls, bias: np.ndarray, features: Blocks) -> LinearModel:
        """A model that gives the same scores to every volume."""
        return cls(np.zeros((len(bias), *features.shape[1:])), np.asarray(bias, dtype=np.float64))

    @classmethod
    def combine(cls, models: Sequence[LinearModel], weights: Sequence[float]) -> LinearModel:
        """The weighted sum of models, which is linear again."""
        pairs = list(zip(models, weights, strict=True))
        weight = np.sum([w * one.weight for one, w in pairs], axis=0)
        return cls(weight, np.sum([w * one.bias for one, w in pairs], axis=0))


@dataclass(frozen=True)
class FoldedModel:
    """A linear model as head weights of the smallest model that has all its features."""

    config: dict[str, Any]
    """Fields of `BrainFoundConfig`."""
    weight: Float[np.ndarray, "R E"]
    bias: Float[np.ndarray, "R"]
    num_slice_features: int
    first_class_token: int
    """Where the class token of the last backbone block begins in a slice embedding."""


def fold(model: LinearModel, layers: Sequence[int]) -> FoldedModel:
    """Leave out the blocks that a model does not read.

    The mean over slices and the class token of the last block are always kept: the frozen baseline reads them.
    """
    used = np.asarray(model.weight.any(axis=(0, 4)))
    used[0, -1, 0] = True
    statistics, blocks, kinds = (np.unique(places) for places in np.nonzero(used))
    kept = [layers[block] for block in blocks]
    weight = model.weight[:, statistics][:, :, blocks][:, :, :, kinds]
    width = weight.shape[-1]
    config = {
        "feature_layers": kept if len(kept) > 1 else None,
        "slice_features": "cls_and_patches" if len(kinds) > 1 else "cls",
        "aggregator": "_".join(_NAMES[statistic] for statistic in statistics),
        "head_norm": "none",
    }
    per_block = len(kinds) * width
    return FoldedModel(
        config, weight.reshape(len(weight), -1), model.bias, len(kept) * per_block, (len(kept) - 1) * per_block
    )
