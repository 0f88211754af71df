"""Batches that are on the device before the step that needs them.

A copy from ordinary memory makes the GPU's queue wait. On CUDA a thread therefore takes batches from the
loader, copies them to pinned memory and from there to the device on a stream of its own, while the step
before is computed. On a CPU there is nothing to copy, and the loader's processes read ahead by
themselves: a further thread would only take a core from the computation.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def prefetch_to_device(batches: Iterable[Batch], device: torch.device, ahead: int = 2) -> Generator[Batch, None, None]:
    """Batches (dataclasses of tensors) in order, on the device.

    Args:
        ahead: how many batches are made before they are asked for; each takes memory on the device.
    """
    if device.type != "cuda":
        for batch in batches:
            yield map_tensors(batch, lambda tensor: tensor.to(device))
        return
    side = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(side):
            moved = map_tensors(batch, lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
            return moved, side.record_event()

    for batch, copied in map_in_background(batches, copy, ahead):
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        # The allocator must not give this memory to the next copy while the step still reads it.
        for tensor in tensor_fields(batch).values():
            tensor.record_stream(stream)
        yield batch


def map_in_background(
    items: Iterable[Batch], make: Callable[[Batch], Result], ahead: int
) -> Generator[Result, None, None]:
    """`make` of each item, in order, in a thread that is at most `ahead` items in front.

    An error of the thread is raised where its item would have come. Closing the generator ends the thread.
    """
    iterator = iter(items)
    end = object()

    def step() -> Any:
        item: Any = next(iterator, end)
        return end if item is end else make(item)

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting: deque[Future[Any]] = deque(pool.submit(step) for _ in range(ahead))
        try:
            while (made := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(step))
                yield made
        finally:
            for future in waiting:
                future.cancel()


def tensor_fields(batch: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass by name."""
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A copy of a dataclass with each of its tensors changed."""
    changed = {name: change(tensor) for name, tensor in tensor_fields(batch).items()}
    return dataclasses.replace(batch, **changed)  # type: ignore[type-var]


@contextmanager
def closing_generator(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """End a generator when it is no longer needed, and with it its threads and processes."""
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()
