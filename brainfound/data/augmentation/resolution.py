"""Resolution: blur, thick pixels and Gibbs ringing.

A scanner samples the object's spectrum up to a highest frequency along each axis. A sharp cutoff makes edges ring
(Gibbs ringing; Czervionke et al. 1988, AJNR 9:1033; Kellner et al. 2016, MRM 76:1574). Sampling only 1 / f of the
spectrum, with a window that fades out as scanners do to avoid ringing, makes pixels f times as thick. Both filters are
linear and separable, so each is one matrix per axis. Cosines replace complex exponentials: this is the spectrum of the
image and its mirror, because the two ends of a crop are not neighbours and must not ring into each other.

Axis legend: ``K`` images, ``S`` slices that are treated alike (1 for a view), ``H W`` pixels, ``L`` pixels of one axis.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

MAX_BLUR_RADIUS = 4  # pixels; kernels have 2 · 4 + 1 taps, enough for a sigma of 1.5 pixels


def gaussian_blur(images: Float[Tensor, "K S H W"], sigma_pixels: Float[Tensor, "K"]) -> Float[Tensor, "K S H W"]:
    """Blur each image by its own sigma (0 is the identity), along rows and then along columns.

    Padding repeats the border pixels, since a crop's border lies within the head. Adding shifted images is up to five
    times faster on a CPU than a convolution per channel.
    """
    offsets = torch.arange(MAX_BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    # A sigma of 0 would divide by 0; at 1e-3 pixels the kernel is the identity in float32.
    kernel = (-0.5 * (offsets / sigma_pixels.clamp(min=1e-3)[:, None]) ** 2).exp()
    kernel = kernel / (2 * kernel.sum(dim=1, keepdim=True) - kernel[:, :1])
    weights = kernel[:, :, None, None, None].unbind(dim=1)
    for dim, padding in ((2, (0, 0, MAX_BLUR_RADIUS, MAX_BLUR_RADIUS)), (3, (MAX_BLUR_RADIUS, MAX_BLUR_RADIUS, 0, 0))):
        length = images.shape[dim]
        padded = F.pad(images, padding, mode="replicate")
        images = padded.narrow(dim, MAX_BLUR_RADIUS, length) * weights[0]
        pair = torch.empty_like(images)
        for offset in range(1, MAX_BLUR_RADIUS + 1):
            before = padded.narrow(dim, MAX_BLUR_RADIUS - offset, length)
            after = padded.narrow(dim, MAX_BLUR_RADIUS + offset, length)
            images.add_(torch.add(before, after, out=pair).mul_(weights[offset]))
    return images


def kspace_truncation_weights(kept: Float[Tensor, "K"], length: int) -> Float[Tensor, "K L"]:
    """Frequency weights of an axis that keep the lowest share `kept`: Gibbs ringing."""
    return (torch.arange(length) < kept[:, None] * length).float()


def kspace_hann_weights(factor: Float[Tensor, "K"], length: int) -> Float[Tensor, "K L"]:
    """Frequency weights of an axis for pixels `factor` times as thick: a Hann window up to the new Nyquist limit."""
    position = torch.arange(length) * factor[:, None] / length  # 1 at the new Nyquist frequency
    return torch.where(position < 1, 0.5 + 0.5 * (math.pi * position.clamp(max=1)).cos(), 0.0)


def filter_rows(images: Float[Tensor, "K S H W"], weights: Float[Tensor, "K H"]) -> Float[Tensor, "K S H W"]:
    """Scale the frequencies from row to row (along H)."""
    return _filter_matrix(weights)[:, None] @ images


def filter_columns(images: Float[Tensor, "K S H W"], weights: Float[Tensor, "K W"]) -> Float[Tensor, "K S H W"]:
    """Scale the frequencies from column to column (along W)."""
    return images @ _filter_matrix(weights)[:, None]


def _filter_matrix(weights: Float[Tensor, "K L"]) -> Float[Tensor, "K L L"]:
    """The symmetric matrix Σ_j weight_j · c_j c_jᵀ over the orthonormal cosines c_j (DCT-II).

    cos a · cos b = (cos(a − b) + cos(a + b)) / 2, so an entry is the sum of two values of one kernel: at the distance
    of two pixels, and at the distance to the other's mirror image.
    """
    cosines, distance, mirrored = _cosines(weights.shape[1], weights.device)
    kernel = weights @ cosines
    return kernel[:, distance] + kernel[:, mirrored]


@cache
def _cosines(
    length: int, device: torch.device
) -> tuple[Float[Tensor, "L 2·L"], Int[Tensor, "L L"], Int[Tensor, "L L"]]:
    frequency, pixel = torch.arange(length, dtype=torch.float64), torch.arange(length)
    table = torch.cos(math.pi / length * frequency[:, None] * torch.arange(2 * length)) / length
    table[0] /= 2
    distance = (pixel[:, None] - pixel).abs()
    return table.float().to(device), distance.to(device), (pixel[:, None] + pixel + 1).to(device)
