"""What a fine-tuning run is made of, as a recipe.

What a head learns by, as recipes, and the fields of a model's configuration that they become.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from brainfound.adapters.attach import AdapterRecipe
from brainfound.errors import RecipeError, did_you_mean
from brainfound.finetuning.scoring import ScoringRecipe
from brainfound.finetuning.splits import SplitRecipe
from brainfound.finetuning.targets import Target
from brainfound.finetuning.volumes import VolumeAugmentation
from brainfound.models.configuration import AGGREGATORS, DECODERS, SLICE_FEATURES, STEMS
from brainfound.recipes import Recipe, load, validate
from brainfound.training.engine import EngineRecipe

_MARGIN = 0.1
"""By how much of the training part's range the bins reach beyond it on each side."""


class ClassificationHeadRecipe(Recipe):
    """The loss of a classification."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a session weighs by the inverse frequency of its class in the training part. For rare classes; the
    probabilities are then those of a cohort in which all classes are equally frequent."""
    focal_gamma: float = Field(0.0, ge=0)
    """Focal loss: above 0, sessions that are answered well count less (2 is usual); 0: cross-entropy."""


class RegressionHeadRecipe(Recipe):
    """The head and the loss of a regression."""

    head: Literal["point", "gaussian", "bins"] = "point"
    """point: one number. gaussian: also its standard deviation, by the likelihood. bins: a distribution over bins of
    the training part's range, whose expectation is the answer."""
    loss: Literal["smooth_l1", "l1", "huber"] = "smooth_l1"
    """Of the point head, on the target in standard deviations of the training part."""
    huber_delta: float = Field(1.0, gt=0)
    """Where the Huber loss turns from squares to absolute errors, in the same unit."""
    bins: int = Field(40, ge=2)
    """Bins of the head `bins`. They reach a tenth of the range beyond the training part on each side."""
    label_width: float = Field(1.0, gt=0)
    """Standard deviation of the soft label around a target, in widths of a bin."""
    interval_confidence: float = Field(0.9, gt=0, lt=1)
    """Share of new sessions that the prediction interval, fitted on the validation part, should hold."""

    @model_validator(mode="after")
    def _require_point_head_for_loss(self) -> Self:
        if self.head != "point" and self.loss != "smooth_l1":
            raise ValueError(f"the head {self.head} has a loss of its own; loss: {self.loss} needs head: point")
        return self


def classification_config_fields(
    recipe: ClassificationHeadRecipe, target: Target, labels: np.ndarray
) -> dict[str, Any]:
    """Fields of `BrainFoundConfig`.

    Args:
        labels: of the training part: class indices ``(n,)``, or 0 and 1 ``(n, K)`` for several labels.
    """
    weights = class_weights(labels, len(target.names)) if recipe.class_weights == "balanced" else None
    problem = "multi_label_classification" if target.multi_label else None
    return {"class_weights": weights, "classification_focal_gamma": recipe.focal_gamma, "problem_type": problem}


def class_weights(labels: np.ndarray, num_classes: int) -> list[float]:
    """Inverse frequencies: n / (K · n_k) of each class, mean 1 over sessions; negatives / positives of each label.

    Args:
        labels: class indices ``(n,)``, or 0 and 1 ``(n, K)`` for several labels; each class occurs.
    """
    if labels.ndim == 2:
        positives = labels.sum(axis=0)
        return ((len(labels) - positives) / positives).tolist()
    counts = np.bincount(labels, minlength=num_classes)
    return (len(labels) / (num_classes * counts)).tolist()


def regression_config_fields(recipe: RegressionHeadRecipe, target: Target, values: np.ndarray) -> dict[str, Any]:
    """Fields of `BrainFoundConfig`.

    Args:
        values: ``(n,)`` of the training part, in the unit of the target.
    """
    margin = _MARGIN * float(np.ptp(values))
    ends = [float(values.min()) - margin, float(values.max()) + margin]
    return {
        "target_mean": target.mean,
        "target_std": target.std,
        "regression_head": recipe.head,
        "regression_loss": recipe.loss,
        "huber_delta": recipe.huber_delta,
        "regression_bins": recipe.bins,
        "regression_range": ends if recipe.head == "bins" else None,
        "regression_label_width": recipe.label_width,
    }


