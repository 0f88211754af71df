"""Random views of slices for pretraining, made in batches on the device from uint8 pixels.

Axis legend: ``n`` images (slices), ``V`` views per image, ``C`` contrasts, ``H W`` pixels.

A view is one random crop, slightly rotated and sheared, with random intensities. What changes a
scan without changing the anatomy is varied (receiver gain, contrast between tissues, noise,
resolution); what would is not: there is no vertical flip, and left and right are kept unless the
recipe asks otherwise. Air stays exactly 0, because "background is 0" is part of the input contract.

Sources: multi-crop (SwAV, arXiv 2006.09882, section 3.2) with the scales of DINOv2; gamma, noise
and blur as in common MRI augmentation (nnU-Net, Isensee et al. 2021, supplementary note 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from brainfound.data.batches import unit_range
from brainfound.errors import RecipeError
from brainfound.recipes import Recipe

MAX_BLUR_RADIUS = 4  # pixels; kernels have 2 · 4 + 1 taps, enough for a sigma of 1.5 pixels


class IntensityRecipe(Recipe):
    """Random intensities of a view; every contrast of a view is varied on its own."""

    gamma_probability: float = Field(default=0.5, ge=0, le=1)
    """How often the grey values are raised to a random power."""
    gamma: tuple[float, float] = (0.7, 1.5)
    """Range of that power (drawn log-uniformly)."""
    contrast_probability: float = Field(default=0.8, ge=0, le=1)
    """How often gain and contrast are varied."""
    brightness: float = Field(default=0.2, ge=0, lt=1)
    """The gain is drawn from 1 ± this."""
    contrast: float = Field(default=0.25, ge=0, lt=1)
    """The distance from the foreground's mean is scaled by 1 ± this."""
    noise_probability: float = Field(default=0.3, ge=0, le=1)
    """How often Gaussian noise is added to the foreground."""
    noise_std: float = Field(default=0.05, ge=0)
    """Largest standard deviation of the noise, on the 0–1 scale."""
    blur_probability: float = Field(default=0.3, ge=0, le=1)
    """How often a view is blurred."""
    blur_sigma_pixels: tuple[float, float] = (0.3, 1.2)
    """Range of the Gaussian blur."""


