"""Smooth bending of the plane: what its control points say, without a fold, in the right direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from brainfound.data.augmentation.geometry import MAX_DISPLACEMENT, displacement_field, random_control_points


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
