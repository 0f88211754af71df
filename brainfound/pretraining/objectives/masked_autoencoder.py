"""Masked autoencoding: the encoder sees a quarter of a crop's patches, a light decoder draws the rest.

Axis legend: ``n`` crops (one per slice), ``C`` contrasts, ``H W`` pixels, ``P`` patches, ``V`` visible
and ``M`` masked ones, ``D`` width, ``p`` side of a patch in pixels.

Source: MAE (arXiv 2111.06377). What is ours is made for scans of several contrasts: the pixels of a
patch are normalised per contrast, a contrast that a crop does not show is no target, every crop
weighs alike however many contrasts it shows, and a run that continues from released weights is anchored
to them: the frozen starting checkpoint looks at the same visible patches.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from brainfound.data.augmentation import MultiCrop, Views, ViewsRecipe
from brainfound.data.augmentation.sampling import to_device
from brainfound.errors import RecipeError
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.monitoring.collapse_metrics import feature_health_metrics
from brainfound.pretraining.objectives.anchor import AnchorRecipe, anchor_losses
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.heads import PixelDecoder, PixelDecoderRecipe
from brainfound.pretraining.objectives.losses import at_least_float32
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.starting_model import merge_adapters
from brainfound.recipes import Recipe
from brainfound.training import distributed as ranks
from brainfound.training.randomness import INITIALISATION, MASKS, VIEWS, StepKey, numpy_generator, torch_generator

_DECODER_STREAM = 100  # apart from the streams of projection heads, which count from 0
_STEP_STREAM = 2  # apart from the views and masks of self-distillation, beside which this may run
MIN_VARIANCE = 1e-6  # MAE's; patches of air have none


class ReconstructionRecipe(Recipe):
    """What is hidden, and what draws it."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Part of a crop's patches that the encoder does not see."""
    normalise_targets: bool = True
    """Whether the pixels of each patch and contrast are brought to mean 0 and variance 1 before they are compared."""
    decoder: PixelDecoderRecipe = PixelDecoderRecipe()
    """The decoder."""


class MaskedAutoencoderRecipe(ReconstructionRecipe, AnchorRecipe):
    """Masked autoencoding alone."""

    kind: Literal["masked_autoencoder"] = "masked_autoencoder"
    """Names the objective."""


class PatchSplit(NamedTuple):
    """Which patches of each crop the encoder sees, both in increasing order."""

    kept: Int[Tensor, "n V"]
    hidden: Int[Tensor, "n M"]


class MaskedViews(NamedTuple):
    """What a forward pass needs of a batch; the fields are the arguments of `reconstruct`."""

    pixels: Float[Tensor, "n C H W"]
    contrast_mask: Bool[Tensor, "n C"]
    kept: Int[Tensor, "n V"]
    hidden: Int[Tensor, "n M"]


class Reconstruction(NamedTuple):
    """What the student answers."""

    cls: Float[Tensor, "n D"]
    visible: Float[Tensor, "n V D"]
    patches: Float[Tensor, "n M C·p²"]


def num_hidden_patches(num_patches: int, ratio: float) -> int:
    """How many patches of a crop are hidden: at least one, and not all."""
    return min(max(round(num_patches * ratio), 1), num_patches - 1)


def sample_hidden_patches(num_crops: int, num_patches: int, num_hidden: int, rng: np.random.Generator) -> PatchSplit:
    """Hide the same number of patches, at random places, in each crop."""
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(num_patches), (num_crops, 1)), axis=1))
    hidden, kept = order[:, :num_hidden], order[:, num_hidden:]
    return PatchSplit(kept.sort(dim=1).values, hidden.sort(dim=1).values)


def patchify(pixels: Float[Tensor, "n C H W"], patch_size: int) -> Float[Tensor, "n P C p²"]:
    """The pixels of each patch, patches row by row as the encoder orders them."""
    return rearrange(pixels, "n c (rows p) (cols q) -> n (rows cols) c (p q)", p=patch_size, q=patch_size)


