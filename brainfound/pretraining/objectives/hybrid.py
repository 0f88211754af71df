"""Self-distillation and masked autoencoding together, on one student encoder.

What crops mean (self-distillation) and what they look like (reconstruction) ask for different
features; the weighted sum trains both. Student and decoder are one module with one forward pass, so
that data-parallel training sees each parameter once, and the encoder's gradient is that of the sum.

Axis legend: ``n`` slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from brainfound.data.augmentation import ViewsRecipe
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.encoder_with_heads import EncoderWithHeads
from brainfound.pretraining.objectives.heads import PixelDecoder
from brainfound.pretraining.objectives.masked_autoencoder import (
    MaskedViews,
    PatchMasking,
    Reconstruction,
    ReconstructionRecipe,
    reconstruct,
)
from brainfound.pretraining.objectives.self_distillation import SelfDistillation, SelfDistillationRecipe
from brainfound.pretraining.slices import PretrainBatch
from brainfound.training.randomness import StepKey


class HybridRecipe(SelfDistillationRecipe):
    """The settings of self-distillation, and beside them those of reconstruction."""

    # The tag of a union: a kind of its own, though every other setting is inherited.
    kind: Literal["hybrid"] = "hybrid"  # type: ignore[assignment]
    """Names the objective."""
    reconstruction_weight: float = Field(default=1.0, gt=0)
    """Weight of the reconstruction, beside the weights of self-distillation."""
    reconstruction: ReconstructionRecipe = ReconstructionRecipe()
    """What is hidden, and what draws it."""


class HybridStudent(nn.Module):
    """The student of self-distillation, and a pixel decoder on the same encoder."""

    def __init__(self, distilled: EncoderWithHeads, decoder: PixelDecoder) -> None:
        super().__init__()
        self.distilled = distilled
        self.heads = nn.ModuleDict({"decoder": decoder})

    def forward(
        self, arguments: tuple[Any, ...], named: Mapping[str, Any], views: MaskedViews
    ) -> tuple[Any, Reconstruction]:
        """(What the student of self-distillation answers to its arguments, the reconstruction of the views)."""
        answer = self.distilled(*arguments, **named)
        return answer, reconstruct(self.distilled.encoder, self.heads["decoder"], *views)


class Hybrid(Objective):
    """Self-distillation, whose student also reconstructs; the teacher is exported.

    Args:
        encoder: the starting checkpoint, with its trained part chosen; it is copied, not changed.
        recipe: weights and constants of both.
        views: of self-distillation; reconstruction gets a crop of its own, made as the global ones are.
        num_steps: length of the run.
        seed: initialises heads and decoder.

    Raises:
        RecipeError: as self-distillation does.
    """

    student: HybridStudent

    def __init__(
        self, encoder: SliceEncoder, recipe: HybridRecipe, views: ViewsRecipe, num_steps: int, seed: int
    ) -> None:
        self.recipe = recipe
        self.distillation = SelfDistillation(encoder, recipe, views, num_steps, seed)
        self.patch_masking = PatchMasking(encoder, recipe.reconstruction, views)
        self.student = HybridStudent(self.distillation.student, self.patch_masking.make_decoder(encoder, seed))

    @property
    def exported_encoder(self) -> SliceEncoder:
        """The teacher's encoder."""
        return self.distillation.exported_encoder

    def frozen_modules(self) -> list[nn.Module]:
        return self.distillation.frozen_modules()

    def require_batch_size(self, num_slices: int) -> None:
        self.distillation.require_batch_size(num_slices)

    def to(self, device: torch.device) -> None:
        self.distillation.to(device)

    def loss(self, student: nn.Module, batch: PretrainBatch, key: StepKey) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.patch_masking.views(batch, key)
        answers: list[Reconstruction] = []

        def distilled(*arguments: Any, **named: Any) -> Any:
            # The one forward pass of the step: what self-distillation asks for, and the reconstruction with it.
            answer, reconstruction = student(arguments, named, views)
            answers.append(reconstruction)
            return answer

        total, metrics = self.distillation.loss(_as_module(distilled), batch, key)
        (answer,) = answers
        reconstruction = self.patch_masking.loss(answer, views)
        total = total + self.recipe.reconstruction_weight * reconstruction
        return total, {**metrics, "loss_reconstruction": reconstruction.detach()}

    def after_step(self, step: int, taken: Float[Tensor, ""]) -> None:
        self.distillation.after_step(step, taken)

    def health_metrics(self) -> dict[str, float]:
        return self.distillation.health_metrics()

    def schedule(self, step: int) -> dict[str, float]:
        return self.distillation.schedule(step)

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        return {**self.distillation.clip_groups(), "decoder": list(self.student.heads["decoder"].parameters())}

    def state_dict(self) -> dict[str, Tensor]:
        return self.distillation.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.distillation.load_state_dict(state)


def _as_module(call: Callable[..., Any]) -> nn.Module:
    """Self-distillation only ever calls its student, once per loss."""
    return cast(nn.Module, call)
