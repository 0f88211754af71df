"""Which slices a step reads: a pure function of (seed, step, world size, rank).

Axis legend: ``n`` slices of one micro-batch on one rank.

The rows of a store are read as an endless sequence of seeded permutations, one per epoch; the
micro-batch of a step is a window of that sequence, and each rank takes its part of the window. All
ranks compute the same permutations, so nothing is communicated, no slice is repeated within an
epoch, and a resumed run continues at its window without reading what came before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from brainfound.errors import RecipeError
from brainfound.training.randomness import ORDER, numpy_generator


class EpochOrder:
    """The endless sequence of indices 0 … `num_items` − 1, shuffled anew in each epoch."""

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items = num_items
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def window(self, start: int, count: int) -> np.ndarray:
        """The indices at positions `start` … `start + count − 1` of the sequence."""
        positions = np.arange(start, start + count)
        epochs, offsets = positions // self.num_items, positions % self.num_items
        return np.concatenate([self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # A window may straddle two epochs; older ones are not needed again.
            self._epochs = {known: order for known, order in self._epochs.items() if known == epoch - 1}
            self._epochs[epoch] = numpy_generator(ORDER, self.seed, epoch).permutation(self.num_items)
        return self._epochs[epoch]


class RankBatchSampler:
    """The micro-batches of one rank, from a step on.

    Args:
        order: the sequence that all ranks share.
        batch_size: slices of one optimiser step, over all ranks and micro-batches.
        accumulation: micro-batches of a step.
        first_step, num_steps: the steps to yield.

    Raises:
        RecipeError: if the batch cannot be divided equally.
    """

    def __init__(
        self,
        order: EpochOrder,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        first_step: int,
        num_steps: int,
    ) -> None:
        parts = world_size * accumulation
        if batch_size % parts:
            raise RecipeError(
                "the batch is shared equally by all ranks and micro-batches",
                where="engine.batch_size",
                got=batch_size,
                expected=f"a multiple of {world_size} ranks × {accumulation} micro-batches",
                remedy=f"Set engine.batch_size={max(1, batch_size // parts) * parts}",
            )
        self.order, self.rank, self.accumulation = order, rank, accumulation
        self.batch_size, self.per_rank = batch_size, batch_size // parts
        self.per_micro_batch = self.per_rank * world_size
        self.first_step, self.num_steps = first_step, num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.window_starts():
            yield self.order.window(start, self.per_rank).tolist()

    def window_starts(self) -> Iterator[int]:
        """Where in the sequence each micro-batch starts; it takes `per_rank` places from there on."""
        for step in range(self.first_step, self.num_steps):
            for micro_batch in range(self.accumulation):
                yield step * self.batch_size + micro_batch * self.per_micro_batch + self.rank * self.per_rank

    def __len__(self) -> int:
        return max(0, self.num_steps - self.first_step) * self.accumulation
