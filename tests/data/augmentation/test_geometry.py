"""Crops and elastic deformation: position, orientation, no folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from brainfound.data.augmentation import ViewsRecipe, random_affine, sample_crops
from brainfound.data.augmentation.geometry import MAX_DISPLACEMENT, displacement_field, random_control_points


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


def pixel_centres(side: int) -> torch.Tensor:
    return (torch.arange(side) * 2 + 1) / side - 1


def test_displacements_are_cubic_b_splines_of_the_control_points():
    generator = torch.Generator().manual_seed(0)
    cells, size, strength = 4, (20, 30), torch.tensor([0.05, 0.02])
    control = random_control_points(2, cells, generator)
    found = displacement_field(control, strength, size)
    assert found.shape == (2, *size, 2)
    knots = np.arange(-3, cells + 4)
    rows, columns = (BSpline.design_matrix((np.arange(side) + 0.5) / side * cells, knots, 3).toarray() for side in size)
    for image in range(2):
        for axis in range(2):
            expected = 2 * float(strength[image]) * rows @ control[image, axis].double().numpy() @ columns.T
            np.testing.assert_allclose(found[image, :, :, axis], expected, atol=1e-6)


def test_control_points_that_move_alike_move_the_image():
    control = torch.zeros(1, 2, 8, 8)
    control[:, 0] = 1  # along x, that is along columns
    found = displacement_field(control, torch.tensor([0.1]), (16, 24))
    torch.testing.assert_close(found[..., 0], torch.full((1, 16, 24), 0.2))
    torch.testing.assert_close(found[..., 1], torch.zeros(1, 16, 24))


@pytest.mark.parametrize("cells", [1, 3, 6])
def test_nothing_is_folded_however_the_points_move(cells):
    """Every control point at one end or the other of what is allowed: the Jacobian stays positive."""
    generator = torch.Generator().manual_seed(cells)
    control = random_control_points(40, cells, generator).sign()
    control[0] = torch.tensor([1.0, -1.0]).repeat(cells + 3)[: cells + 3]  # neighbours run into each other along x
    side = 96
    looks_at = displacement_field(control, torch.full((40,), MAX_DISPLACEMENT / cells), (side, side))
    looks_at[..., 0] += pixel_centres(side)
    looks_at[..., 1] += pixel_centres(side)[:, None]
    along_x, along_y = looks_at[:, :-1, 1:] - looks_at[:, :-1, :-1], looks_at[:, 1:, :-1] - looks_at[:, :-1, :-1]
    assert (along_x[..., 0] * along_y[..., 1] - along_x[..., 1] * along_y[..., 0]).min() > 0


def test_bending_is_large_and_far_from_affine():
    control = random_control_points(16, 5, torch.Generator().manual_seed(0))
    found = displacement_field(control, torch.full((16,), 0.08), (64, 64))
    positions = torch.stack(torch.meshgrid(pixel_centres(64), pixel_centres(64), indexing="ij"), dim=-1).flatten(0, 1)
    design = torch.cat([positions, torch.ones(len(positions), 1)], dim=1)
    for bent in found.flatten(1, 2):
        rest = bent - design @ torch.linalg.lstsq(design, bent).solution
        assert rest.std() > 0.01  # of an image two wide
