"""Crops and elastic deformation (position, orientation, no folds); blur, thick pixels and Gibbs ringing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import fft, ndimage
from scipy.interpolate import BSpline

from brainfound.data.augmentation import ViewsRecipe, random_affine
from brainfound.data.augmentation.recipe import MAX_BLUR_SIGMA_PIXELS
from brainfound.data.augmentation.transforms import (
    MAX_DISPLACEMENT,
    displacement_field,
    filter_columns,
    filter_rows,
    gaussian_blur,
    kspace_hann_weights,
    kspace_truncation_weights,
    random_control_points,
    sample_crops,
)


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


def test_area_aspect_rotation_and_shear_are_as_requested():
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


def mirrored_spectrum(image: torch.Tensor) -> np.ndarray:
    """|FFT| down the columns of an image continued by its mirror; index k is k half periods per image height."""
    values = image.double().numpy()
    return np.abs(np.fft.rfft(np.concatenate([values, values[::-1]]), axis=0))


@pytest.mark.parametrize("size", [(32, 32), (27, 40)])
def test_a_sharp_cutoff_leaves_nothing_beyond_and_everything_below(size):
    images = torch.rand(2, 1, *size, generator=seeded(0))
    kept = torch.tensor([0.5, 0.8])
    filtered = filter_rows(images, kspace_truncation_weights(kept, size[0]))
    for image, result, part in zip(images[:, 0], filtered[:, 0], kept.tolist(), strict=True):
        before, after = mirrored_spectrum(image), mirrored_spectrum(result)
        first_lost = math.ceil(part * size[0])
        assert after[first_lost:].max() < 1e-4
        np.testing.assert_allclose(after[:first_lost], before[:first_lost], atol=1e-4)
    turned = filter_columns(images.mT.contiguous(), kspace_truncation_weights(kept, size[0])).mT
    torch.testing.assert_close(turned, filtered, atol=1e-5, rtol=0)


def test_filters_are_those_of_the_cosine_transform():
    images = torch.rand(3, 2, 20, 26, generator=seeded(1))
    rows = torch.rand(3, 20, generator=seeded(2))
    columns = torch.rand(3, 26, generator=seeded(3))
    result = filter_columns(filter_rows(images, rows), columns)
    spectrum = fft.dctn(images.double().numpy(), axes=(2, 3), norm="ortho")
    spectrum *= rows.numpy()[:, None, :, None] * columns.numpy()[:, None, None, :]
    expected = fft.idctn(spectrum, axes=(2, 3), norm="ortho")
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_an_edge_rings_by_the_gibbs_constant():
    step = torch.zeros(1, 1, 512, 4)
    step[:, :, 256:] = 1
    ringing = filter_rows(step, kspace_truncation_weights(torch.tensor([0.06]), 512))
    # The Wilbraham–Gibbs overshoot is 8.95% of the jump.
    assert float(ringing.max()) - 1 == pytest.approx(0.0895, abs=0.002)


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_thick_pixels_hold_nothing_beyond_their_nyquist_frequency_and_do_not_ring(factor):
    length = 96
    images = torch.rand(1, 1, length, 3, generator=seeded(0))
    weights = kspace_hann_weights(torch.tensor([factor]), length)
    result = filter_rows(images, weights)
    # 1 / (2 · factor) periods per pixel are length / factor half periods per image.
    assert mirrored_spectrum(result[0, 0])[math.ceil(length / factor) :].max() < 1e-4
    torch.testing.assert_close(result.mean(dim=2), images.mean(dim=2))
    step = torch.zeros(1, 1, length, 1)
    step[:, :, length // 2 :] = 1
    edge = filter_rows(step, weights)
    assert float(edge.max()) < 1.01
    point = torch.zeros(1, 1, length, 1)
    point[:, :, length // 2] = 1
    spread = filter_rows(point, weights)[0, 0, :, 0]
    # A Hann window of half-width 1 / (2 f) has a point response of full width 2 f at half its height.
    fine = np.interp(np.linspace(0, length - 1, 20 * length), np.arange(length), spread.numpy())
    assert (fine > fine.max() / 2).mean() * length == pytest.approx(2 * factor, rel=0.1)


def test_filters_leave_an_even_image_alone():
    even = torch.full((2, 1, 30, 40), 0.7)
    for weights in (
        kspace_truncation_weights(torch.tensor([0.4, 0.8]), 30),
        kspace_hann_weights(torch.tensor([1.3, 3.0]), 30),
    ):
        torch.testing.assert_close(filter_rows(even, weights), even)
    torch.testing.assert_close(gaussian_blur(even, torch.tensor([0.5, 1.2])), even)


def test_blur_is_gaussian_per_image():
    images = torch.rand(3, 2, 20, 15, generator=seeded(0))
    sigma = [0.0, 0.7, 1.2]
    blurred = gaussian_blur(images, torch.tensor(sigma))
    assert torch.equal(blurred[0], images[0])
    for index in (1, 2):
        for part in range(2):
            expected = ndimage.gaussian_filter(
                images[index, part].double().numpy(), sigma[index], mode="nearest", radius=4
            )
            np.testing.assert_allclose(blurred[index, part].numpy(), expected, atol=1e-6)


def test_the_widest_blur_of_a_recipe_is_as_wide_as_it_says():
    image = torch.zeros(1, 1, 1, 61)
    image[..., 30] = 1
    for sigma in (0.6, MAX_BLUR_SIGMA_PIXELS):
        line = gaussian_blur(image.expand(-1, -1, 61, -1), torch.tensor([sigma]))[0, 0, 30]
        assert float((line * (torch.arange(61.0) - 30) ** 2).sum().sqrt()) == pytest.approx(sigma, rel=0.03)
