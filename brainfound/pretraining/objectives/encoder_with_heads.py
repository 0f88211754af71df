"""What self-distillation trains: an encoder with heads, and its pass over all crops of a step.

Axis legend: ``m`` crops of a pass, ``T`` tokens of a crop, ``P`` patch tokens of a global crop, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from brainfound.data.augmentation import Views
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.early_gradient import sum_with_eager_backward
from brainfound.pretraining.objectives.heads import HeadRecipe, ProjectionHead
from brainfound.pretraining.objectives.masking import BlockMasks
from brainfound.pretraining.objectives.prototypes import Projection
from brainfound.training.randomness import INITIALISATION, torch_generator


class GlobalPass(NamedTuple):
    """Global crops that the student encodes together, ``m`` of them, and what is masked in them."""

    crops: slice
    masks: BlockMasks
    """Of these crops, on their device."""
    masked: slice
    """Their masked tokens among those of all global crops."""
    unmasked_fraction: float
    """Their part of the crops of which nothing is masked."""


class StudentOutput(NamedTuple):
    """What the losses need of a pass over global crops."""

    cls: Float[Tensor, "m D"]
    patches: Float[Tensor, "m P D"]
    cls_projection: Projection
    """The CLS tokens, through their head."""
    masked_projection: Projection
    """The masked patch tokens, through theirs."""


class StepLosses(NamedTuple):
    """What the student's answers to the views of one step cost."""

    local_loss_parts: Callable[[Projection], dict[str, Tensor]]
    """Of the projected CLS tokens of some local crops of every slice: parts of the loss by their names."""
    global_loss_parts: Callable[[StudentOutput, GlobalPass], dict[str, Tensor]]
    """Of one pass over global crops. The parts of several passes add up."""
    weighted_sum: Callable[[dict[str, Tensor]], Float[Tensor, ""]]
    """The weighted sum of parts."""


class EncoderWithHeads(nn.Module):
    """An encoder with its DINO and iBOT heads; student and teacher are each one of these.

    Args:
        encoder: taken, not copied.
        head: the shape of each head.
        shared_head: one for CLS and patches, or two.
        drop_path: how often a residual branch of an image is skipped.
        seed: of the heads' first weights.
    """

    def __init__(self, encoder: SliceEncoder, head: HeadRecipe, shared_head: bool, drop_path: float, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.drop_path = drop_path
        self.separate_passes = False
        names = ["dino"] if shared_head else ["dino", "ibot"]
        self.heads = nn.ModuleDict({name: ProjectionHead(encoder.embed_dim, head) for name in names})
        self.initialise_heads(seed)

    def initialise_heads(self, seed: int, first_stream: int = 0) -> None:
        """Give the heads new weights, each from a stream of its own."""
        for stream, head in enumerate(self.heads.values(), start=first_stream):
            assert isinstance(head, ProjectionHead)
            head.initialise(torch_generator(INITIALISATION, seed, stream))

    @property
    def ibot_head(self) -> nn.Module:
        return self.heads["ibot"] if "ibot" in self.heads else self.heads["dino"]

    def forward(
        self, large: Views, passes: Sequence[GlobalPass], small: Views | None, losses: StepLosses
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The student's pass over all views; one call, so that data-parallel training sees one forward.

        Where passes are separate, the gradient of each but the last is taken before the next begins.

        Returns:
            The loss, and its parts before weighting, without gradients.
        """
        found: dict[str, Tensor] = {}

        def weighed(parts: dict[str, Tensor]) -> Float[Tensor, ""]:
            for name, part in parts.items():
                found[name] = found.get(name, 0) + part.detach()
            return losses.weighted_sum(parts)

        def local_loss_parts(crops: Views) -> Float[Tensor, ""]:
            (tokens,) = self.encoder.transform([self._embed(crops)], self.drop_path)
            return weighed(self._local_parts(tokens, losses))

        def global_loss_parts(global_pass: GlobalPass, packed: Sequence[Tensor] = ()) -> Float[Tensor, ""]:
            tokens = self._embed(select_views(large, global_pass.crops), global_pass.masks.mask)
            *others, tokens = self.encoder.transform([*packed, tokens], self.drop_path)
            parts = losses.global_loss_parts(self._output(tokens, global_pass.masks), global_pass)
            for other in others:
                parts |= self._local_parts(other, losses)
            return weighed(parts)

        if not self.separate_passes:
            (together,) = passes
            total = global_loss_parts(together, [] if small is None else [self._embed(small)])
            return total, found
        *early, last = passes
        values = [partial(local_loss_parts, crops) for crops in self._local_passes(large, small)]
        values += [partial(global_loss_parts, global_pass) for global_pass in early]
        # The last one begins when those before it have nothing left in memory but their gradients.
        before = sum_with_eager_backward(values, self.parameters())
        return before + global_loss_parts(last), found

    def _local_passes(self, large: Views, small: Views | None) -> list[Views]:
        """The local crops, as many at a time as are no more tokens than one global crop of every slice."""
        if small is None:
            return []
        large_tokens, small_tokens = (
            self.encoder.num_prefix_tokens + views.pixels.shape[-2:].numel() // self.encoder.patch_size**2
            for views in (large, small)
        )
        at_a_time = max(1, large_tokens // small_tokens) * (len(large.pixels) // 2)
        return [select_views(small, slice(at, at + at_a_time)) for at in range(0, len(small.pixels), at_a_time)]

    def _embed(self, views: Views, masked: Bool[Tensor, "m P"] | None = None) -> Float[Tensor, "m T D"]:
        return self.encoder.embed(views.pixels, views.contrast_mask, bool_masked_pos=masked)

    def _output(self, tokens: Float[Tensor, "m T D"], masks: BlockMasks) -> StudentOutput:
        cls, patches, _ = self.encoder.encoding(tokens)
        hidden = patches.flatten(0, 1).index_select(0, masks.indices)
        return StudentOutput(cls, patches, self.heads["dino"](cls), self.ibot_head(hidden))

    def _local_parts(self, tokens: Float[Tensor, "m T D"], losses: StepLosses) -> dict[str, Tensor]:
        return losses.local_loss_parts(self.heads["dino"](self.encoder.encoding(tokens).cls))


def select_views(views: Views, rows: slice) -> Views:
    """Some successive crops."""
    return Views(views.pixels[rows], views.contrast_mask[rows])
