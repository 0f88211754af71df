"""The model that pretraining starts from: a Hub ViT, a BrainFound model, or new weights."""

from __future__ import annotations

import torch
from pydantic import Field
from transformers import AutoConfig

from brainfound.data.store import Store
from brainfound.errors import RecipeError
from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.models.backbone import config_of
from brainfound.models.configuration import SUPPORTED_BACKBONES
from brainfound.models.start import is_brainfound, start_from
from brainfound.recipes import Recipe
from brainfound.train.randomness import INITIALISATION, seed_of

FROM_SCRATCH = "none"
_MODEL_STREAM = 1000  # apart from the streams of the heads, which count from 0


class ScratchRecipe(Recipe):
    """The new ViT of ``init.source: none``."""

    hidden_size: int = Field(default=384, ge=1)
    """Width."""
    num_layers: int = Field(default=12, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(default=6, ge=1)
    """Attention heads; the width is a multiple of them."""
    patch_size: int = Field(default=14, ge=1)
    """Side of a patch in pixels."""
    layer_scale: float = Field(default=1.0, gt=0)
    """Initial scale of each residual branch."""


class InitRecipe(Recipe):
    """Where the weights come from."""

    source: str = "facebook/dinov2-small"
    """A Hub id or a folder of a DINOv2 or a supervised ViT, a BrainFound export folder, or "none" for new weights."""
    scratch: ScratchRecipe = ScratchRecipe()
    """The size of the new ViT when the source is "none"."""


def build_model(recipe: InitRecipe, store: Store, image_size: int, seed: int) -> BrainFoundModel:
    """The starting model, on the CPU, the same on all ranks.

    Raises:
        ModelError: if the source cannot be used, or its stem is none to pretrain with.
        UsageError: if it is a BrainFound model with other contrasts than the store.
        RecipeError: if new weights cannot have the size that was asked for.
    """
    source = recipe.source
    # New weights (a whole ViT, or an aggregator) are drawn from the global generator by the library.
    torch.manual_seed(seed_of(INITIALISATION, seed, _MODEL_STREAM))
    if source == FROM_SCRATCH:
        return BrainFoundModel(_scratch_config(recipe.scratch, store, image_size))
    model = start_from(BrainFoundModel, source, store.contrasts)
    model.encoder.require_single_slices()
    return model


def outline_model(recipe: InitRecipe, store: Store, image_size: int) -> BrainFoundModel:
    """The starting model in its sizes only: on the meta device, where a weight takes no memory and has no value.

    Raises:
        ModelError: if the source's configuration cannot be read, or is of another family.
        RecipeError: if new weights cannot have the size that was asked for.
    """
    if recipe.source == FROM_SCRATCH:
        config = _scratch_config(recipe.scratch, store, image_size)
    elif is_brainfound(recipe.source):
        config = BrainFoundConfig.from_pretrained(recipe.source)
    else:
        config = BrainFoundConfig(
            backbone_config=config_of(recipe.source), contrasts=store.contrasts, backbone_source=None
        )
    with torch.device("meta"):
        model = BrainFoundModel(config)
    model.encoder.require_single_slices()
    return model


def _scratch_config(scratch: ScratchRecipe, store: Store, image_size: int) -> BrainFoundConfig:
    if scratch.hidden_size % scratch.num_heads:
        raise RecipeError(
            "the width must be a multiple of the attention heads",
            where="init.scratch.hidden_size",
            got=scratch.hidden_size,
            expected=f"a multiple of {scratch.num_heads}",
        )
    backbone = AutoConfig.for_model(
        SUPPORTED_BACKBONES[0],
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.num_layers,
        num_attention_heads=scratch.num_heads,
        patch_size=scratch.patch_size,
        image_size=image_size,
        layerscale_value=scratch.layer_scale,
    )
    return BrainFoundConfig(backbone_config=backbone, contrasts=store.contrasts, backbone_source=None)
