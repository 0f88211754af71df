"""Views of a batch: shapes, range, determinism, orientation, neighbours, contrasts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brainfound.data.augmentation import IntensityRecipe, MultiCrop, ViewsRecipe, drop_contrasts, intensity
from brainfound.data.augmentation.views import contrast_masks
from brainfound.errors import RecipeError

PLAIN = {"gamma_probability": 0.0, "contrast_probability": 0.0, "noise_probability": 0.0, "blur_probability": 0.0}


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


EVERYTHING = IntensityRecipe(
    gamma_probability=1,
    contrast_probability=1,
    bias_field_probability=1,
    blur_probability=1,
    low_resolution_probability=1,
    gibbs_probability=1,
    noise_probability=1,
    noise="rician",
)


@pytest.mark.parametrize("effects", [IntensityRecipe(), EVERYTHING])
def test_shapes_and_range(effects):
    result = views(intensity=effects)
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
    pixels, present = slices(side=32)
    recipe = ViewsRecipe(
        global_size=32,
        num_local=0,
        global_scale=(1, 1),
        aspect=(1, 1),
        rotation_degrees=0,
        shear=0,
        intensity=EVERYTHING,
    )
    result = MultiCrop(recipe, 8)(pixels, present, seeded(1)).global_views.pixels
    assert (result[:, :, :9] == 0).all()
    assert (result[:, 0, 12:] != (pixels.float() / 255).repeat(2, 1, 1, 1)[:, 0, 12:]).float().mean() > 0.9


def test_a_withheld_contrast_is_zero():
    result = views(contrast_dropout=0.6).global_views
    assert not result.contrast_mask.all()
    assert (result.pixels[~result.contrast_mask] == 0).all()


def evenly_grey(value: int) -> torch.Tensor:
    return torch.full((4, 3, 40, 40), value, dtype=torch.uint8)


def test_the_second_global_crop_alone_shows_the_neighbour():
    recipe = ViewsRecipe(
        global_size=32, local_size=16, num_local=3, rotation_degrees=0, shear=0, intensity=IntensityRecipe(**PLAIN)
    )
    present = torch.ones(4, 3, dtype=torch.bool)
    crops = MultiCrop(recipe, 8)(evenly_grey(51), present, seeded(0), neighbours=evenly_grey(204))
    first, second = crops.global_views.pixels.chunk(2)
    for part, mask, value in (
        (first, crops.global_views.contrast_mask[:4], 0.2),
        (second, crops.global_views.contrast_mask[4:], 0.8),
        (crops.local_views.pixels, crops.local_views.contrast_mask, 0.2),
    ):
        # The outermost pixels of a crop at the border are half outside of the slice.
        middle = part[mask][:, 4:-4, 4:-4]
        torch.testing.assert_close(middle, torch.full_like(middle, value), atol=1e-5, rtol=0)


def test_a_neighbour_changes_nothing_else():
    """Crops, contrasts and intensities are drawn alike with and without neighbours."""
    pixels, present = slices()
    crop = MultiCrop(ViewsRecipe(global_size=32, local_size=16, num_local=3), 8)
    alone, same = crop(pixels, present, seeded(4)), crop(pixels, present, seeded(4), neighbours=pixels)
    assert torch.equal(alone.global_views.contrast_mask, same.global_views.contrast_mask)
    torch.testing.assert_close(alone.global_views.pixels, same.global_views.pixels)
    torch.testing.assert_close(alone.local_views.pixels, same.local_views.pixels)


def test_global_crops_of_split_contrasts_share_nothing():
    crops = views(split_contrasts=1.0, contrast_dropout=0.0)
    first, second = crops.global_views.contrast_mask.chunk(2)
    assert not (first & second).any()
    assert first.any(dim=1).all()
    assert second.any(dim=1).all()
    assert torch.equal(first | second, slices()[1])
    for part in (crops.global_views, crops.local_views):
        assert (part.pixels.amax(dim=(2, 3)) > 0).equal(part.contrast_mask)


def test_an_absent_contrast_stays_empty_whatever_lies_in_its_place():
    pixels, present = slices()
    pixels[0, 1] = 200
    crops = MultiCrop(ViewsRecipe(global_size=32, local_size=16, num_local=3), 8)(pixels, present, seeded(0))
    assert (crops.global_views.pixels[::4, 1] == 0).all()
    assert (crops.local_views.pixels[::4, 1] == 0).all()


def test_a_training_step_in_bf16_makes_the_same_views():
    effects = IntensityRecipe(low_resolution_probability=0.5, gibbs_probability=0.5, bias_field_probability=0.5)
    plain = views(intensity=effects).global_views.pixels
    with torch.autocast("cpu", torch.bfloat16):
        inside = views(intensity=effects).global_views.pixels
    assert inside.dtype == torch.float32
    assert torch.equal(plain, inside)


def test_how_many_slices_are_worked_on_together_changes_nothing_but_noise(monkeypatch):
    effects = IntensityRecipe(noise_probability=0, low_resolution_probability=0.5, bias_field_probability=0.5)
    together = views(intensity=effects)
    monkeypatch.setattr(intensity, "CACHED_PIXELS", 1)
    apart = views(intensity=effects)
    torch.testing.assert_close(apart.global_views.pixels, together.global_views.pixels, atol=1e-6, rtol=0)
    torch.testing.assert_close(apart.local_views.pixels, together.local_views.pixels, atol=1e-6, rtol=0)


def test_floats_and_bytes_give_the_same_views():
    pixels, present = slices()
    crop = MultiCrop(ViewsRecipe(global_size=32, local_size=16, num_local=3), 8)
    as_bytes, as_floats = crop(pixels, present, seeded(4)), crop(pixels.float() / 255, present, seeded(4))
    assert torch.equal(as_bytes.global_views.pixels, as_floats.global_views.pixels)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(RecipeError, match=r"views\.local_size=96"):
        MultiCrop(ViewsRecipe(global_size=224, local_size=98), patch_size=16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_views_of_a_cpu_and_is_never_waited_for():
    effects = IntensityRecipe(
        noise_probability=0, bias_field_probability=0.5, low_resolution_probability=0.5, gibbs_probability=0.5
    )
    recipe = ViewsRecipe(global_size=32, local_size=16, num_local=3, split_contrasts=0.5, intensity=effects)
    crop, (pixels, present) = MultiCrop(recipe, 8), slices()
    expected = crop(pixels, present, seeded(0), neighbours=pixels.flip(0))
    on_gpu, neighbours = pixels.cuda(), pixels.flip(0).cuda()
    noise = torch.Generator("cuda").manual_seed(0)
    crop(on_gpu, present, seeded(0), noise, neighbours)  # tables of cosines are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = crop(on_gpu, present, seeded(0), noise, neighbours)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in ((result.global_views, expected.global_views), (result.local_views, expected.local_views)):
        assert torch.equal(one.contrast_mask.cpu(), other.contrast_mask)
        torch.testing.assert_close(one.pixels.cpu(), other.pixels, atol=1e-3, rtol=0)


def test_local_crops_are_not_larger_than_global_ones():
    with pytest.raises(RecipeError, match=r"views\.local_size: .*got 48, expected at most views\.global_size=32"):
        MultiCrop(ViewsRecipe(global_size=32, local_size=48), 8)
    MultiCrop(ViewsRecipe(global_size=32, local_size=48, num_local=0), 8)
    MultiCrop(ViewsRecipe(global_size=32, local_size=32), 8)


PRESENT = torch.tensor([[True, True, True], [True, False, False], [False, True, True], [True, True, True]])


def test_contrasts_drop_but_never_all_and_never_appear():
    present = PRESENT[:3].repeat(200, 1)
    kept = drop_contrasts(present, 0.5, seeded(0))
    assert (kept <= present).all()
    assert kept.any(dim=1).all()
    share = kept[present].float().mean()
    # Three contrasts keep 1 + 2 · ½ of 3, two keep 1 + ½ of 2, one keeps itself.
    assert float(share) == pytest.approx(0.75, abs=0.03)
    assert torch.equal(drop_contrasts(present, 0.0, seeded(0)), present)


@given(
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), min_size=1, max_size=12),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.4]),
)
def test_split_views_are_disjoint_and_never_empty(rows, seed, dropout):
    present = torch.tensor(rows)
    large, local = contrast_masks(present, 5, dropout, 1.0, seeded(seed))
    several = present.sum(dim=1) >= 2
    first, second = large.unbind(dim=1)
    assert not (first & second)[several].any()
    assert torch.equal(first[~several], present[~several])
    assert torch.equal(second[~several], present[~several])
    for shown in (first, second, *local.unbind(dim=1)):
        assert shown.any(dim=1).all()
        assert (shown <= present).all()
    if dropout == 0:
        assert torch.equal(first | second, present)


def test_every_division_and_every_local_subset_has_its_turn():
    present = torch.ones(400, 3, dtype=torch.bool)
    large, local = contrast_masks(present, 2, 0.0, 1.0, seeded(0))
    assert len({tuple(row) for row in large[:, 0].int().tolist()}) == 6  # all but none and all
    assert len({tuple(row) for row in local.flatten(0, 1).int().tolist()}) == 7  # all but none
    sizes = local.sum(dim=2).flatten().bincount(minlength=4)[1:] / 800
    assert sizes.tolist() == pytest.approx([1 / 3] * 3, abs=0.06)


def test_the_requested_part_is_split_and_the_rest_shows_everything():
    present = PRESENT.repeat(20, 1)
    large, local = contrast_masks(present, 3, 0.0, 0.5, seeded(1))
    is_split = (large[:, 0] != present).any(dim=1)
    assert int(is_split.sum()) == 30  # half of those with two or more
    assert torch.equal(large[~is_split, 1], present[~is_split])
    assert torch.equal(local[~is_split], present[~is_split, None].expand(-1, 3, -1))
    assert (local[is_split] != present[is_split, None]).any()
    none, _ = contrast_masks(present, 3, 0.0, 0.0, seeded(1))
    assert torch.equal(none, present[:, None].expand(-1, 2, -1))
