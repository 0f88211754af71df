"""The recipe of an automatic run: its candidates and how they are judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from brainfound.finetuning.recipe import FinetuneEngineRecipe, FinetuneRecipe
from brainfound.finetuning.splits import SplitRecipe
from brainfound.finetuning.tasks import AnyTaskRecipe, AutoTaskRecipe
from brainfound.recipes import Recipe, load, validate

Method = Literal["penalised", "pls"]
Features = Literal["cls", "patches", "cls_and_patches", "layers"]
Pooling = Literal["mean", "mean_std", "mean_max", "mean_std_max"]


class LinearCandidate(NamedTuple):
    """A linear model of frozen features."""

    method: Method
    features: Features
    pooling: Pooling

    @property
    def name(self) -> str:
        return f"{self.method}-{self.features}-{self.pooling}".replace("_", "-")


class LinearRecipe(Recipe):
    """The linear candidates: every combination of a method, features of a slice, and pooling over slices.

    For a classification or a regression.
    """

    methods: tuple[Method, ...] = ("penalised", "pls")
    """penalised: ridge for a regression, logistic for a classification. pls: partial least squares, for a regression
    alone."""
    features: tuple[Features, ...] = ("cls", "patches", "cls_and_patches", "layers")
    """cls and patches are of the last block; layers: both, of four blocks evenly spaced over the depth."""
    pooling: tuple[Pooling, ...] = ("mean", "mean_std", "mean_max")
    """Statistics of the slices."""

    def candidates(self) -> list[LinearCandidate]:
        """The simplest first."""
        combinations = [
            (pooling, features, method)
            for pooling in self.pooling
            for features in self.features
            for method in self.methods
        ]
        return [LinearCandidate(method, features, pooling) for pooling, features, method in combinations]


class AutoRecipe(Recipe):
    """All settings of an automatic run."""

    lookalikes: ClassVar[Mapping[str, str]] = {
        "brainfound.finetuning.recipe:FinetuneRecipe": "this recipe trains one model; use brainfound.finetune"
    }

    kind: Literal["auto"] = "auto"
    name: str = "auto"
    """Name of the run; also of its default folder."""
    seed: int = Field(0, ge=0)
    """Seeds the inner folds and the training of candidates."""
    minutes: float = Field(30.0, gt=0)
    """Time for the candidates, which begins when the features are computed. The simplest candidate is always fitted;
    one that does not fit into the time left is not begun."""
    inner_folds: int = Field(5, ge=2)
    """Folds by subject, of the training and the validation part together, on which candidates are judged."""
    inner_repeats: int = Field(3, ge=1)
    """Divisions into inner folds; trained candidates use the first."""
    linear: LinearRecipe = LinearRecipe()
    trained: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Name → what a fine-tuning recipe has in addition, from cheap to dear: {lora: {adapter: lora-r8}}; of `engine` and
    `task` the given settings only. With cached_embeddings, a candidate reads the features of the linear ones unless it
    names its own."""
    task: AnyTaskRecipe = AutoTaskRecipe()
    """As in a fine-tuning recipe."""
    contrasts: tuple[str, ...] | None = None
    """The contrasts that the model reads; null: all of the store."""
    stem: Literal["channels", "per_contrast", "slices"] | None = None
    """How contrasts enter the backbone; null: as in the model."""
    num_slices: int = Field(128, ge=1)
    """Slices read per volume by linear candidates, evenly spaced; all where there are no more."""
    split: SplitRecipe = SplitRecipe()
    engine: FinetuneEngineRecipe = FinetuneEngineRecipe()

    @model_validator(mode="after")
    def _require_known_settings(self) -> AutoRecipe:
        if not any((self.linear.methods, self.trained)):
            raise ValueError("there is no candidate: give linear.methods or trained")
        for name in self.trained:
            self.finetuning(name)
        return self

    def finetuning(self, candidate: str | None = None, layers: Sequence[int] | None = None) -> FinetuneRecipe:
        """The fine-tuning recipe of a trained candidate; without one, that of the linear candidates.

        ``layers`` are the blocks that the linear candidates read.
        """
        shared = ("seed", "task", "contrasts", "stem", "split", "engine")
        content = {name: value for name, value in self.model_dump(mode="json").items() if name in shared}
        own: Mapping[str, Any] = {"adapter": "head-only", "aggregator": "mean", "num_slices": self.num_slices}
        if candidate is not None:
            own = self.trained[candidate]
            if own.get("cached_embeddings") and "slice_features" not in own:
                shared_features = {"slice_features": "cls_and_patches", "feature_layers": layers}
                own = {**shared_features, "num_slices": self.num_slices, **own}
        nested = {name: {**content[name], **own.get(name, {})} for name in ("engine", "task")}
        content |= {"name": candidate or self.name, "frozen_baseline": False, **own, **nested}
        return validate(FinetuneRecipe, content, where=f"trained.{candidate}")


CHANGEABLE_ON_RESUME = ("minutes",)


def resolve_auto_recipe(recipe: AutoRecipe | str | Path, overrides: Iterable[str]) -> AutoRecipe:
    """The recipe of an automatic run, with its overrides; RecipeError for an unknown name, key or value."""
    if isinstance(recipe, AutoRecipe):
        return validate(AutoRecipe, recipe.model_dump(mode="json"), overrides)
    return load(AutoRecipe, recipe, "train", overrides)
