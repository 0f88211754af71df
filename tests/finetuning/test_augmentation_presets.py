"""Augmentation by name, and what the names stand for."""

from __future__ import annotations

import pytest
import torch
import yaml

from brainfound.data.augmentation import IntensityRecipe
from brainfound.data.batches import VolumeBatch
from brainfound.errors import RecipeError
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.finetuning.volumes import PRESETS, VolumeAugmentation, augment_volumes
from brainfound.recipes import load, validate
from brainfound.training.randomness import StepKey

KEY = StepKey(seed=0, step=3, micro_batch=0, rank=0)
NONE = PRESETS["none"]


def augmentation(content: dict, *overrides: str) -> VolumeAugmentation:
    return validate(FinetuneRecipe, content, overrides, where="mine.yaml").augmentation


def head_batch(num_volumes: int = 6, side: int = 64) -> VolumeBatch:
    """A textured disc in air with a mask of one quarter; the second contrast is absent in every other volume."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    head = ((rows - side / 2) ** 2 + (columns - side / 2) ** 2) < (0.33 * side) ** 2
    grey = (60 + 20 * (rows // 8 % 2) + 40 * (columns // 8 % 2) + 2 * (columns % 8)) * head
    batch = VolumeBatch(
        pixel_values=grey.to(torch.uint8).expand(num_volumes, 3, 2, side, side).clone(),
        contrast_mask=torch.ones(num_volumes, 2, dtype=torch.bool),
        slice_mask=torch.ones(num_volumes, 3, dtype=torch.bool),
        positions_mm=torch.zeros(num_volumes, 3),
        masks=(head & (rows < side / 2) & (columns < side / 2)).long().expand(num_volumes, 3, side, side).clone(),
    )
    batch.contrast_mask[::2, 1] = False
    batch.pixel_values[::2, :, 1] = 0
    return batch


def test_a_recipe_that_names_a_preset_holds_its_fields():
    for name, preset in PRESETS.items():
        recipe = validate(FinetuneRecipe, {"augmentation": name})
        assert recipe.augmentation == preset == FinetuneRecipe(augmentation=name).augmentation
        resolved = yaml.safe_load(recipe.to_yaml())["augmentation"]
        assert resolved["rotation_degrees"] == preset.rotation_degrees
        assert resolved["intensity"]["blur_probability"] == preset.intensity.blur_probability
        assert validate(FinetuneRecipe, yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("recipe", "preset"), [("classification", "mild"), ("regression", "mild"), ("segmentation", "strong")]
)
def test_each_task_has_its_preset(recipe, preset):
    assert load(FinetuneRecipe, f"finetune-{recipe}", "train").augmentation == PRESETS[preset]


def test_one_field_is_set_on_top_of_a_preset_and_the_others_stay():
    found = augmentation({"augmentation": "strong"}, "augmentation.rotation_degrees=7")
    assert found == PRESETS["strong"].model_copy(update={"rotation_degrees": 7.0})
    found = augmentation({}, "augmentation=mild", "augmentation.intensity.blur_probability=0.9")
    mild = PRESETS["mild"]
    blurred = mild.intensity.model_copy(update={"blur_probability": 0.9})
    assert found == mild.model_copy(update={"intensity": blurred})
    # What a preset stands for is not changed by what one recipe does to it.
    assert augmentation({"augmentation": "mild"}) == mild
    assert augmentation({"augmentation": "mild"}, "augmentation=none") == NONE


def test_a_mapping_holds_fields_of_its_own():
    content = {"rotation_degrees": 5, "scale": 0.05, "shear": 0.0, "contrast_dropout": 0.2}
    found = augmentation({"augmentation": content}, "augmentation.scale=0.1")
    assert (found.rotation_degrees, found.scale, found.shear) == (5, 0.1, 0)
    assert found.elastic_probability == 0
    assert augmentation({"augmentation": content}) == PRESETS["mild"]  # the fields of mild, written out
    # A group of intensities that is given in part is filled up with its defaults.
    partly = augmentation({"augmentation": {"intensity": {"blur_probability": 0}}})
    assert partly.intensity == IntensityRecipe(blur_probability=0)


@pytest.mark.parametrize(
    ("content", "overrides", "expected"),
    [
        (
            {"augmentation": "stron"},
            (),
            "mine.yaml: augmentation: no such preset (got 'stron', expected one of none, mild, strong, or a mapping). "
            "Did you mean strong?",
        ),
        ({}, ("augmentation=stron",), "--set augmentation: no such preset (got 'stron', "),
        (
            {"augmentation": "heavy"},
            ("augmentation.scale=0",),
            "--set augmentation.scale=0: augmentation: no such preset (got 'heavy', ",
        ),
        ({"augmentation": "mild"}, ("augmentation.rotation=3",), "--set augmentation.rotation: unknown key. Did you"),
        ({"optim": "fast"}, (), "mine.yaml: optim: the value does not fit (got"),
        ({"optim": "fast"}, ("optim.lr=1",), "--set optim.lr=1: optim: this key holds a value, not a group"),
        ({}, ("augmentation.elastic=0.2",), "--set augmentation.elastic: elastic: 0.2 in 5 cells would fold the image"),
    ],
)
def test_wrong_names_and_values_are_one_line(content, overrides, expected):
    with pytest.raises(RecipeError) as error:
        augmentation(content, *overrides)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_none_leaves_every_volume_as_it_is():
    batch = head_batch()
    seen = augment_volumes(batch, NONE, KEY)
    torch.testing.assert_close(seen.pixel_values, batch.pixel_values / 255, atol=1e-5, rtol=0)
    assert torch.equal(seen.masks, batch.masks)
    assert torch.equal(seen.contrast_mask, batch.contrast_mask)


@pytest.mark.parametrize("name", ["mild", "strong"])
def test_air_stays_empty_and_absent_contrasts_stay_absent(name):
    batch = head_batch()
    seen = augment_volumes(batch, PRESETS[name], KEY)
    assert not torch.equal(seen.pixel_values, batch.pixel_values / 255)
    assert not (seen.contrast_mask & ~batch.contrast_mask).any()
    absent = ~seen.contrast_mask[:, None, :].expand(-1, 3, -1)
    assert (seen.pixel_values[absent] == 0).all()
    assert seen.pixel_values.min() >= 0
    assert seen.pixel_values.max() <= 1
    # The corners are air, whatever the head was turned, stretched or bent to.
    assert (seen.pixel_values[..., :3, :3] == 0).all()
    assert (seen.pixel_values[..., -3:, -3:] == 0).all()


def test_the_strong_one_moves_anatomy_further_than_the_mild_one():
    batch = head_batch(num_volumes=24)

    def kept(name: str) -> float:
        moved = augment_volumes(batch, PRESETS[name], KEY).masks
        return float((moved & batch.masks).sum() / batch.masks.sum())

    assert 0 < kept("strong") < kept("mild") - 0.1


def bending(probability: float = 1.0, **changes) -> VolumeAugmentation:
    return NONE.model_copy(update={"elastic_probability": probability, **changes})


def test_masks_and_all_slices_are_bent_with_the_pixels():
    batch = head_batch()
    white = batch.masks[:, :, None].repeat(1, 1, 2, 1, 1).mul(255).to(torch.uint8)
    batch = VolumeBatch(white, torch.ones_like(batch.contrast_mask), batch.slice_mask, batch.positions_mm, batch.masks)
    seen = augment_volumes(batch, bending(), KEY)
    for volume in range(6):
        bright, mask = seen.pixel_values[volume, 0, 0] > 0.5, seen.masks[volume, 0] == 1
        assert 2 * (bright & mask).sum() / (bright.sum() + mask.sum()) > 0.97
        assert torch.equal(seen.masks[volume, 0], seen.masks[volume, 2])
        assert torch.equal(seen.pixel_values[volume, 0], seen.pixel_values[volume, 2])
    # By a strength of its own: one may be bent by less than a pixel.
    assert (seen.masks != batch.masks).flatten(1).any(dim=1).sum() >= 4
    assert not torch.equal(seen.masks[0], seen.masks[1])


def test_a_part_of_the_volumes_is_bent_and_each_step_draws_anew():
    batch = head_batch(num_volumes=8)
    still = augment_volumes(batch, NONE, KEY).pixel_values

    def bent(key: StepKey) -> list[bool]:
        seen = augment_volumes(batch, bending(0.5), key)
        again = augment_volumes(batch, bending(0.5), key)
        assert torch.equal(seen.pixel_values, again.pixel_values)
        return [not torch.equal(one, other) for one, other in zip(seen.pixel_values, still, strict=True)]

    drawn = [bent(StepKey(0, step, 0, 0)) for step in range(4)]
    assert all(sum(of_step) == 4 for of_step in drawn)
    assert len({tuple(of_step) for of_step in drawn}) > 1


def test_bending_changes_nothing_else_that_is_drawn():
    """Affine, intensities and withheld contrasts are those of the same recipe without bending."""
    batch = head_batch()
    flat = PRESETS["strong"].model_copy(update={"elastic_probability": 0.0})
    faint = flat.model_copy(update={"elastic_probability": 1.0, "elastic": 1e-30})
    plain, bent = augment_volumes(batch, flat, KEY), augment_volumes(batch, faint, KEY)
    assert torch.equal(plain.contrast_mask, bent.contrast_mask)
    assert torch.equal(plain.pixel_values, bent.pixel_values)


def test_affine_and_bending_are_one_resampling_of_what_is_seen(monkeypatch):
    """A volume looks where the affine takes the place that the bending alone would look at."""
    batch, grids = head_batch(num_volumes=1), []
    original = torch.nn.functional.grid_sample

    def record(images, grid, **options):
        grids.append(grid.clone())
        return original(images, grid, **options)

    def looks_at(recipe: VolumeAugmentation) -> torch.Tensor:
        grids.clear()
        augment_volumes(batch, recipe, KEY)
        of_pixels, of_masks = grids
        assert torch.equal(of_pixels, of_masks)
        return of_pixels[0]

    monkeypatch.setattr("brainfound.finetuning.volumes.F.grid_sample", record)
    moved = NONE.model_copy(update={"rotation_degrees": 30.0, "scale": 0.25, "shear": 0.1})
    flat, bent = looks_at(moved), looks_at(bending())
    ones = torch.ones(64, 64, 1)
    identity = torch.cat([looks_at(NONE), ones], dim=-1)
    matrix = torch.linalg.lstsq(identity.flatten(0, 1), flat.flatten(0, 1)).solution
    expected = torch.cat([bent, ones], dim=-1) @ matrix
    both = looks_at(moved.model_copy(update={"elastic_probability": 1.0}))
    torch.testing.assert_close(both, expected, atol=1e-4, rtol=0)
    assert (both - flat).abs().max() > 50 * 1e-4
