"""Random numbers of views: drawn on the CPU, so that every device sees the same and none has to be waited for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def log_uniform(shape: tuple[int, ...], span: tuple[float, float], generator: torch.Generator) -> Tensor:
    return uniform(shape, math.log(span[0]), math.log(span[1]), generator).exp()


def random_selection(count: int, probability: float, generator: torch.Generator) -> Bool[Tensor, "count"]:
    """A random part of `count` things; its size is count · probability, rounded up or down at random.

    A part of the same size in every step costs the same in every step; each thing is chosen with the probability.
    """
    rounding = float(torch.rand((), generator=generator))
    order = torch.randperm(count, generator=generator)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[order[: min(count, math.floor(probability * count + rounding))]] = True
    return chosen


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on another device, without waiting for what that device is doing."""
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class EffectSelection:
    """The images that an effect was drawn for, in rising order, and its values for them."""

    index: Int[np.ndarray, "chosen"]
    values: tuple[Tensor, ...]
    """Each with one row per chosen image."""

    @classmethod
    def where(cls, chosen: Bool[Tensor, "count"], *values: Tensor) -> EffectSelection:
        """From one mark, and one row of values, per image."""
        return cls(np.flatnonzero(chosen.numpy()), tuple(value[chosen] for value in values))

    def part(self, first: int, count: int, device: torch.device) -> tuple[Tensor, ...] | None:
        """Those of images `first` … `first + count − 1`: their index, counted from `first`, and their values."""
        low, high = np.searchsorted(self.index, [first, first + count])
        if low == high:
            return None
        index = torch.from_numpy(self.index[low:high] - first)
        return tuple(to_device(tensor, device) for tensor in (index, *(value[low:high] for value in self.values)))
