"""How the models of pretraining are run: attention kernel, compilation, and the use of memory.

None of it changes the result, beyond rounding and the draws of stochastic depth (it drops whole sequences of a pass:
with few slices, separate passes drop another number). "auto" is resolved once by trial, and the choice is written into
the run's recipe, so that a resumed run computes as before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field
from torch import Tensor

from brainfound.data.augmentation import ViewsRecipe
from brainfound.errors import RecipeError
from brainfound.models.blocks import SavedActivations
from brainfound.models.encoder import SliceEncoder
from brainfound.models.kernels import Packing, available_kernels, choose_kernel
from brainfound.pretraining.objectives.base import Objective
from brainfound.training import distributed
from brainfound.training.engine import EngineRecipe

AUTO_KEYS = ("attention", "compile", "crops")
"""The keys of the engine whose "auto" is resolved here."""
_SAVED_ACTIVATIONS: dict[bool | str, SavedActivations] = {False: "all", "pointwise": "products", True: "inputs"}
_NUM_TIMED_CROPS = 4  # crops of each size that a kernel is timed with


class PretrainEngineRecipe(EngineRecipe):
    """The engine of pretraining: it may also leave the starting checkpoint as it is, and chooses how models are run."""

    steps: int = Field(default=10_000, ge=0)
    """Optimiser steps of the whole run; 0 probes and exports the starting checkpoint untouched."""
    attention: Literal["auto", "sdpa", "matmul", "varlen", "xformers"] = "auto"
    """The attention kernel (`brainfound.models.kernels`); "auto" takes the fastest of those that work here."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the blocks with torch.compile; "auto" does so on a GPU where that works."""
    gradient_checkpointing: bool | Literal["pointwise"] = "pointwise"
    """What is computed again in the backward pass, to save memory: false, nothing; "pointwise", norms and
    activations, which costs next to no time (what is compiled does so anyway); true, everything inside a residual
    branch, a third more work for much less memory."""
    crops: Literal["auto", "packed", "separate"] = "auto"
    """"packed" encodes all crops together; "separate" encodes local crops and each of the two global ones by
    themselves and takes their gradients one after the other, which needs about a third of the memory for
    activations. "auto": packed on a GPU."""


def resolve_auto_settings(
    engine: PretrainEngineRecipe, encoder: SliceEncoder, views: ViewsRecipe, device: torch.device
) -> tuple[PretrainEngineRecipe, dict[str, Any]]:
    """Replace each "auto" by a choice for this machine, the same on all ranks; also returns facts for run.json.

    Args:
        engine: with its precision resolved.

    Raises:
        RecipeError: if the kernel of the recipe does not work here, with its own reason.
    """
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    config = encoder.backbone.config
    head_width = config.hidden_size // config.num_attention_heads
    found: dict[str, float | str] = {}
    kernel: str = engine.attention
    if kernel == "auto":
        packing = _packing(encoder, views)
        kernel, found = choose_kernel(packing, config.num_attention_heads, head_width, device, dtype)
    elif fault := available_kernels(device, dtype, head_width)[kernel]:
        raise RecipeError(
            f"this attention kernel does not work here: {fault}",
            where="engine.attention",
            got=kernel,
            remedy="Set engine.attention=sdpa",
        )
    on_gpu = device.type == "cuda"
    choice: dict[str, Any] = {
        "attention": kernel,
        "compile": (on_gpu and _can_compile(device)) if engine.compile == "auto" else engine.compile,
        "crops": ("packed" if on_gpu else "separate") if engine.crops == "auto" else engine.crops,
    }
    if engine.parallel == "fsdp" and distributed.is_distributed():
        # A sharded module hands its gradients over at the end of the one backward pass.
        choice["crops"] = "packed"
    (choice,) = broadcast_object_list([choice], from_process=0)
    return engine.model_copy(update=choice), {"attention_probe": found} if found else {}


def apply(objective: Objective, engine: PretrainEngineRecipe) -> None:
    """Run the models of an objective as a recipe without "auto" says."""
    objective.separate_passes = engine.crops == "separate"
    for module in (objective.student, *objective.frozen_modules()):
        for part in module.modules():
            if isinstance(part, SliceEncoder):
                kept = _SAVED_ACTIVATIONS[engine.gradient_checkpointing]
                part.configure_blocks(engine.attention, compiled=bool(engine.compile), kept=kept)  # type: ignore[arg-type]


def _packing(encoder: SliceEncoder, views: ViewsRecipe) -> Packing:
    sides = [views.global_size] + ([views.local_size] if views.num_local else [])
    lengths = [encoder.num_prefix_tokens + (side // encoder.patch_size) ** 2 for side in sides]
    return Packing(tuple((_NUM_TIMED_CROPS, length) for length in lengths))


@lru_cache
def _can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; it needs a compiler, which not every machine has."""

    def twice(values: Tensor) -> Tensor:
        return torch.nn.functional.gelu(values) * 2

    values = torch.ones(8, device=device)
    try:
        return torch.allclose(torch.compile(twice, dynamic=False)(values), twice(values))
    except RuntimeError:  # what every failure of the compiler derives from
        return False