class ViewsRecipe(Recipe):
    """The random views that teacher and student see of each slice."""

    num_local: int = Field(default=8, ge=0)
    """Local crops per slice, seen by the student only. There are always two global crops."""
    global_size: int = Field(default=224, ge=1)
    """Side of a global crop in pixels; a multiple of the patch size."""
    local_size: int = Field(default=98, ge=1)
    """Side of a local crop in pixels; a multiple of the patch size."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Range of the area of a global crop, as a part of the slice."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Range of the area of a local crop, as a part of the slice."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a crop's height over its width before it is resized to a square."""
    rotation_degrees: float = Field(default=10.0, ge=0, le=45)
    """Largest in-plane rotation, to either side."""
    shear: float = Field(default=0.05, ge=0, lt=1)
    """Largest in-plane shear, to either side."""
    flip_left_right: float = Field(default=0.0, ge=0, le=1)
    """How often a view is mirrored. 0, because the side of a lesion is information."""
    contrast_dropout: float = Field(default=0.1, ge=0, lt=1)
    """How often a present contrast is withheld from a view; one contrast always stays."""
    slice_margin: float = Field(default=0.1, ge=0, lt=0.5)
    """Part of a session's slices left out at each end, where there is little brain."""
    intensity: IntensityRecipe = IntensityRecipe()

    @model_validator(mode="after")
    def _ranges_increase(self) -> ViewsRecipe:
        for name in ("global_scale", "local_scale", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two increasing positive numbers, got {low}, {high}")
        return self


@dataclass(frozen=True)
class Views:
    """A batch of views; rows are view-major: all images in crop 0, then all images in crop 1, …"""

    pixels: Float[Tensor, "V·n C H W"]
    """Grey values, 0–1; an absent or withheld contrast is 0."""
    contrast_mask: Bool[Tensor, "V·n C"]
    """Which contrasts this view shows."""


@dataclass(frozen=True)
class CropViews:
    """The global and local views of the same images; `local_views` is None without local crops."""

    global_views: Views
    local_views: Views | None


class MultiCrop:
    """Two global and `num_local` local random views of each slice.

    Args:
        recipe: the settings.
        patch_size: of the backbone; crop sides must be multiples of it.

    Raises:
        RecipeError: if a crop side is not a multiple of the patch size.
    """

    num_global = 2

    def __init__(self, recipe: ViewsRecipe, patch_size: int) -> None:
        for key in ("global_size", "local_size"):
            side = getattr(recipe, key)
            if side % patch_size and (key == "global_size" or recipe.num_local):
                nearest = max(1, round(side / patch_size)) * patch_size
                raise RecipeError(
                    "a crop's side must be a multiple of the backbone's patch size",
                    where=f"views.{key}",
                    got=side,
                    expected=f"a multiple of {patch_size}",
                    remedy=f"Set views.{key}={nearest}",
                )
        self.recipe = recipe
        self.patch_size = patch_size

    def __call__(
        self,
        pixels: UInt8[Tensor, "n C H W"],
        present: Bool[Tensor, "n C"],
        generator: torch.Generator,
        noise_generator: torch.Generator | None = None,
    ) -> CropViews:
        """Views of a batch.

        Args:
            pixels: slices, uint8 or float in 0–1, on the device where the views are to be made.
            present: which contrasts each slice has.
            generator: on the CPU; draws everything that is small (the same on every device).
            noise_generator: on the device of `pixels`; draws the pixels' noise. By default `generator`.
        """
        images = unit_range(pixels) * present[:, :, None, None]
        noise_generator = noise_generator or generator
        recipe = self.recipe

        def views(count: int, side: int, scale: tuple[float, float]) -> Views:
            crops = random_crops(images, count, side, scale, recipe, generator)
            mask = drop_contrasts(present.cpu().repeat(count, 1), recipe.contrast_dropout, generator)
            crops = vary_intensity(crops, recipe.intensity, generator, noise_generator)
            mask = mask.to(pixels.device)
            return Views(crops * mask[:, :, None, None], mask)

        large = views(self.num_global, recipe.global_size, recipe.global_scale)
        small = views(recipe.num_local, recipe.local_size, recipe.local_scale) if recipe.num_local else None
        return CropViews(large, small)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _log_uniform(shape: tuple[int, ...], span: tuple[float, float], generator: torch.Generator) -> Tensor:
    return _uniform(shape, math.log(span[0]), math.log(span[1]), generator).exp()


def random_affine(
    count: int,
    image_size: tuple[int, int],
    scale: tuple[float, float],
    recipe: ViewsRecipe,
    generator: torch.Generator,
) -> Float[Tensor, "count 2 3"]:
    """Matrices for `affine_grid`: from a crop's normalised coordinates (x, y) to the image's.

    The crop's centre is drawn so that the unrotated crop lies inside the image; crop height and
    width follow area and aspect and are cut to the image. Rotation and shear are in pixels, so an
    image that is not square is not distorted.
    """
    height, width = image_size
    area = _uniform((count,), *scale, generator) * height * width
    aspect = _log_uniform((count,), recipe.aspect, generator)
    crop_height = (area * aspect).sqrt().clamp(max=height)
    crop_width = (area / aspect).sqrt().clamp(max=width)
    centre_x = (torch.rand(count, generator=generator) * 2 - 1) * (width - crop_width) / 2
    centre_y = (torch.rand(count, generator=generator) * 2 - 1) * (height - crop_height) / 2
    limit = math.radians(recipe.rotation_degrees)
    angle = _uniform((count,), -limit, limit, generator)
    shear = _uniform((count,), -recipe.shear, recipe.shear, generator)
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < recipe.flip_left_right).float()
    cosine, sine = angle.cos(), angle.sin()
    # Rotation · shear · size, in pixels from the image's middle; then in units of half the image.
    rows = torch.stack(
        [
            torch.stack([cosine * crop_width * mirror, (cosine * shear - sine) * crop_height, 2 * centre_x]) / width,
            torch.stack([sine * crop_width * mirror, (sine * shear + cosine) * crop_height, 2 * centre_y]) / height,
        ]
    )
    return rearrange(rows, "two three count -> count two three")


