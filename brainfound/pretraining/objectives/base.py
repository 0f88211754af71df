"""The contract of a self-supervised objective: one class in one file, and its line in `registry`.

A minimal objective has a recipe with its `kind`, an `__init__` that sets `student`, and `compute_loss` and `describe`.
Everything else has a default here: crops, dry run, checkpoints, gradient clipping, export.

Axis legend: ``n`` slices of this rank's micro-batch, ``C`` contrasts, ``H W`` pixels, ``D`` width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brainfound.data.augmentation import ViewsRecipe
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.monitoring.collapse_metrics import feature_health_metrics
from brainfound.pretraining.objectives.flops import StepFlops, encoder_flops, matmul_flops
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.starting_model import merged_state_dict
from brainfound.recipes import Recipe
from brainfound.training import distributed
from brainfound.training.randomness import StepKey
from brainfound.training.schedules import ScheduleRecipe

LossAndMetrics = tuple[Float[Tensor, ""], dict[str, Tensor]]
"""The loss of a micro-batch, and its named parts without gradients, for the log."""


class TrainedModel(nn.Module):
    """What the optimiser moves, behind one forward pass per micro-batch.

    DDP and FSDP hook into `forward`, and every parameter must take part in it. The objective computes its whole loss
    inside that call, with the other methods of the model.
    """

    def forward(self, compute_loss: Callable[[Any], LossAndMetrics]) -> LossAndMetrics:
        return compute_loss(self)


class EncoderWithHeads(TrainedModel):
    """An encoder (used as it is, not copied) with named heads."""

    def __init__(self, encoder: SliceEncoder, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)


class Objective(ABC):
    """A self-supervised loss with its state.

    Args:
        encoder: the starting checkpoint, with its trained part chosen; objectives copy it.
        recipe: the settings, of class `recipe_class`.
        views: how crops are made.
        num_steps: length of the run.
        seed: of new weights.
    """

    recipe_class: ClassVar[type[Recipe]]
    """The settings; its field `kind` has the objective's name as its only value."""
    exported_name: ClassVar[str] = "encoder"
    """The exported part, in words, for the model card."""
    uses_multi_crop: ClassVar[bool] = True
    """Whether each step reads two global crops of a slice and the local ones; otherwise it reads one global crop."""
    student: nn.Module
    """Everything that is trained: a `TrainedModel`."""
    separate_passes: bool = False
    """Whether to spend time to save memory, where an objective can encode its crops one after the other."""
    last_cls: Float[Tensor, "n D"] | None = None
    """The CLS tokens of the last batch, for `health_metrics`; `compute_loss` may set it."""

    def __init__(self, encoder: SliceEncoder, recipe: Any, views: ViewsRecipe, num_steps: int, seed: int) -> None:
        self.recipe, self.views, self.num_steps = recipe, views, num_steps

    @abstractmethod
    def compute_loss(self, student: Any, batch: PretrainBatch, key: StepKey) -> LossAndMetrics:
        """The loss of a micro-batch, from views to weighted sum; the names of its parts begin with ``loss_``.

        Args:
            student: `self.student`, inside its forward pass.
            key: names the randomness of this micro-batch.
        """

    @abstractmethod
    def describe(self) -> str:
        """The objective in words, for the model card."""

    @classmethod
    def kind(cls) -> str:
        """The name of the objective in recipes."""
        return cls.recipe_class.model_fields["kind"].default

    @classmethod
    def defaults_for_scratch(cls, recipe: Any) -> dict[str, float]:
        """Settings that a run from new weights switches off, with their new values."""
        return {}

    @classmethod
    def preflight(cls, recipe: Any, schedule: ScheduleRecipe, num_steps: int) -> Iterator[str]:
        """Notes for the author of a recipe, before anything is loaded.

        Raises:
            RecipeError: if the settings cannot work.
        """
        yield from ()

    def require_batch_size(self, num_slices: int) -> None:
        """Refuse a micro-batch of a size that this objective cannot learn from.

        Raises:
            RecipeError: names the setting.
        """
        return

    def loss(self, student: nn.Module, batch: PretrainBatch, key: StepKey) -> LossAndMetrics:
        """The loss of a micro-batch through `student`, which is `self.student`, perhaps wrapped by DDP or FSDP."""
        return student(partial(self.compute_loss, batch=batch, key=key))

    def after_step(self, step: int, taken: Float[Tensor, ""]) -> None:
        """Called after every step.

        Args:
            taken: on the device, 1 where the optimiser moved and 0 where it skipped the step; nothing here
                may wait for its value.
        """
        return

    @property
    def exported_encoder(self) -> SliceEncoder:
        """The encoder that is probed and exported."""
        return self.student.encoder  # type: ignore[return-value]

    def exported_state(self) -> dict[str, Tensor]:
        """The weights to export: those of `exported_encoder`, whole, under the names of a plain encoder.

        All ranks call it together where the encoder is sharded.
        """
        return merged_state_dict(self.exported_encoder, distributed.gather(self.exported_encoder.state_dict()))

    def named_frozen_modules(self) -> dict[str, nn.Module]:
        """The models that take part and are not trained: "teacher", "anchor".

        They are sharded as the student is, and checkpoints hold their weights under these names.
        """
        return {}

    def frozen_modules(self) -> list[nn.Module]:
        """The modules of `named_frozen_modules`."""
        return list(self.named_frozen_modules().values())

    def to(self, device: torch.device) -> None:
        """Move the frozen modules to the device; the engine moves the student."""
        for module in self.frozen_modules():
            module.to(device)

    def health_metrics(self) -> dict[str, float]:
        """Collapse metrics of the last batch, over all ranks; called on all ranks together."""
        return {} if self.last_cls is None else feature_health_metrics(distributed.gather_rows(self.last_cls.float()))

    def schedule(self, step: int) -> dict[str, float]:
        """The objective's own scheduled values at a step, for the log."""
        return {}

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named sets of parameters whose gradients are clipped apart from each other."""
        groups = {name: list(head.parameters()) for name, head in getattr(self.student, "heads", {}).items()}
        return {"backbone": list(self.student.encoder.parameters()), **groups}  # type: ignore[union-attr]

    def flops(self, num_slices: int) -> StepFlops:
        """The operations of a micro-batch; here: the crops of `uses_multi_crop` through encoder and frozen modules."""
        encoder, views = self.exported_encoder, self.views
        crops = [(2, views.global_size), (views.num_local, views.local_size)]
        crops = crops if self.uses_multi_crop else [(1, views.global_size)]
        sizes = [(number * num_slices, (side // encoder.patch_size) ** 2) for number, side in crops]
        num_crops = sum(number for number, _ in sizes)
        heads = getattr(self.student, "heads", {}).values()
        trained = sum(encoder_flops(encoder, *size, backward=True) for size in sizes)
        trained += sum(matmul_flops(head, num_crops, backward=True) for head in heads)
        return StepFlops(trained, teacher=len(self.frozen_modules()) * encoder_flops(encoder, *sizes[0]))

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors beside the student that a checkpoint must hold."""
        modules = self.named_frozen_modules().items()
        return {f"{part}.{name}": tensor for part, module in modules for name, tensor in module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the tensors of `state_dict`; a missing or unknown name raises."""
        modules = self.named_frozen_modules()
        if unknown := sorted(name for name in state if name.partition(".")[0] not in modules):
            raise KeyError(f"unknown: {', '.join(unknown)}")
        for part, module in modules.items():
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
