"""Which slices a step reads: a pure function of (seed, step, world size, rank).

Axis legend: ``n`` slices of one micro-batch on one rank.

The rows of a store are read as an endless sequence of seeded permutations, one per epoch; the
micro-batch of a step is a window of that sequence, and each rank takes its part of the window. All
ranks compute the same permutations, so nothing is communicated, no slice is repeated within an
epoch, and a resumed run continues at its window without reading what came before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from brainfound.data.batches import as_tensor
from brainfound.data.store import Store
from brainfound.errors import RecipeError, StoreError
from brainfound.pretraining.objectives.base import PretrainBatch
from brainfound.training.randomness import NEIGHBOURS, ORDER, numpy_generator, uniform_at_positions


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


def usable_rows(store: Store, margin: float) -> np.ndarray:
    """The slice rows of a store without the first and last `margin` of each session's slices.

    Raises:
        StoreError: if nothing is left.
    """
    sessions = store.slice_sessions
    first = np.searchsorted(sessions, sessions, side="left")
    counts = np.bincount(sessions, minlength=len(store))[sessions]
    index = np.arange(len(sessions)) - first
    cut = np.floor(counts * margin)
    rows = np.flatnonzero((index >= cut) & (index < counts - cut))
    if not len(rows):
        raise StoreError("the store has no slices to train on", where=store.path)
    return rows


class SliceNeighbours:
    """Which slices lie near which: those of the same session within a distance, the slice itself left out.

    Args:
        store: where the slices come from.
        rows: slice rows that may be neighbours, session by session, from inferior to superior.
        distance_mm: between the middles of two slices.
    """

    ROUNDING_MM = 1e-3  # positions are float32; two slices at exactly the distance are neighbours

    def __init__(self, store: Store, rows: np.ndarray, distance_mm: float) -> None:
        sessions = store.slice_sessions[rows].astype(np.float64)
        positions = store.slice_positions_mm[rows].astype(np.float64)
        reach = distance_mm + self.ROUNDING_MM
        # One rising line of all sessions, further apart from each other than any two neighbours.
        line = positions - positions.min() + sessions * (np.ptp(positions) + 2 * reach)
        assert (np.diff(line) >= 0).all()
        self.first = np.searchsorted(line, line - reach, side="left")
        self.num_others = np.searchsorted(line, line + reach, side="right") - self.first - 1

    def draw(self, indices: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """One neighbour of each slice, by a number in 0–1; a slice without any is its own."""
        others = self.num_others[indices]
        drawn = self.first[indices] + np.floor(numbers * others).astype(np.int64)
        return np.where(others == 0, indices, drawn + (drawn >= indices))


class PairedBatchSampler:
    """The micro-batches of `batches` as pairs (slice, neighbour), drawn by seed and position in the sequence alone."""

    def __init__(self, batches: RankBatchSampler, neighbours: SliceNeighbours) -> None:
        self.batches, self.neighbours = batches, neighbours

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, count = self.batches.order, self.batches.per_rank
        for start in self.batches.window_starts():
            indices = order.window(start, count)
            drawn = self.neighbours.draw(indices, uniform_at_positions(start, count, NEIGHBOURS, order.seed))
            yield list(zip(indices.tolist(), drawn.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.batches)


class SliceDataset(Dataset):
    """Slices of a store by position in `rows`; a worker only reads bytes, views are made on the device.

    Args:
        neighbour_mm: how far away the other slice may be that comes with each slice; 0 for none.
    """

    def __init__(self, store: Store, rows: np.ndarray, neighbour_mm: float = 0.0) -> None:
        self.store, self.rows = store, rows
        self.neighbours = SliceNeighbours(store, rows, neighbour_mm) if neighbour_mm > 0 else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> PretrainBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> PretrainBatch:
        """One micro-batch, read at once: slices, or pairs of a slice and its neighbour."""
        chosen = self.rows[np.asarray(indices)]
        rows = chosen if chosen.ndim == 1 else chosen[:, 0]
        pixels = as_tensor(self.store.read_slices(chosen.T.reshape(-1)))
        sessions = self.store.slice_sessions[rows]
        present = self.store.present[sessions]
        return PretrainBatch(
            pixels[: len(rows)],
            torch.from_numpy(present),
            torch.from_numpy(sessions.astype(np.int64)),
            pixels[len(rows) :] if chosen.ndim == 2 else None,
            present,
        )


def _identity_collate(batch: Any) -> Any:
    return batch  # `__getitems__` has made the whole micro-batch already


def make_slice_loader(dataset: SliceDataset, batches: RankBatchSampler, num_workers: int) -> DataLoader:
    """A loader of micro-batches in order."""
    sampler = batches if dataset.neighbours is None else PairedBatchSampler(batches, dataset.neighbours)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=_identity_collate)
