"""Masks: blocks of patches for the masked-patch loss, and single patches for masked autoencoding.

Axis legend: ``N`` crops, ``P`` patch tokens (rows · columns of the grid), ``V`` visible and ``M`` masked tokens.

Sources: BEiT (arXiv 2106.08254, algorithm 1) for blocks; iBOT and DINOv2 for masking a part of the crops at ratios
spread over a range, here the mid-points of strata, so that tensors keep their shapes; MAE (2111.06377) for patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from brainfound.data.augmentation.transforms import to_device

MIN_BLOCK_PATCHES = 4  # patches; BEiT uses 16 on a grid of 14 × 14, DINOv2 uses 4
MIN_ASPECT = 0.3
ATTEMPTS_PER_BLOCK = 10


@dataclass(frozen=True)
class BlockMasks:
    """The patch tokens that are hidden from the student."""

    mask: Bool[Tensor, "N P"]
    indices: Int[Tensor, "M"]
    """Positions of the masked tokens in the flattened (N · P) tokens, in increasing order."""
    weights: Float[Tensor, "M"]
    """1 / (number of masked tokens of the crop), per masked token."""
    unmasked_crops: Int[Tensor, "V"]

    def to(self, device: torch.device) -> BlockMasks:
        return BlockMasks(*(to_device(part, device) for part in vars(self).values()))

    def select_crops(self, crops: slice) -> tuple[BlockMasks, slice]:
        """The masks of some consecutive crops, and the range of their masked tokens among those of all crops."""
        first, last = crops.start, crops.stop
        before, inside = int(self.mask[:first].sum()), int(self.mask[crops].sum())
        masked = slice(before, before + inside)
        unmasked_crops = self.unmasked_crops[(self.unmasked_crops >= first) & (self.unmasked_crops < last)] - first
        indices = self.indices[masked] - first * self.mask.shape[1]
        return BlockMasks(self.mask[crops], indices, self.weights[masked], unmasked_crops), masked


def num_masked_per_crop(num_crops: int, num_patches: int, probability: float, ratios: tuple[float, float]) -> list[int]:
    """The numbers of masked patches of crops, in no particular order; at least one is above 0."""
    num_masked = min(num_crops, max(1, round(num_crops * probability)))
    low, high = ratios
    middles = [low + (high - low) * (index + 0.5) / num_masked for index in range(num_masked)]
    counts = [min(num_patches, max(1, round(num_patches * middle))) for middle in middles]
    return counts + [0] * (num_crops - num_masked)


def sample_block_mask(grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """A mask (rows, columns) with exactly `count` patches, in rectangular blocks as far as they fit."""
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    missing = count
    while missing:
        for _ in range(ATTEMPTS_PER_BLOCK):
            area = rng.uniform(min(MIN_BLOCK_PATCHES, missing), missing)
            ratio = math.exp(rng.uniform(math.log(MIN_ASPECT), math.log(1 / MIN_ASPECT)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (0 < height <= rows and 0 < width <= columns):
                continue
            top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            block = mask[top : top + height, left : left + width]
            placed = block.size - int(block.sum())
            if 0 < placed <= missing:
                block[:] = True
                missing -= placed
                break
        else:
            # No block fits the rest exactly: single patches make the count exact.
            free = np.flatnonzero(~mask)
            mask.ravel()[rng.choice(free, missing, replace=False)] = True
            missing = 0
    return mask


def sample_block_masks(
    num_crops: int,
    grid: tuple[int, int],
    rng: np.random.Generator,
    probability: float = 0.5,
    ratios: tuple[float, float] = (0.1, 0.5),
) -> BlockMasks:
    """Block masks for a batch of crops, with the counts of `num_masked_per_crop` in random order."""
    counts = rng.permutation(np.array(num_masked_per_crop(num_crops, grid[0] * grid[1], probability, ratios)))
    mask = torch.from_numpy(np.stack([sample_block_mask(grid, int(count), rng).ravel() for count in counts]))
    per_crop = torch.from_numpy(counts)
    weights = (1.0 / per_crop.clamp(min=1).float())[:, None].expand_as(mask)[mask]
    return BlockMasks(mask, mask.flatten().nonzero().flatten(), weights, (per_crop == 0).nonzero().flatten())


class PatchSplit(NamedTuple):
    """The patches of each crop that the encoder sees, and the others; both in increasing order."""

    kept: Int[Tensor, "N V"]
    hidden: Int[Tensor, "N M"]


def num_hidden_patches(num_patches: int, ratio: float) -> int:
    """The number of hidden patches of a crop: at least one, and not all."""
    return min(max(round(num_patches * ratio), 1), num_patches - 1)


def sample_hidden_patches(num_crops: int, num_patches: int, num_hidden: int, rng: np.random.Generator) -> PatchSplit:
    """Hide the same number of patches, at random places, in each crop."""
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(num_patches), (num_crops, 1)), axis=1))
    hidden, kept = order[:, :num_hidden], order[:, num_hidden:]
    return PatchSplit(kept.sort(dim=1).values, hidden.sort(dim=1).values)
