"""Decoders: the patch tokens of slices → class scores of every pixel.

`DECODERS` is the registry: a new decoder is a class and one line.

Axis legend: N slices, C contrasts, P patches, D width, h w patch rows and columns, F feature channels, K classes,
H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from brainfound.models.backbones import get_patch_size
from brainfound.models.stem import normalise


class Decoder(nn.Module, ABC):
    """Base: fuse tokens on the patch grid, optionally mix neighbouring slices, then refine to pixels in chunks.

    Only the mixing, on the small patch grid, needs a whole volume. `config` is a `BrainFoundConfig`.
    """

    reads_image: ClassVar[bool] = False
    """Whether `forward` needs the pixels of the slices."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.layers = tuple(config.resolved_decoder_layers)
        self.chunk = config.slice_chunk
        channels = config.decoder_width * len(self.layers)
        self.slice_mixing = SliceMixing(channels) if config.decoder_slice_mixing else None
        width = config.hidden_size
        # Per block: tokens (…, D) → features (…, F). One norm each: scales differ by an order of magnitude.
        self.projections = nn.ModuleDict(
            {str(n): nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.decoder_width)) for n in self.layers}
        )

    def fuse(self, tokens: dict[int, Tensor], grid: tuple[int, int]) -> Float[Tensor, "slices channels rows columns"]:
        """Tokens (N, P, D) by backbone block → one map on the patch grid with the features of all blocks."""
        rows, columns = grid
        maps = [
            rearrange(self.projections[str(layer)](tokens[layer]), "n (h w) f -> n f h w", h=rows, w=columns)
            for layer in self.layers
        ]
        return torch.cat(maps, dim=1)

    @abstractmethod
    def refine(
        self,
        fused: Float[Tensor, "slices channels rows columns"],
        pixels: Float[Tensor, "slices contrasts height width"] | None = None,
        presence: Bool[Tensor, "slices contrasts"] | None = None,
    ) -> Float[Tensor, "slices classes finer_rows finer_columns"]:
        """Fused map → class scores at the decoder's own resolution; `pixels` are required if it `reads_image`."""

    def forward(
        self,
        fused: Float[Tensor, "slices channels rows columns"],
        slices_per_volume: Sequence[int],
        size: tuple[int, int],
        pixels: Tensor | None = None,
        presence: Bool[Tensor, "slices contrasts"] | None = None,
    ) -> Float[Tensor, "slices classes height width"]:
        """Fused maps of the valid slices, volume by volume → class scores at `size` (height, width) pixels.

        Args:
            pixels: the slices (N, C, H, W), 0–1 or uint8, for a decoder that `reads_image`.
            presence: True where a slice has a contrast; None: all.
        """
        if self.slice_mixing is not None:
            fused = torch.cat([self.slice_mixing(volume) for volume in fused.split(list(slices_per_volume))])
        scores = []
        for first in range(0, len(fused), self.chunk):
            rows = slice(first, first + self.chunk)
            refined = self.refine(
                fused[rows], None if pixels is None else pixels[rows], None if presence is None else presence[rows]
            )
            scores.append(F.interpolate(refined, size=size, mode="bilinear", align_corners=False))
        return torch.cat(scores)


class SliceMixing(nn.Conv1d):
    """A residual depthwise convolution along the valid slices of one volume. It starts as the identity."""

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, volume: Float[Tensor, "slices channels rows columns"]
    ) -> Float[Tensor, "slices channels rows columns"]:
        rows = volume.shape[2]
        along_slices = rearrange(volume, "s f h w -> (h w) f s")
        return volume + rearrange(super().forward(along_slices), "(h w) f s -> s f h w", h=rows)


class LinearDecoder(Decoder):
    """One linear layer on the tokens; the baseline for the other decoders."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.score = nn.Conv2d(config.decoder_width * len(self.layers), config.num_classes, kernel_size=1)

    def refine(self, fused: Tensor, pixels: Tensor | None = None, presence: Tensor | None = None) -> Tensor:
        return self.score(fused)


class FpnDecoder(Decoder):
    """A feature pyramid from several blocks (Lin et al. 2017, §3; the levels of a ViT as in Li et al. 2022, §3).

    Early blocks are upsampled to strides of a quarter and a half patch with transposed convolutions, the later ones
    stay at one patch; they are fused from deep to shallow. The resolution of the class scores is a quarter patch.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width = config.decoder_width
        self.levels = nn.ModuleList(_upsampling(width, factor) for factor in pyramid_factors(len(self.layers)))
        self.smoothing = nn.ModuleList(_convolution(width) for _ in self.layers)
        self.score = nn.Conv2d(width, config.num_classes, kernel_size=1)

    def refine(self, fused: Tensor, pixels: Tensor | None = None, presence: Tensor | None = None) -> Tensor:
        maps = [level(part) for level, part in zip(self.levels, fused.chunk(len(self.layers), dim=1), strict=True)]
        top = self.smoothing[-1](maps[-1])
        for level, smooth in zip(reversed(maps[:-1]), reversed(self.smoothing[:-1]), strict=True):
            raised = F.interpolate(top, size=level.shape[-2:], mode="bilinear", align_corners=False)
            top = smooth(level + raised)
        return self.score(top)


def pyramid_factors(num_levels: int) -> list[int]:
    """The upsampling of each level over the patch grid, from the shallowest block to the deepest.

    >>> pyramid_factors(4), pyramid_factors(1)
    ([4, 2, 1, 1], [4])
    """
    return [4, 2, *[1] * num_levels][:num_levels]


