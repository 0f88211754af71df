"""The anchor: a frozen copy of the starting checkpoint, from which the student must not move far.

Axis legend: ``n`` crops, ``P`` patch tokens, ``D`` width.

Source: the Gram loss of DINOv3 (arXiv 2508.10104, section 4.2), here to the frozen start of a continued run.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from brainfound.data.augmentation import ViewsRecipe
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives import losses
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.flops import StepFlops, encoder_flops
from brainfound.pretraining.starting_model import merge_adapters
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


class AnchoredObjective(Objective):
    """An objective with an anchor, unless its recipe turns that off. Its recipe is an `AnchorRecipe`."""

    recipe: Any

    def __init__(self, encoder: SliceEncoder, recipe: Any, views: ViewsRecipe, num_steps: int, seed: int) -> None:
        super().__init__(encoder, recipe, views, num_steps, seed)
        self.anchor = merge_adapters(encoder).requires_grad_(False).eval() if recipe.anchored else None

    @classmethod
    def defaults_for_scratch(cls, recipe: Any) -> dict[str, float]:
        """New weights are nothing to be anchored to."""
        return {"anchor_gram_weight": 0, "anchor_cls_weight": 0}

    def describe_anchor(self) -> str:
        """For the description of the objective; begins with a comma."""
        return ", anchored to the starting checkpoint" if self.recipe.anchored else ""

    def named_frozen_modules(self) -> dict[str, nn.Module]:
        return {} if self.anchor is None else {"anchor": self.anchor}

    def anchor_losses(
        self,
        patches: Float[Tensor, "n P D"],
        cls: Float[Tensor, "n D"],
        anchor_patches: Float[Tensor, "n P D"],
        anchor_cls: Float[Tensor, "n D"],
    ) -> dict[str, Float[Tensor, ""]]:
        """The distances that have a weight, before weighting, by the names of their weights."""
        parts = {}
        if self.recipe.anchor_gram_weight:
            parts["anchor_gram"] = losses.gram_loss(patches, anchor_patches)
        if self.recipe.anchor_cls_weight:
            parts["anchor_cls"] = losses.cosine_loss(cls, anchor_cls)
        return parts

    def anchor_flops(self, num_crops: int, num_patches: int, num_visible_patches: int) -> StepFlops:
        """The operations of the anchor and of the Gram matrices of both models."""
        if self.anchor is None:
            return StepFlops(0.0)
        gram = 0.0
        if self.recipe.anchor_gram_weight:
            gram = 2.0 * num_crops * num_visible_patches**2 * self.anchor.embed_dim
        forward = encoder_flops(self.anchor, num_crops, num_patches, num_visible_patches=num_visible_patches)
        return StepFlops(3 * gram, anchor=forward + gram)
