"""Adapter recipes: which weights of a model are trained, and how.

Recipes name roles ("query", "mlp_in") rather than modules, because module names differ between families of ViTs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, Self

from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import AfterValidator, Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from brainfound.adapters.low_rank import attach_principal
from brainfound.errors import ModelError, RecipeError, did_you_mean
from brainfound.models import BrainFoundForSegmentation
from brainfound.models.encoder import SliceEncoder
from brainfound.recipes import Recipe

ROLES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "output": ("o_proj",),
    "mlp_in": ("fc1", "gate_proj", "up_proj"),
    "mlp_out": ("fc2", "down_proj"),
    "patch": ("patch_embeddings.projection",),
}
"""Role → possible endings of the names of its modules, across all families."""
_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def require_known_roles(roles: Iterable[str]) -> None:
    for role in roles:
        if role not in ROLES:
            raise RecipeError(f"unknown role {role!r}", where="roles", remedy=did_you_mean(role, ROLES))


def _validate_roles(roles: tuple[str, ...]) -> tuple[str, ...]:
    if not roles:
        raise ValueError("at least one role is needed")
    try:
        require_known_roles(roles)
    except RecipeError as error:
        raise ValueError(error.reason) from None
    return roles


Roles = Annotated[tuple[str, ...], AfterValidator(_validate_roles)]
"""Roles in a recipe: at least one, all known."""


def resolve_targets(model: nn.Module, roles: Iterable[str], layers: Iterable[int] | None = None) -> list[str]:
    """The full names of the modules with the given roles in a BrainFound model, a slice encoder, or a plain ViT.

    `layers` are 1-based blocks, None for all. The patch embedding belongs to no block and is always kept.

    Raises:
        RecipeError: if a role is unknown.
        ModelError: if a role, or a block, has no module in this model.
    """
    roles = list(roles)
    require_known_roles(roles)
    prefix = _backbone_prefix(model)
    candidates = [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    blocks = {number for name in candidates if (number := block_number(name)) is not None}
    wanted = blocks if layers is None else set(layers)
    if wanted - blocks:
        expected = f"1 to {max(blocks, default=0)}"
        raise ModelError(f"the backbone has no block {sorted(wanted - blocks)}", where="layers", expected=expected)
    targets: list[str] = []
    for role in roles:
        endings = tuple(f".{ending}" for ending in ROLES[role])
        kept = [n for n in candidates if f".{n}".endswith(endings) and block_number(n) in {None, *wanted}]
        if not kept:
            remedy = "Choose another role, or check that the model is a supported ViT without an adapter"
            raise ModelError(f"no module of {type(model).__name__} has the role {role!r}", where="roles", remedy=remedy)
        targets += kept
    return sorted(set(targets), key=candidates.index)


def block_number(name: str) -> int | None:
    """The 1-based block that a module belongs to, or None.

    >>> block_number("encoder.layer.0.attention.q_proj"), block_number("embeddings.cls")
    (1, None)
    """
    match = _BLOCK.search(name)
    return None if match is None else int(match.group(1)) + 1


def _backbone_prefix(model: nn.Module) -> str:
    """The name prefix of the ViT: aggregators and decoders have projections of their own, which are trained in full."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "backbone" and isinstance(module, PreTrainedModel):
            return f"{name}."
    return ""


Method = Literal["none", "lora", "dora", "rslora", "pissa", "last_blocks", "full"]


class AdapterRecipe(Recipe):
    """The trained part of a model in fine-tuning."""

    method: Method = "lora"
    """"none" trains the head alone, "full" everything, "last_blocks" the last blocks and the last norm; "lora" (Hu et
    al. 2021), "dora" (Liu et al. 2024), "rslora" (Kalajdzievski 2023) and "pissa" (Meng et al. 2024, updates that start
    as the principal part of the weights) train low-rank updates of the backbone and the head."""
    roles: Roles = ("query", "value")
    """The weight matrices that get an update: query, key, value, output, mlp_in, mlp_out, patch."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Rank of each update."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale of the updates: alpha/rank, for rslora alpha/sqrt(rank)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before each update; not with pissa, whose updates hold the principal part of the weights."""
    layers: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """1-based blocks that get updates; null means all."""
    blocks: Annotated[int, Field(ge=1)] = 2
    """The number of last blocks that the method last_blocks trains; other methods ignore it."""
    train_contrast_embedding: bool = True
    """Also train the stem's embedding of each contrast, with low-rank updates and last_blocks; "full" always does.
    Gradients must then flow through all blocks."""

    @model_validator(mode="after")
    def _principal_parts_exist(self) -> Self:
        if self.method == "pissa" and self.dropout:
            raise ValueError("dropout would take out the greater part of the weights; set dropout to 0 with pissa")
        if self.method == "pissa" and "patch" in self.roles:
            raise ValueError("pissa splits matrices, and patch is a convolution; leave out patch, or use lora")
        return self


