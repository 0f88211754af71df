"""Block masks: exact counts, determinism, parts; `test_exactness_masking.py` compares them with the published ones."""

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


def test_some_patch_is_always_masked():
    assert sum(num_masked_per_crop(2, 4, 0.0, (0.0, 0.0))) == 1


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
