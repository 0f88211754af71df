"""Random numbers of views, drawn on the CPU: they are equal on all devices and need no synchronisation."""

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
    """Select each of `count` items with `probability`, count · probability in all, rounded up or down at random.

    The nearly constant number keeps the cost of a step constant.
    """
    rounding = float(torch.rand((), generator=generator))
    order = torch.randperm(count, generator=generator)
    selected = torch.zeros(count, dtype=torch.bool)
    selected[order[: min(count, math.floor(probability * count + rounding))]] = True
    return selected


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to another device without synchronisation."""
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class EffectSelection:
    """The images that an effect was drawn for, in ascending order, and the effect's values."""

    index: Int[np.ndarray, "selected"]
    values: tuple[Tensor, ...]
    """Each with one row per selected image."""

    @classmethod
    def where(cls, selected: Bool[Tensor, "count"], *values: Tensor) -> EffectSelection:
        """From a mask over all images, and values with one row per image."""
        return cls(np.flatnonzero(selected.numpy()), tuple(value[selected] for value in values))

    def part(self, first: int, count: int, device: torch.device) -> tuple[Tensor, ...] | None:
        """Index (relative to `first`) and values for images `first` … `first + count − 1`; None if none is selected."""
        low, high = np.searchsorted(self.index, [first, first + count])
        if low == high:
            return None
        index = torch.from_numpy(self.index[low:high] - first)
        return tuple(to_device(tensor, device) for tensor in (index, *(value[low:high] for value in self.values)))
