"""Where attention goes: rollout through the blocks of a transformer, and the weights of slices.

Axis legend: M images (or volumes), T tokens of one, H heads, S slices, D width.

Attention rollout (Abnar and Zuidema, "Quantifying attention flow in transformers", ACL 2020, section 3): with the mean
over heads A of a block, (A + I) / 2 says how much of each token a block passes on, and the product over the blocks
how much of each input token ends up in each output token.

The kernels that models run with give no attention away, so that queries and keys are made again from the tokens that
enter a block. The model itself, its kernel and its adapters stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brainfound.models.inference import inner_model

WEIGHING_AGGREGATORS = ("attention", "transformer")
"""Aggregators that weigh slices by what they show."""


def block_attention(block: Any, tokens: Float[Tensor, "images tokens width"]) -> Float[Tensor, "images tokens tokens"]:
    """The attention of a backbone's block to the tokens that enter it, as a mean over heads."""
    attention = block.attention
    normed = block.norm1(tokens)
    query, key = attention.q_proj(normed), attention.k_proj(normed)
    return _mean_over_heads(query, key, attention.num_attention_heads, attention.scaling)


def _mean_over_heads(query: Tensor, key: Tensor, num_heads: int, scaling: float) -> Tensor:
    query, key = (part.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key))
    total = query.new_zeros(len(query), query.shape[2], key.shape[2])
    # Head by head: those of a giant ViT would together take a gigabyte.
    for head in range(num_heads):
        total += (query[:, head] @ key[:, head].transpose(-1, -2) * scaling).softmax(dim=-1)
    return total / num_heads


class AttentionRollout:
    """Watches the blocks of a transformer while it runs; a context manager.

    Args:
        blocks: those that may run, in the order in which they do; those that do not run do not count.
        attention: a block and the tokens that enter it → its attention (M, T, T).
    """

    def __init__(self, blocks: Iterable[nn.Module], attention: Callable[[Any, Tensor], Tensor]) -> None:
        self._blocks, self._attention = list(blocks), attention
        self._handles: list[Any] = []
        self._product: Tensor | None = None

    def __enter__(self) -> Self:
        self._handles = [block.register_forward_pre_hook(self._watch) for block in self._blocks]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        attention = self._attention(block, arguments[0])
        step = (attention + torch.eye(attention.shape[-1], device=attention.device)) / 2
        self._product = step if self._product is None else step @ self._product

    def take(self) -> Float[Tensor, "images tokens tokens"]:
        """The rollout of the pass that ended; row: output token, column: input token. The next pass starts anew."""
        assert self._product is not None, "no block has run"
        product, self._product = self._product, None
        return product


@torch.no_grad()
def slice_weights(
    model: nn.Module, embeddings: Float[Tensor, "slices width"], positions_mm: Float[Tensor, "1 slices"]
) -> Float[Tensor, "slices"] | None:
    """What each slice weighs in the volume, with sum 1; None where the aggregator does not choose."""
    if inner_model(model).config.aggregator not in WEIGHING_AGGREGATORS:
        return None
    weights = model(slice_embeddings=embeddings[None], positions_mm=positions_mm).slice_weights[0]
    return weights / weights.sum()