def reconstruction_loss(
    predicted: Float[Tensor, "n M C·p²"],
    target: Float[Tensor, "n M C p²"],
    contrast_mask: Bool[Tensor, "n C"],
    normalise: bool = True,
) -> Float[Tensor, ""]:
    """Mean squared error over the hidden patches of the contrasts that a crop shows, then over crops.

    Source: MAE, section 3; normalised targets as in its "reconstruction target".
    """
    with torch.autocast(predicted.device.type, enabled=False):
        target = at_least_float32(target)
        if normalise:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + MIN_VARIANCE).sqrt()
        error = (at_least_float32(predicted).view_as(target) - target).square().mean(dim=(1, 3))
        shown = contrast_mask.to(error.dtype)
        return ((error * shown).sum(dim=1) / shown.sum(dim=1).clamp(min=1)).mean()


def encode_visible(
    encoder: SliceEncoder,
    pixels: Float[Tensor, "n C H W"],
    contrast_mask: Bool[Tensor, "n C"],
    kept: Int[Tensor, "n V"],
) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n V D"]]:
    """(CLS, patches) of the patches that are kept; only they go through the blocks."""
    tokens = encoder.embed(pixels, contrast_mask)
    prefix, patches = tokens.tensor_split([encoder.num_prefix_tokens], dim=1)
    patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
    (encoded,) = encoder.transform([torch.cat([prefix, patches], dim=1)])
    return encoded[:, 0], encoded[:, encoder.num_prefix_tokens :]


def reconstruct(
    encoder: SliceEncoder,
    decoder: nn.Module,
    pixels: Float[Tensor, "n C H W"],
    contrast_mask: Bool[Tensor, "n C"],
    kept: Int[Tensor, "n V"],
    hidden: Int[Tensor, "n M"],
) -> Reconstruction:
    """Encode the patches that are kept, and decode the hidden ones."""
    cls, visible = encode_visible(encoder, pixels, contrast_mask, kept)
    return Reconstruction(cls, visible, decoder(cls, visible, kept, hidden))


