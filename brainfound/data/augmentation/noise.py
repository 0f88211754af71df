"""Noise of the receiver.

Physics: real and imaginary part of the signal have independent Gaussian noise of one standard deviation. The magnitude
image then has Rician noise (Gudbjartsson and Patz 1995, MRM 34:910), which is nearly Gaussian where the signal is three
times the noise or more, and brightens what is darker.

Axis legend: ``K`` images, ``S`` slices, ``H W`` pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def add_noise(
    images: Float[Tensor, "K S H W"],
    std: Float[Tensor, "K"],
    kind: Literal["gaussian", "rician"],
    generator: torch.Generator,
) -> Float[Tensor, "K S H W"]:
    """The images with noise everywhere, also in the background. `images` is overwritten."""
    noisy = images.add_(_noise(images, std, generator))
    if kind == "rician":
        noisy.square_().add_(_noise(images, std, generator).square_()).sqrt_()
    return noisy


def _noise(like: Tensor, std: Float[Tensor, "K"], generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator, device=generator.device)
    return noise.to(like.device).mul_(std[:, None, None, None])
