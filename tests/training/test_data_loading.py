"""The slices of a step, and batches prepared in advance: in order, with their errors, without a leftover thread."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from brainfound.errors import RecipeError
from brainfound.pretraining.slices import (
    PairedBatchSampler,
    SliceDataset,
    SliceNeighbours,
    make_slice_loader,
    usable_rows,
)
from brainfound.training.data_loading import (
    EpochOrder,
    RankBatchSampler,
    closing_generator,
    map_in_background,
    map_tensors,
    prefetch_to_device,
)
from brainfound.training.randomness import NEIGHBOURS, uniform_at_positions
from tests.tiny_runs import prefetch_threads


def batches(rank: int = 0, world_size: int = 1, first_step: int = 0, accumulation: int = 1, num_items: int = 10):
    order = EpochOrder(num_items, seed=3)
    return list(RankBatchSampler(order, 4, accumulation, rank, world_size, first_step, 6))


def test_an_epoch_reads_every_slice_once_and_the_next_in_another_order():
    order = EpochOrder(10, seed=0)
    first, second = order.window(0, 10), order.window(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert not np.array_equal(first, second)
    assert np.array_equal(EpochOrder(10, seed=0).window(7, 6), np.concatenate([first[7:], second[:3]]))


def test_ranks_and_micro_batches_divide_the_same_global_batch():
    whole = batches()
    for accumulation in (1, 2):
        parts = [batches(rank, 2, accumulation=accumulation) for rank in (0, 1)]
        for step in range(6):
            micro = [parts[r][step * accumulation + a] for a in range(accumulation) for r in (0, 1)]
            assert sorted(row for part in micro for row in part) == sorted(whole[step])


def test_a_later_start_reads_what_an_earlier_one_would_have():
    assert batches(first_step=4) == batches()[4:]


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(RecipeError, match=r"engine\.batch_size"):
        batches(world_size=3)


def test_margin_cuts_both_ends_of_each_session(store):
    rows = usable_rows(store, 0.25)
    for session in range(len(store)):
        own = store.session_rows(session)
        kept = rows[store.slice_sessions[rows] == session]
        cut = int(len(own) * 0.25)
        assert kept.tolist() == own[cut : len(own) - cut].tolist()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_gives_the_pixels_of_the_rows(store, num_workers):
    rows = usable_rows(store, 0.0)
    order = EpochOrder(len(rows), 0)
    loader = make_slice_loader(SliceDataset(store, rows), RankBatchSampler(order, 5, 1, 0, 1, 0, 2), num_workers)
    first, second = list(loader)
    expected = rows[order.window(5, 5)]
    assert torch.equal(second.pixels, torch.from_numpy(store.read_slices(expected)))
    assert second.sessions.tolist() == store.slice_sessions[expected].tolist()
    assert torch.equal(second.present, torch.from_numpy(store.present[store.slice_sessions[expected]]))
    assert first.pixels.dtype == torch.uint8


def test_numbers_belong_to_positions():
    numbers = uniform_at_positions(0, 4000, NEIGHBOURS, 7)
    assert np.array_equal(numbers[1500:1600], uniform_at_positions(1500, 100, NEIGHBOURS, 7))
    assert not np.array_equal(numbers[:100], uniform_at_positions(0, 100, NEIGHBOURS, 8))
    assert len(set(numbers)) == 4000
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert counts.min() > 330
    assert counts.max() < 470


# The store's slices are 6 mm apart.
@pytest.mark.parametrize("distance_mm", [3.0, 6.0, 13.0, 1000.0])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_neighbours_are_all_others_of_the_session_within_the_distance(store, distance_mm, margin):
    rows = usable_rows(store, margin)
    neighbours = SliceNeighbours(store, rows, distance_mm)
    sessions, positions = store.slice_sessions[rows], store.slice_positions_mm[rows]
    everyone = np.arange(len(rows))
    drawn = np.stack([neighbours.draw(everyone, np.full(len(rows), n)) for n in np.linspace(0, 1 - 1e-9, 60)])
    for index in everyone:
        near = (sessions == sessions[index]) & (np.abs(positions - positions[index]) <= distance_mm + 1e-3)
        near[index] = False
        # A slice without another one near is its own neighbour.
        assert set(drawn[:, index]) == (set(np.flatnonzero(near)) or {index})


def paired(store, rank=0, world_size=1, first_step=0, seed=3, distance_mm=13.0):
    rows = usable_rows(store, 0.0)
    batches = RankBatchSampler(EpochOrder(len(rows), seed), 4, 1, rank, world_size, first_step, 60)
    return list(PairedBatchSampler(batches, SliceNeighbours(store, rows, distance_mm)))


def test_neighbours_hang_on_seed_and_position_alone(store):
    whole = paired(store)
    assert paired(store, first_step=40) == whole[40:]
    for step, (first, second) in enumerate(zip(paired(store, 0, 2), paired(store, 1, 2), strict=True)):
        assert first + second == whole[step]
    assert paired(store, seed=4) != whole
    # The same slice meets several neighbours: another one in each epoch.
    met: dict[int, set[int]] = {}
    for index, neighbour in (pair for batch in whole for pair in batch):
        met.setdefault(index, set()).add(neighbour)
    assert max(map(len, met.values())) > 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_pixels_of_the_neighbours(store, num_workers):
    rows = usable_rows(store, 0.0)
    dataset = SliceDataset(store, rows, neighbour_mm=13.0)
    batches = RankBatchSampler(EpochOrder(len(rows), 3), 4, 1, 0, 1, 0, 4)
    loaded = list(make_slice_loader(dataset, batches, num_workers))
    for batch, pairs in zip(loaded, paired(store)[:4], strict=True):
        slices, neighbours = rows[np.array(pairs).T]
        assert torch.equal(batch.pixels, torch.from_numpy(store.read_slices(slices)))
        assert torch.equal(batch.neighbours, torch.from_numpy(store.read_slices(neighbours)))
        assert batch.sessions.tolist() == store.slice_sessions[neighbours].tolist()
        assert (slices != neighbours).all()
        assert torch.equal(batch.present, batch.present_on_cpu)
    assert make_slice_loader(SliceDataset(store, rows), batches, 0).dataset[0].neighbours is None


def test_what_is_present_is_known_without_asking_the_device(store):
    pair = SliceDataset(store, usable_rows(store, 0.0), neighbour_mm=13.0)[(0, 1)]
    batch = map_tensors(pair, lambda tensor: tensor.to("meta"))
    assert batch.present.device.type == batch.neighbours.device.type == "meta"
    assert batch.present_on_cpu.tolist() == [store.present[0].tolist()]


@dataclass(frozen=True)
class Pair:
    number: torch.Tensor
    name: str
    absent: torch.Tensor | None = None


def pairs(count: int):
    return (Pair(torch.tensor(i), f"pair {i}") for i in range(count))


def test_every_batch_comes_once_and_in_order():
    assert [(p.number.item(), p.name) for p in prefetch_to_device(pairs(5), torch.device("cpu"))] == [
        (i, f"pair {i}") for i in range(5)
    ]
    for ahead in (1, 2, 9):
        assert list(map_in_background(range(5), lambda item: item * 2, ahead)) == [0, 2, 4, 6, 8]
    assert list(map_in_background([], str, 2)) == []


def test_the_next_items_are_made_while_one_is_used():
    """Two in front of the one in use, and no more: memory is not endless."""
    used, ahead, two_ahead = 1, [], threading.Event()

    def make(item: int) -> int:
        ahead.append(item - used)
        if item == 2:
            two_ahead.set()
        return item

    items = map_in_background(range(200), make, 2)
    assert next(items) == 0
    assert two_ahead.wait(60)
    for used in range(2, 201):
        assert next(items) == used - 1
    assert list(items) == []
    assert max(ahead) == 1


def test_an_error_comes_where_its_item_would_have_come():
    def make(item: int) -> int:
        if item == 2:
            raise OSError("the disk is gone")
        return item

    items = map_in_background(range(5), make, 2)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert prefetch_threads() == []


def test_closing_ends_the_thread():
    items = map_in_background(range(1000), lambda item: item, 2)
    with closing_generator(items) as used:
        assert next(used) == 0
        assert prefetch_threads() != []
    assert prefetch_threads() == []


def test_only_tensors_are_moved():
    moved = map_tensors(Pair(torch.tensor(1), "one"), lambda tensor: tensor + 1)
    assert (moved.number.item(), moved.name, moved.absent) == (2, "one", None)
