"""Masked autoencoding: the encoder sees a quarter of a crop's patches, a light decoder predicts the others.

Axis legend: ``n`` crops (one per slice), ``C`` contrasts, ``H W`` pixels, ``P`` patches, ``V`` visible
and ``M`` masked ones, ``D`` width, ``p`` side of a patch in pixels.

Source: MAE (arXiv 2111.06377). Ours: target pixels are normalised per patch and contrast, missing contrasts are no
targets, every crop has equal weight however many contrasts it shows, and the frozen starting checkpoint, which sees the
same visible patches, is the anchor.
"""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from brainfound.data.augmentation import MultiCrop, Views, ViewsRecipe
from brainfound.data.augmentation.transforms import to_device
from brainfound.errors import RecipeError
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.base import (
    AnchoredObjective,
    AnchorRecipe,
    LossAndMetrics,
    StepFlops,
    encoder_flops,
    matmul_flops,
)
from brainfound.pretraining.objectives.losses import at_least_float32
from brainfound.pretraining.objectives.masking import num_hidden_patches, sample_hidden_patches
from brainfound.pretraining.objectives.networks import EncoderWithHeads, PixelDecoder, PixelDecoderRecipe
from brainfound.pretraining.slices import PretrainBatch
from brainfound.recipes import Recipe
from brainfound.training.randomness import INITIALISATION, MASKS, VIEWS, StepKey, numpy_generator, torch_generator

_DECODER_STREAM = 100  # apart from the streams of projection heads, which count from 0
_STEP_STREAM = 2  # apart from the views and masks of self-distillation, with which this may run
MIN_VARIANCE = 1e-6  # as in MAE; patches of air have no variance


class ReconstructionRecipe(Recipe):
    """How many patches are hidden, and the decoder that predicts them."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Fraction of a crop's patches that the encoder does not see."""
    normalise_targets: bool = True
    """Whether the target pixels of each patch and contrast are normalised to mean 0 and variance 1."""
    decoder: PixelDecoderRecipe = PixelDecoderRecipe()
    """Size of the decoder."""


class MaskedAutoencoderRecipe(ReconstructionRecipe, AnchorRecipe):
    """Masked autoencoding alone."""

    kind: Literal["masked_autoencoder"] = "masked_autoencoder"
    """Names the objective."""


class MaskedViews(NamedTuple):
    """One crop of each slice, and its visible and hidden patches; the fields are arguments of `reconstruct`."""

    pixels: Float[Tensor, "n C H W"]
    contrast_mask: Bool[Tensor, "n C"]
    kept: Int[Tensor, "n V"]
    hidden: Int[Tensor, "n M"]


class Reconstruction(NamedTuple):
    cls: Float[Tensor, "n D"]
    visible: Float[Tensor, "n V D"]
    patches: Float[Tensor, "n M C·p²"]


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
        present = contrast_mask.to(error.dtype)
        return ((error * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)).mean()


def encode_visible(
    encoder: SliceEncoder,
    pixels: Float[Tensor, "n C H W"],
    contrast_mask: Bool[Tensor, "n C"],
    kept: Int[Tensor, "n V"],
) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n V D"]]:
    """(CLS, patches) of crops of which only the kept patches go through the blocks."""
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
    cls, visible = encode_visible(encoder, pixels, contrast_mask, kept)
    return Reconstruction(cls, visible, decoder(cls, visible, kept, hidden))


