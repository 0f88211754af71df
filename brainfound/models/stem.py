"""Stems: how the contrasts of a slice enter a 2-D ViT.

Axis legend: N slices, C contrasts, M images given to the ViT, H W pixels, P patches, D width.

- ``channels`` (BrainFound, arXiv 2510.23415): one contrast is one input channel of the patch convolution. Three
  contrasts start from the RGB kernels. Any other number starts from their mean, scaled by 3/C: C equal channels give
  the RGB model's output on grey. An absent contrast contributes nothing, and the others are rescaled by C/(number
  present). With every contrast present nothing changes, to the last bit.
- ``per_contrast``: each present contrast of a slice is a grey image of its own. The kernel is the sum of the RGB
  kernels; the ViT's outputs for the images of a slice are averaged.
- ``slices``: a slice with its neighbours below and above is one image of three channels, with the RGB kernels.

The library's ViT passes `pixel_values` alone to its patch embedding. Presence, or the number of the contrast,
therefore travels as constant planes of the same image, and no forward pass needs to be forked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfound.models.configuration import BrainFoundConfig

NUM_NEIGHBOUR_SLICES = 3
"""Planes of the stem "slices": the slice below, the slice, the slice above."""


def pack_planes(
    pixels: Float[Tensor, "slices contrasts height width"],
    contrast_mask: Bool[Tensor, "slices contrasts"] | None,
) -> Float[Tensor, "slices planes height width"]:
    """Normalised pixels and the presence of each contrast as one image of 2·C planes; None: all are present."""
    if contrast_mask is None:
        return torch.cat((pixels, torch.ones_like(pixels)), dim=1)
    presence = contrast_mask.to(pixels.dtype)[:, :, None, None].expand_as(pixels)
    return torch.cat((pixels, presence), dim=1)


def pack_contrast_number(
    pixels: Float[Tensor, "images height width"], contrasts: Int[Tensor, "images"]
) -> Float[Tensor, "images 2 height width"]:
    """Normalised pixels of single contrasts, with the index of the contrast as a second plane."""
    number = contrasts.to(pixels.dtype)[:, None, None].expand_as(pixels)
    return torch.stack((pixels, number), dim=1)


class PresentImages:
    """The present contrasts of N slices as M single images, contrast by contrast.

    Args:
        present: True where a slice has a contrast.

    Attributes:
        slices, contrasts: (M,) the slice and the contrast of each image.
    """

    def __init__(self, present: Bool[Tensor, "slices contrasts"]) -> None:
        self.counts = present.sum(dim=1)
        self.contrasts, self.slices = present.T.nonzero(as_tuple=True)
        self._images_per_contrast = present.sum(dim=0).tolist()

    def mean(self, values: Float[Tensor, "images *rest"]) -> Float[Tensor, "slices *rest"]:
        """Values of the images → the mean over the images of each slice."""
        total = values.new_zeros(len(self.counts), *values.shape[1:])
        # Within one contrast no slice comes twice, so the order of the additions is fixed on every device.
        for of_contrast, slices in zip(
            values.split(self._images_per_contrast), self.slices.split(self._images_per_contrast), strict=True
        ):
            total = total.index_add(0, slices, of_contrast)
        return total / self.counts.view(-1, *[1] * (values.dim() - 1))


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
    """A learned vector per contrast; the patches receive the mean over the present ones. Starts at zero."""

    def __init__(self, num_contrasts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_contrasts, width))

    def forward(self, presence: Float[Tensor, "slices contrasts"]) -> Float[Tensor, "slices width"]:
        presence = presence.to(self.weight.dtype)
        return presence @ self.weight / presence.sum(dim=1, keepdim=True).clamp(min=1)


class PatchStem(nn.Module):
    """Base: a patch convolution in place of the backbone's own.

    Args:
        num_channels: input channels of the convolution.
        width: D.
        patch_size: side of a patch in pixels.
        image_size: (height, width) that the position grid was made for.
    """

    def __init__(self, num_channels: int, width: int, patch_size: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        # The names that the library's embedding module reads.
        self.image_size = image_size
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (image_size[0] // patch_size) * (image_size[1] // patch_size)
        self.num_channels = num_channels
        self.projection = nn.Conv2d(num_channels, width, kernel_size=patch_size, stride=patch_size)

    def embed(self, pixels: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images patches width"]:
        """Pixels → patch embeddings, row by row."""
        return self.projection(pixels.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def init_from(self, patch_embeddings: Any) -> None:
        """Start from the patch embedding of a plain ViT or of another stem.

        Where the number of channels differs, the kernels are averaged over channels (`inflate_kernels`).
        """
        kernels = patch_embeddings.projection
        self.projection.weight.copy_(inflate_kernels(kernels.weight, self.num_channels))
        assert self.projection.bias is not None
        self.projection.bias.copy_(kernels.bias)


class ContrastPatchEmbeddings(PatchStem):
    """The stem "channels": patch embedding over C contrasts."""

    def __init__(self, num_contrasts: int, width: int, patch_size: int, image_size: tuple[int, int]) -> None:
        super().__init__(num_contrasts, width, patch_size, image_size)
        self.contrast_embedding = ContrastEmbedding(num_contrasts, width)

    def forward(self, planes: Float[Tensor, "slices planes height width"]) -> Float[Tensor, "slices patches width"]:
        """Planes as `pack_planes` makes them → patch embeddings, row by row."""
        num_contrasts = self.num_channels
        presence = planes[:, num_contrasts:, 0, 0]
        # Filled, not multiplied: 0 × NaN is NaN, and an absent contrast may hold anything.
        pixels = planes[:, :num_contrasts].masked_fill(presence[:, :, None, None] == 0, 0.0)
        scale = num_contrasts / presence.sum(dim=1).clamp(min=1)
        patches = self.embed(pixels * scale[:, None, None, None])
        return patches + self.contrast_embedding(presence)[:, None].to(patches.dtype)

    def init_from(self, patch_embeddings: Any) -> None:
        super().init_from(patch_embeddings)
        _copy_contrast_embedding(self, patch_embeddings)


class GreyPatchEmbeddings(PatchStem):
    """The stem "per_contrast": patch embedding of one grey image, and the embedding of its contrast."""

    def __init__(self, num_contrasts: int, width: int, patch_size: int, image_size: tuple[int, int]) -> None:
        super().__init__(1, width, patch_size, image_size)
        self.num_contrasts = num_contrasts
        self.contrast_embedding = ContrastEmbedding(num_contrasts, width)

    def forward(self, planes: Float[Tensor, "images 2 height width"]) -> Float[Tensor, "images patches width"]:
        """Planes as `pack_contrast_number` makes them → patch embeddings, row by row."""
        patches = self.embed(planes[:, :1])
        contrast = F.one_hot(planes[:, 1, 0, 0].long(), self.num_contrasts)
        return patches + self.contrast_embedding(contrast)[:, None].to(patches.dtype)

    def init_from(self, patch_embeddings: Any) -> None:
        super().init_from(patch_embeddings)
        _copy_contrast_embedding(self, patch_embeddings)


class SlicePatchEmbeddings(PatchStem):
    """The stem "slices": patch embedding of three neighbouring slices."""

    def __init__(self, width: int, patch_size: int, image_size: tuple[int, int]) -> None:
        super().__init__(NUM_NEIGHBOUR_SLICES, width, patch_size, image_size)

    def forward(self, planes: Float[Tensor, "slices 3 height width"]) -> Float[Tensor, "slices patches width"]:
        """Normalised pixels of the slice below, the slice and the slice above → patch embeddings, row by row."""
        return self.embed(planes)


def build_stem(config: BrainFoundConfig, patch_size: int, image_size: tuple[int, int]) -> PatchStem:
    """The stem that a configuration names, with new weights."""
    width, num_contrasts = config.hidden_size, config.num_contrasts
    stems: dict[str, Callable[[], PatchStem]] = {
        "channels": lambda: ContrastPatchEmbeddings(num_contrasts, width, patch_size, image_size),
        "per_contrast": lambda: GreyPatchEmbeddings(num_contrasts, width, patch_size, image_size),
        "slices": lambda: SlicePatchEmbeddings(width, patch_size, image_size),
    }
    return stems[config.stem]()


@torch.no_grad()
def _copy_contrast_embedding(stem: ContrastPatchEmbeddings | GreyPatchEmbeddings, patch_embeddings: Any) -> None:
    if isinstance(patch_embeddings, (ContrastPatchEmbeddings, GreyPatchEmbeddings)):
        stem.contrast_embedding.weight.copy_(patch_embeddings.contrast_embedding.weight)
