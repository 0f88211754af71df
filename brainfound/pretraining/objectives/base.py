"""What every self-supervised objective offers to the pretraining task.

Axis legend: ``n`` slices of this rank's micro-batch, ``C`` contrasts, ``H W`` pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.starting_model import merged_state_dict
from brainfound.training.distributed import gather
from brainfound.training.randomness import StepKey


class Objective(ABC):
    """A self-supervised loss with its state.

    `student` holds everything that is trained, as one module whose every parameter takes part in
    every forward pass (data-parallel training needs both). The rest of the state (a teacher, an
    anchor) belongs to the objective and is never wrapped.
    """

    student: nn.Module

    @property
    @abstractmethod
    def exported_encoder(self) -> SliceEncoder:
        """The encoder that is probed and exported."""

    def exported_state(self) -> dict[str, Tensor]:
        """The weights to export: those of `exported_encoder`, whole, under the names of a plain encoder.

        All ranks call it together where the encoder is sharded.
        """
        return merged_state_dict(self.exported_encoder, gather(self.exported_encoder.state_dict()))

    def frozen_modules(self) -> list[nn.Module]:
        """What is looked through and not trained (a teacher, an anchor): sharded as the student is."""
        return []

    def require_batch_size(self, num_slices: int) -> None:
        """Refuse a micro-batch of a size that this objective cannot learn from.

        Raises:
            RecipeError: names the setting.
        """
        return

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move what is not trained to the device; the engine moves the student."""

    @abstractmethod
    def loss(self, student: nn.Module, batch: PretrainBatch, key: StepKey) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch and its named parts.

        Args:
            student: `self.student`, as wrapped for data-parallel training.
        """

    @abstractmethod
    def after_step(self, step: int, taken: Float[Tensor, ""]) -> None:
        """Called after every step.

        Args:
            taken: on the device, 1 where the optimiser moved and 0 where it skipped the step; nothing here
                may wait for its value.
        """

    @abstractmethod
    def health_metrics(self) -> dict[str, float]:
        """Health of the last batch, over all ranks; called on all ranks together."""

    @abstractmethod
    def schedule(self, step: int) -> dict[str, float]:
        """The objective's own scheduled values at a step, for the log."""

    @abstractmethod
    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Sub-modules whose gradients are clipped on their own."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors beside the student that a checkpoint must hold."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the tensors of `state_dict`; a missing or unknown name raises."""
