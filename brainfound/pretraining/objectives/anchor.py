"""The anchor: what holds a model near its starting checkpoint.

Axis legend: ``n`` crops, ``P`` patch tokens, ``D`` width.

Source: the Gram loss of DINOv3 (arXiv 2508.10104, section 4.2), here to the frozen start of a continued run.
"""

from __future__ import annotations

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from brainfound.pretraining.objectives import losses
from brainfound.recipes import Recipe


class AnchorRecipe(Recipe):
    """How strongly an objective is anchored."""

    anchor_gram_weight: float = Field(default=1.0, ge=0)
    """Weight of the distance between patch Gram matrices of student and starting checkpoint; 0 turns it off."""
    anchor_cls_weight: float = Field(default=0.1, ge=0)
    """Weight of 1 − cosine between the CLS tokens of student and starting checkpoint; 0 turns it off."""

    @property
    def anchored(self) -> bool:
        """Whether a frozen copy of the starting checkpoint takes part."""
        return self.anchor_gram_weight > 0 or self.anchor_cls_weight > 0


def anchor_losses(
    recipe: AnchorRecipe,
    patches: Float[Tensor, "n P D"],
    cls: Float[Tensor, "n D"],
    anchor_patches: Float[Tensor, "n P D"],
    anchor_cls: Float[Tensor, "n D"],
) -> dict[str, Tensor]:
    """The distances that have a weight, before weighting, by the names of their weights."""
    parts = {}
    if recipe.anchor_gram_weight:
        parts["anchor_gram"] = losses.gram_loss(patches, anchor_patches)
    if recipe.anchor_cls_weight:
        parts["anchor_cls"] = losses.cosine_loss(cls, anchor_cls)
    return parts