def describe_loss(task: str, config: Any) -> str:
    """The loss of a model, in words, for its card.

    Args:
        task: classification, regression or segmentation.
        config: its `BrainFoundConfig`.
    """
    if task == "segmentation":
        return {
            "dice_cross_entropy": "cross-entropy + soft Dice",
            "dice_focal": "focal cross-entropy + soft Dice",
            "tversky": "Tversky",
            "focal_tversky": "focal Tversky",
        }[config.segmentation_loss]
    if task == "regression":
        if config.regression_head == "gaussian":
            return "Gaussian likelihood"
        if config.regression_head == "bins":
            return f"soft labels over {config.regression_bins} bins"
        return {"smooth_l1": "smooth L1", "l1": "L1", "huber": f"Huber, delta {config.huber_delta:g}"}[
            config.regression_loss
        ]
    name = "binary cross-entropy" if config.problem_type == "multi_label_classification" else "cross-entropy"
    if config.classification_focal_gamma:
        name = f"focal loss (gamma {config.classification_focal_gamma:g}) on {name}"
    return name if config.class_weights is None else f"{name}, weighted by inverse frequency"


SEGMENTATION_FIELDS = (
    "decoder",
    "decoder_width",
    "decoder_slice_mixing",
    "segmentation_loss",
    "tversky_alpha",
    "tversky_beta",
    "tversky_gamma",
    "focal_gamma",
)
"""What a recipe of a segmentation says of the model, under the names of the model's configuration."""

TASK_SPECIFIC_KEYS: Mapping[str, tuple[str, ...]] = {
    "classification": ("classification",),
    "regression": ("regression",),
    "segmentation": (*SEGMENTATION_FIELDS, "foreground_share", "merge_codes", "scoring"),
}
"""Keys and groups of the recipe that one task alone reads, besides the regions of a segmentation."""

CHOICE_SPECIFIC_KEYS: Mapping[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "segmentation": (
        ("segmentation_loss", ("tversky", "focal_tversky"), ("tversky_alpha", "tversky_beta")),
        ("segmentation_loss", ("focal_tversky",), ("tversky_gamma",)),
        ("segmentation_loss", ("dice_focal",), ("focal_gamma",)),
    ),
    "regression": (
        ("regression.loss", ("huber",), ("regression.huber_delta",)),
        ("regression.head", ("bins",), ("regression.bins", "regression.label_width")),
    ),
}
"""By task: a choice, what it must be, and the keys that nothing reads where it is something else."""


