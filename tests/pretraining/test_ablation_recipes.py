"""The ablations of the views differ from their base, and the base from the recipe it stands for, in what they say."""

from __future__ import annotations

from typing import Any

import pytest

from brainfound import recipes
from brainfound.pretraining.recipe import PretrainRecipe

ARTEFACTS = {"bias_field_probability", "low_resolution_probability", "gibbs_probability", "noise"}
INTENSITY = {"gamma_probability", "contrast_probability", "blur_probability", "noise_probability"}
FACTORS: dict[str, set[str]] = {
    "ablation-base": set(),
    "ablation-neighbour-slice": {"views.neighbour_mm"},
    "ablation-no-contrast-dropout": {"views.contrast_dropout"},
    "ablation-split-contrasts": {"views.split_contrasts"},
    "ablation-no-intensity": {f"views.intensity.{key}" for key in INTENSITY},
    "ablation-artefacts": {f"views.intensity.{key}" for key in ARTEFACTS},
    "ablation-no-affine": {"views.rotation_degrees", "views.shear", "views.aspect"},
}


def flat(content: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {where.removeprefix("."): content}
    return {key: value for name, part in content.items() for key, value in flat(part, f"{where}.{name}").items()}


def settings(name: str) -> dict[str, Any]:
    return flat(recipes.load(PretrainRecipe, name, "train").model_dump(mode="json"))


def test_every_ablation_is_known():
    assert {name for name in recipes.available("train") if name.startswith("ablation-")} == set(FACTORS)


@pytest.mark.parametrize("name", FACTORS)
def test_an_ablation_varies_one_factor(name):
    base, varied = settings("ablation-base"), settings(name)
    assert base.keys() == varied.keys()
    assert {key for key in base if base[key] != varied[key]} - {"name"} == FACTORS[name]
    text = recipes.find(name, "train").read_text()
    assert f"brainfound pretrain {name} --data STORE" in text.split("name:")[0]


def test_the_base_is_the_laptop_recipe():
    base, laptop = settings("ablation-base"), settings("pretrain-vits14-laptop")
    assert {key for key in base if base[key] != laptop.get(key)} == {"name"}