class ParameterCount(NamedTuple):
    """The numbers of trained and of all parameters of a model."""

    trainable: int
    total: int


def attach_adapter(model: nn.Module, recipe: AdapterRecipe) -> Any:
    """Freeze a BrainFound model or slice encoder except for the part that a recipe trains.

    The task's aggregator, head and decoder are always trained in full. With the low-rank methods the result is a
    `peft.PeftModel` around `model` with the same outputs; otherwise it is `model` itself.

    Raises:
        ModelError: if the model already has an adapter, or has no module for a role.
        RecipeError: if the model has fewer blocks or smaller matrices than the recipe needs, or the decoder reads none
            of the trained blocks.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, PeftModel) for module in model.modules()):
        raise ModelError("the model already has an adapter", remedy="Attach to the model that it was made from")
    task_modules = _task_modules(model)
    if recipe.method == "full":
        model.requires_grad_(True)
        _freeze_idle(model)
        return model
    model.requires_grad_(False)
    if recipe.method != "none" and recipe.train_contrast_embedding:
        task_modules += [name for name, _ in model.named_modules() if name.endswith(".contrast_embedding")]
    if recipe.method not in ("none", "last_blocks"):
        return _attach_updates(model, recipe, task_modules)
    if recipe.method == "last_blocks":
        unfreeze_last_blocks(_encoder(model), recipe.blocks)
    for name in task_modules:
        model.get_submodule(name).requires_grad_(True)
    _freeze_idle(model)
    if recipe.method == "last_blocks" and not any(p.requires_grad for p in _encoder(model).blocks.parameters()):
        text = "the decoder reads none of the last blocks: they would learn nothing"
        remedy = "Train more blocks, or decode later ones (decoder_layers)"
        raise RecipeError(text, where="blocks", got=recipe.blocks, remedy=remedy)
    return model


def _attach_updates(model: nn.Module, recipe: AdapterRecipe, task_modules: list[str]) -> PeftModel:
    targets = resolve_targets(model, recipe.roles, recipe.layers)
    # No task type: it would wrap the forward pass for text models and break calls with pixel_values.
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout,
        use_dora=recipe.method == "dora",
        use_rslora=recipe.method == "rslora",
        init_lora_weights="pissa" if recipe.method == "pissa" else True,
        target_modules=targets,
        modules_to_save=task_modules or None,
    )
    if recipe.method == "pissa":
        return attach_principal(model, config, targets)
    return get_peft_model(model, config)  # type: ignore[arg-type, return-value]


def unfreeze_last_blocks(encoder: SliceEncoder, num_blocks: int) -> None:
    """Train the last blocks of an encoder and its last norm; a RecipeError if there are fewer blocks."""
    if num_blocks > encoder.num_layers:
        expected, remedy = f"at most {encoder.num_layers}", "Lower blocks, or use the method full"
        text = "the encoder has fewer blocks"
        raise RecipeError(text, where="blocks", got=num_blocks, expected=expected, remedy=remedy)
    for block in encoder.blocks[encoder.num_layers - num_blocks :]:
        block.requires_grad_(True)
    encoder.norm.requires_grad_(True)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trained and total parameters; a weight that an adapter keeps twice, frozen and trained, counts twice."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def _task_modules(model: nn.Module) -> list[str]:
    """The full names of the modules outside the encoder that have weights which the outputs depend on."""
    used = {"decoder"} if isinstance(model, BrainFoundForSegmentation) else {"aggregator", "head", "decoder"}
    return [
        name
        for name, module in model.named_modules()
        if name.removeprefix("brainfound.") in used and any(True for _ in module.parameters())
    ]


def _freeze_idle(model: nn.Module) -> None:
    """Freeze weights that no output depends on: distributed training would wait for their gradients in vain."""
    encoder = _encoder(model)
    encoder.backbone.embeddings.mask_token.requires_grad_(False)
    if isinstance(model, BrainFoundForSegmentation):
        unread = encoder.blocks[max(model.config.resolved_decoder_layers) :]
        for module in (*unread, encoder.norm, model.brainfound.aggregator):
            module.requires_grad_(False)


def _encoder(model: Any) -> SliceEncoder:
    return model if isinstance(model, SliceEncoder) else model.encoder
