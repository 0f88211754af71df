"""The models of self-distillation: an encoder with projection heads, and gradients that are computed early.

Axis legend: ``m`` crops of a pass, ``M`` masked tokens, ``T`` tokens of a crop, ``P`` patch tokens of a global crop,
``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from brainfound.data.augmentation import Views
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.base import TrainedModel
from brainfound.pretraining.objectives.heads import HeadRecipe, ProjectionHead
from brainfound.pretraining.objectives.prototypes import Projection
from brainfound.training.randomness import INITIALISATION, torch_generator


class EncoderWithHeads(TrainedModel):
    """An encoder (not copied) with named heads."""

    def __init__(self, encoder: SliceEncoder, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)


class DistillationOutput(NamedTuple):
    """The outputs for global crops."""

    cls: Float[Tensor, "m D"]
    patches: Float[Tensor, "m P D"]
    cls_projection: Projection
    masked_projection: Projection


class DistillationModel(EncoderWithHeads):
    """An encoder with DINO and iBOT heads, or one shared head; student and teacher are each one of these."""

    def __init__(self, encoder: SliceEncoder, head: HeadRecipe, shared_head: bool, drop_path: float, seed: int) -> None:
        names = ["dino"] if shared_head else ["dino", "ibot"]
        super().__init__(encoder, {name: ProjectionHead(encoder.embed_dim, head) for name in names})
        self.drop_path = drop_path
        self.initialise_heads(seed)

    def initialise_heads(self, seed: int, first_stream: int = 0) -> None:
        """Give the heads new weights, each from a stream of its own."""
        for stream, head in enumerate(self.heads.values(), start=first_stream):
            assert isinstance(head, ProjectionHead)
            head.initialise(torch_generator(INITIALISATION, seed, stream))

    @property
    def ibot_head(self) -> nn.Module:
        return self.heads["ibot"] if "ibot" in self.heads else self.heads["dino"]

    def embed(self, views: Views, masked: Bool[Tensor, "m P"] | None = None) -> Float[Tensor, "m T D"]:
        return self.encoder.embed(views.pixels, views.contrast_mask, bool_masked_pos=masked)

    def project_cls(self, tokens: Float[Tensor, "m T D"]) -> Projection:
        return self.heads["dino"](self.encoder.encoding(tokens).cls)

    def project(self, tokens: Float[Tensor, "m T D"], masked: Int[Tensor, "M"]) -> DistillationOutput:
        """Encoded global crops through both heads; `masked` are positions in the flattened (m · P) patches."""
        cls, patches, _ = self.encoder.encoding(tokens)
        hidden = patches.flatten(0, 1).index_select(0, masked)
        return DistillationOutput(cls, patches, self.heads["dino"](cls), self.ibot_head(hidden))


def backward_per_pass(passes: Sequence[Callable[[], Tensor]], parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The sum of the losses of `passes`, whose gradients for `parameters` are computed now, pass by pass.

    The activations of a pass are freed before the next one begins: the memory of a step is that of its largest pass.
    The backward pass of the sum hands the gradients on, once. Anything else that a loss depends on gets none. If
    gradients are disabled (evaluation), it is the plain sum.
    """
    if not torch.is_grad_enabled():
        return torch.stack([compute() for compute in passes]).sum()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    collected: dict[int, Tensor] = {}
    total = torch.stack([_collect(collected, compute(), trained) for compute in passes]).sum()
    return _PrecomputedGradients.apply(total, list(collected.values()), *(trained[index] for index in collected))


def _collect(
    collected: dict[int, Tensor], loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, ""]:
    """Add the gradients of a loss to those collected, by the index of the parameter; returns the loss without graph.

    New gradients share one piece of memory: scattered, they would keep the allocator from reusing that of the pass.
    """
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    reached = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
    known = [index for index in reached if index in collected]
    new = [index for index in reached if index not in collected]
    if known:
        torch._foreach_add_([collected[index] for index in known], [reached[index] for index in known])
    if new:
        pieces = torch.cat([reached[index].flatten() for index in new]).split([reached[p].numel() for p in new])
        collected.update({index: piece.view_as(reached[index]) for index, piece in zip(new, pieces, strict=True)})
    return loss.detach()


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("gradients that were computed early can be handed on once")
        # In place: a copy would double their memory while the last pass still holds its activations.
        torch._foreach_mul_(ctx.gradients, gradient)
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *gradients
