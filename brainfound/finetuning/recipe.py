"""The recipe of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from brainfound.adapters.attach import AdapterRecipe
from brainfound.data.label_names import has_sides
from brainfound.errors import RecipeError
from brainfound.finetuning.splits import SplitRecipe
from brainfound.finetuning.tasks import AnyTaskRecipe, AutoTaskRecipe, Task
from brainfound.finetuning.volumes import VolumeAugmentation
from brainfound.recipes import Recipe, load, validate
from brainfound.training.engine import EngineRecipe


class FinetuneOptimRecipe(Recipe):
    """AdamW with warm-up and cosine decay."""

    lr: float = Field(5e-4, gt=0)
    """Peak learning rate of adapters (or of the backbone in full fine-tuning)."""
    head_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the new parts: aggregator, decoder, head."""
    weight_decay: float = Field(0.01, ge=0)
    """On matrices; none on biases, norms and tokens."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest gradient norm."""


class FinetuneEngineRecipe(EngineRecipe):
    """Engine settings for fine-tuning."""

    steps: int = Field(500, ge=1)
    """Optimiser steps in the whole run."""
    batch_size: int = Field(4, ge=1)
    """Volumes in one optimiser step, over all ranks and micro-batches."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_num_workers(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "num_workers" in given:
            raise ValueError("num_workers is for pretraining; fine-tuning reads in the training process: leave it out")
        return given


class FinetuneRecipe(Recipe):
    """All settings of a fine-tuning run."""

    lookalikes: ClassVar[Mapping[str, str]] = {
        "brainfound.pretraining.recipe:PretrainRecipe": "this is a pretraining recipe; use `brainfound pretrain`",
        "brainfound.finetuning.auto.recipe:AutoRecipe": "this recipe chooses among models; in Python use finetune_auto",
    }

    name: str = "finetune"
    """Name of the run; also of its default folder."""
    seed: int = Field(0, ge=0)
    """Seeds new weights, order, slices, augmentation and dropout."""
    task: AnyTaskRecipe = AutoTaskRecipe()
    """The kind (classification, regression, segmentation) and its settings: {kind: regression, head: bins}; or the kind
    alone. auto: segmentation for the mask, regression for numbers with many values, else classification."""
    adapter: str = "lora-r8"
    """A recipe of the `adapters` folder, by name or file."""
    contrasts: tuple[str, ...] | None = None
    """The contrasts that the model reads, in training, scoring and prediction: [T1w, FLAIR]. Sessions with none of them
    are left out. null: all of the store."""
    stem: Literal["channels", "per_contrast", "slices"] | None = None
    """How contrasts enter the backbone: channels, per_contrast, or slices (neighbouring slices, where only one
    contrast is read). null: as in the model; channels for a plain ViT."""
    slice_features: Literal["cls", "patches", "cls_and_patches"] | None = None
    """Embedding of a slice for a classification or a regression: cls, patches (the mean of the patch tokens) or
    cls_and_patches. null: as in the model; cls for a plain ViT."""
    feature_layers: tuple[int, ...] | None = None
    """Blocks of the backbone, counted from 1, whose features are concatenated: [6, 12]. null: as in the model; the last
    for a plain ViT."""
    aggregator: Literal["mean", "max", "mean_std", "mean_max", "mean_std_max", "attention", "transformer"] = "attention"
    """Slice embeddings → volume embedding (not used by a segmentation)."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the head's last layer."""
    num_slices: int = Field(32, ge=1)
    """Slices read per volume in training and prediction; a segmentation predicts all slices."""
    head_fit_passes: int = Field(4, ge=0)
    """Passes over the training part for fitting the last layer of the head or decoder to frozen features, before
    training (at most 500 volumes for a segmentation); 0 starts from random weights."""
    cached_embeddings: bool = False
    """Embed each session once and train on the embeddings: an epoch takes seconds. For classification and regression on
    a frozen backbone (adapter head-only); nothing is augmented, and no contrast is withheld."""
    gradient_checkpointing: bool = False
    """Recompute the activations of the backbone's blocks in the backward pass: less memory, more time."""
    evaluate_every: int = Field(100, ge=0)
    """Steps between evaluations on the validation part, the first before training; 0: never. The best step is exported;
    without evaluations, the last."""
    patience: int = Field(5, ge=0)
    """Evaluations in a row without a gain after which training ends; 0: never."""
    min_gain: float = Field(0.01, ge=0, lt=1)
    """Smallest gain that counts, as a share of the best validation score so far (MAE, log loss or Dice)."""
    frozen_baseline: bool = True
    """Before training, also fit a linear model on the untouched backbone (mean over slices; per patch for a
    segmentation) and score it on the test part. This embeds the training and test parts once."""
    split: SplitRecipe = SplitRecipe()
    optim: FinetuneOptimRecipe = FinetuneOptimRecipe()
    augmentation: VolumeAugmentation = VolumeAugmentation()
    """none, mild (for classification and regression), strong (for segmentation), or its fields one by one."""
    engine: FinetuneEngineRecipe = FinetuneEngineRecipe()


