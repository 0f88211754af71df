"""Decoders: the patch tokens of slices → class scores of every pixel.

Axis legend: N slices, P patches, D width, h w patch rows and columns, F feature channels, K classes, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from brainfound.models.configuration import BrainFoundConfig

_GROUPS = 8


class Decoder(nn.Module, ABC):
    """Base: fuse tokens on the patch grid, mix neighbouring slices if asked, then refine to pixels.

    The three steps are separate because the first and the last see one slice at a time and can run in
    chunks; only the middle one, on the small patch grid, needs a whole volume.
    """

    def __init__(self, config: BrainFoundConfig) -> None:
        super().__init__()
        self.layers = tuple(config.resolved_decoder_layers)
        self.chunk = config.slice_chunk
        channels = config.decoder_width * len(self.layers)
        self.slice_mixing = SliceMixing(channels) if config.decoder_slice_mixing else None

    @abstractmethod
    def fuse(self, tokens: dict[int, Tensor], grid: tuple[int, int]) -> Float[Tensor, "slices channels rows columns"]:
        """Backbone block → tokens (N, P, D), to one map on the patch grid with the blocks' features side by side."""

    @abstractmethod
    def refine(
        self, fused: Float[Tensor, "slices channels rows columns"]
    ) -> Float[Tensor, "slices classes finer_rows finer_columns"]:
        """The fused map → class scores, at the decoder's own resolution."""

    def forward(
        self,
        fused: Float[Tensor, "slices channels rows columns"],
        slices_per_volume: Sequence[int],
        size: tuple[int, int],
    ) -> Float[Tensor, "slices classes height width"]:
        """Fused maps of the valid slices, volume by volume → class scores at `size` (height, width) pixels."""
        if self.slice_mixing is not None:
            fused = torch.cat([self.slice_mixing(volume) for volume in fused.split(list(slices_per_volume))])
        scores = [
            F.interpolate(self.refine(chunk), size=size, mode="bilinear", align_corners=False)
            for chunk in fused.split(self.chunk)
        ]
        return torch.cat(scores)


class SliceMixing(nn.Conv1d):
    """A residual depthwise convolution along the slices of one volume. It starts as the identity.

    Its border is the volume's first and last valid slice, so padding is never mixed in.
    """

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
    """One linear layer per pixel block: what the tokens hold already, and the baseline for the others."""

    def __init__(self, config: BrainFoundConfig) -> None:
        super().__init__(config)
        self.projections = _projections(config, self.layers)
        self.score = nn.Conv2d(config.decoder_width * len(self.layers), config.num_classes, kernel_size=1)

    def fuse(self, tokens: dict[int, Tensor], grid: tuple[int, int]) -> Tensor:
        return _project(self.projections, tokens, self.layers, grid)

    def refine(self, fused: Tensor) -> Tensor:
        return self.score(fused)


class FpnDecoder(Decoder):
    """A feature pyramid from several blocks (Lin et al. 2017, §3; the levels of a ViT as in Li et al. 2022, §3).

    A ViT has one resolution. Its early blocks are raised to strides of a quarter and a half patch with
    transposed convolutions, the later ones stay at one patch; they are fused from deep to shallow. Class
    scores are made at a quarter of a patch, so that structures smaller than a patch can be told apart.
    """

    def __init__(self, config: BrainFoundConfig) -> None:
        super().__init__(config)
        width = config.decoder_width
        self.projections = _projections(config, self.layers)
        self.levels = nn.ModuleList(_upsampling(width, factor) for factor in pyramid_factors(len(self.layers)))
        self.smoothing = nn.ModuleList(_convolution(width) for _ in self.layers)
        self.score = nn.Conv2d(width, config.num_classes, kernel_size=1)

    def fuse(self, tokens: dict[int, Tensor], grid: tuple[int, int]) -> Tensor:
        return _project(self.projections, tokens, self.layers, grid)

    def refine(self, fused: Tensor) -> Tensor:
        maps = [level(part) for level, part in zip(self.levels, fused.chunk(len(self.layers), dim=1), strict=True)]
        top = self.smoothing[-1](maps[-1])
        for level, smooth in zip(reversed(maps[:-1]), reversed(self.smoothing[:-1]), strict=True):
            raised = F.interpolate(top, size=level.shape[-2:], mode="bilinear", align_corners=False)
            top = smooth(level + raised)
        return self.score(top)


def pyramid_factors(num_levels: int) -> list[int]:
    """How much finer than the patch grid each level is, from the shallowest block to the deepest.

    >>> pyramid_factors(4), pyramid_factors(1)
    ([4, 2, 1, 1], [4])
    """
    return [4, 2, *[1] * num_levels][:num_levels]


def build_decoder(config: BrainFoundConfig) -> Decoder:
    """The decoder that a configuration names."""
    return LinearDecoder(config) if config.decoder == "linear" else FpnDecoder(config)


def _projections(config: BrainFoundConfig, layers: Sequence[int]) -> nn.ModuleDict:
    # Blocks differ in scale by an order of magnitude; the norm brings them on a par before they are added.
    return nn.ModuleDict(
        {
            str(layer): nn.Sequential(
                nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.decoder_width)
            )
            for layer in layers
        }
    )


def _project(
    projections: nn.ModuleDict, tokens: dict[int, Tensor], layers: Sequence[int], grid: tuple[int, int]
) -> Tensor:
    maps = [
        rearrange(projections[str(layer)](tokens[layer]), "n (h w) f -> n f h w", h=grid[0], w=grid[1])
        for layer in layers
    ]
    return torch.cat(maps, dim=1)


def _upsampling(width: int, factor: int) -> nn.Sequential:
    steps: list[nn.Module] = []
    while factor > 1:
        steps += [nn.ConvTranspose2d(width, width, kernel_size=2, stride=2), _norm(width), nn.GELU()]
        factor //= 2
    return nn.Sequential(*steps)


def _convolution(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, kernel_size=3, padding=1), _norm(width), nn.GELU())


def _norm(width: int) -> nn.GroupNorm:
    groups = next(groups for groups in range(min(_GROUPS, width), 0, -1) if width % groups == 0)
    return nn.GroupNorm(groups, width)
