"""Self-distillation and masked autoencoding together, on one student encoder.

Student and decoder are one module with one forward pass, so that data-parallel training sees each parameter once, and
the encoder's gradient is that of the weighted sum.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from brainfound.data.augmentation import ViewsRecipe
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.base import LossAndMetrics, StepFlops, TrainedModel
from brainfound.pretraining.objectives.masked_autoencoder import PatchMasking, ReconstructionRecipe, reconstruct
from brainfound.pretraining.objectives.networks import DistillationModel, PixelDecoder
from brainfound.pretraining.objectives.self_distillation import SelfDistillation, SelfDistillationRecipe
from brainfound.pretraining.slices import PretrainBatch
from brainfound.training.randomness import StepKey


class HybridRecipe(SelfDistillationRecipe):
    # The tag of a union: a kind of its own, though every other setting is inherited.
    kind: Literal["hybrid"] = "hybrid"  # type: ignore[assignment]
    """Names the objective."""
    reconstruction_weight: float = Field(default=1.0, gt=0)
    """Weight of the reconstruction, next to the weights of self-distillation."""
    reconstruction: ReconstructionRecipe = ReconstructionRecipe()
    """How many patches are hidden, and the decoder that predicts them."""


class HybridModel(TrainedModel):
    """The student of self-distillation, and a pixel decoder on the same encoder."""

    def __init__(self, distilled: DistillationModel, decoder: PixelDecoder) -> None:
        super().__init__()
        self.distilled = distilled
        self.heads = nn.ModuleDict({"decoder": decoder})


class Hybrid(SelfDistillation):
    """Self-distillation whose student also reconstructs an extra global crop; the teacher is exported."""

    recipe_class = HybridRecipe
    recipe: HybridRecipe
    student: HybridModel  # type: ignore[assignment]

    def __init__(
        self, encoder: SliceEncoder, recipe: HybridRecipe, views: ViewsRecipe, num_steps: int, seed: int
    ) -> None:
        super().__init__(encoder, recipe, views, num_steps, seed)
        self.patch_masking = PatchMasking(encoder, recipe.reconstruction, views)
        self.student = HybridModel(self.distilled, self.patch_masking.make_decoder(encoder, seed))

    def compute_loss(  # type: ignore[override]
        self, student: HybridModel, batch: PretrainBatch, key: StepKey
    ) -> LossAndMetrics:
        total, metrics = super().compute_loss(student.distilled, batch, key)
        views = self.patch_masking.views(batch, key)
        output = reconstruct(student.distilled.encoder, student.heads["decoder"], *views)
        reconstruction = self.patch_masking.loss(output, views)
        total = total + self.recipe.reconstruction_weight * reconstruction
        return total, {**metrics, "loss_reconstruction": reconstruction.detach()}

    def describe(self) -> str:
        weight = f"weighted {self.recipe.reconstruction_weight:g}"
        return f"{super().describe()} and masked autoencoding ({self.patch_masking.describe()}, {weight})"

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        return {**super().clip_groups(), "decoder": list(self.student.heads["decoder"].parameters())}

    def flops(self, num_slices: int) -> StepFlops:
        decoder = self.student.heads["decoder"]
        own = StepFlops(self.patch_masking.flops(self.distilled.encoder, decoder, num_slices))
        return super().flops(num_slices) + own
