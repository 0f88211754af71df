"""The contract of a self-supervised objective: one class in one file, and its line in `registry`.

A minimal objective has a recipe with its `kind`, an `__init__` that sets `student`, and `compute_loss` and `describe`.
Everything else has a default here: crops, dry run, checkpoints, gradient clipping, export. `AnchoredObjective` adds a
frozen copy of the starting checkpoint, from which the student must not stray far.

FLOPs are those of the matrix products of a step: (a, b) · (b, c) counts 2·a·b·c. Backward, a matrix costs as much again
for the gradient of its input, and once more for its own if it is trained. Recomputation does not count (model FLOPs,
as in PaLM, arXiv 2204.02311, appendix B), nor do memory-bound operations (norms, softmaxes, optimiser, EMA).

Axis legend: ``n`` slices or crops of this rank's micro-batch, ``C`` contrasts, ``H W`` pixels, ``P`` patch tokens,
``D`` width.

Source of the anchor: the Gram loss of DINOv3 (arXiv 2508.10104, section 4.2), here to the frozen starting checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from brainfound.data.augmentation import ViewsRecipe
from brainfound.models.block_runner import kept_packing
from brainfound.models.encoder import SliceEncoder
from brainfound.models.kernels import Packing
from brainfound.pretraining.monitoring.guard import feature_health_metrics
from brainfound.pretraining.objectives import losses
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.starting_model import merge_adapters, merged_state_dict
from brainfound.recipes import Recipe
from brainfound.training import distributed
from brainfound.training.optim import ScheduleRecipe
from brainfound.training.randomness import StepKey

LossAndMetrics = tuple[Float[Tensor, ""], dict[str, Tensor]]
"""The loss of a micro-batch, and its named parts without gradients, for the log."""


class TrainedModel(nn.Module):
    """All trained weights. DDP and FSDP hook into `forward`, so the whole loss is computed inside it."""

    def forward(self, compute_loss: Callable[[Any], LossAndMetrics]) -> LossAndMetrics:
        return compute_loss(self)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a micro-batch by model; the student's are forward and backward."""

    student: float
    teacher: float = 0.0
    anchor: float = 0.0

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.anchor

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(self.student + other.student, self.teacher + other.teacher, self.anchor + other.anchor)


def encoder_flops(
    encoder: SliceEncoder,
    num_crops: int,
    num_patches: int,
    *,
    num_visible_patches: int | None = None,
    backward: bool = False,
    drop_path: float = 0.0,
) -> float:
    """FLOPs of crops of `num_patches` through an encoder, whose blocks see `num_visible_patches` (None: all)."""
    num_tokens = encoder.num_prefix_tokens + (num_patches if num_visible_patches is None else num_visible_patches)
    through = num_crops
    if drop_path and num_crops:
        ((through, _),) = kept_packing(Packing(((num_crops, num_tokens),)), drop_path).runs
    kernel = encoder.backbone.embeddings.patch_embeddings.projection.weight
    # Pixels need no gradient.
    embedding = 2 * num_crops * num_patches * kernel.numel() * (1 + (backward and kernel.requires_grad))
    attention = 4 * num_tokens**2 * encoder.embed_dim * encoder.num_layers * through * (3 if backward else 1)
    return embedding + attention + matmul_flops(encoder.blocks, through * num_tokens, backward)


def matmul_flops(module: nn.Module, num_rows: int, backward: bool) -> float:
    """FLOPs of `num_rows` rows through every matrix of a module."""
    return sum(
        2.0 * num_rows * matrix.numel() * (1 + backward * (1 + matrix.requires_grad))
        for matrix in module.parameters()
        if matrix.ndim == 2
    )


