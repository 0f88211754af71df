"""Random numbers, geometry and resolution of views, one section each.

Sampling: random numbers are drawn on the CPU, so they are the same for all devices and need no synchronisation.

Geometry: an elastic deformation displaces a coarse grid of control points, interpolated by cubic B-splines (Rueckert et
al. 1999, IEEE TMI 18:712). It does not fold while every control point moves by less than `MAX_DISPLACEMENT` of a cell
along each axis (Choi and Lee 2000, Graphical Models 62:411).

Resolution: a scanner samples the object's spectrum up to a highest frequency along each axis. A sharp cutoff makes
edges ring (Gibbs ringing; Czervionke et al. 1988, AJNR 9:1033; Kellner et al. 2016, MRM 76:1574). Sampling 1 / f of the
spectrum, with a window that fades out as in scanners, makes pixels f times as thick. Each filter is one matrix per axis
of cosines, the spectrum of the image joined to its mirror image, so the two ends of a crop do not ring into each other.

Axis legend: ``n`` images (slices), ``V`` views per image, ``C`` contrasts, ``H W`` pixels; ``K`` images with an effect,
``S`` slices treated alike (1 for a view), ``G`` control points of an axis (three more than cells), ``L`` its pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from brainfound.data.augmentation.recipe import ViewsRecipe

MAX_DISPLACEMENT = 1 / 2.046392675
"""The largest displacement of a control point along an axis that cannot fold the plane, in cells."""
MAX_BLUR_RADIUS = 4  # pixels; kernels have 2 · 4 + 1 taps, enough for `MAX_BLUR_SIGMA_PIXELS`

# Sampling


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def log_uniform(shape: tuple[int, ...], span: tuple[float, float], generator: torch.Generator) -> Tensor:
    return uniform(shape, math.log(span[0]), math.log(span[1]), generator).exp()


def random_selection(count: int, probability: float, generator: torch.Generator) -> Bool[Tensor, "count"]:
    """Select count · probability items, rounded up or down at random, so the cost per step is nearly constant."""
    rounding = float(torch.rand((), generator=generator))
    order = torch.randperm(count, generator=generator)
    selected = torch.zeros(count, dtype=torch.bool)
    selected[order[: min(count, math.floor(probability * count + rounding))]] = True
    return selected


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to another device without synchronisation."""
    if device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class EffectSelection:
    """The images that an effect was drawn for, in ascending order, and the effect's values (a row per image)."""

    index: Int[np.ndarray, "selected"]
    values: tuple[Tensor, ...]

    @classmethod
    def where(cls, selected: Bool[Tensor, "count"], *values: Tensor) -> EffectSelection:
        """Build from a mask over all images, and values with one row per image."""
        return cls(np.flatnonzero(selected.numpy()), tuple(value[selected] for value in values))

    def part(self, first: int, count: int, device: torch.device) -> tuple[Tensor, ...] | None:
        """Index (relative to `first`) and values for images `first` … `first + count − 1`; None if none is selected."""
        low, high = np.searchsorted(self.index, [first, first + count])
        if low == high:
            return None
        index = torch.from_numpy(self.index[low:high] - first)
        return tuple(to_device(tensor, device) for tensor in (index, *(value[low:high] for value in self.values)))


# Geometry


def random_affine(
    count: int, image_size: tuple[int, int], scale: tuple[float, float], recipe: ViewsRecipe, generator: torch.Generator
) -> Float[Tensor, "count 2 3"]:
    """Matrices from a crop's normalised coordinates (x, y) to the image's, as for `torch.nn.functional.affine_grid`.

    Before its rotation the crop lies inside the image. Rotation and shear act on pixels, so they do not distort an
    image that is not square.
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
    x = torch.stack([cosine * crop_width * mirror, (cosine * shear - sine) * crop_height, 2 * centre_x]) / width
    y = torch.stack([sine * crop_width * mirror, (sine * shear + cosine) * crop_height, 2 * centre_y]) / height
    return rearrange([x, y], "two three count -> count two three")


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

    `strength` is the displacement for a control value of 1, as a share of the image's side.
    """
    rows, columns = (_spline_weights(side, control.shape[-1] - 3, control.device) for side in size)
    smooth = rows @ control @ columns.T
    return rearrange(smooth * (2 * strength)[:, None, None, None], "k xy h w -> k h w xy")


