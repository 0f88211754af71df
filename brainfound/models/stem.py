"""The stem "channels": how the contrasts of a slice enter a 2-D ViT.

Axis legend: N slices, C contrasts, H W pixels, P patches, D width.

One contrast is one input channel of the patch convolution (BrainFound, arXiv 2510.23415). Three
contrasts start from the RGB kernels as they are. Any other number starts from the mean of the RGB
kernels, each scaled by 3/C, so that C equal grey channels give what the RGB model gives on grey. An
absent contrast contributes nothing and the others are rescaled by C/(number present). With every
contrast present nothing is changed, to the last bit.

The library's ViT hands `pixel_values` to its patch embedding and nothing else. Presence therefore
travels as C further planes of the same image, constant 0 or 1: no forward pass needs to be forked.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def pack_planes(
    pixels: Float[Tensor, "slices contrasts height width"],
    contrast_mask: Bool[Tensor, "slices contrasts"] | None,
) -> Float[Tensor, "slices planes height width"]:
    """Normalised pixels and their presence as one image of 2·C planes; no mask means all present."""
    if contrast_mask is None:
        return torch.cat((pixels, torch.ones_like(pixels)), dim=1)
    presence = contrast_mask.to(pixels.dtype)[:, :, None, None].expand_as(pixels)
    return torch.cat((pixels, presence), dim=1)


def inflate_kernels(
    kernels: Float[Tensor, "width channels rows columns"], num_contrasts: int
) -> Float[Tensor, "width contrasts rows columns"]:
    """Patch kernels for `num_contrasts` channels from those of an RGB model.

    The response to C equal channels is the RGB model's response to three equal channels.
    """
    num_channels = kernels.shape[1]
    if num_channels == num_contrasts:
        return kernels.clone()
    mean = kernels.mean(dim=1, keepdim=True) * (num_channels / num_contrasts)
    return mean.repeat(1, num_contrasts, 1, 1)


class ContrastEmbedding(nn.Module):
    """A learned vector per contrast; the mean over the present ones is what the patches receive. Starts at zero."""

    def __init__(self, num_contrasts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_contrasts, width))

    def forward(self, presence: Float[Tensor, "slices contrasts"]) -> Float[Tensor, "slices width"]:
        presence = presence.to(self.weight.dtype)
        return presence @ self.weight / presence.sum(dim=1, keepdim=True).clamp(min=1)


class ContrastPatchEmbeddings(nn.Module):
    """Patch embedding over C contrasts; takes the place of the backbone's own.

    Args:
        num_contrasts: C.
        width: D.
        patch_size: side of a patch in pixels.
        image_size: (height, width) that the position grid was made for.
    """

    def __init__(self, num_contrasts: int, width: int, patch_size: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        # The names that the library's embedding module reads.
        self.image_size = image_size
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
        self.num_channels = num_contrasts
        self.projection = nn.Conv2d(num_contrasts, width, kernel_size=patch_size, stride=patch_size)
        self.contrast_embedding = ContrastEmbedding(num_contrasts, width)

    def forward(self, planes: Float[Tensor, "slices planes height width"]) -> Float[Tensor, "slices patches width"]:
        """Planes as `pack_planes` makes them → patch embeddings, row by row."""
        num_contrasts = self.num_channels
        presence = planes[:, num_contrasts:, 0, 0]
        # Filled, not multiplied: 0 × NaN is NaN, and an absent contrast may hold anything.
        pixels = planes[:, :num_contrasts].masked_fill(presence[:, :, None, None] == 0, 0.0)
        scale = num_contrasts / presence.sum(dim=1).clamp(min=1)
        pixels = (pixels * scale[:, None, None, None]).to(self.projection.weight.dtype)
        patches = self.projection(pixels).flatten(2).transpose(1, 2)
        return patches + self.contrast_embedding(presence)[:, None].to(patches.dtype)
