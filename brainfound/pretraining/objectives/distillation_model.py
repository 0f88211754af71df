"""The models of self-distillation: an encoder with projection heads, and the EMA that makes a teacher of a student.

Axis legend: ``m`` crops of a pass, ``M`` masked tokens, ``T`` tokens of a crop, ``P`` patch tokens of a global crop,
``D`` width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from brainfound.data.augmentation import Views
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.base import EncoderWithHeads
from brainfound.pretraining.objectives.heads import HeadRecipe, ProjectionHead
from brainfound.pretraining.objectives.prototypes import Projection
from brainfound.training.distributed import to_local_tensors
from brainfound.training.randomness import INITIALISATION, torch_generator

_FOREACH_CHUNK = 64  # tensors; bounds the memory of the differences


class DistillationOutput(NamedTuple):
    """The outputs for global crops."""

    cls: Float[Tensor, "m D"]
    patches: Float[Tensor, "m P D"]
    cls_projection: Projection
    """The CLS tokens, through their head."""
    masked_projection: Projection
    """The masked patch tokens, through theirs."""


class DistillationModel(EncoderWithHeads):
    """An encoder with its DINO and iBOT heads; student and teacher are each one of these.

    Args:
        encoder: used as it is, not copied.
        head: the shape of each head.
        shared_head: one for CLS and patches, or two.
        drop_path: how often a residual branch of an image is skipped.
        seed: of the heads' first weights.
    """

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
        """Crops as tokens, the masked patches replaced by the mask token."""
        return self.encoder.embed(views.pixels, views.contrast_mask, bool_masked_pos=masked)

    def project_cls(self, tokens: Float[Tensor, "m T D"]) -> Projection:
        """The CLS tokens of encoded crops, through their head."""
        return self.heads["dino"](self.encoder.encoding(tokens).cls)

    def project(self, tokens: Float[Tensor, "m T D"], masked: Int[Tensor, "M"]) -> DistillationOutput:
        """Encoded global crops through both heads; `masked` are positions in the flattened (m · P) patches."""
        cls, patches, _ = self.encoder.encoding(tokens)
        hidden = patches.flatten(0, 1).index_select(0, masked)
        return DistillationOutput(cls, patches, self.heads["dino"](cls), self.ibot_head(hidden))


@torch.no_grad()
def ema_update(averages: Iterable[Tensor], values: Iterable[Tensor], weight: Float[Tensor, ""]) -> None:
    """average ← average + weight · (value − average), in place, without waiting for the weight's value.

    An average that equals its value stays as it is to the last bit, and so do all where the weight is 0.

    Args:
        averages, values: in the same order; of sharded tensors each rank moves its own slice.
        weight: on the device of the tensors.
    """
    old, new = to_local_tensors(averages), to_local_tensors(values)
    if not old or old[0].device.type == "cpu":
        for average, value in zip(old, new, strict=True):
            average.lerp_(value, weight.to(average.dtype))
        return
    # A GPU would spend its time on launching one small operation per tensor.
    for first in range(0, len(old), _FOREACH_CHUNK):
        some = old[first : first + _FOREACH_CHUNK]
        differences = torch._foreach_sub(new[first : first + _FOREACH_CHUNK], some)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(some, differences)
