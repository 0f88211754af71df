"""The recipe of a pretraining run: its sections, and what overrides and new weights change in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from brainfound.data.augmentation import ViewsRecipe
from brainfound.errors import RecipeError
from brainfound.pretraining.execution import PretrainEngineRecipe
from brainfound.pretraining.monitoring.guard import GuardRecipe
from brainfound.pretraining.monitoring.probes import ProbeRecipe
from brainfound.pretraining.objectives.registry import (
    OBJECTIVES,
    OBJECTIVES_BY_KIND,
    ObjectiveRecipe,
    convert_settings,
)
from brainfound.pretraining.starting_model import FROM_SCRATCH, InitRecipe, TrainedPartRecipe
from brainfound.recipes import Recipe, load, validate
from brainfound.training.optim import OptimRecipe
from brainfound.training.schedules import ScheduleRecipe


class PretrainRecipe(Recipe):
    """Everything that a pretraining run is made of."""

    lookalikes: ClassVar[Mapping[str, str]] = {
        "brainfound.finetuning.recipe:FinetuneRecipe": "this is a fine-tuning recipe; use `brainfound finetune`"
    }

    name: str = "pretrain"
    """Name of the run; also of its default folder."""
    seed: int = Field(default=0, ge=0)
    """Of initialisation, order, views, masks and dropout."""
    data: str | None = None
    """The store; `--data` on the command line goes before it."""
    init: InitRecipe = InitRecipe()
    views: ViewsRecipe = ViewsRecipe()
    objective: ObjectiveRecipe = OBJECTIVES[0].recipe_class()
    """What is learnt: `kind` names the objective (self_distillation, …); the other keys depend on it."""
    trained: TrainedPartRecipe = TrainedPartRecipe()
    optim: OptimRecipe = OptimRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    guard: GuardRecipe = GuardRecipe()
    probe: ProbeRecipe = ProbeRecipe()
    engine: PretrainEngineRecipe = PretrainEngineRecipe()


# These may change between a run and its continuation: they have no effect on the result, beyond rounding and the
# draws of stochastic depth.
CHANGEABLE_ON_RESUME = (
    "name",
    "data",
    "guard",
    "engine.parallel",
    "engine.attention",
    "engine.compile",
    "engine.gradient_checkpointing",
    "engine.crops",
    "engine.log_every",
    "engine.checkpoint_every",
    "engine.keep_checkpoints",
    "engine.max_skipped_in_a_row",
    "engine.num_workers",
)


def resolve_recipe(
    recipe: PretrainRecipe | str | Path, init: str | Path | None, overrides: Iterable[str]
) -> tuple[PretrainRecipe, list[str]]:
    """The recipe with overrides and with what follows from them, and notes on the changes.

    Raises:
        RecipeError: a bad recipe or override.
    """
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
    """New weights switch some of the objective's settings off, and need no waiting for their heads."""
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