class UnetrDecoder(Decoder):
    """Tokens of several blocks and the image itself (UNETR, Hatamizadeh et al. 2022, Fig. 1).

    The deepest block's map is doubled step by step and merged with the maps of shallower blocks, upsampled by
    transposed convolutions of their own, and at the end with the slice's pixels after two convolutions. Widths halve
    with each doubling. Where doubling overshoots the pixel grid (a patch of 14), the result is resampled to it.
    As in the stem, absent contrasts are zero after the normalisation and the others are rescaled.
    """

    reads_image: ClassVar[bool] = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.image_mean, self.image_std = config.image_mean, config.image_std
        patch_size = get_patch_size(config.backbone_config)
        self.doublings = doublings_of_tokens(len(self.layers), patch_size)
        last = doublings_to_pixels(patch_size)
        narrowest = min(config.decoder_width, 16)
        widths = [max(config.decoder_width // 2**step, narrowest) for step in range(last + 1)]
        num_maps = [self.doublings.count(step) for step in range(last + 1)]
        self.tokens = nn.ModuleList(_upsampling_path(widths[: step + 1]) for step in self.doublings)
        self.entry = _fusion_block(num_maps[0] * widths[0], widths[0])
        self.doubling = nn.ModuleList(_doubling(coarse, fine) for coarse, fine in pairwise(widths))
        self.merging = nn.ModuleList(
            _fusion_block((1 + num_skips) * width, width)
            for num_skips, width in zip(num_maps[1:last], widths[1:last], strict=True)
        )
        self.image = _fusion_block(config.num_contrasts, widths[last])
        self.exit = _fusion_block(2 * widths[last], widths[last])
        self.score = nn.Conv2d(widths[last], config.num_classes, kernel_size=1)

    def refine(self, fused: Tensor, pixels: Tensor | None = None, presence: Tensor | None = None) -> Tensor:
        assert pixels is not None, "this decoder reads the image"
        image = self.image(self._normalise_image(pixels, presence))
        parts = fused.chunk(len(self.layers), dim=1)
        maps: dict[int, list[Tensor]] = {}
        for step, raise_tokens, part in zip(self.doublings, self.tokens, parts, strict=True):
            maps.setdefault(step, []).append(raise_tokens(part))
        features = self.entry(torch.cat(maps[0], dim=1))
        for step, merge in enumerate(self.merging, start=1):
            features = merge(torch.cat([self.doubling[step - 1](features), *maps.get(step, [])], dim=1))
        features = self.doubling[-1](features)
        if features.shape[-2:] != image.shape[-2:]:
            features = F.interpolate(features, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return self.score(self.exit(torch.cat([features, image], dim=1)))

    def _normalise_image(
        self, pixels: Tensor, presence: Tensor | None
    ) -> Float[Tensor, "slices contrasts height width"]:
        """Normalised pixels, zero in absent contrasts."""
        image = normalise(pixels, self.image_mean, self.image_std)
        if presence is not None:
            # Filled, not multiplied: 0 × NaN is NaN.
            image = image.masked_fill(~presence[:, :, None, None], 0.0)
            scale = presence.shape[1] / presence.sum(dim=1).clamp(min=1)
            image = image * scale[:, None, None, None].to(image.dtype)
        return image.to(self.score.weight.dtype)


def doublings_to_pixels(patch_size: int) -> int:
    """The number of doublings from the patch grid to at least the resolution of the pixels.

    >>> [doublings_to_pixels(size) for size in (8, 14, 16)]
    [3, 4, 4]
    """
    return max((patch_size - 1).bit_length(), 1)


def doublings_of_tokens(num_layers: int, patch_size: int) -> list[int]:
    """The number of doublings of each block's tokens before the unetr decoder merges them, shallowest block first.

    >>> doublings_of_tokens(4, 16), doublings_of_tokens(4, 8)
    ([3, 2, 1, 0], [2, 2, 1, 0])
    """
    return [min(step, doublings_to_pixels(patch_size) - 1) for step in reversed(range(num_layers))]


DECODERS: dict[str, type[Decoder]] = {"linear": LinearDecoder, "fpn": FpnDecoder, "unetr": UnetrDecoder}
"""Name → class of every decoder; `BrainFoundConfig` validates names against it."""


def _doubling(coarse: int, fine: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(coarse, fine, kernel_size=2, stride=2)


def _upsampling(width: int, factor: int) -> nn.Sequential:
    doublings = range(factor.bit_length() - 1)
    return nn.Sequential(*(part for _ in doublings for part in (_doubling(width, width), _norm(width), nn.GELU())))


def _upsampling_path(widths: Sequence[int]) -> nn.Sequential:
    """Transposed convolutions, each followed by a convolution."""
    return nn.Sequential(
        *(part for coarse, fine in pairwise(widths) for part in (_doubling(coarse, fine), *_convolution(fine)))
    )


def _fusion_block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(*_convolution(width, channels), *_convolution(width))


def _convolution(width: int, channels: int | None = None) -> nn.Sequential:
    """A convolution from `channels` (by default `width`) to `width` channels, with norm and GELU."""
    return nn.Sequential(nn.Conv2d(channels or width, width, kernel_size=3, padding=1), _norm(width), nn.GELU())


def _norm(width: int) -> nn.GroupNorm:
    groups = next(groups for groups in range(min(8, width), 0, -1) if width % groups == 0)
    return nn.GroupNorm(groups, width)
