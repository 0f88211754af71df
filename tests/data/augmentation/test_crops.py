"""Where a view looks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from brainfound.data.augmentation import ViewsRecipe, random_affine, sample_crops


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_crops_are_those_of_an_affine_grid_one_by_one():
    images = torch.rand(3, 2, 30, 40, generator=seeded(0))
    matrices = random_affine(6, (30, 40), (0.3, 1.0), ViewsRecipe(), seeded(1)).unflatten(0, (3, 2))
    crops = sample_crops(images, matrices, 16)
    for image in range(3):
        for view in range(2):
            grid = F.affine_grid(matrices[image, view][None], [1, 2, 16, 16], align_corners=False)
            expected = F.grid_sample(images[image][None], grid, align_corners=False)[0]
            torch.testing.assert_close(crops[image, :, view], expected, atol=1e-5, rtol=0)


@given(st.integers(0, 10_000))
def test_nothing_is_ever_upside_down_and_sides_are_kept(seed):
    recipe = ViewsRecipe(rotation_degrees=30, shear=0.2)
    matrices = random_affine(64, (30, 40), recipe.global_scale, recipe, seeded(seed))
    assert recipe.flip_left_right == 0
    assert (matrices[:, 0, 0] > 0).all()  # to the right in the crop is to the right in the slice
    assert (matrices[:, 1, 1] > 0).all()  # downwards is downwards
    mirrored = random_affine(64, (30, 40), (0.3, 1), recipe.model_copy(update={"flip_left_right": 1.0}), seeded(seed))
    assert (mirrored[:, 0, 0] < 0).all()
    assert (mirrored[:, 1, 1] > 0).all()


def test_area_aspect_rotation_and_shear_are_as_asked():
    recipe = ViewsRecipe()
    matrices = random_affine(2000, (200, 200), (0.2, 0.5), recipe, seeded(0))[:, :, :2]
    area = torch.linalg.det(matrices)
    assert 0.2 <= float(area.min()) < 0.22
    assert 0.48 < float(area.max()) <= 0.5 + 1e-5
    angle = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0]).rad2deg()
    assert float(angle.abs().max()) == pytest.approx(10, abs=0.1)
    assert float(angle.mean()) == pytest.approx(0, abs=0.5)
    columns = matrices / matrices.norm(dim=1, keepdim=True)
    cosine = (columns[:, :, 0] * columns[:, :, 1]).sum(dim=1)  # shear s leaves atan s of the right angle
    assert float(cosine.abs().max()) == pytest.approx(0.05, abs=0.002)


def test_an_upright_crop_lies_within_the_slice():
    recipe = ViewsRecipe(rotation_degrees=0, shear=0)
    matrices = random_affine(500, (30, 40), (0.1, 1.0), recipe, seeded(2))
    half = matrices[:, :, :2].abs().sum(dim=2)
    assert (half + matrices[:, :, 2].abs() <= 1 + 1e-5).all()
