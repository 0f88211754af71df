"""Roles of a ViT's weight matrices, and the modules that have them.

Adapter recipes name roles ("query", "mlp_in") rather than modules, because module names differ between families.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator
from torch import nn
from transformers import PreTrainedModel

from brainfound.errors import ModelError, RecipeError, did_you_mean

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