class PatchMasking:
    """Crops with hidden patches (one per slice, like the first global one), their decoder, and the loss.

    Raises:
        RecipeError: if crops do not fit the encoder's patch size, or have one patch only.
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
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_hidden = num_hidden_patches(self.num_patches, recipe.mask_ratio)
        self.num_visible = self.num_patches - self.num_hidden
        self.crop = MultiCrop(views.model_copy(update={"num_local": 0}), encoder.patch_size, num_global=1)

    def views(self, batch: PretrainBatch, key: StepKey) -> MaskedViews:
        device = batch.pixels.device
        large: Views = self.crop(
            batch.pixels,
            batch.present_on_cpu,
            torch_generator(VIEWS, key.seed, *key.keys, _STEP_STREAM),
            torch_generator(VIEWS, key.seed, *key.keys, _STEP_STREAM + 1, device=device),
        ).global_views
        rng = numpy_generator(MASKS, key.seed, *key.keys, _STEP_STREAM)
        patches = sample_hidden_patches(len(large.pixels), self.num_patches, self.num_hidden, rng)
        return MaskedViews(large.pixels, large.contrast_mask, *(to_device(part, device) for part in patches))

    def loss(self, reconstruction: Reconstruction, views: MaskedViews) -> Float[Tensor, ""]:
        patches = patchify(views.pixels, self.patch_size)
        target = patches.gather(1, views.hidden[..., None, None].expand(-1, -1, *patches.shape[2:]))
        return reconstruction_loss(reconstruction.patches, target, views.contrast_mask, self.recipe.normalise_targets)

    def make_decoder(self, encoder: SliceEncoder, seed: int) -> PixelDecoder:
        """A new decoder, the same on all ranks."""
        num_outputs = len(encoder.contrasts) * self.patch_size**2
        decoder = PixelDecoder(encoder.embed_dim, self.grid, num_outputs, self.recipe.decoder)
        decoder.initialise(torch_generator(INITIALISATION, seed, _DECODER_STREAM))
        return decoder

    def describe(self) -> str:
        return f"{self.recipe.mask_ratio:.0%} of the patches hidden"

    def flops(self, encoder: SliceEncoder, decoder: nn.Module, num_slices: int) -> float:
        """FLOPs of encoder and decoder, forward and backward."""
        assert isinstance(decoder, PixelDecoder)
        num_kept, num_tokens = self.num_visible, 1 + self.num_patches
        flops = encoder_flops(encoder, num_slices, self.num_patches, num_visible_patches=num_kept, backward=True)
        flops += matmul_flops(decoder.embed, num_slices * (1 + num_kept), backward=True)
        flops += matmul_flops(decoder.blocks, num_slices * num_tokens, backward=True)
        flops += 12.0 * num_slices * num_tokens**2 * decoder.embed.out_features * len(decoder.blocks)
        return flops + matmul_flops(decoder.predict, num_slices * self.num_hidden, backward=True)


class MaskedAutoencoder(AnchoredObjective):
    """A copy of an encoder that predicts hidden patches, and its anchor; the trained encoder is exported."""

    recipe_class = MaskedAutoencoderRecipe
    uses_multi_crop = False
    recipe: MaskedAutoencoderRecipe
    student: EncoderWithHeads

    def __init__(
        self, encoder: SliceEncoder, recipe: MaskedAutoencoderRecipe, views: ViewsRecipe, num_steps: int, seed: int
    ) -> None:
        student = copy.deepcopy(encoder)
        # Hidden patches do not enter the encoder, so its own mask token would never get a gradient.
        student.backbone.embeddings.mask_token.requires_grad_(False)
        self.patch_masking = PatchMasking(encoder, recipe, views)
        self.student = EncoderWithHeads(student, {"decoder": self.patch_masking.make_decoder(encoder, seed)})
        super().__init__(encoder, recipe, views, num_steps, seed)
        self._gram_distance: Tensor | None = None

    def compute_loss(self, student: EncoderWithHeads, batch: PretrainBatch, key: StepKey) -> LossAndMetrics:
        views = self.patch_masking.views(batch, key)
        output = reconstruct(student.encoder, student.heads["decoder"], *views)
        loss = self.patch_masking.loss(output, views)
        metrics = {"loss_reconstruction": loss.detach()}
        if self.anchor is not None:
            with torch.no_grad():  # the starting checkpoint sees the same patches
                cls, visible = encode_visible(self.anchor, views.pixels, views.contrast_mask, views.kept)
            for name, part in self.anchor_losses(output.visible, output.cls, visible, cls).items():
                loss = loss + getattr(self.recipe, f"{name}_weight") * part
                metrics[f"loss_{name}"] = part.detach()
        self.last_cls, self._gram_distance = output.cls.detach(), metrics.get("loss_anchor_gram")
        return loss, metrics

    def describe(self) -> str:
        return f"masked autoencoding ({self.patch_masking.describe()}{self.describe_anchor()})"

    @torch.no_grad()
    def health_metrics(self) -> dict[str, float]:
        """Collapse metrics of the last batch's CLS tokens; without prototypes, no entropy and no ln K."""
        distance = {} if self._gram_distance is None else {"gram_distance": self._gram_distance.item()}
        return super().health_metrics() | distance

    def flops(self, num_slices: int) -> StepFlops:
        own = self.patch_masking.flops(self.student.encoder, self.student.heads["decoder"], num_slices)
        anchor = self.anchor_flops(num_slices, self.patch_masking.num_patches, self.patch_masking.num_visible)
        return StepFlops(own) + anchor
