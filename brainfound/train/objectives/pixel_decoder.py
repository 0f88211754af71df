"""The decoder of the masked autoencoder: what is seen of a crop → the pixels of what is not.

Axis legend: ``n`` crops, ``P`` patches, ``V`` visible and ``M`` masked ones, ``D`` width of the
encoder, ``W`` width of the decoder, ``C`` contrasts, ``p`` side of a patch in pixels.

Source: MAE (arXiv 2111.06377, section 3 and appendix A.1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from brainfound.recipes import Recipe


class PixelDecoderRecipe(Recipe):
    """The size of the decoder; it is thrown away after training."""

    width: int = Field(default=512, ge=4, multiple_of=4)
    """W; a multiple of 4, for the sines and cosines of two axes, and of the heads."""
    layers: int = Field(default=8, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=16, ge=1)
    """Attention heads."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of a block's MLP over W."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> PixelDecoderRecipe:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class PixelDecoder(nn.Module):
    """A light transformer over all patches of a crop.

    Args:
        encoder_width: D.
        grid: rows and columns of patches.
        num_outputs: values per patch, C · p².
        recipe: the size.
    """

    positions: Tensor

    def __init__(self, encoder_width: int, grid: tuple[int, int], num_outputs: int, recipe: PixelDecoderRecipe) -> None:
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.embed = nn.Linear(encoder_width, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(recipe.width))
        self.register_buffer("positions", sine_cosine_positions(grid, recipe.width), persistent=False)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                recipe.width,
                recipe.heads,
                int(recipe.width * recipe.mlp_ratio),
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(recipe.layers)
        )
        self.norm = nn.LayerNorm(recipe.width)
        self.predict = nn.Linear(recipe.width, num_outputs)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights from `generator`, the same on all ranks: Xavier uniform, biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.mask_token, std=0.02, generator=generator)

    def forward(
        self,
        cls: Float[Tensor, "n D"],
        visible: Float[Tensor, "n V D"],
        kept: Int[Tensor, "n V"],
        hidden: Int[Tensor, "n M"],
    ) -> Float[Tensor, "n M outputs"]:
        """The values of the hidden patches, in the order of `hidden`."""
        seen = self.embed(torch.cat([cls[:, None], visible], dim=1))
        width = seen.shape[-1]
        patches = self.mask_token.to(seen.dtype).expand(len(seen), self.num_patches, width)
        patches = patches.scatter(1, kept[..., None].expand(-1, -1, width), seen[:, 1:])
        # The CLS token has no place in the grid.
        tokens = torch.cat([seen[:, :1], patches + self.positions.to(seen.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        # Only what is asked for is normalised and predicted; the rest would be thrown away.
        asked = tokens[:, 1:].gather(1, hidden[..., None].expand(-1, -1, width))
        return self.predict(self.norm(asked))


def sine_cosine_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "P W"]:
    """Fixed positions: a quarter of the width each for sine and cosine of rows and of columns.

    Frequencies fall from 1 to 1/10,000 (Vaswani et al. 2017, section 3.5), over two axes as in MAE.
    """
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