@cache
def _spline_weights(length: int, cells: int, device: torch.device) -> Float[Tensor, "L G"]:
    """The weight of each control point at each pixel centre: non-zero for four neighbours, summing to 1."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length * cells
    cell = position.floor().long().clamp(max=cells - 1)
    t = position - cell
    four = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], dim=1) / 6
    weights = torch.zeros(length, cells + 3, dtype=torch.float64)
    weights.scatter_(1, cell[:, None] + torch.arange(4), four)
    return weights.float().to(device)


# Resolution


def gaussian_blur(images: Float[Tensor, "K S H W"], sigma_pixels: Float[Tensor, "K"]) -> Float[Tensor, "K S H W"]:
    """Blur each image by its own sigma (0 is the identity), along rows and then along columns.

    Padding repeats the border pixels, since a crop's border lies within the head. Adding shifted images is up to five
    times faster on a CPU than a convolution per channel.
    """
    offsets = torch.arange(MAX_BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    # A sigma of 0 would divide by 0; at 1e-3 pixels the kernel is the identity in float32.
    kernel = (-0.5 * (offsets / sigma_pixels.clamp(min=1e-3)[:, None]) ** 2).exp()
    kernel = kernel / (2 * kernel.sum(dim=1, keepdim=True) - kernel[:, :1])
    weights = kernel[:, :, None, None, None].unbind(dim=1)
    for dim, padding in ((2, (0, 0, MAX_BLUR_RADIUS, MAX_BLUR_RADIUS)), (3, (MAX_BLUR_RADIUS, MAX_BLUR_RADIUS, 0, 0))):
        length = images.shape[dim]
        padded = F.pad(images, padding, mode="replicate")
        images = padded.narrow(dim, MAX_BLUR_RADIUS, length) * weights[0]
        pair = torch.empty_like(images)
        for offset in range(1, MAX_BLUR_RADIUS + 1):
            before = padded.narrow(dim, MAX_BLUR_RADIUS - offset, length)
            after = padded.narrow(dim, MAX_BLUR_RADIUS + offset, length)
            images.add_(torch.add(before, after, out=pair).mul_(weights[offset]))
    return images


def kspace_truncation_weights(kept: Float[Tensor, "K"], length: int) -> Float[Tensor, "K L"]:
    """Frequency weights of an axis that keep the lowest share `kept`, which causes Gibbs ringing."""
    return (torch.arange(length) < kept[:, None] * length).float()


def kspace_hann_weights(factor: Float[Tensor, "K"], length: int) -> Float[Tensor, "K L"]:
    """Frequency weights of an axis for pixels `factor` times as thick: a Hann window up to the new Nyquist limit."""
    position = torch.arange(length) * factor[:, None] / length  # 1 at the new Nyquist frequency
    return torch.where(position < 1, 0.5 + 0.5 * (math.pi * position.clamp(max=1)).cos(), 0.0)


def filter_rows(images: Float[Tensor, "K S H W"], weights: Float[Tensor, "K H"]) -> Float[Tensor, "K S H W"]:
    """Scale the frequencies from row to row (along H)."""
    return _filter_matrix(weights)[:, None] @ images


def filter_columns(images: Float[Tensor, "K S H W"], weights: Float[Tensor, "K W"]) -> Float[Tensor, "K S H W"]:
    """Scale the frequencies from column to column (along W)."""
    return images @ _filter_matrix(weights)[:, None]


def _filter_matrix(weights: Float[Tensor, "K L"]) -> Float[Tensor, "K L L"]:
    """The symmetric matrix Σ_j weight_j · c_j c_jᵀ over the orthonormal cosines c_j (DCT-II).

    cos a · cos b = (cos(a − b) + cos(a + b)) / 2, so an entry is the sum of two values of one kernel: at the distance
    of two pixels, and at the distance to the other's mirror image.
    """
    cosines, distance, mirrored = _cosines(weights.shape[1], weights.device)
    kernel = weights @ cosines
    return kernel[:, distance] + kernel[:, mirrored]


@cache
def _cosines(side: int, device: torch.device) -> tuple[Float[Tensor, "L 2·L"], Int[Tensor, "L L"], Int[Tensor, "L L"]]:
    frequency, pixel = torch.arange(side, dtype=torch.float64), torch.arange(side)
    table = torch.cos(math.pi / side * frequency[:, None] * torch.arange(2 * side)) / side
    table[0] /= 2
    distance = (pixel[:, None] - pixel).abs()
    return table.float().to(device), distance.to(device), (pixel[:, None] + pixel + 1).to(device)
