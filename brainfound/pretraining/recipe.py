"""The recipe of a pretraining run: its sections, how "auto" is resolved, and what overrides and new weights change.

The engine settings that "auto" chooses (attention kernel, compilation, use of memory) do not change the result, beyond
rounding and the draws of stochastic depth: it drops whole sequences of a pass, and separate passes with few slices drop
a different number. The choice is written into the run's recipe, so that a resumed run computes as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field
from torch import Tensor

from brainfound.data.augmentation import ViewsRecipe
from brainfound.errors import RecipeError
from brainfound.models.encoder import SliceEncoder
from brainfound.models.kernels import Packing, available_kernels, choose_kernel
from brainfound.pretraining.monitoring.guard import GuardRecipe
from brainfound.pretraining.monitoring.probes import ProbeRecipe
from brainfound.pretraining.objectives.registry import OBJECTIVES, OBJECTIVES_BY_KIND, ObjectiveRecipe, convert_settings
from brainfound.pretraining.starting_model import FROM_SCRATCH, InitRecipe, TrainedPartRecipe
from brainfound.recipes import Recipe, load, validate
from brainfound.training import distributed
from brainfound.training.engine import EngineRecipe
from brainfound.training.optim import OptimRecipe, ScheduleRecipe

AUTO_KEYS = ("attention", "compile", "crops")
"""The engine settings whose "auto" is resolved here."""
# These may change between a run and its continuation too, as they have no effect on what is learnt.
CHANGEABLE_ON_RESUME = (
    "data",
    "guard",
    *(f"engine.{key}" for key in ("num_workers", "parallel", "gradient_checkpointing", *AUTO_KEYS)),
)


class PretrainEngineRecipe(EngineRecipe):
    """Engine settings for pretraining, including how the models are run."""

    steps: int = Field(default=10_000, ge=0)
    """Optimiser steps of the whole run; 0 probes and exports the starting checkpoint untouched."""
    num_workers: int = Field(default=2, ge=0)
    """Processes per rank that read slices; 0 reads in the training process."""
    attention: Literal["auto", "sdpa", "matmul", "varlen", "xformers"] = "auto"
    """The attention kernel (`brainfound.models.kernels`); "auto" takes the fastest of those that work here."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the blocks with torch.compile; "auto" does so on a GPU where that works."""
    gradient_checkpointing: bool | Literal["pointwise"] = "pointwise"
    """What the backward pass recomputes to save memory: false, nothing; "pointwise", norms and activations, which
    costs next to no time (compiled code always does so); true, all of a residual branch, a third more work for much
    less memory."""
    crops: Literal["auto", "packed", "separate"] = "auto"
    """"packed" encodes all crops together; "separate" encodes the local crops, then each of the two global ones, with
    about a third of the memory for activations. "auto": packed on a GPU."""


class PretrainRecipe(Recipe):
    """Everything that defines a pretraining run."""

    lookalikes: ClassVar[Mapping[str, str]] = {
        "brainfound.finetuning.recipe:FinetuneRecipe": "this is a fine-tuning recipe; use `brainfound finetune`"
    }

    name: str = "pretrain"
    """Name of the run; also of its default folder."""
    seed: int = Field(default=0, ge=0)
    """Seed of initialisation, order, views, masks and dropout."""
    data: str | None = None
    """The store; `--data` on the command line takes precedence."""
    init: InitRecipe = InitRecipe()
    views: ViewsRecipe = ViewsRecipe()
    objective: ObjectiveRecipe = OBJECTIVES[0].recipe_class()
    """The loss: `kind` names the objective (self_distillation, …); the other keys depend on it."""
    trained: TrainedPartRecipe = TrainedPartRecipe()
    optim: OptimRecipe = OptimRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    guard: GuardRecipe = GuardRecipe()
    probe: ProbeRecipe = ProbeRecipe()
    engine: PretrainEngineRecipe = PretrainEngineRecipe()


def resolve_recipe(
    recipe: PretrainRecipe | str | Path, init: str | Path | None, overrides: Iterable[str]
) -> tuple[PretrainRecipe, list[str]]:
    """The recipe with overrides and their consequences, and notes on the changes."""
    content, notes = _with_overrides(recipe, list(overrides))
    if init is not None:
        content = content.model_copy(update={"init": content.init.model_copy(update={"source": str(init)})})
    if content.init.source == FROM_SCRATCH:
        content, more = _adapt_to_scratch(content)
        notes += more
    if content.schedule.head_warmup_steps >= content.engine.steps > 0:
        raise RecipeError(
            "the backbone would never learn",
            where="schedule.head_warmup_steps",
            got=content.schedule.head_warmup_steps,
            expected=f"less than engine.steps={content.engine.steps}",
            remedy="Set schedule.head_warmup_steps to a tenth of the steps",
        )
    return content, notes


