"""Block masks against the published procedure: how many, how spread over the crops, of what shape, where.

Sources: BEiT (arXiv 2106.08254, algorithm 1) for the blocks; iBOT (2111.07832) and DINOv2 (2304.07193)
for half of the crops and a ratio in each stratum of 0.1 … 0.5. Said differences: our ratios are the
middles of the strata (DINOv2 draws within them), a block may reach from edge to edge (DINOv2: not
quite), and the count is made exact with single patches (DINOv2 leaves a few out; DINOv3 does as we do).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from brainfound.pretraining.objectives.masking import sample_block_mask, sample_block_masks

GRID = (16, 16)
NUM_PATCHES = 256


def counts_of(masks) -> np.ndarray:
    return masks.mask.sum(dim=1).numpy()


@pytest.mark.parametrize("num_crops", [2, 4, 10, 16, 34])
def test_half_of_the_crops_are_masked_and_each_stratum_of_ratios_has_one(num_crops):
    strata = np.linspace(0.1, 0.5, num_crops // 2 + 1)
    for seed in range(10):
        counts = np.sort(counts_of(sample_block_masks(num_crops, GRID, np.random.default_rng(seed))))
        assert (counts[: num_crops // 2] == 0).all()
        for count, low, high in zip(counts[num_crops // 2 :], strata[:-1], strata[1:], strict=True):
            assert low * NUM_PATCHES - 0.5 <= count <= high * NUM_PATCHES + 0.5
            assert count == round(NUM_PATCHES * (low + high) / 2)


def test_the_mean_ratio_is_that_of_the_published_draw():
    """Uniform over 0.1 … 0.5 has the mean 0.3, for masked crops."""
    counts = counts_of(sample_block_masks(64, GRID, np.random.default_rng(0)))
    assert counts[counts > 0].mean() / NUM_PATCHES == pytest.approx(0.3, abs=0.002)


def test_every_crop_has_the_same_chance_of_every_count():
    """Chi-square of (crop, count) over many draws: 16 cells of known expectation, with a fixed seed."""
    rng = np.random.default_rng(1)
    num_crops, draws = 4, 800
    table = np.zeros((num_crops, 3))
    for _ in range(draws):
        counts = counts_of(sample_block_masks(num_crops, (4, 4), rng))
        for crop, count in enumerate(counts):
            table[crop, sorted({0, *counts.tolist()}).index(count)] += 1
    expected = np.tile([draws / 2, draws / 4, draws / 4], (num_crops, 1))
    statistic = ((table - expected) ** 2 / expected).sum()
    assert statistic < 30  # 6 degrees of freedom: above 30 once in 25,000 draws


@pytest.mark.parametrize("grid", [GRID, (2, 2)])  # of four patches one or two are masked
def test_indices_weights_and_unmasked_crops_are_those_of_the_loss(grid):
    masks = sample_block_masks(12, grid, np.random.default_rng(2))
    num_patches = grid[0] * grid[1]
    mask = masks.mask.numpy()
    indices, weights = [], []
    for crop in range(12):
        for patch in range(num_patches):
            if mask[crop, patch]:
                indices.append(crop * num_patches + patch)
                weights.append(1 / mask[crop].sum())
    assert masks.indices.tolist() == indices
    np.testing.assert_allclose(masks.weights.numpy(), weights, rtol=1e-7)
    assert masks.weights.double().sum().item() == pytest.approx((mask.sum(axis=1) > 0).sum())
    assert masks.unmasked_crops.tolist() == np.flatnonzero(~mask.any(axis=1)).tolist() != []


def rectangles(mask: np.ndarray) -> list[tuple[int, int]]:
    """Height and width of the connected parts of more than one patch that are full rectangles."""
    labels, _ = ndimage.label(mask)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        part = labels[rows, columns] == number
        if part.all() and part.size > 1:
            found.append(part.shape)
    return found


def test_blocks_keep_to_the_aspect_limits_and_use_them():
    """On a wide grid blocks lie apart; the sides are rounded, so the limits hold for some size within ±0.5."""
    rng = np.random.default_rng(3)
    shapes = [shape for _ in range(400) for shape in rectangles(sample_block_mask((60, 60), 120, rng))]
    assert len(shapes) > 400
    broken = [s for s in shapes if (s[0] + 0.5) / (s[1] - 0.5) < 0.3 or (s[1] + 0.5) / (s[0] - 0.5) < 0.3]
    assert len(broken) <= len(shapes) / 100  # two blocks that touch may look like one
    ratios = np.array([math.log(h / w) for h, w in shapes if h * w >= 30])
    assert abs(ratios.mean()) < 0.1
    # Log-uniform over ±ln(1 / 0.3): the standard deviation is the limit over the root of 3.
    assert ratios.std() == pytest.approx(math.log(1 / 0.3) / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("count", [38, 90, 128])
def test_no_side_and_no_axis_is_preferred(count):
    """The chance of a patch equals that of its mirror image: mean z² over pairs is 1 where there is no bias.

    Blocks lie inside of the grid, so that the middle is masked more often than the corners; that is
    the published procedure, and so the mirror images are compared and not all patches with each other.
    """
    rng = np.random.default_rng(4)
    masks = np.stack([sample_block_mask(GRID, count, rng) for _ in range(1500)]).astype(float)
    for mirrored in (masks[:, ::-1], masks[:, :, ::-1], masks.transpose(0, 2, 1)):
        difference = masks - mirrored
        spread = difference.std(axis=0)
        moved = spread > 0
        z = difference.mean(axis=0)[moved] / (spread[moved] / math.sqrt(len(masks)))
        assert (z**2).mean() < 2.5
        assert np.abs(z).max() < 5


def published_mask(count: int, rng: np.random.Generator) -> np.ndarray:
    """BEiT's algorithm 1 with DINOv2's smallest block of 4 and 10 attempts: blocks until none fits."""
    mask = np.zeros(GRID, dtype=bool)
    while mask.sum() < count:
        room = count - mask.sum()
        for _ in range(10):
            area = 4 + (room - 4) * rng.random()  # between the two, whichever is larger
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= GRID[0] or width >= GRID[1]:
                continue
            top, left = (
                rng.integers(0, GRID[0] - height, endpoint=True),
                rng.integers(0, GRID[1] - width, endpoint=True),
            )
            tried = mask.copy()
            tried[top : top + height, left : left + width] = True
            if 0 < tried.sum() - mask.sum() <= room:
                mask = tried
                break
        else:
            break
    return mask


def masked_neighbours(masks: np.ndarray) -> float:
    """The chance that the right or lower neighbour of a masked patch is masked."""
    pairs = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    return pairs / (masks[:, :-1].sum() + masks[:, :, :-1].sum())


@pytest.mark.parametrize("count", [38, 90, 128])
def test_masks_look_like_the_published_ones(count):
    """The same coverage of every patch, and as blocky: within the noise of 1,500 masks and a few per cent."""
    ours = np.stack([sample_block_mask(GRID, count, np.random.default_rng([5, i])) for i in range(1500)])
    theirs = np.stack([published_mask(count, np.random.default_rng([6, i])) for i in range(1500)])
    assert theirs.sum(axis=(1, 2)).mean() > 0.97 * count  # a few patches are missing there
    assert (ours.sum(axis=(1, 2)) == count).all()
    noise = math.sqrt(2 * 0.25 / 1500)
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 0.03 + 4 * noise
    assert masked_neighbours(ours) == pytest.approx(masked_neighbours(theirs), abs=0.02)
