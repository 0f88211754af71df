"""Settings that nothing would read are refused in one line; recipes, defaults and fitting settings pass."""

from __future__ import annotations

import pytest

from brainfound.errors import RecipeError
from brainfound.finetuning.recipe import FinetuneRecipe, require_effective_settings
from brainfound.finetuning.targets import Target
from brainfound.recipes import load, validate

TARGETS = {
    "classification": Target("classification", "diagnosis", names=("a", "b")),
    "regression": Target("regression", "age_years", mean=50.0, std=10.0),
    "segmentation": Target("segmentation", "mask", names=("background", "label 1"), codes=(0, 1)),
}


def recipe(*overrides: str) -> FinetuneRecipe:
    return validate(FinetuneRecipe, {}, overrides)


@pytest.mark.parametrize("task", TARGETS)
def test_shipped_recipes_and_defaults_fit(task):
    require_effective_settings(load(FinetuneRecipe, f"finetune-{task}", "train"), TARGETS[task])
    require_effective_settings(recipe(), TARGETS[task])
    # A resolved recipe has every key, with its default.
    require_effective_settings(validate(FinetuneRecipe, recipe().model_dump(mode="json")), TARGETS[task])


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("classification", ["classification.focal_gamma=2", "classification.class_weights=balanced", "aggregator=max"]),
        ("regression", ["regression.loss=huber", "regression.huber_delta=0.5"]),
        ("regression", ["regression.head=bins", "regression.bins=20", "regression.label_width=2"]),
        ("regression", ["regression.head=gaussian", "regression.interval_confidence=0.8"]),
        ("segmentation", ["decoder=unetr", "decoder_width=16", "decoder_slice_mixing=true", "foreground_share=0.9"]),
        ("segmentation", ["segmentation_loss=tversky", "tversky_alpha=0.5", "tversky_beta=0.5", "merge_codes=true"]),
        ("segmentation", ["segmentation_loss=focal_tversky", "tversky_beta=0.8", "tversky_gamma=2"]),
        ("segmentation", ["segmentation_loss=dice_focal", "focal_gamma=3", "aggregator=mean"]),
        ("segmentation", ["regions={whole: [1]}"]),
    ],
)
def test_what_is_read_passes(task, overrides):
    require_effective_settings(recipe(*overrides), TARGETS[task])


@pytest.mark.parametrize(
    ("task", "overrides", "expected"),
    [
        (
            "regression",
            ["regression.huber_delta=0.5"],
            "regression.huber_delta: this setting is for regression.loss=huber (got regression.loss=smooth_l1). "
            "Leave it out, or set regression.loss=huber",
        ),
        (
            "regression",
            ["regression.bins=20", "regression.label_width=2"],
            "regression.bins, regression.label_width: these settings are for regression.head=bins "
            "(got regression.head=point). Leave them out, or set regression.head=bins",
        ),
        (
            "segmentation",
            ["tversky_beta=0.9"],
            "tversky_beta: this setting is for segmentation_loss=tversky or focal_tversky "
            "(got segmentation_loss=dice_cross_entropy). Leave it out, or set segmentation_loss=tversky",
        ),
        (
            "segmentation",
            ["segmentation_loss=tversky", "tversky_gamma=2"],
            "tversky_gamma: this setting is for segmentation_loss=focal_tversky (got segmentation_loss=tversky)",
        ),
        (
            "segmentation",
            ["segmentation_loss=tversky", "focal_gamma=3"],
            "focal_gamma: this setting is for segmentation_loss=dice_focal",
        ),
        (
            "segmentation",
            ["aggregator=max"],
            "aggregator: this setting is for a classification or a regression (got a segmentation of mask). "
            "Leave it out",
        ),
        (
            "classification",
            ["decoder=unetr", "tversky_beta=0.9"],
            "decoder, tversky_beta: these settings are for a segmentation (got a classification of diagnosis). "
            "Leave them out, or set task=segmentation",
        ),
        ("regression", ["foreground_share=0.9"], "foreground_share: this setting is for a segmentation"),
        ("classification", ["merge_codes=true"], "merge_codes: this setting is for a segmentation"),
        (
            "segmentation",
            ["classification.focal_gamma=2"],
            "classification.focal_gamma: this setting is for a classification (got a segmentation of mask)",
        ),
        ("classification", ["regression.head=bins"], "regression.head: this setting is for a regression"),
    ],
)
def test_what_nothing_would_read_is_refused(task, overrides, expected):
    with pytest.raises(RecipeError) as error:
        require_effective_settings(recipe(*overrides), TARGETS[task])
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