# Neither of these affects the weights.
CHANGEABLE_ON_RESUME = ("frozen_baseline", "task.scoring")


def resolve_recipe(
    recipe: FinetuneRecipe | str | Path, adapter: str | Path | None, overrides: Iterable[str]
) -> FinetuneRecipe:
    """The recipe of a run, with its overrides; RecipeError for an unknown name, key or value."""
    overrides = list(overrides)
    if isinstance(recipe, FinetuneRecipe):
        content = validate(FinetuneRecipe, recipe.model_dump(mode="json"), overrides)
    else:
        content = load(FinetuneRecipe, recipe, "train", overrides)
        if content.name == FinetuneRecipe.model_fields["name"].default:
            content = content.model_copy(update={"name": Path(recipe).stem})
    if adapter is not None:
        content = content.model_copy(update={"adapter": str(adapter)})
    load(AdapterRecipe, content.adapter, "adapters")  # fail on a wrong name now, not after the model is built
    return content


def require_effective_settings(recipe: FinetuneRecipe, task: Task) -> None:
    """Refuse shared settings that have no effect on a task, with a RecipeError that names the keys."""
    # For a segmentation. A mean has no weights and stands in for the unused aggregator.
    allowed = (
        {"aggregator": ("attention", "mean"), "slice_features": (None,), "feature_layers": (None,)}
        if task.per_voxel
        else {}
    )
    if unread := [name for name, values in allowed.items() if getattr(recipe, name) not in values]:
        what, them = ("this setting is", "it") if len(unread) == 1 else ("these settings are", "them")
        raise RecipeError(
            f"{what} for a classification or a regression",
            where=", ".join(unread),
            got=f"a {task.kind} of {task.column}",
            remedy=f"Leave {them} out",
        )
    if task.per_voxel and recipe.augmentation.flip_left_right:
        _refuse_sides(task.names[int(task.names[0] == "background") :])
    if recipe.cached_embeddings:
        method = load(AdapterRecipe, recipe.adapter, "adapters").method
        if task.per_voxel or method != "none":
            raise RecipeError(
                "embeddings can be kept for classification and regression on a frozen backbone only",
                where="cached_embeddings",
                got=f"a {task.kind} with an adapter of the method {method!r}",
                remedy="Use --adapter head-only, or leave cached_embeddings out",
            )


def _refuse_sides(names: Sequence[str]) -> None:
    """Refuse to mirror labels of one side, whose masks would then be on the wrong side."""
    unnamed = len(names) > 1 and any(name.startswith("label ") for name in names)
    if unnamed or has_sides(names):
        what = "label codes have no names, so their sides are not known" if unnamed else "some labels name a side"
        more = ", or name the codes with task.lookup_table or task.regions" if unnamed else ""
        raise RecipeError(
            f"{what}: mirrored volumes would have them on the wrong one",
            where="augmentation.flip_left_right",
            got=", ".join(names[:5]),
            remedy=f"Leave flip_left_right out{more}",
        )
