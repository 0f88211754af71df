"""The objectives that a recipe can name, and how each is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from brainfound.data.augmentation import ViewsRecipe
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.hybrid import Hybrid, HybridRecipe
from brainfound.pretraining.objectives.masked_autoencoder import (
    MaskedAutoencoder,
    MaskedAutoencoderRecipe,
    ReconstructionRecipe,
)
from brainfound.pretraining.objectives.self_distillation import SelfDistillation, SelfDistillationRecipe
from brainfound.pretraining.starting_model import TrainedPartRecipe, select_trainable_part

DEFAULT_KIND = "self_distillation"


def _with_kind(content: Any) -> Any:
    """Recipes written before there were kinds mean self-distillation."""
    return {"kind": DEFAULT_KIND, **content} if isinstance(content, Mapping) else content


ObjectiveRecipe = Annotated[
    SelfDistillationRecipe | MaskedAutoencoderRecipe | HybridRecipe,
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
]
OBJECTIVE_RECIPES: dict[str, type[SelfDistillationRecipe] | type[MaskedAutoencoderRecipe]] = {
    recipe.model_fields["kind"].default: recipe
    for recipe in (SelfDistillationRecipe, MaskedAutoencoderRecipe, HybridRecipe)
}
"""Kind → the class of its settings."""


def make_objective(
    recipe: SelfDistillationRecipe | MaskedAutoencoderRecipe,
    trained: TrainedPartRecipe,
    encoder: SliceEncoder,
    views: ViewsRecipe,
    num_steps: int,
    seed: int,
) -> Objective:
    """The objective that a recipe names, around a copy of the starting encoder.

    Raises:
        RecipeError: if crops do not fit the patch size, the anchor has nothing to look at, or the
            encoder has no such part to train.
    """
    encoder = select_trainable_part(encoder, trained, seed)
    if isinstance(recipe, MaskedAutoencoderRecipe):
        return MaskedAutoencoder(encoder, recipe, views, seed)
    if isinstance(recipe, HybridRecipe):
        return Hybrid(encoder, recipe, views, num_steps, seed)
    return SelfDistillation(encoder, recipe, views, num_steps, seed)


def convert_settings(kind: str, before: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings of an objective, carried over to another kind.

    Args:
        kind: the new kind, one of `OBJECTIVE_RECIPES`.
        before: settings with the kind that they were written for.

    Returns:
        The settings that mean the same in both kinds, and the names of those that have no meaning in the new one.
    """
    old = OBJECTIVE_RECIPES[before.get("kind", DEFAULT_KIND)].model_fields
    new = OBJECTIVE_RECIPES[kind].model_fields
    names = [name for name in before if name != "kind"]
    kept = [name for name in names if name in new and new[name].annotation == old[name].annotation]
    content = {"kind": kind, **{name: before[name] for name in kept}}
    return content, [name for name in names if name not in kept]


def in_words(recipe: SelfDistillationRecipe | MaskedAutoencoderRecipe) -> tuple[str, str]:
    """What an objective is, and what of it is exported, for a model card.

    >>> in_words(MaskedAutoencoderRecipe(anchor_gram_weight=0, anchor_cls_weight=0))
    ('masked autoencoding (75% of the patches hidden)', 'encoder')
    """
    anchored = ", anchored to the starting checkpoint" if recipe.anchored else ""
    if isinstance(recipe, MaskedAutoencoderRecipe):
        return f"masked autoencoding ({_describe_masking(recipe)}{anchored})", "encoder"
    weighted = {"DINO": recipe.dino_weight, "iBOT": recipe.ibot_weight, "KoLeo": recipe.koleo_weight}
    parts = " + ".join(name for name, weight in weighted.items() if weight)
    words = f"self-distillation ({parts}{anchored})"
    if isinstance(recipe, HybridRecipe):
        hiding = _describe_masking(recipe.reconstruction)
        words += f" and masked autoencoding ({hiding}, weighted {recipe.reconstruction_weight:g})"
    return words, "EMA teacher"


def _describe_masking(recipe: ReconstructionRecipe) -> str:
    return f"{recipe.mask_ratio:.0%} of the patches hidden"
