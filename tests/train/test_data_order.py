"""Which slices a step reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfound.errors import RecipeError
from brainfound.train.data_order import EpochOrder, RankBatches, SliceRows, slice_loader, usable_rows


def batches(rank: int = 0, world_size: int = 1, first_step: int = 0, accumulation: int = 1, num_items: int = 10):
    order = EpochOrder(num_items, seed=3)
    return list(RankBatches(order, 4, accumulation, rank, world_size, first_step, 6))


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
    loader = slice_loader(SliceRows(store, rows), RankBatches(order, 5, 1, 0, 1, 0, 2), num_workers)
    first, second = list(loader)
    expected = rows[order.window(5, 5)]
    assert torch.equal(second.pixels, torch.from_numpy(store.read_slices(expected)))
    assert second.sessions.tolist() == store.slice_sessions[expected].tolist()
    assert torch.equal(second.present, torch.from_numpy(store.present[store.slice_sessions[expected]]))
    assert first.pixels.dtype == torch.uint8