class EncoderWithDecoder(nn.Module):
    """An encoder with a pixel decoder."""

    def __init__(self, encoder: SliceEncoder, decoder: PixelDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({"decoder": decoder})

    def forward(self, *views: Tensor) -> Reconstruction:
        return reconstruct(self.encoder, self.heads["decoder"], *views)


class PatchMasking:
    """Turns slices into crops with hidden patches, and compares an answer with what was hidden.

    Args:
        encoder: gives the patch size.
        recipe: what is hidden.
        views: how crops are made: as the global ones, one of each slice.

    Raises:
        RecipeError: if crops do not fit the patch size, or have one patch only.
    """

    def __init__(self, encoder: SliceEncoder, recipe: ReconstructionRecipe, views: ViewsRecipe) -> None:
        self.recipe = recipe
        self.patch_size = encoder.patch_size
        self.grid = (views.global_size // encoder.patch_size,) * 2
        if self.grid == (1, 1):
            raise RecipeError(
                "a crop of one patch cannot be hidden in part",
                where="views.global_size",
                got=views.global_size,
                expected=f"at least {2 * encoder.patch_size}",
                remedy=f"Set views.global_size={2 * encoder.patch_size} or more",
            )
        self.num_hidden = num_hidden_patches(self.grid[0] * self.grid[1], recipe.mask_ratio)
        self.crop = MultiCrop(views.model_copy(update={"num_local": 0}), encoder.patch_size, num_global=1)

    def views(self, batch: PretrainBatch, key: StepKey) -> MaskedViews:
        """One crop of each slice, and what is hidden of it: a function of the key."""
        device = batch.pixels.device
        large: Views = self.crop(
            batch.pixels,
            batch.present_on_cpu,
            torch_generator(VIEWS, key.seed, *key.keys, _STEP_STREAM),
            torch_generator(VIEWS, key.seed, *key.keys, _STEP_STREAM + 1, device=device),
        ).global_views
        patches = sample_hidden_patches(
            len(large.pixels),
            self.grid[0] * self.grid[1],
            self.num_hidden,
            numpy_generator(MASKS, key.seed, *key.keys, _STEP_STREAM),
        )
        return MaskedViews(
            large.pixels,
            large.contrast_mask,
            to_device(patches.kept, device),
            to_device(patches.hidden, device),
        )

    def loss(self, answer: Reconstruction, views: MaskedViews) -> Float[Tensor, ""]:
        """How far an answer is from the hidden pixels."""
        patches = patchify(views.pixels, self.patch_size)
        target = patches.gather(1, views.hidden[..., None, None].expand(-1, -1, *patches.shape[2:]))
        return reconstruction_loss(answer.patches, target, views.contrast_mask, self.recipe.normalise_targets)

    def make_decoder(self, encoder: SliceEncoder, seed: int) -> PixelDecoder:
        """A new decoder that fits the encoder and the crops, the same on all ranks."""
        num_outputs = len(encoder.contrasts) * self.patch_size**2
        decoder = PixelDecoder(encoder.embed_dim, self.grid, num_outputs, self.recipe.decoder)
        decoder.initialise(torch_generator(INITIALISATION, seed, _DECODER_STREAM))
        return decoder


class MaskedAutoencoder(Objective):
    """An encoder that learns by filling in, and its anchor; there is no teacher, so the student is exported.

    Args:
        encoder: the starting checkpoint, with its trained part chosen; it is copied, not changed.
        recipe: what is hidden, and what draws it.
        views: how crops are made.
        seed: initialises the decoder.

    Raises:
        RecipeError: if crops do not fit the patch size, or have one patch only.
    """

    student: EncoderWithDecoder

    def __init__(self, encoder: SliceEncoder, recipe: MaskedAutoencoderRecipe, views: ViewsRecipe, seed: int) -> None:
        self.recipe = recipe
        student = copy.deepcopy(encoder)
        # Hidden patches do not enter the encoder, so its own mask token would wait for a gradient in vain.
        student.backbone.embeddings.mask_token.requires_grad_(False)
        self.patch_masking = PatchMasking(encoder, recipe, views)
        self.student = EncoderWithDecoder(student, self.patch_masking.make_decoder(encoder, seed))
        self.anchor = merge_adapters(encoder).requires_grad_(False).eval() if recipe.anchored else None
        self._last: tuple[Tensor, dict[str, Tensor]] | None = None

    @property
    def exported_encoder(self) -> SliceEncoder:
        """The student's encoder."""
        return self.student.encoder

    def frozen_modules(self) -> list[nn.Module]:
        return [] if self.anchor is None else [self.anchor]

    def to(self, device: torch.device) -> None:
        if self.anchor is not None:
            self.anchor.to(device)

    def loss(self, student: nn.Module, batch: PretrainBatch, key: StepKey) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.patch_masking.views(batch, key)
        answer = student(*views)
        loss = self.patch_masking.loss(answer, views)
        metrics = {"loss_reconstruction": loss.detach()}
        for name, part in self._anchor_parts(answer, views).items():
            loss = loss + getattr(self.recipe, f"{name}_weight") * part
            metrics[f"loss_{name}"] = part.detach()
        self._last = answer.cls.detach(), metrics
        return loss, metrics

    def _anchor_parts(self, answer: Reconstruction, views: MaskedViews) -> dict[str, Tensor]:
        """The distances to the starting checkpoint, which sees the same patches."""
        if self.anchor is None:
            return {}
        with torch.no_grad():
            cls, visible = encode_visible(self.anchor, views.pixels, views.contrast_mask, views.kept)
        return anchor_losses(self.recipe, answer.visible, answer.cls, visible, cls)

    def after_step(self, step: int, taken: Float[Tensor, ""]) -> None:
        """There is no teacher to move."""

    @torch.no_grad()
    def health_metrics(self) -> dict[str, float]:
        """Gauges of the last batch's CLS tokens; there are no prototypes, so there is no entropy and no ln K."""
        if self._last is None:
            return {}
        cls, metrics = self._last
        health_metrics = feature_health_metrics(ranks.gather_rows(cls.float()))
        if "loss_anchor_gram" in metrics:
            health_metrics["gram_distance"] = metrics["loss_anchor_gram"].item()
        return health_metrics

    def schedule(self, step: int) -> dict[str, float]:
        return {}

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        return {
            "backbone": list(self.student.encoder.parameters()),
            "decoder": list(self.student.heads["decoder"].parameters()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        if self.anchor is None:
            return {}
        return {f"anchor.{name}": tensor for name, tensor in self.anchor.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.anchor is not None:
            self.anchor.load_state_dict({name.removeprefix("anchor."): tensor for name, tensor in state.items()})
        elif state:
            raise KeyError(f"unknown: {', '.join(sorted(state))}")
