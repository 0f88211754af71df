"""The head of self-distillation: embedding → a unit vector, to be compared with prototypes.

Axis legend: ``N`` rows, ``D`` width, ``K`` prototypes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from brainfound.recipes import Recipe
from brainfound.train.prototype_losses import Projection, unit_rows


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
    """MLP, L2 normalisation, and prototypes of unit length: the scores are cosines in −1…1.

    Source: DINO (arXiv 2104.14294, appendix C). The prototypes' length is fixed at 1, which DINO
    calls `norm_last_layer` and recommends for stability.
    """

    def __init__(self, width: int, recipe: HeadRecipe) -> None:
        super().__init__()
        widths = [width] + [recipe.hidden] * (recipe.layers - 1) + [recipe.bottleneck]
        layers: list[nn.Module] = []
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            layers += [nn.Linear(fan_in, fan_out)] + ([nn.GELU()] if index < recipe.layers - 1 else [])
        self.mlp = nn.Sequential(*layers)
        self.last_layer = nn.Linear(recipe.bottleneck, recipe.prototypes, bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights from `generator`, the same on all ranks.

        Truncated normal of 1 / sqrt(fan-in) in the MLP, which is DINO's 0.02 at its width of 2,048 and
        keeps the bottleneck away from 0 in narrower heads (near 0 the normalisation's gradient
        explodes); 0.02 for the prototypes; biases 0.
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
        return Projection(unit, unit_rows(self.last_layer.weight))
