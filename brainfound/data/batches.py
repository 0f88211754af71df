"""From stacks to the tensors that a model takes.

Axis legend: B volumes, S slices, C contrasts, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num, UInt8
from torch import Tensor

from brainfound.data.preprocessing.stack import Stack


@dataclass(frozen=True)
class VolumeBatch:
    """A batch of volumes, padded to the longest; all fields but ``masks`` are arguments of the models."""

    pixel_values: UInt8[Tensor, "B S C H W"] | Float[Tensor, "B S C H W"]
    contrast_mask: Bool[Tensor, "B C"]
    slice_mask: Bool[Tensor, "B S"]
    positions_mm: Float[Tensor, "B S"]
    masks: Int[Tensor, "B S H W"] | None = None

    def to(self, device: torch.device | str) -> VolumeBatch:
        """The same batch on a device."""
        tensors = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a model's forward pass."""
        return {name: value for name, value in vars(self).items() if name != "masks"}


def as_tensor(pixels: Num[np.ndarray, "..."]) -> Tensor:
    """Pixels of a stack or store as model input: uint8 unchanged, uint16 as float32 in 0–1."""
    if pixels.dtype == np.uint16:
        return torch.from_numpy(pixels.astype(np.float32) / np.float32(65535))
    return torch.from_numpy(pixels)


def to_unit_range(pixels: Tensor) -> Float[Tensor, "..."]:
    """Model input, uint8 or float in 0–1, as floats in 0–1."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def evenly_spaced_slices(num_slices: int, wanted: int | None) -> Int[np.ndarray, "S"]:
    """Indices of at most ``wanted`` slices (None: all), each in the middle of its share of the stack."""
    if wanted is None or wanted >= num_slices:
        return np.arange(num_slices)
    return np.floor((np.arange(wanted) + 0.5) * num_slices / wanted).astype(int)


def collate(stacks: Sequence[Stack], slices: Sequence[np.ndarray] | None = None) -> VolumeBatch:
    """Stacks with equal contrasts and slice size as one batch; shorter ones are padded with zeros.

    ``slices``: indices of the chosen slices of each stack; all if None.
    """
    chosen = [np.arange(len(stack.pixels)) for stack in stacks] if slices is None else list(slices)
    length = max(len(index) for index in chosen)
    batch, (_, num_contrasts, height, width) = len(stacks), stacks[0].pixels.shape
    pixels = np.zeros((batch, length, num_contrasts, height, width), dtype=stacks[0].pixels.dtype)
    slice_mask = np.zeros((batch, length), dtype=bool)
    positions = np.zeros((batch, length), dtype=np.float32)
    all_have_masks = all(stack.mask is not None for stack in stacks)
    masks = np.zeros((batch, length, height, width), dtype=np.int64) if all_have_masks else None
    for row, (stack, index) in enumerate(zip(stacks, chosen, strict=True)):
        pixels[row, : len(index)] = stack.pixels[index]
        slice_mask[row, : len(index)] = True
        positions[row, : len(index)] = stack.positions_mm[index]
        if masks is not None and stack.mask is not None:
            masks[row, : len(index)] = stack.mask[index]
    return VolumeBatch(
        pixel_values=as_tensor(pixels),
        contrast_mask=torch.from_numpy(np.stack([stack.present for stack in stacks])),
        slice_mask=torch.from_numpy(slice_mask),
        positions_mm=torch.from_numpy(positions),
        masks=None if masks is None else torch.from_numpy(masks),
    )


def remove_contrasts(stack: Stack, absent: Sequence[str]) -> Stack:
    """The stack as if some contrasts had not been scanned; ValueError if no contrast is left."""
    keep = stack.present & np.array([contrast not in absent for contrast in stack.contrasts])
    if not keep.any():
        raise ValueError(f"no contrast is left of {stack.contrasts} without {tuple(absent)}")
    pixels = np.where(keep[None, :, None, None], stack.pixels, stack.pixels.dtype.type(0))
    return replace(stack, pixels=pixels, present=keep)