def _with_overrides(recipe: PretrainRecipe | str | Path, overrides: list[str]) -> tuple[PretrainRecipe, list[str]]:
    """The recipe with overrides, and notes on the settings that they make useless."""
    values = {key.strip(): value.strip() for key, _, value in (text.partition("=") for text in overrides)}
    kind = values.get("objective.kind")
    notes: list[str] = []
    if kind in OBJECTIVES_BY_KIND:
        # The settings of the recipe's own objective need not exist in another one.
        before = recipe if isinstance(recipe, PretrainRecipe) else load(PretrainRecipe, recipe, "train")
        content = before.model_dump(mode="json", exclude_unset=True)
        own = {"kind": before.objective.kind, **before.objective.model_dump(mode="json", exclude_defaults=True)}
        content["objective"], left_out = convert_settings(kind, own)
        if left_out:
            notes.append(f"objective.kind is {kind}; of the recipe's objective, {', '.join(left_out)} is not used")
        resolved = validate(PretrainRecipe, content, overrides)
    elif isinstance(recipe, PretrainRecipe):
        resolved = validate(PretrainRecipe, recipe.model_dump(mode="json"), overrides)
    else:
        resolved = load(PretrainRecipe, recipe, "train", overrides)
    if not isinstance(recipe, PretrainRecipe) and resolved.name == PretrainRecipe.model_fields["name"].default:
        resolved = resolved.model_copy(update={"name": Path(recipe).stem})
    return resolved, notes


def _adapt_to_scratch(recipe: PretrainRecipe) -> tuple[PretrainRecipe, list[str]]:
    """For new weights, switch off the head warm-up and the objective's settings that need a checkpoint."""
    content = recipe.model_dump(mode="json")
    switched_off = OBJECTIVES_BY_KIND[recipe.objective.kind].defaults_for_scratch(recipe.objective)
    notes = []
    for group, changes in (("objective", switched_off), ("schedule", {"head_warmup_steps": 0})):
        for key, value in changes.items():
            if content[group][key] != value:
                notes.append(f"init.source is none: {group}.{key} {content[group][key]:g} → {value:g}")
                content[group][key] = value
    if recipe.trained.part != "full":
        notes.append(f"init.source is none: with trained.part={recipe.trained.part}, most new weights stay random")
    return validate(PretrainRecipe, content), notes


def resolve_auto_settings(
    engine: PretrainEngineRecipe, encoder: SliceEncoder, views: ViewsRecipe, device: torch.device
) -> tuple[PretrainEngineRecipe, dict[str, Any]]:
    """Replace each "auto" except that of the precision by a choice for this machine, the same on all ranks.

    Also returns facts for run.json.

    Raises:
        RecipeError: if the kernel of the recipe does not work here, with the reason.
    """
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    config = encoder.backbone.config
    head_width = config.hidden_size // config.num_attention_heads
    kernel_probe: dict[str, float | str] = {}
    kernel: str = engine.attention
    if kernel == "auto":
        sides = [views.global_size] + ([views.local_size] if views.num_local else [])
        lengths = [encoder.num_prefix_tokens + (side // encoder.patch_size) ** 2 for side in sides]
        packing = Packing(tuple((4, length) for length in lengths))  # four crops of each size are timed
        kernel, kernel_probe = choose_kernel(packing, config.num_attention_heads, head_width, device, dtype)
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
        # A sharded module reduces its gradients at the end of its only backward pass.
        choice["crops"] = "packed"
    (choice,) = broadcast_object_list([choice], from_process=0)
    return engine.model_copy(update=choice), {"attention_probe": kernel_probe} if kernel_probe else {}


@lru_cache
def _can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; it needs a compiler, which not every machine has."""

    def twice(values: Tensor) -> Tensor:
        return torch.nn.functional.gelu(values) * 2

    values = torch.ones(8, device=device)
    try:
        return torch.allclose(torch.compile(twice, dynamic=False)(values), twice(values))
    except RuntimeError:  # the base class of every compiler failure
        return False