class FinetuneOptimRecipe(Recipe):
    """AdamW with a warm-up and a cosine."""

    lr: float = Field(5e-4, gt=0)
    """Peak learning rate of adapters (or of the backbone in full fine-tuning)."""
    head_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of what is new: aggregator, decoder, head."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; none on biases, norms and tokens."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest gradient norm."""


class FinetuneRecipe(Recipe):
    """Everything that a fine-tuning run is made of."""

    lookalikes: ClassVar[Mapping[str, str]] = {
        "brainfound.pretraining.recipe:PretrainRecipe": "this is a pretraining recipe; use `brainfound pretrain`"
    }

    name: str = "finetune"
    """Name of the run; also of its default folder."""
    seed: int = Field(0, ge=0)
    """Of new weights, order, slices, augmentation and dropout."""
    task: Literal["auto", "classification", "regression", "segmentation"] = "auto"
    """auto: segmentation for the mask, regression for numbers with many values, else classification."""
    adapter: str = "lora-r8"
    """A recipe of the adapters room, by name or file."""
    contrasts: tuple[str, ...] | None = None
    """The only contrasts that the model sees, in training, scoring and prediction, whatever else a session has:
    [T1w, FLAIR]. Sessions with none of them are left out. null: all of the store."""
    stem: str | None = None
    """How contrasts enter the backbone: channels, per_contrast, or slices (neighbouring slices of a store's only
    contrast, of those that are read). null: as the model has it; channels for a plain ViT."""
    slice_features: str | None = None
    """What of a slice goes into a classification or a regression: cls, patches (the mean of the patch tokens) or
    cls_and_patches. null: as the model has it; cls for a plain ViT."""
    aggregator: str = "attention"
    """Slice embeddings → volume embedding: mean, max, attention or transformer (not used by segmentation)."""
    decoder: str = "fpn"
    """Patch embeddings → pixels (segmentation only): linear, fpn, or unetr (with skips from the image)."""
    decoder_width: int = Field(128, ge=8)
    """Channels of the decoder."""
    decoder_slice_mixing: bool = False
    """Segmentation: the decoder mixes neighbouring slices; training then reads runs of slices."""
    segmentation_loss: Literal["dice_cross_entropy", "dice_focal", "tversky", "focal_tversky"] = "dice_cross_entropy"
    """Segmentation: the last three are for small structures such as lesions."""
    tversky_alpha: float = Field(0.3, ge=0)
    """Tversky losses: weight of false positives."""
    tversky_beta: float = Field(0.7, ge=0)
    """Tversky losses: weight of false negatives."""
    tversky_gamma: float = Field(4 / 3, ge=1)
    """focal_tversky: the Tversky loss to the power 1/this."""
    focal_gamma: float = Field(2.0, ge=0)
    """dice_focal: how little pixels count that are right already; 0 is the cross-entropy."""
    regions: dict[str, list[int]] = Field(default_factory=dict)
    """Segmentation: overlapping labels made of codes, such as {whole: [1, 2, 4], core: [1, 4]}; each is a yes or no of
    its own. Empty: every code is a class, and a pixel has one."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the head's last layer."""
    num_slices: int = Field(32, ge=1)
    """Slices read per volume, in training and, but for segmentation, in prediction."""
    head_fit_passes: int = Field(4, ge=0)
    """Passes over the training part whose frozen features the last layer of the head or decoder is first fitted to, of
    a segmentation 500 volumes at most; 0 starts from a random one."""
    cached_embeddings: bool = False
    """Embed each session once and train on that: seconds for an epoch. For classification and regression with an
    adapter that leaves the backbone as it is (head-only); nothing is augmented, and no contrast withheld."""
    classification: ClassificationHeadRecipe = ClassificationHeadRecipe()
    """Class weights and focal loss (classification only)."""
    regression: RegressionHeadRecipe = RegressionHeadRecipe()
    """The head and its loss (regression only)."""
    foreground_share: float = Field(0.5, ge=0, le=1)
    """Segmentation: share of the training slices (or of their runs) that show the structure."""
    gradient_checkpointing: bool = False
    """Compute the backbone's blocks again in the backward pass instead of keeping what they held: less memory, more
    time."""
    merge_codes: bool = False
    """Segmentation: any label code but 0 is one class."""
    evaluate_every: int = Field(100, ge=0)
    """Steps between two looks at the validation part; 0: never."""
    frozen_baseline: bool = True
    """Before training also fit a linear model to the untouched backbone (mean over slices; of a segmentation patch by
    patch), whose scores on the test part stand beside those of the run. It embeds the training and the test part
    once."""
    scoring: ScoringRecipe = ScoringRecipe()
    """Segmentation: further scores, and what an empty mask counts."""
    split: SplitRecipe = SplitRecipe()
    optim: FinetuneOptimRecipe = FinetuneOptimRecipe()
    augmentation: VolumeAugmentation = VolumeAugmentation()
    """none, mild (for classification and regression), strong (for segmentation), or its fields one by one."""
    engine: EngineRecipe = EngineRecipe(steps=500, batch_size=4, num_workers=0)


# What may change between a run and its continuation: nothing in here touches a weight.
CHANGEABLE_ON_RESUME = (
    "name",
    "frozen_baseline",
    "scoring",
    "engine.log_every",
    "engine.checkpoint_every",
    "engine.keep_checkpoints",
    "engine.max_skipped_in_a_row",
    "engine.num_workers",
)


