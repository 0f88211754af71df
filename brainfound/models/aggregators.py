"""Aggregators: the slice embeddings of a volume → one volume embedding.

`AGGREGATORS` is the registry: a new aggregator is a class and one line. Padding is dropped rather than masked:
volumes with the same number of valid slices are pooled together, so padding cannot change the result by a single bit.

Axis legend: B volumes, S slices, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


class Aggregation(NamedTuple):
    """A volume embedding, and the weight of each slice in it; None where the aggregator has no weights."""

    embedding: Float[Tensor, "volumes width"]
    weights: Float[Tensor, "volumes slices"] | None


class Aggregator(nn.Module, ABC):
    """Base class that drops padding; subclasses pool volumes in which every slice is valid."""

    has_weights = True
    has_uniform_weights = False
    """Whether every slice weighs the same, whatever it contains."""
    num_statistics = 1
    """Width of the volume embedding, in widths of a slice embedding."""

    @abstractmethod
    def pool(
        self, slices: Float[Tensor, "volumes slices width"], positions_mm: Float[Tensor, "volumes slices"]
    ) -> tuple[Tensor, Tensor | None]:
        """Pool volumes without padding into embeddings (B, D) and slice weights (B, S), or None."""

    def forward(
        self,
        slice_embeddings: Float[Tensor, "volumes slices width"],
        slice_mask: Bool[Tensor, "volumes slices"] | None = None,
        positions_mm: Float[Tensor, "volumes slices"] | None = None,
    ) -> Aggregation:
        """Pool each volume over its valid slices, at least one.

        Args:
            slice_mask: True where a slice is valid; None: all are.
            positions_mm: None: valid slices 1 mm apart, centred on 0.
        """
        # Differences between subjects may be below bfloat16 resolution; full precision is cheap here.
        with torch.autocast(slice_embeddings.device.type, enabled=False):
            if (weight := next(self.parameters(), None)) is not None:
                slice_embeddings = slice_embeddings.to(weight.dtype)
            return self._pool_valid(slice_embeddings, slice_mask, positions_mm)

    def _pool_valid(
        self, slice_embeddings: Tensor, slice_mask: Tensor | None, positions_mm: Tensor | None
    ) -> Aggregation:
        if slice_mask is None:
            positions_mm = _centred_positions(slice_embeddings) if positions_mm is None else positions_mm
            return Aggregation(*self.pool(slice_embeddings, positions_mm))
        counts = slice_mask.sum(dim=1)
        num_volumes, num_slices, width = slice_embeddings.shape
        embedding = slice_embeddings.new_zeros(num_volumes, width * self.num_statistics)
        weights = slice_embeddings.new_zeros(num_volumes, num_slices) if self.has_weights else None
        for count in counts.unique().tolist():
            volumes = (counts == count).nonzero()[:, 0]
            # A stable sort brings the valid slices to the front in their order.
            order = slice_mask[volumes].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
            valid = slice_embeddings[volumes[:, None], order]
            positions = _centred_positions(valid) if positions_mm is None else positions_mm[volumes[:, None], order]
            pooled, pooled_weights = self.pool(valid, positions)
            embedding = embedding.index_copy(0, volumes, pooled.to(embedding.dtype))
            if weights is not None and pooled_weights is not None:
                weights = weights.index_put((volumes[:, None], order), pooled_weights.to(weights.dtype))
        return Aggregation(embedding, weights)


class MeanAggregator(Aggregator):
    """The mean over slices."""

    has_uniform_weights = True

    def pool(self, slices: Tensor, positions_mm: Tensor) -> tuple[Tensor, Tensor]:
        return slices.mean(dim=1), slices.new_full(slices.shape[:2], 1.0 / slices.shape[1])


class MaxAggregator(Aggregator):
    """The maximum of each feature over slices; keeps a finding in a single slice that a mean would dilute."""

    has_weights = False

    def pool(self, slices: Tensor, positions_mm: Tensor) -> tuple[Tensor, None]:
        # amax splits the gradient among ties, so it stays invariant to order when slices repeat.
        return slices.amax(dim=1), None


class StatisticsAggregator(Aggregator):
    """Several statistics of each feature over slices, concatenated: "mean", "std" (with divisor S) and "max"."""

    has_weights = False

    def __init__(self, statistics: Sequence[str]) -> None:
        super().__init__()
        self.statistics, self.num_statistics = tuple(statistics), len(statistics)

    def pool(self, slices: Tensor, positions_mm: Tensor) -> tuple[Tensor, None]:
        # The root of 0, as of a single slice, has no gradient.
        std = slices.var(dim=1, correction=0).clamp_min(1e-12).sqrt()
        found = {"mean": slices.mean(dim=1), "std": std, "max": slices.amax(dim=1)}
        return torch.cat([found[name] for name in self.statistics], dim=1), None


class AttentionAggregator(Aggregator):
    """Gated attention pooling (Ilse, Tomczak, Welling 2018, "Attention-based deep MIL", eq. 9); invariant to order."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.value = nn.Linear(width, hidden_width)
        self.gate = nn.Linear(width, hidden_width)
        self.score = nn.Linear(hidden_width, 1)

    def pool(self, slices: Tensor, positions_mm: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(torch.tanh(self.value(slices)) * torch.sigmoid(self.gate(slices)))[..., 0]
        # In float32: under bf16 the weights of 150 slices would not sum to one.
        weights = scores.float().softmax(dim=1)
        return torch.einsum("bs,bsd->bd", weights.to(slices.dtype), slices), weights


class TransformerAggregator(Aggregator):
    """A small pre-norm transformer whose class token attends to the slices at their positions in mm.

    A slice's weight is the class token's attention rollout (Abnar and Zuidema 2020, §3); with one layer that is its
    attention, averaged over heads. No gradient flows through the weights.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.input_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(SliceBlock(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def pool(self, slices: Tensor, positions_mm: Tensor) -> tuple[Tensor, Tensor]:
        num_volumes, num_slices, width = slices.shape
        slices = self.input_norm(slices)
        slices = slices + sinusoidal_positions(positions_mm, width).to(slices.dtype)
        tokens = torch.cat((self.class_token.to(slices.dtype).expand(num_volumes, -1, -1), slices), dim=1)
        rollout = torch.eye(1 + num_slices, device=slices.device)
        for layer in self.layers:
            tokens, attention = layer(tokens)
            # The residual connection carries half of a layer's output past its attention.
            rollout = (attention @ rollout + rollout) / 2
        weights = rollout[:, 0, 1:]
        return self.norm(tokens[:, 0]), weights / weights.sum(dim=1, keepdim=True)


class SliceBlock(nn.Module):
    """One pre-norm transformer block over the tokens of a volume."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads_for(width)
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(
        self, tokens: Float[Tensor, "volumes tokens width"]
    ) -> tuple[Float[Tensor, "volumes tokens width"], Float[Tensor, "volumes tokens tokens"]]:
        """The tokens after the block, and its attention: averaged over heads, rows sum to 1, without gradient."""
        projected = self.query_key_value(self.norm1(tokens))
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        with torch.no_grad():
            scores = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
            attention = scores.softmax(dim=-1).mean(dim=1)
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.output(attended.transpose(1, 2).flatten(2))
        return tokens + self.contract(F.gelu(self.expand(self.norm2(tokens)))), attention


def num_heads_for(width: int, head_width: int = 64) -> int:
    """The largest number of heads up to `width` / `head_width` that divides `width`.

    >>> num_heads_for(384), num_heads_for(1024), num_heads_for(32)
    (6, 16, 1)
    """
    most = max(1, width // head_width)
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


def sinusoidal_positions(
    positions_mm: Float[Tensor, "volumes slices"], width: int, shortest_mm: float = 4.0, longest_mm: float = 1000.0
) -> Float[Tensor, "volumes slices width"]:
    """Sines and cosines of positions, continuous in mm, at wavelengths in this range (Vaswani et al. 2017, §3.5)."""
    num_waves = (width + 1) // 2
    exponents = torch.linspace(0.0, 1.0, num_waves, device=positions_mm.device)
    wavelengths_mm = shortest_mm * (longest_mm / shortest_mm) ** exponents
    angles = positions_mm.float()[..., None] * (2 * math.pi / wavelengths_mm)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :width]


STATISTICS: dict[str, tuple[str, ...]] = {
    "mean_std": ("mean", "std"),
    "mean_max": ("mean", "max"),
    "mean_std_max": ("mean", "std", "max"),
}
"""The aggregators that concatenate several statistics: a volume embedding is as many times wider than a slice's."""

AGGREGATORS: dict[str, Callable[[PreTrainedConfig], Aggregator]] = {
    "mean": lambda config: MeanAggregator(),
    "max": lambda config: MaxAggregator(),
    "mean_std": lambda config: StatisticsAggregator(STATISTICS["mean_std"]),
    "mean_max": lambda config: StatisticsAggregator(STATISTICS["mean_max"]),
    "mean_std_max": lambda config: StatisticsAggregator(STATISTICS["mean_std_max"]),
    "attention": lambda config: AttentionAggregator(config.embedding_size, config.aggregator_width),
    "transformer": lambda config: TransformerAggregator(config.embedding_size, config.aggregator_layers),
}
"""Name → constructor from a `BrainFoundConfig`, which validates names against it."""


def _centred_positions(slices: Tensor) -> Tensor:
    num_volumes, num_slices, _ = slices.shape
    positions = torch.arange(num_slices, device=slices.device, dtype=torch.float32) - (num_slices - 1) / 2
    return positions.expand(num_volumes, -1)