class Objective(ABC):
    """A self-supervised loss with its state.

    Args:
        encoder: the starting checkpoint, with its trained part selected; objectives copy it.
        recipe: the settings, of class `recipe_class`.
        seed: the seed of new weights.
    """

    recipe_class: ClassVar[type[Recipe]]
    """The settings; its field `kind` has the objective's name as its only value."""
    exported_name: ClassVar[str] = "encoder"
    """Name of the exported part, for the model card."""
    uses_multi_crop: ClassVar[bool] = True
    """Whether each step reads two global crops of a slice and the local ones; otherwise it reads one global crop."""
    student: nn.Module
    """Everything that is trained: a `TrainedModel`."""
    separate_passes: bool = False
    """Whether to encode crops one after the other, if the objective can: slower, with less memory."""
    last_cls: Float[Tensor, "n D"] | None = None
    """The CLS tokens of the last batch, for `health_metrics`; `compute_loss` may set it."""

    def __init__(self, encoder: SliceEncoder, recipe: Any, views: ViewsRecipe, num_steps: int, seed: int) -> None:
        self.recipe, self.views, self.num_steps = recipe, views, num_steps

    @abstractmethod
    def compute_loss(self, student: Any, batch: PretrainBatch, key: StepKey) -> LossAndMetrics:
        """The loss of a micro-batch, from views to weighted sum; the names of its parts begin with ``loss_``.

        `student` is `self.student` inside its forward pass; `key` names the randomness of this micro-batch.
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
        """Notes for the author of a recipe, before anything is loaded; a RecipeError if it cannot work."""
        yield from ()

    def require_batch_size(self, num_slices: int) -> None:
        """Raise a RecipeError if this objective cannot learn from micro-batches of this size."""
        return

    def loss(self, student: nn.Module, batch: PretrainBatch, key: StepKey) -> LossAndMetrics:
        """The loss of a micro-batch through `student`, which is `self.student`, perhaps wrapped by DDP or FSDP."""
        return student(partial(self.compute_loss, batch=batch, key=key))

    def after_step(self, step: int, taken: Float[Tensor, ""]) -> None:
        """Called after every step; `taken` is 1 if the optimiser stepped (on the device: do not wait for it)."""
        return

    @property
    def exported_encoder(self) -> SliceEncoder:
        """The encoder that is probed and exported."""
        return self.student.encoder  # type: ignore[return-value]

    def exported_state(self) -> dict[str, Tensor]:
        """The weights to export: those of `exported_encoder`, unsharded, under the names of a plain encoder.

        All ranks call it together if the encoder is sharded.
        """
        return merged_state_dict(self.exported_encoder, distributed.gather(self.exported_encoder.state_dict()))

    def named_frozen_modules(self) -> dict[str, nn.Module]:
        """The untrained models ("teacher", "anchor"): sharded like the student and saved under these names."""
        return {}

    def frozen_modules(self) -> list[nn.Module]:
        return list(self.named_frozen_modules().values())

    def to(self, device: torch.device) -> None:
        """Move the frozen modules to the device; the engine moves the student."""
        for module in self.frozen_modules():
            module.to(device)

    def health_metrics(self) -> dict[str, float]:
        """Collapse metrics of the last batch, over all ranks, which call this together."""
        return {} if self.last_cls is None else feature_health_metrics(distributed.gather_rows(self.last_cls.float()))

    def schedule(self, step: int) -> dict[str, float]:
        """The objective's own scheduled values at a step, for the log."""
        return {}

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named sets of parameters whose gradients are clipped separately."""
        groups = {name: list(head.parameters()) for name, head in getattr(self.student, "heads", {}).items()}
        return {"backbone": list(self.student.encoder.parameters()), **groups}  # type: ignore[union-attr]

    def flops(self, num_slices: int) -> StepFlops:
        """The FLOPs of a micro-batch; here: the crops of `uses_multi_crop` through encoder and frozen modules."""
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
        """The tensors besides the student's that a checkpoint must hold."""
        modules = self.named_frozen_modules().items()
        return {f"{part}.{name}": tensor for part, module in modules for name, tensor in module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the tensors of `state_dict`; a missing or unknown name raises."""
        modules = self.named_frozen_modules()
        if unknown := sorted(name for name in state if name.partition(".")[0] not in modules):
            raise KeyError(f"unknown: {', '.join(unknown)}")
        for part, module in modules.items():
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


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
    """An objective with an anchor, unless its recipe (an `AnchorRecipe`) turns that off."""

    def __init__(self, encoder: SliceEncoder, recipe: Any, views: ViewsRecipe, num_steps: int, seed: int) -> None:
        super().__init__(encoder, recipe, views, num_steps, seed)
        self.anchor = merge_adapters(encoder).requires_grad_(False).eval() if recipe.anchored else None

    @classmethod
    def defaults_for_scratch(cls, recipe: Any) -> dict[str, float]:
        """There is no point in anchoring to new weights."""
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
        """The unweighted distances whose weight is not 0, by name (``anchor_gram``, ``anchor_cls``)."""
        parts = {}
        if self.recipe.anchor_gram_weight:
            parts["anchor_gram"] = losses.gram_loss(patches, anchor_patches)
        if self.recipe.anchor_cls_weight:
            parts["anchor_cls"] = losses.cosine_loss(cls, anchor_cls)
        return parts

    def anchor_flops(self, num_crops: int, num_patches: int, num_visible_patches: int) -> StepFlops:
        """The FLOPs of the anchor and of the Gram matrices of both models."""
        if self.anchor is None:
            return StepFlops(0.0)
        gram = (
            2.0 * num_crops * num_visible_patches**2 * self.anchor.embed_dim if self.recipe.anchor_gram_weight else 0.0
        )
        forward = encoder_flops(self.anchor, num_crops, num_patches, num_visible_patches=num_visible_patches)
        return StepFlops(3 * gram, anchor=forward + gram)
