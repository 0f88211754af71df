"""The order in which slices are read, and the transfer of batches to the device.

The order is a pure function of (seed, step, world size, rank): the rows of a store are an endless sequence of seeded
permutations, one per epoch; a micro-batch is a window of it, and each rank takes its part of the window. Ranks need not
communicate, and a resumed run does not re-read earlier batches.

On CUDA a thread copies each batch through pinned memory to the device while the previous step is computed.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from brainfound.errors import RecipeError
from brainfound.training.randomness import ORDER, numpy_generator

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class EpochOrder:
    """The endless sequence of indices 0 … `num_items` − 1, reshuffled every epoch."""

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items, self.seed = num_items, seed
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
    """The micro-batches of one rank in steps `first_step` … `num_steps` − 1; all ranks share `order`.

    A step has `accumulation` micro-batches; together, over all ranks, they read `batch_size` slices.

    Raises:
        RecipeError: ranks and micro-batches do not divide the batch equally.
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
            what, where = "ranks and micro-batches must divide the batch equally", "engine.batch_size"
            expected = f"a multiple of {world_size} ranks × {accumulation} micro-batches"
            remedy = f"Set engine.batch_size={max(1, batch_size // parts) * parts}"
            raise RecipeError(what, where=where, got=batch_size, expected=expected, remedy=remedy)
        self.order, self.rank, self.accumulation = order, rank, accumulation
        self.batch_size, self.per_rank = batch_size, batch_size // parts
        self.per_micro_batch = self.per_rank * world_size
        self.first_step, self.num_steps = first_step, num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.window_starts():
            yield self.order.window(start, self.per_rank).tolist()

    def window_starts(self) -> Iterator[int]:
        """The position in the sequence at which each micro-batch's `per_rank` items begin."""
        for step in range(self.first_step, self.num_steps):
            for micro_batch in range(self.accumulation):
                yield step * self.batch_size + micro_batch * self.per_micro_batch + self.rank * self.per_rank

    def __len__(self) -> int:
        return max(0, self.num_steps - self.first_step) * self.accumulation


def prefetch_to_device(batches: Iterable[Batch], device: torch.device, ahead: int = 2) -> Generator[Batch, None, None]:
    """Yield batches (dataclasses of tensors) in order, on the device; up to `ahead` are copied in advance."""
    if device.type != "cuda":
        for batch in batches:
            yield map_tensors(batch, lambda tensor: tensor.to(device))
        return
    copy_stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(copy_stream):
            moved = map_tensors(batch, lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            return moved, copy_stream.record_event()

    for batch, copy_done in map_in_background(batches, copy, ahead):
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copy_done)
        # The allocator must not give this memory to the next copy while the step still reads it.
        for tensor in tensor_fields(batch).values():
            tensor.record_stream(stream)
        yield batch


def map_in_background(
    items: Iterable[Batch], make: Callable[[Batch], Result], ahead: int
) -> Generator[Result, None, None]:
    """Apply `make` to each item, in order, in a thread that runs at most `ahead` items ahead.

    An error in the thread is raised in place of its item. Closing the generator ends the thread.
    """
    iterator, end = iter(items), object()

    def step() -> Any:
        item: Any = next(iterator, end)
        return end if item is end else make(item)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        pending: deque[Future[Any]] = deque(pool.submit(step) for _ in range(ahead))
        try:
            while (result := pending.popleft().result()) is not end:
                pending.append(pool.submit(step))
                yield result
        finally:
            for future in pending:
                future.cancel()


def tensor_fields(batch: Any) -> dict[str, Tensor]:
    """The tensor fields of a dataclass, by name."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A copy of a dataclass with `change` applied to each of its tensors."""
    changed = {name: change(tensor) for name, tensor in tensor_fields(batch).items()}
    return dataclasses.replace(batch, **changed)  # type: ignore[type-var]


@contextmanager
def closing_generator(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Close a generator on exit, and with it its threads and processes."""
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()
