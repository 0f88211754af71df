"""Batches made ahead: in order, with their errors, and without leaving a thread behind."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
import torch

from brainfound.training.prefetch import closing_generator, map_in_background, map_tensors, prefetch_to_device


@dataclass(frozen=True)
class Pair:
    number: torch.Tensor
    name: str
    absent: torch.Tensor | None = None


def pairs(count: int):
    return (Pair(torch.tensor(i), f"pair {i}") for i in range(count))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_every_batch_comes_once_and_in_order():
    assert [(p.number.item(), p.name) for p in prefetch_to_device(pairs(5), torch.device("cpu"))] == [
        (i, f"pair {i}") for i in range(5)
    ]
    for ahead in (1, 2, 9):
        assert list(map_in_background(range(5), lambda item: item * 2, ahead)) == [0, 2, 4, 6, 8]
    assert list(map_in_background([], str, 2)) == []


def test_the_next_items_are_made_while_one_is_used():
    made = []
    items = map_in_background(range(10), lambda item: made.append(item) or item, 2)
    assert next(items) == 0
    time.sleep(0.2)
    assert made == [0, 1, 2]  # two in front of the one in use, and no more: memory is not endless
    items.close()


def test_an_error_comes_where_its_item_would_have_come():
    def make(item: int) -> int:
        if item == 2:
            raise OSError("the disk is gone")
        return item

    items = map_in_background(range(5), make, 2)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert threads() == []


def test_closing_ends_the_thread():
    items = map_in_background(range(1000), lambda item: item, 2)
    with closing_generator(items) as used:
        assert next(used) == 0
        assert threads() != []
    assert threads() == []


def test_only_tensors_are_moved():
    moved = map_tensors(Pair(torch.tensor(1), "one"), lambda tensor: tensor + 1)
    assert (moved.number.item(), moved.name, moved.absent) == (2, "one", None)
