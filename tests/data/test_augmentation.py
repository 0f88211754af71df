"""Views: shapes, range, determinism, orientation, contrasts."""

from __future__ import annotations

import pytest
import torch

from brainfound.data.augmentation import IntensityRecipe, MultiCrop, ViewsRecipe, drop_contrasts, gaussian_blur
from brainfound.errors import RecipeError

PLAIN = {
    "gamma_probability": 0.0,
    "contrast_probability": 0.0,
    "noise_probability": 0.0,
    "blur_probability": 0.0,
}


def slices(num: int = 4, num_contrasts: int = 3, side: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randint(1, 256, (num, num_contrasts, side, side), dtype=torch.uint8, generator=seeded(0))
    pixels[:, :, :10] = 0
    present = torch.ones(num, num_contrasts, dtype=torch.bool)
    present[0, 1] = False
    pixels[0, 1] = 0
    return pixels, present


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(seed: int = 0, **settings):
    crop = MultiCrop(ViewsRecipe(**({"global_size": 32, "local_size": 16, "num_local": 3} | settings)), patch_size=8)
    return crop(*slices(), seeded(seed))


def test_shapes_and_range():
    result = views()
    assert result.global_views.pixels.shape == (8, 3, 32, 32)
    assert result.local_views.pixels.shape == (12, 3, 16, 16)
    for part in (result.global_views, result.local_views):
        assert part.contrast_mask.shape == part.pixels.shape[:2]
        assert torch.isfinite(part.pixels).all()
        assert part.pixels.min() >= 0
        assert part.pixels.max() <= 1
        assert part.pixels.max() > 0.5


def test_views_depend_on_the_seed_alone():
    first, again, other = views(1), views(1), views(2)
    assert torch.equal(first.global_views.pixels, again.global_views.pixels)
    assert torch.equal(first.local_views.pixels, again.local_views.pixels)
    assert not torch.equal(first.global_views.pixels, other.global_views.pixels)


def test_no_local_crops():
    assert views(num_local=0).local_views is None


def test_left_stays_left_and_anterior_stays_anterior():
    """A marker at anterior left must never appear on another side, whatever is drawn."""
    pixels = torch.zeros(64, 1, 40, 40, dtype=torch.uint8)
    pixels[:, :, 4:12, 4:12] = 255
    recipe = ViewsRecipe(
        global_size=32, num_local=0, global_scale=(0.9, 1.0), intensity=IntensityRecipe(**PLAIN), contrast_dropout=0.0
    )
    result = MultiCrop(recipe, 8)(pixels, torch.ones(64, 1, dtype=torch.bool), seeded(3)).global_views.pixels
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    mass = result.sum(dim=(1, 2, 3))
    assert (mass > 0).all()
    assert ((result[:, 0] * rows).sum(dim=(1, 2)) / mass < 15).all()
    assert ((result[:, 0] * columns).sum(dim=(1, 2)) / mass < 15).all()
    mirrored = MultiCrop(recipe.model_copy(update={"flip_left_right": 1.0}), 8)
    flipped = mirrored(pixels, torch.ones(64, 1, dtype=torch.bool), seeded(3)).global_views.pixels
    assert ((flipped[:, 0] * columns).sum(dim=(1, 2)) / mass > 16).all()


def test_without_randomness_a_view_is_the_slice():
    pixels, present = slices(side=32)
    recipe = ViewsRecipe(
        global_size=32,
        num_local=0,
        global_scale=(1, 1),
        aspect=(1, 1),
        rotation_degrees=0,
        shear=0,
        contrast_dropout=0,
        intensity=IntensityRecipe(**PLAIN),
    )
    result = MultiCrop(recipe, 8)(pixels, present, seeded(0)).global_views
    torch.testing.assert_close(result.pixels, (pixels.float() / 255).repeat(2, 1, 1, 1), atol=1e-5, rtol=0)
    assert torch.equal(result.contrast_mask, present.repeat(2, 1))


def test_background_stays_zero():
    strong = IntensityRecipe(gamma_probability=1, contrast_probability=1, noise_probability=1, blur_probability=1)
    pixels, present = slices(side=32)
    recipe = ViewsRecipe(
        global_size=32, num_local=0, global_scale=(1, 1), aspect=(1, 1), rotation_degrees=0, shear=0, intensity=strong
    )
    result = MultiCrop(recipe, 8)(pixels, present, seeded(1)).global_views.pixels
    assert (result[:, :, :9] == 0).all()
    assert (result[:, 0, 12:] != (pixels.float() / 255).repeat(2, 1, 1, 1)[:, 0, 12:]).float().mean() > 0.9


def test_contrasts_drop_but_never_all_and_never_appear():
    present = torch.tensor([[True, True, True], [True, False, False], [False, True, True]]).repeat(200, 1)
    kept = drop_contrasts(present, 0.5, seeded(0))
    assert (kept <= present).all()
    assert kept.any(dim=1).all()
    share = kept[present].float().mean()
    # Three contrasts keep 1 + 2 · ½ of 3, two keep 1 + ½ of 2, one keeps itself.
    assert float(share) == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop_contrasts(present, 0.0, seeded(0)), present)


def test_a_withheld_contrast_is_zero():
    result = views(contrast_dropout=0.6).global_views
    assert not result.contrast_mask.all()
    assert (result.pixels[~result.contrast_mask] == 0).all()


def test_blur_is_gaussian_per_image():
    images = torch.zeros(2, 1, 15, 15)
    images[:, :, 7, 7] = 1
    blurred = gaussian_blur(images, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(blurred[0], images[0])
    assert blurred[1].sum() == pytest.approx(1, abs=1e-5)
    assert blurred[1, 0, 7, 8] / blurred[1, 0, 7, 7] == pytest.approx(2.718281828**-0.5, rel=1e-4)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(RecipeError, match=r"views\.local_size=96"):
        MultiCrop(ViewsRecipe(global_size=224, local_size=98), patch_size=16)