def resolve_recipe(
    recipe: FinetuneRecipe | str | Path, adapter: str | Path | None, overrides: Iterable[str]
) -> FinetuneRecipe:
    """The recipe of a run, with its overrides, checked.

    Raises:
        RecipeError: a name or a value that there is not.
    """
    overrides = list(overrides)
    if isinstance(recipe, FinetuneRecipe):
        content = validate(FinetuneRecipe, recipe.model_dump(mode="json"), overrides)
    else:
        content = load(FinetuneRecipe, recipe, "train", overrides)
        if content.name == FinetuneRecipe.model_fields["name"].default:
            content = content.model_copy(update={"name": Path(recipe).stem})
    for field, known in (("aggregator", AGGREGATORS), ("decoder", DECODERS)):
        if getattr(content, field) not in known:
            raise RecipeError(f"no {field} {getattr(content, field)!r}", where=field, expected=", ".join(known))
    for field, known in (("stem", STEMS), ("slice_features", SLICE_FEATURES)):
        value = getattr(content, field)
        if value not in (None, *known):
            raise RecipeError(
                f"no {field} {value!r}",
                where=field,
                expected=", ".join(known),
                remedy=did_you_mean(str(value), known),
            )
    if adapter is not None:
        content = content.model_copy(update={"adapter": str(adapter)})
    load(AdapterRecipe, content.adapter, "adapters")  # refuse a wrong name now, not after the model was built
    return content


def require_effective_settings(recipe: FinetuneRecipe, target: Target) -> None:
    """Refuse what would have no effect on this target, and embeddings that cannot be kept.

    Nothing reads a setting of another task, or of a loss or a head that is not chosen. One that has its default value
    is not refused.

    Raises:
        RecipeError: names the keys.
    """
    values, defaults = (_flatten(content.model_dump()) for content in (recipe, FinetuneRecipe()))
    changed = [key for key, value in values.items() if key in defaults and value != defaults[key]]
    for task, own in TASK_SPECIFIC_KEYS.items():
        if task != target.task:
            unread = [key for key in changed if key.partition(".")[0] in own]
            _refuse_unused_settings(unread, f"for a {task}", f"a {target.task} of {target.column}", f"task={task}")
    # A mean has no weights, and is what a segmentation has in the place of an aggregator.
    of_volumes = {"aggregator": recipe.aggregator != "mean", "slice_features": True}
    if target.task == "segmentation":
        unread = [key for key in changed if of_volumes.get(key)]
        _refuse_unused_settings(unread, "for a classification or a regression", f"a segmentation of {target.column}")
    for choice, wanted, keys in CHOICE_SPECIFIC_KEYS.get(target.task, ()):
        if values[choice] not in wanted:
            unread = [key for key in changed if key in keys]
            needed = f"for {choice}={' or '.join(wanted)}"
            _refuse_unused_settings(unread, needed, f"{choice}={values[choice]}", f"{choice}={wanted[0]}")
    if recipe.cached_embeddings:
        _require_frozen_backbone(recipe, target)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys as users write them, with dots, and their values."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _refuse_unused_settings(unread: Sequence[str], whom: str, got: str, instead: str | None = None) -> None:
    if unread:
        what, it = ("this setting is", "it") if len(unread) == 1 else ("these settings are", "them")
        remedy = f"Leave {it} out" + (f", or set {instead}" if instead else "")
        raise RecipeError(f"{what} {whom}", where=", ".join(unread), got=got, remedy=remedy)


def _require_frozen_backbone(recipe: FinetuneRecipe, target: Target) -> None:
    method = load(AdapterRecipe, recipe.adapter, "adapters").method
    if method != "none" or target.task == "segmentation":
        raise RecipeError(
            "embeddings can be kept for classification and regression on a frozen backbone only",
            where="cached_embeddings",
            got=f"a {target.task} with an adapter of the method {method!r}",
            remedy="Use --adapter head-only, or leave cached_embeddings out",
        )
