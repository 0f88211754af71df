"""Geometry of views: random resized, rotated and sheared crops, and elastic deformation.

A crop is one resampling of the slice. An elastic deformation displaces a coarse grid of control points, interpolated by
cubic B-splines (Rueckert et al. 1999, IEEE TMI 18:712). It does not fold while every control point moves by less than
`MAX_DISPLACEMENT` of a cell along each axis (Choi and Lee 2000, Graphical Models 62:411).

Axis legend: ``n`` images (slices), ``V`` views per image, ``C`` contrasts, ``H W`` pixels; ``K`` deformed images, ``G``
control points of an axis (three more than cells), ``L`` pixels of one axis.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from brainfound.data.augmentation.recipe import ViewsRecipe
from brainfound.data.augmentation.sampling import log_uniform, uniform

MAX_DISPLACEMENT = 1 / 2.046392675
"""The largest displacement of a control point along an axis that cannot fold the plane, in cells."""


def random_affine(
    count: int,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    recipe: ViewsRecipe,
    generator: torch.Generator,
) -> Float[Tensor, "count 2 3"]:
    """Matrices from a crop's normalised coordinates (x, y) to the image's, as for `torch.nn.functional.affine_grid`.

    Before its rotation the crop lies inside the image; its height and width follow area and aspect, limited to the
    image. Rotation and shear act on pixels, so they do not distort an image that is not square.
    """
    height, width = image_size
    area = uniform((count,), *scale, generator) * height * width
    aspect = log_uniform((count,), recipe.aspect, generator)
    crop_height = (area * aspect).sqrt().clamp(max=height)
    crop_width = (area / aspect).sqrt().clamp(max=width)
    centre_x = (torch.rand(count, generator=generator) * 2 - 1) * (width - crop_width) / 2
    centre_y = (torch.rand(count, generator=generator) * 2 - 1) * (height - crop_height) / 2
    limit = math.radians(recipe.rotation_degrees)
    angle = uniform((count,), -limit, limit, generator)
    shear = uniform((count,), -recipe.shear, recipe.shear, generator)
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < recipe.flip_left_right).float()
    cosine, sine = angle.cos(), angle.sin()
    # Rotation · shear · size, in pixels from the image's centre, divided by half the image's size.
    rows = torch.stack(
        [
            torch.stack([cosine * crop_width * mirror, (cosine * shear - sine) * crop_height, 2 * centre_x]) / width,
            torch.stack([sine * crop_width * mirror, (sine * shear + cosine) * crop_height, 2 * centre_y]) / height,
        ]
    )
    return rearrange(rows, "two three count -> count two three")


def sample_crops(
    images: Float[Tensor, "n C H W"], matrices: Float[Tensor, "n V 2 3"], side: int
) -> Float[Tensor, "n C V side side"]:
    """The crops of `random_affine` matrices, by one `grid_sample` (bilinear, 0 outside).

    All views of an image are sampled as one tall grid, so that images are not copied per view. Storing x and y of the
    grid separately, as sums of rows and columns, is more than ten times faster than `affine_grid`. There is no
    anti-aliasing: at the usual scales crops are resized by less than a factor of two.
    """
    num_images, num_views = matrices.shape[:2]
    steps = (torch.arange(side, device=images.device, dtype=images.dtype) * 2 + 1) / side - 1
    along_x, along_y, offset = rearrange(matrices, "n views two three -> three n two views 1", three=3)
    grid = images.new_empty(num_images, 2, num_views, side, side)
    torch.add((along_x * steps + offset)[..., None, :], (along_y * steps)[..., :, None], out=grid)
    tall = rearrange(grid, "n two views h w -> n (views h) w two")
    sampled = F.grid_sample(images, tall, mode="bilinear", padding_mode="zeros", align_corners=False)
    return rearrange(sampled, "n c (views h) w -> n c views h w", views=num_views)


def random_control_points(count: int, cells: int, generator: torch.Generator) -> Float[Tensor, "count 2 G G"]:
    """Displacements along x and y between −1 and 1, for a grid of `cells` × `cells` cells over an image."""
    return uniform((count, 2, cells + 3, cells + 3), -1, 1, generator)


def displacement_field(
    control: Float[Tensor, "K 2 G G"], strength: Float[Tensor, "K"], size: tuple[int, int]
) -> Float[Tensor, "K H W 2"]:
    """The offset from each pixel to where it is sampled, in normalised coordinates (x, y) of `grid_sample`.

    Args:
        strength: the displacement by a control value of 1, as a share of the image's side.
    """
    rows, columns = (_spline_weights(side, control.shape[-1] - 3, control.device) for side in size)
    smooth = rows @ control @ columns.T
    return rearrange(smooth * (2 * strength)[:, None, None, None], "k xy h w -> k h w xy")


@cache
def _spline_weights(length: int, cells: int, device: torch.device) -> Float[Tensor, "L G"]:
    """The weight of each control point at each pixel centre: non-zero for four neighbours, with the sum 1."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length * cells
    cell = position.floor().long().clamp(max=cells - 1)
    t = position - cell
    four = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1) / 6
    weights = torch.zeros(length, cells + 3, dtype=torch.float64)
    weights.scatter_(1, cell[:, None] + torch.arange(4), four)
    return weights.float().to(device)
