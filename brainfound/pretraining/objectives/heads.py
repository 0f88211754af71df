"""The heads of the objectives: projection onto prototypes, and the pixel decoder of masked autoencoding.

Axis legend: ``N`` rows, ``D`` width of the encoder, ``K`` prototypes; ``n`` crops, ``P`` patches, ``V`` visible and
``M`` masked ones, ``W`` width of the decoder.

Sources: DINO (arXiv 2104.14294, appendix C); MAE (2111.06377, section 3 and appendix A.1).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from brainfound.pretraining.objectives.prototypes import Projection, normalise_rows
from brainfound.recipes import Recipe


class HeadRecipe(Recipe):
    """The size of a projection head."""

    prototypes: int = Field(default=65_536, ge=2)
    """K, the number of prototypes."""
    hidden: int = Field(default=2048, ge=1)
    """Width of the hidden layers."""
    bottleneck: int = Field(default=256, ge=1)
    """Width in front of the prototypes."""
    layers: int = Field(default=3, ge=1)
    """Linear layers of the MLP, without the prototypes."""


class ProjectionHead(nn.Module):
    """MLP, L2 normalisation, and prototypes of fixed length 1 (DINO's `norm_last_layer`): scores are cosines."""

    is_shard_unit = True  # for `brainfound.training.distributed.shard`

    def __init__(self, width: int, recipe: HeadRecipe) -> None:
        super().__init__()
        widths = [width] + [recipe.hidden] * (recipe.layers - 1) + [recipe.bottleneck]
        layers: list[nn.Module] = []
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            layers += [nn.Linear(fan_in, fan_out)] + ([nn.GELU()] if index < recipe.layers - 1 else [])
        self.mlp = nn.Sequential(*layers)
        self.last_layer = nn.Linear(recipe.bottleneck, recipe.prototypes, bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights: truncated normal, std 1 / sqrt(fan-in) in the MLP, 0.02 for the prototypes; biases 0.

        The first is DINO's 0.02 at its width of 2,048. In narrower heads it keeps the bottleneck away from 0, where the
        gradient of the normalisation explodes.
        """
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.last_layer.weight, std=0.02, generator=generator)

    def forward(self, embeddings: Float[Tensor, "N D"]) -> Projection:
        # A larger eps than the default keeps the gradient of a near-zero bottleneck finite in bfloat16.
        narrow = self.mlp(embeddings)
        unit = F.normalize(narrow.to(torch.promote_types(narrow.dtype, torch.float32)), dim=-1, eps=1e-6)
        return Projection(unit, normalise_rows(self.last_layer.weight))


class PixelDecoderRecipe(Recipe):
    """The size of the decoder, which is not exported."""

    width: int = Field(default=512, ge=4, multiple_of=4)
    """W; a multiple of 4 (for the sines and cosines of two axes) and of `heads`."""
    layers: int = Field(default=8, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=16, ge=1)
    """Attention heads."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of a block's MLP over W."""

    @model_validator(mode="after")
    def _require_divisible_width(self) -> PixelDecoderRecipe:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class PixelDecoder(nn.Module):
    """A light transformer over all patches of a crop, with `num_outputs` values per patch."""

    positions: Tensor

    def __init__(self, encoder_width: int, grid: tuple[int, int], num_outputs: int, recipe: PixelDecoderRecipe) -> None:
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.embed = nn.Linear(encoder_width, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(recipe.width))
        self.register_buffer("positions", sincos_position_embedding(grid, recipe.width), persistent=False)
        block = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        sizes = (recipe.width, recipe.heads, int(recipe.width * recipe.mlp_ratio))
        self.blocks = nn.ModuleList(block(*sizes) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.width)
        self.predict = nn.Linear(recipe.width, num_outputs)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights: Xavier uniform, biases 0, norms 1."""
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
        """The predicted values of the hidden patches, in the order of `hidden`."""
        embedded = self.embed(torch.cat([cls[:, None], visible], dim=1))
        width = embedded.shape[-1]
        patches = self.mask_token.to(embedded.dtype).expand(len(embedded), self.num_patches, width)
        patches = patches.scatter(1, kept[..., None].expand(-1, -1, width), embedded[:, 1:])
        # The CLS token has no place in the grid.
        tokens = torch.cat([embedded[:, :1], patches + self.positions.to(embedded.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        # Only hidden patches are normalised and predicted.
        masked = tokens[:, 1:].gather(1, hidden[..., None].expand(-1, -1, width))
        return self.predict(self.norm(masked))


def sincos_position_embedding(grid: tuple[int, int], width: int) -> Float[Tensor, "P W"]:
    """Sines and cosines of rows and columns, frequencies 1 to 1/10,000 (Vaswani et al. 2017, section 3.5; MAE)."""
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
