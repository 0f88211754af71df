"""Block masks: exact counts, blocks, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfound.pretraining.objectives.masking import num_masked_per_crop, sample_block_mask, sample_block_masks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.integers(0, 1000))
def test_block_mask_has_exactly_the_count(rows, columns, part, seed):
    count = round(part * rows * columns)
    mask = sample_block_mask((rows, columns), count, np.random.default_rng(seed))
    assert mask.shape == (rows, columns)
    assert mask.sum() == count


def test_masks_are_blocks_not_salt():
    """Of the neighbours of a masked patch most are masked: a random mask of 40% would have 40%."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(30):
        mask = sample_block_mask((16, 16), 100, rng)
        shares.append((mask[:, 1:] & mask[:, :-1]).sum() / mask[:, 1:].sum())
    assert np.mean(shares) > 0.7


def test_counts_are_spread_over_the_ratios_and_the_same_in_every_step():
    counts = num_masked_per_crop(8, 256, 0.5, (0.1, 0.5))
    assert counts == [round(256 * r) for r in (0.15, 0.25, 0.35, 0.45)] + [0] * 4
    first, second = (sample_block_masks(8, (16, 16), np.random.default_rng(seed)) for seed in (0, 1))
    assert len(first.indices) == len(second.indices) == sum(counts)
    assert not torch.equal(first.mask, second.mask)


def test_some_patch_is_always_masked():
    assert sum(num_masked_per_crop(2, 4, 0.0, (0.0, 0.0))) == 1


def test_indices_weights_and_visible_crops_describe_the_mask():
    masks = sample_block_masks(6, (4, 5), np.random.default_rng(3))
    assert torch.equal(masks.mask.flatten().nonzero().flatten(), masks.indices)
    per_crop = torch.zeros(6).index_add(0, masks.indices // 20, masks.weights)
    torch.testing.assert_close(per_crop, masks.mask.any(dim=1).float())
    assert masks.unmasked_crops.tolist() == [n for n in range(6) if not masks.mask[n].any()]


def test_masks_of_a_seed_are_the_same():
    masks = [sample_block_masks(4, (6, 6), np.random.default_rng(5)).mask for _ in range(2)]
    assert torch.equal(*masks)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_masks_of_some_crops_are_those_of_all(probability):
    masks = sample_block_masks(6, (4, 4), np.random.default_rng(3), probability, (0.1, 0.6))
    parts = [masks.select_crops(slice(first, first + 3)) for first in (0, 3)]
    assert [where.start for _, where in parts] == [0, parts[0][1].stop]
    assert parts[1][1].stop == len(masks.indices)
    assert torch.equal(torch.cat([part.mask for part, _ in parts]), masks.mask)
    assert torch.equal(torch.cat([part.weights for part, _ in parts]), masks.weights)
    for part, _ in parts:
        assert torch.equal(part.mask.flatten().nonzero().flatten(), part.indices)
        assert torch.equal((~part.mask.any(dim=1)).nonzero().flatten(), part.unmasked_crops)
