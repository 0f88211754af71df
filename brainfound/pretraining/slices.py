"""Slices of a store as micro-batches of pretraining.

Axis legend: ``n`` slices of one micro-batch on one rank, ``C`` contrasts, ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from brainfound.data.batches import as_tensor
from brainfound.data.store import Store
from brainfound.data.worker_processes import loader_context
from brainfound.errors import StoreError
from brainfound.training.data_loading import RankBatchSampler
from brainfound.training.randomness import NEIGHBOURS, uniform_at_positions


@dataclass(frozen=True)
class PretrainBatch:
    """Slices from the store, without any augmentation."""

    pixels: UInt8[Tensor, "n C H W"]
    present: Bool[Tensor, "n C"]
    sessions: Int[Tensor, "n"]
    neighbours: UInt8[Tensor, "n C H W"] | None = None
    """Another slice of the same session for each slice, if views need one."""
    present_numpy: Bool[np.ndarray, "n C"] | None = None
    """`present` as an array, which stays on the CPU when the tensors move."""

    @property
    def present_on_cpu(self) -> Bool[Tensor, "n C"]:
        """`present`, if possible without waiting for a GPU."""
        return self.present.cpu() if self.present_numpy is None else torch.from_numpy(self.present_numpy)


def usable_rows(store: Store, margin: float) -> np.ndarray:
    """The slice rows of a store without the first and last `margin` of each session; StoreError if none is left."""
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
    """The neighbours of each slice among `rows`: other slices of its session within `distance_mm`."""

    ROUNDING_MM = 1e-3  # positions are float32; two slices at exactly the distance are neighbours

    def __init__(self, store: Store, rows: np.ndarray, distance_mm: float) -> None:
        sessions = store.slice_sessions[rows].astype(np.float64)
        positions = store.slice_positions_mm[rows].astype(np.float64)
        reach = distance_mm + self.ROUNDING_MM
        # All sessions on one increasing axis, further apart from each other than any two neighbours.
        line = positions - positions.min() + sessions * (np.ptp(positions) + 2 * reach)
        assert (np.diff(line) >= 0).all()
        self.first = np.searchsorted(line, line - reach, side="left")
        self.num_others = np.searchsorted(line, line + reach, side="right") - self.first - 1

    def draw(self, indices: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """One neighbour of each slice, chosen by a number in [0, 1); a slice without neighbours gets itself."""
        others = self.num_others[indices]
        drawn = self.first[indices] + np.floor(numbers * others).astype(np.int64)
        return np.where(others == 0, indices, drawn + (drawn >= indices))


class PairedBatchSampler:
    """The micro-batches of `batches` as pairs (slice, neighbour), drawn by seed and position alone."""

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
    """Slices of a store by position in `rows`, each with a neighbour within `neighbour_mm` unless that is 0.

    A worker only reads bytes; views are made on the device.
    """

    def __init__(self, store: Store, rows: np.ndarray, neighbour_mm: float = 0.0) -> None:
        self.store, self.rows = store, rows
        self.neighbours = SliceNeighbours(store, rows, neighbour_mm) if neighbour_mm > 0 else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> PretrainBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> PretrainBatch:
        """One micro-batch in one read: slices, or pairs of a slice and its neighbour."""
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
    sampler = batches if dataset.neighbours is None else PairedBatchSampler(batches, dataset.neighbours)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_identity_collate,
        multiprocessing_context=loader_context(num_workers),
    )
