"""The objectives that a recipe can name. A new one is a file in this folder, and a line in `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from brainfound.data.augmentation import ViewsRecipe
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives import hybrid, masked_autoencoder, self_distillation
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.starting_model import TrainedPartRecipe, select_trainable_part

OBJECTIVES: tuple[type[Objective], ...] = (
    self_distillation.SelfDistillation,
    masked_autoencoder.MaskedAutoencoder,
    hybrid.Hybrid,
)
"""The first is the default."""
OBJECTIVES_BY_KIND = {objective.kind(): objective for objective in OBJECTIVES}


def _with_kind(content: Any) -> Any:
    """Recipes without a kind mean self-distillation."""
    return {"kind": OBJECTIVES[0].kind(), **content} if isinstance(content, Mapping) else content


if TYPE_CHECKING:
    ObjectiveRecipe = Any
else:
    ObjectiveRecipe = Annotated[
        Union[tuple(objective.recipe_class for objective in OBJECTIVES)],  # noqa: UP007
        Field(discriminator="kind"),
        BeforeValidator(_with_kind),
    ]
"""The settings of one of the objectives, chosen by `kind`."""


def make_objective(
    recipe: ObjectiveRecipe,
    trained: TrainedPartRecipe,
    encoder: SliceEncoder,
    views: ViewsRecipe,
    num_steps: int,
    seed: int,
) -> Objective:
    """The objective that a recipe names, around a copy of the starting encoder.

    Raises:
        RecipeError: if crops do not fit the patch size, or the encoder has no such part to train.
    """
    encoder = select_trainable_part(encoder, trained, seed)
    return OBJECTIVES_BY_KIND[recipe.kind](encoder, recipe, views, num_steps, seed)


def convert_settings(kind: str, before: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings carried over to another kind (those with the same meaning in both), and the names of the others."""
    old, new = (OBJECTIVES_BY_KIND[name].recipe_class.model_fields for name in (before["kind"], kind))
    names = [name for name in before if name != "kind"]
    kept = [name for name in names if name in new and new[name].annotation == old[name].annotation]
    content = {"kind": kind, **{name: before[name] for name in kept}}
    return content, [name for name in names if name not in kept]
