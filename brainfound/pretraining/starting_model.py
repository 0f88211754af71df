"""The model that pretraining starts from (a Hub ViT, a BrainFound model, or new weights), and its trained part.

Parameters that the checkpoint lacks (mask token and contrast embeddings here, heads in the objectives) are
always trained: frozen noise is useless.

Axis legend: ``R`` rank, ``I`` width into a matrix, ``O`` width out of it.

Sources: LoRA (arXiv 2106.09685) for the updates; ExPLoRA (2406.10973, section 4) for continued pretraining with them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers import AutoConfig

from brainfound.adapters.attach import Roles, resolve_targets, unfreeze_last_blocks
from brainfound.data.store import Store
from brainfound.errors import RecipeError
from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.models.backbones import SUPPORTED_BACKBONES, load_backbone_config
from brainfound.models.encoder import SliceEncoder
from brainfound.models.loading import is_brainfound, load_initial_model
from brainfound.recipes import Recipe
from brainfound.training.optim import NEW_TOKENS
from brainfound.training.randomness import INITIALISATION, derive_seed, torch_generator

FROM_SCRATCH = "none"
_ADAPTER = "default"
# Random streams of the model and of updates, apart from those of heads and decoders, which count from 0.
_MODEL_STREAM, _ADAPTER_STREAM = 1000, 2000


class ScratchRecipe(Recipe):
    """The new ViT of ``init.source: none``."""

    hidden_size: int = Field(default=384, ge=1)
    """Embedding width."""
    num_layers: int = Field(default=12, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(default=6, ge=1)
    """Attention heads; the width must be a multiple of this."""
    patch_size: int = Field(default=14, ge=1)
    """Side of a patch in pixels."""
    layer_scale: float = Field(default=1.0, gt=0)
    """Initial scale of each residual branch."""


class InitRecipe(Recipe):
    source: str = "facebook/dinov2-small"
    """A Hub id or a folder of a DINOv2 or supervised ViT, a BrainFound export folder, or "none" for new weights."""
    scratch: ScratchRecipe = ScratchRecipe()
    """The size of the new ViT when the source is "none"."""


def build_model(recipe: InitRecipe, store: Store, image_size: int, seed: int) -> BrainFoundModel:
    """The starting model, on the CPU, the same on all ranks.

    Raises:
        ModelError, UsageError: if the source cannot be used, or its stem or contrasts do not fit.
        RecipeError: if the size of the new ViT is invalid.
    """
    # New weights (a whole ViT, or an aggregator) are drawn from the global generator by the library.
    torch.manual_seed(derive_seed(INITIALISATION, seed, _MODEL_STREAM))
    if recipe.source == FROM_SCRATCH:
        return BrainFoundModel(_scratch_config(recipe.scratch, store, image_size))
    model = load_initial_model(BrainFoundModel, recipe.source, store.contrasts)
    model.encoder.require_single_slices()
    return model


def build_meta_model(recipe: InitRecipe, store: Store, image_size: int) -> BrainFoundModel:
    """`build_model` on the meta device: weights without memory or values."""
    if recipe.source == FROM_SCRATCH:
        config = _scratch_config(recipe.scratch, store, image_size)
    elif is_brainfound(recipe.source):
        config = BrainFoundConfig.from_pretrained(recipe.source)
    else:
        backbone = load_backbone_config(recipe.source)
        config = BrainFoundConfig(backbone_config=backbone, contrasts=store.contrasts, backbone_source=None)
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


class TrainedPartRecipe(Recipe):
    """The part of the encoder that is trained."""

    part: Literal["full", "last_blocks", "lora"] = "full"
    """"full" trains everything; "last_blocks" the last `blocks` and the last norm; "lora" the last `blocks`, all norms,
    and low-rank updates of the frozen blocks (ExPLoRA). Mask token, contrast embeddings and heads always learn."""
    blocks: int = Field(default=1, ge=0)
    """How many of the last blocks are trained in full; without effect when the part is "full"."""
    rank: int = Field(default=64, ge=1, le=1024)
    """Rank of each update."""
    alpha: float = Field(default=64.0, gt=0)
    """Scale of the updates: alpha / rank."""
    roles: Roles = ("query", "value")
    """The matrices of the frozen blocks that get an update: query, key, value, output, mlp_in, mlp_out."""

    @field_validator("roles")
    @classmethod
    def _roles_of_blocks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "patch" in value:
            raise ValueError("the patch embedding belongs to no block; leave out patch")
        return value

    def ignored_keys(self) -> list[str]:
        """The changed keys that have no effect with this part."""
        ignored = {"full": ("blocks", "rank", "alpha", "roles"), "last_blocks": ("rank", "alpha", "roles"), "lora": ()}
        fields = type(self).model_fields
        return [key for key in ignored[self.part] if getattr(self, key) != fields[key].default]

    def describe(self, num_layers: int) -> str:
        """The trained part of an encoder of `num_layers` blocks, for a model card."""
        if self.part == "full":
            return "all of the encoder"
        kept = f"the last {self.blocks} of {num_layers} blocks"
        if self.part == "last_blocks":
            return f"{kept}, the last norm, mask token and contrast embeddings"
        updates = f"updates of rank {self.rank} of {', '.join(self.roles)} in the other blocks"
        return f"{kept}, all norms, mask token, contrast embeddings, and {updates} (ExPLoRA), merged into the weights"


def select_trainable_part(encoder: SliceEncoder, recipe: TrainedPartRecipe, seed: int) -> SliceEncoder:
    """An encoder in which only the trained part requires gradients: the encoder itself for "full", else a copy.

    "lora" adds updates B·A, with B = 0 at first. RecipeError if the encoder has too few blocks.
    """
    if recipe.part == "full":
        return encoder.requires_grad_(True)
    num_frozen = encoder.num_layers - recipe.blocks
    if num_frozen < (1 if recipe.part == "lora" else 0):
        raise RecipeError(
            f"the encoder has {encoder.num_layers} blocks, which leaves none to freeze",
            where="trained.blocks",
            got=recipe.blocks,
            expected=f"at most {encoder.num_layers - (recipe.part == 'lora')}",
            remedy="Lower trained.blocks, or set trained.part=full",
        )
    encoder = copy.deepcopy(encoder).requires_grad_(False)
    if recipe.part == "lora":
        _inject_lora(encoder, recipe, num_frozen, seed)
        for module in encoder.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.requires_grad_(True)
    unfreeze_last_blocks(encoder, recipe.blocks)
    for name, parameter in encoder.named_parameters():
        if any(part in name for part in NEW_TOKENS):
            parameter.requires_grad_(True)
    return encoder


def merge_adapters(encoder: SliceEncoder) -> SliceEncoder:
    """A copy of an encoder with its updates, if it has any, merged into plain matrices."""
    plain = copy.deepcopy(encoder)
    for name, layer in _lora_layers(plain).items():
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    plain.load_state_dict(merged_state_dict(encoder, encoder.state_dict()))
    return plain


@torch.no_grad()
def merged_state_dict(encoder: SliceEncoder, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The (gathered) `state` of an encoder under the names of one without updates: W + (alpha / rank) · B·A."""
    adapted = _lora_layers(encoder)
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        target, _, kind = name.rpartition(".base_layer.")
        if target in adapted and kind == "weight":
            down, up = (state[f"{target}.lora_{part}.{_ADAPTER}.weight"] for part in "AB")  # (R, I), (O, R)
            tensor = tensor + adapted[target].scaling[_ADAPTER] * (up @ down)
        merged[f"{target}.{kind}" if target in adapted else name] = tensor
    return merged


def _lora_layers(encoder: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in encoder.named_modules() if isinstance(module, LoraLayer)}


def _inject_lora(encoder: SliceEncoder, recipe: TrainedPartRecipe, num_frozen: int, seed: int) -> None:
    """Add updates to the first `num_frozen` blocks, in place."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        target_modules=resolve_targets(encoder, recipe.roles, range(1, num_frozen + 1)),
        task_type=None,
    )
    inject_adapter_in_model(config, encoder, _ADAPTER)
    generator = torch_generator(INITIALISATION, seed, _ADAPTER_STREAM)
    for layer in _lora_layers(encoder).values():
        # As in PEFT, but not from the global generator, whose state differs between ranks.
        nn.init.kaiming_uniform_(layer.lora_A[_ADAPTER].weight, a=math.sqrt(5), generator=generator)
