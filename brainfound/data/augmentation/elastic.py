"""Elastic deformation: a smooth bending of the plane, as heads differ in shape and tissue gives way.

Model: displacements of a coarse grid of control points, made smooth by cubic B-splines (Rueckert et al. 1999, IEEE TMI
18:712). No place is folded over another while every control point moves by less than `FURTHEST` of a cell along each
axis (Choi and Lee 2000, Graphical Models 62:411).

Axis legend: ``K`` images, ``G`` control points of an axis (three more than cells), ``L`` pixels of one axis, ``H W``
pixels.
"""

from __future__ import annotations

from functools import cache

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from brainfound.data.augmentation.drawing import uniform

FURTHEST = 1 / 2.046392675
"""The largest displacement of a control point along an axis that cannot fold the plane, in cells."""


def random_control_points(count: int, cells: int, generator: torch.Generator) -> Float[Tensor, "count 2 G G"]:
    """Displacements along x and y between −1 and 1, for a grid of `cells` × `cells` cells over an image."""
    return uniform((count, 2, cells + 3, cells + 3), -1, 1, generator)


def displacements(
    control: Float[Tensor, "K 2 G G"], strength: Float[Tensor, "K"], size: tuple[int, int]
) -> Float[Tensor, "K H W 2"]:
    """Where each pixel looks instead, relative to itself, in normalised coordinates (x, y) as `grid_sample` takes them.

    Args:
        strength: what a control value of 1 means, as a share of the image's side.
    """
    rows, columns = (_spline_weights(side, control.shape[-1] - 3, control.device) for side in size)
    smooth = rows @ control @ columns.T
    return rearrange(smooth * (2 * strength)[:, None, None, None], "k xy h w -> k h w xy")


@cache
def _spline_weights(length: int, cells: int, device: torch.device) -> Float[Tensor, "L G"]:
    """The weight of each control point at the centre of each pixel: four neighbours have one, and their sum is 1."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length * cells
    cell = position.floor().long().clamp(max=cells - 1)
    t = position - cell
    four = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1) / 6
    weights = torch.zeros(length, cells + 3, dtype=torch.float64)
    weights.scatter_(1, cell[:, None] + torch.arange(4), four)
    return weights.float().to(device)
