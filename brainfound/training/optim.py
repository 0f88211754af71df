"""Parameter groups and the optimiser.

Sources: layer-wise decay of the learning rate (BEiT, arXiv 2106.08254; ELECTRA, 2003.10555),
patch-embedding × 0.2 as in DINOv2; AdamW (1711.05101). No weight decay on biases, norms and layer scales
as in DINOv2, nor on tokens and positions as in BEiT. The mask token, which released checkpoints leave at
zero, learns like the heads and not like the embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from brainfound.recipes import Recipe
from brainfound.training.distributed import to_full_tensor
from brainfound.training.schedules import Role

_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
_TOKENS = ("cls_token", "register_tokens", "position_embeddings")
_NEW_TOKENS = ("mask_token", "contrast_embedding")
_HEAD = re.compile(r"(?:^|\.)heads?\.")


class OptimRecipe(Recipe):
    """AdamW with layer-wise decay."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate at a global batch of 128; the effective one is lr · sqrt(batch / 128)."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Each block, from the last to the first, learns this much slower than the one above it."""
    patch_embed_scale: float = Field(default=0.2, ge=0, le=1)
    """The patch convolution learns this much slower still."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Constant weight decay of matrices; none on biases, norms, layer scales and tokens."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of AdamW's second moment; 0.99 forgets a bad batch in 100 steps, 0.999 in 1,000."""
    clip_norm: float = Field(default=3.0, gt=0)
    """Largest gradient norm of each sub-module (backbone, each head)."""


@dataclass(frozen=True)
class ParameterSettings:
    """How one parameter learns."""

    role: Role
    lr_scale: float
    decays: bool


def parameter_settings(name: str, parameter: nn.Parameter, num_layers: int, recipe: OptimRecipe) -> ParameterSettings:
    """How a parameter learns, by its name.

    Layer 0 is the embeddings, 1 … `num_layers` the blocks, and the last norm is above them; a layer
    learns at ``layer_decay ** (num_layers + 1 − layer)``. What the checkpoint does not bring (heads,
    mask token, contrast embeddings) is "new" and learns at the full rate from the first step. Low-rank
    updates (LoRA) wait as the backbone does, and then learn at the full rate in every layer.
    """
    is_token = any(part in name for part in (*_TOKENS, *_NEW_TOKENS))
    decays = parameter.ndim > 1 and not is_token
    if _HEAD.search(name):
        return ParameterSettings("last_layer" if "last_layer" in name else "new", 1.0, decays)
    if any(part in name for part in _NEW_TOKENS):
        return ParameterSettings("new", 1.0, decays)
    if ".lora_" in name:
        # Updates start without effect, like heads, but move the backbone: they wait for the heads as it does.
        # No layer decay: the frozen matrix beneath keeps what an early layer knows, and weight decay leads back to it.
        return ParameterSettings("backbone", 1.0, decays)
    block = _BLOCK.search(name)
    if block:
        layer = int(block.group(1)) + 1
    elif "embeddings" in name:
        layer = 0
    else:
        layer = num_layers + 1
    scale = recipe.layer_decay ** (num_layers + 1 - layer)
    if "patch_embeddings" in name:
        scale *= recipe.patch_embed_scale
    return ParameterSettings("backbone", scale, decays)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], num_layers: int, recipe: OptimRecipe
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group; parameters of a group learn alike.

    The engine reads ``role``, ``lr_scale`` and ``decays`` of each group and sets its learning rate
    and weight decay at every step. The order is that of the first parameter of each group, so that
    a saved optimiser state fits again.
    """
    groups: dict[ParameterSettings, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        traits = parameter_settings(name, parameter, num_layers, recipe)
        group = groups.setdefault(
            traits, {"params": [], "role": traits.role, "lr_scale": traits.lr_scale, "decays": traits.decays}
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]], recipe: OptimRecipe) -> torch.optim.AdamW:
    """Fused AdamW over the groups; their learning rates are set by the engine before the first step."""
    return torch.optim.AdamW(
        groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )


def allocate_moments(optimizer: Any) -> None:
    """Give each parameter that has no state yet the moments that the first step of a fused AdamW would make.

    Nothing happens to other optimisers. Made at the first step, they would lie for good in the gaps that the first
    backward pass leaves behind, and later passes would not find room between them.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's is around it
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def clip_gradients(groups: Mapping[str, list[nn.Parameter]], max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of each group down to `max_norm`, without waiting for the device.

    Returns:
        The norm (0-dim) of each group's gradients before that.
    """
    return {name: to_full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)) for name, parameters in groups.items()}
