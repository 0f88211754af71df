"""Stems: how the contrasts of a slice enter a 2-D ViT.

- ``channels`` (BrainFound, arXiv 2510.23415): one contrast is one input channel of the patch convolution, with the
  RGB kernels, or for other numbers than three with their mean times 3/C. An absent contrast contributes nothing, and
  the others are rescaled by C/(number present).
- ``per_contrast``: each present contrast of a slice is a separate grey image, with the sum of the RGB kernels; the
  ViT's outputs for the images of a slice are averaged.
- ``slices``: a slice with its neighbours below and above is one image of three channels, with the RGB kernels.

The transformers ViT passes only `pixel_values` to its patch embedding. Presence, or the index of the contrast,
therefore travels as constant planes of the same image.

Axis legend: N slices, C contrasts, M input images of the ViT, H W pixels, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from brainfound.data.batches import to_unit_range
from brainfound.models.backbones import get_image_size, get_patch_size

NUM_NEIGHBOUR_SLICES = 3
"""Planes of the stem "slices": the slice below, the slice, the slice above."""


def normalise(
    pixels: Tensor, mean: float | Sequence[float], std: float | Sequence[float], contrasts: Tensor | None = None
) -> Float[Tensor, "... height width"]:
    """(Pixels − mean) / std, with one value or one per contrast; pixels are uint8 or 0–1, (…, C, H, W).

    `contrasts` holds the contrast index of each image if images have a single one, (M, 1, H, W).
    """
    pixels = to_unit_range(pixels)

    def per_contrast(value: float | Sequence[float]) -> float | Tensor:
        if isinstance(value, (int, float)):
            return value
        values = pixels.new_tensor(list(value))
        return (values if contrasts is None else values[contrasts][:, None])[..., None, None]

    return (pixels - per_contrast(mean)) / per_contrast(std)


def pack_planes(
    pixels: Float[Tensor, "slices contrasts height width"], contrast_mask: Bool[Tensor, "slices contrasts"] | None
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

    `slices` and `contrasts` (M,) hold the slice and the contrast of each image.
    """

    def __init__(self, present: Bool[Tensor, "slices contrasts"]) -> None:
        self.counts = present.sum(dim=1)
        self.contrasts, self.slices = present.T.nonzero(as_tuple=True)
        self._images_per_contrast = present.sum(dim=0).tolist()

    def mean(self, values: Float[Tensor, "images *rest"]) -> Float[Tensor, "slices *rest"]:
        """Average the values of the images over the images of each slice."""
        total = values.new_zeros(len(self.counts), *values.shape[1:])
        # Within one contrast no slice occurs twice, so the order of the additions is fixed on every device.
        for contrast_values, slices in zip(
            values.split(self._images_per_contrast), self.slices.split(self._images_per_contrast), strict=True
        ):
            total = total.index_add(0, slices, contrast_values)
        return total / self.counts.view(-1, *[1] * (values.dim() - 1))


def inflate_kernels(
    kernels: Float[Tensor, "width channels rows columns"], num_contrasts: int
) -> Float[Tensor, "width contrasts rows columns"]:
    """Patch kernels for C channels from those of an RGB model, with its response to equal channels.

    Where the number of channels differs, each kernel is the mean over the old channels, scaled.
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
    """Base: a patch convolution that replaces the backbone's, built from a `BrainFoundConfig`."""

    fixed_channels: ClassVar[int | None] = None
    """Input channels of the convolution; None: one per contrast."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        # Attribute names that the transformers embedding module reads.
        self.image_size = get_image_size(config.backbone_config)
        size = get_patch_size(config.backbone_config)
        self.patch_size = (size, size)
        self.num_patches = (self.image_size[0] // size) * (self.image_size[1] // size)
        self.num_channels = self.fixed_channels or config.num_contrasts
        self.projection = nn.Conv2d(self.num_channels, config.hidden_size, kernel_size=size, stride=size)

    def embed(self, pixels: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images patches width"]:
        """Pixels → patch embeddings, row by row."""
        return self.projection(pixels.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def init_from(self, patch_embeddings: Any) -> None:
        """Start from the patch embedding of a plain ViT or of another stem; see `inflate_kernels`."""
        kernels = patch_embeddings.projection
        self.projection.weight.copy_(inflate_kernels(kernels.weight, self.num_channels))
        assert self.projection.bias is not None
        self.projection.bias.copy_(kernels.bias)


class EmbeddingStem(PatchStem):
    """Base: a stem that also adds the learned vectors of the contrasts."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_contrasts = config.num_contrasts
        self.contrast_embedding = ContrastEmbedding(self.num_contrasts, config.hidden_size)

    @torch.no_grad()
    def init_from(self, patch_embeddings: Any) -> None:
        super().init_from(patch_embeddings)
        if isinstance(patch_embeddings, EmbeddingStem):
            self.contrast_embedding.weight.copy_(patch_embeddings.contrast_embedding.weight)


class ContrastPatchEmbeddings(EmbeddingStem):
    """The stem "channels": patch embedding over C contrasts."""

    def forward(self, planes: Float[Tensor, "slices planes height width"]) -> Float[Tensor, "slices patches width"]:
        """Planes from `pack_planes` → patch embeddings, row by row."""
        num_contrasts = self.num_channels
        presence = planes[:, num_contrasts:, 0, 0]
        # Filled, not multiplied: 0 × NaN is NaN, and an absent contrast may hold anything.
        pixels = planes[:, :num_contrasts].masked_fill(presence[:, :, None, None] == 0, 0.0)
        scale = num_contrasts / presence.sum(dim=1).clamp(min=1)
        patches = self.embed(pixels * scale[:, None, None, None])
        return patches + self.contrast_embedding(presence)[:, None].to(patches.dtype)


class GreyPatchEmbeddings(EmbeddingStem):
    """The stem "per_contrast": patch embedding of one grey image, and the embedding of its contrast."""

    fixed_channels = 1

    def forward(self, planes: Float[Tensor, "images 2 height width"]) -> Float[Tensor, "images patches width"]:
        """Planes from `pack_contrast_number` → patch embeddings, row by row."""
        patches = self.embed(planes[:, :1])
        contrast = F.one_hot(planes[:, 1, 0, 0].long(), self.num_contrasts)
        return patches + self.contrast_embedding(contrast)[:, None].to(patches.dtype)


class SlicePatchEmbeddings(PatchStem):
    """The stem "slices": patch embedding of three neighbouring slices."""

    fixed_channels = NUM_NEIGHBOUR_SLICES

    def forward(self, planes: Float[Tensor, "slices 3 height width"]) -> Float[Tensor, "slices patches width"]:
        """Normalised pixels of the slice below, the slice and the slice above → patch embeddings, row by row."""
        return self.embed(planes)


STEMS: dict[str, type[PatchStem]] = {
    "channels": ContrastPatchEmbeddings,
    "per_contrast": GreyPatchEmbeddings,
    "slices": SlicePatchEmbeddings,
}
"""Name → class of every stem; `BrainFoundConfig` validates names against it."""