def random_crops(
    images: Float[Tensor, "n C H W"],
    num_views: int,
    side: int,
    scale: tuple[float, float],
    recipe: ViewsRecipe,
    generator: torch.Generator,
) -> Float[Tensor, "V·n C side side"]:
    """Random resized, rotated and sheared crops, view-major, by one `grid_sample` (bilinear, 0 outside).

    All views of an image are sampled as one tall grid, so that images are not copied per view.
    There is no anti-aliasing: at the usual scales crops are resized by less than a factor of two.
    """
    num_images, num_contrasts, height, width = images.shape
    matrices = random_affine(num_views * num_images, (height, width), scale, recipe, generator)
    grid = F.affine_grid(
        matrices.to(images.device), [num_views * num_images, num_contrasts, side, side], align_corners=False
    )
    tall = rearrange(grid, "(views n) h w two -> n (views h) w two", n=num_images)
    sampled = F.grid_sample(images, tall, mode="bilinear", padding_mode="zeros", align_corners=False)
    return rearrange(sampled, "n c (views h) w -> (views n) c h w", views=num_views)


def drop_contrasts(present: Bool[Tensor, "n C"], probability: float, generator: torch.Generator) -> Bool[Tensor, "n C"]:
    """Withhold each present contrast with `probability`; one present contrast of each row always stays."""
    order = torch.rand(present.shape, generator=generator).masked_fill(~present, -1.0)
    survivor = F.one_hot(order.argmax(dim=1), present.shape[1]).bool()
    kept = torch.rand(present.shape, generator=generator) >= probability
    return present & (kept | survivor)


def vary_intensity(
    views: Float[Tensor, "n C H W"],
    recipe: IntensityRecipe,
    generator: torch.Generator,
    noise_generator: torch.Generator,
) -> Float[Tensor, "n C H W"]:
    """Random gamma, gain, contrast, blur and noise of the foreground; the background stays 0, the range 0–1."""
    device, shape = views.device, tuple(views.shape[:2])
    foreground = views > 0

    def draw(values: Tensor, probability: float, neutral: float) -> Tensor:
        chosen = torch.rand(shape, generator=generator) < probability
        return torch.where(chosen, values, torch.full_like(values, neutral)).to(device)[:, :, None, None]

    gamma = draw(_log_uniform(shape, recipe.gamma, generator), recipe.gamma_probability, 1.0)
    # The power is taken of clamped values: the gradient is not needed, but 0 ** gamma must be 0.
    views = views.clamp(0, 1).pow(gamma)
    gain = draw(
        _uniform(shape, 1 - recipe.brightness, 1 + recipe.brightness, generator), recipe.contrast_probability, 1
    )
    spread = draw(_uniform(shape, 1 - recipe.contrast, 1 + recipe.contrast, generator), recipe.contrast_probability, 1)
    count = foreground.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    mean = views.sum(dim=(2, 3), keepdim=True) / count
    views = (mean + (views - mean) * spread) * gain * foreground
    sigma = _uniform((len(views),), *recipe.blur_sigma_pixels, generator)
    blurred = torch.rand(len(views), generator=generator) < recipe.blur_probability
    views = gaussian_blur(views, torch.where(blurred, sigma, torch.zeros_like(sigma)).to(device))
    std = draw(_uniform(shape, 0, recipe.noise_std, generator), recipe.noise_probability, 0.0)
    noise = torch.randn(views.shape, generator=noise_generator, device=noise_generator.device).to(device)
    return ((views + noise * std) * foreground).clamp(0, 1)


def gaussian_blur(images: Float[Tensor, "n C H W"], sigma_pixels: Float[Tensor, "n"]) -> Float[Tensor, "n C H W"]:
    """Blur each image by its own sigma (0 leaves it as it is), as two one-dimensional convolutions."""
    num_images, num_contrasts = images.shape[:2]
    offsets = torch.arange(-MAX_BLUR_RADIUS, MAX_BLUR_RADIUS + 1, device=images.device, dtype=images.dtype)
    # A sigma of 0 would divide by 0; at 1e-3 pixels the kernel is the identity in float32.
    kernel = (-0.5 * (offsets / sigma_pixels.clamp(min=1e-3)[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    per_channel = repeat(kernel, "n taps -> (n c) 1 taps", c=num_contrasts)
    flat = rearrange(images, "n c h w -> 1 (n c) h w")
    groups = num_images * num_contrasts
    flat = F.conv2d(flat, per_channel[..., :, None], padding=(MAX_BLUR_RADIUS, 0), groups=groups)
    flat = F.conv2d(flat, per_channel[..., None, :], padding=(0, MAX_BLUR_RADIUS), groups=groups)
    return rearrange(flat, "1 (n c) h w -> n c h w", n=num_images)
