"""Random intensities of the foreground, in the order of the acquisition; the background stays exactly 0.

The effects are tissue contrast (gamma, gain), coils (bias field), sampling (blur, thick pixels, Gibbs ringing; see
`transforms`) and receiver (noise). Their parameters are drawn first; an effect touches only the images that it was
drawn for. Grey values stay in 0–1.

Bias field: the exponential of a polynomial of low order, the inverse of the correction of Van Leemput et al. 1999 (IEEE
TMI 18:885); coil sensitivity and transmit inhomogeneity multiply the signal and vary over centimetres.
Noise: Gaussian in the real and the imaginary part makes the magnitude Rician (Gudbjartsson and Patz 1995, MRM 34:910),
which is nearly Gaussian above three times the noise and brightens darker pixels.

Axis legend: ``P`` images (one contrast of one view, or of one volume), ``S`` slices of an image that are treated alike
(1 for a view), ``K`` images that an effect was drawn for, ``T`` powers of an axis, ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from brainfound.data.augmentation.recipe import IntensityRecipe
from brainfound.data.augmentation.transforms import (
    EffectSelection,
    filter_columns,
    filter_rows,
    gaussian_blur,
    kspace_hann_weights,
    kspace_truncation_weights,
    log_uniform,
    random_selection,
    to_device,
    uniform,
)

CACHED_PIXELS = 1 << 20  # per chunk on a CPU: their float32 values and one copy fit into its cache
ORDER = 3  # total order of a bias field's polynomial


def chunk_size(num_images: int, pixels_per_image: int, device: torch.device) -> int:
    """Number of images to process at once: on a CPU as many as fit into its cache, on other devices all."""
    return max(1, CACHED_PIXELS // max(1, pixels_per_image)) if device.type == "cpu" else max(1, num_images)


@dataclass(frozen=True)
class IntensityPlan:
    """The drawn parameters of the effects on P images; the noise itself is drawn when the plan is applied."""

    recipe: IntensityRecipe
    gamma: EffectSelection
    gain: Float[Tensor, "P"]
    spread: Float[Tensor, "P"]
    """Factor on the distance from the foreground's mean."""
    bias_field: EffectSelection
    blur: EffectSelection
    rows: EffectSelection
    """Weights of the frequencies from row to row (Gibbs ringing, thick pixels); `columns`: from column to column."""
    columns: EffectSelection
    noise: EffectSelection

    @classmethod
    def draw(
        cls,
        num_images: int,
        size: tuple[int, int],
        recipe: IntensityRecipe,
        generator: torch.Generator,
        visible: Bool[Tensor, "P"] | None = None,
    ) -> IntensityPlan:
        """Draw for `num_images` images of `size` pixels, with a generator on the CPU.

        The effects of images that are not `visible` are drawn but not applied.
        """
        count, one, where = (num_images,), torch.ones(()), EffectSelection.where

        def select(probability: float) -> Bool[Tensor, "P"]:
            selected = random_selection(num_images, probability, generator)
            return selected if visible is None else selected & visible

        def between(low: float, high: float) -> Float[Tensor, "P"]:
            return uniform(count, low, high, generator)

        # The order of the draws fixes the result of a seed.
        gamma = where(select(recipe.gamma_probability), log_uniform(count, recipe.gamma, generator))
        varied = random_selection(num_images, recipe.contrast_probability, generator)
        gain = between(1 - recipe.brightness, 1 + recipe.brightness).where(varied, one)
        spread = between(1 - recipe.contrast, 1 + recipe.contrast).where(varied, one)
        is_biased, coefficients = select(recipe.bias_field_probability), random_coefficients(num_images, generator)
        bias_field = where(is_biased, coefficients, between(0, recipe.bias_field))
        blur = where(select(recipe.blur_probability), between(*recipe.blur_sigma_pixels))
        is_thick, rings = select(recipe.low_resolution_probability), select(recipe.gibbs_probability)
        rows, columns = _draw_filters(size, is_thick, rings, recipe, generator)
        noise = where(select(recipe.noise_probability), between(0, recipe.noise_std))
        return cls(recipe, gamma, gain, spread, bias_field, blur, rows, columns, noise)

    def apply(self, images: Float[Tensor, "P S H W"], noise_generator: torch.Generator, first: int = 0) -> None:
        """Vary `images` in place: those of this plan from number `first` on, with grey values 0–1 and background 0."""
        count, device = len(images), images.device

        def change(selection: EffectSelection, effect: Callable[..., Tensor]) -> None:
            if (part := selection.part(first, count, device)) is not None:
                index, *values = part
                images.index_copy_(0, index, effect(images.index_select(0, index), *values))

        foreground = images.sign()
        change(self.gamma, raise_to_power)
        self._vary_gain(images, foreground, first)
        change(self.bias_field, apply_bias_field)
        change(self.blur, gaussian_blur)
        change(self.rows, filter_rows)
        change(self.columns, filter_columns)
        change(self.noise, lambda selected, std: add_noise(selected, std, self.recipe.noise, noise_generator))
        images.mul_(foreground).clamp_(0, 1)

    def _vary_gain(self, images: Tensor, foreground: Tensor, first: int) -> None:
        """(mean + (value − mean) · spread) · gain in the foreground."""
        gain, spread = self.gain[first : first + len(images)], self.spread[first : first + len(images)]
        if bool((gain == 1).all() and (spread == 1).all()):
            return
        gain, spread = (to_device(factor, images.device)[:, None, None, None] for factor in (gain, spread))
        num_pixels = foreground.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
        mean = images.sum(dim=(1, 2, 3), keepdim=True) / num_pixels
        # Later filters reach across the brain's border, so the background must be 0 already; Rician noise would mirror
        # negative values.
        images.mul_(spread * gain).add_(mean * (1 - spread) * gain).clamp_(min=0).mul_(foreground)


def raise_to_power(images: Float[Tensor, "K S H W"], gamma: Float[Tensor, "K"]) -> Float[Tensor, "K S H W"]:
    """images ** gamma, with 0 at 0; `images` is overwritten. exp(gamma · log) is much faster than a power."""
    return images.log_().mul_(gamma[:, None, None, None]).exp_()


def _draw_filters(
    size: tuple[int, int],
    is_thick: Bool[Tensor, "P"],
    rings: Bool[Tensor, "P"],
    recipe: IntensityRecipe,
    generator: torch.Generator,
) -> tuple[EffectSelection, EffectSelection]:
    """Frequency weights of both axes: thick pixels along one or both, ringing along one."""
    count = (len(is_thick),)
    factor = log_uniform(count, recipe.low_resolution, generator)
    kept = uniform(count, *recipe.gibbs_kept, generator)
    thick_axis = torch.randint(3, count, generator=generator)  # 2: both
    ringing_axis = torch.randint(2, count, generator=generator)
    axes = []
    for axis, length in enumerate(size):
        thick = is_thick & (thick_axis != 1 - axis)
        ringing = rings & (ringing_axis == axis)
        either = thick | ringing
        window = kspace_hann_weights(factor[either], length).where(thick[either, None], torch.ones(()))
        cutoff = kspace_truncation_weights(kept[either], length).where(ringing[either, None], torch.ones(()))
        axes.append(EffectSelection(either.nonzero()[:, 0].numpy(), (window * cutoff,)))
    return axes[0], axes[1]


@torch.no_grad()
def vary_intensity(
    images: Float[Tensor, "n C *S H W"],
    recipe: IntensityRecipe,
    generator: torch.Generator,
    noise_generator: torch.Generator,
) -> Float[Tensor, "n C *S H W"]:
    """Vary each contrast of each image independently, all slices of a volume alike. `images` is overwritten.

    Images are contiguous, with grey values 0–1 and background 0. `generator` (on the CPU) draws the parameters of the
    effects, `noise_generator` (on the CPU or the device of the images) the noise.
    """
    height, width = images.shape[-2:]
    flat = images.view(images.shape[0] * images.shape[1], -1, height, width).clamp_(0, 1)
    plan = IntensityPlan.draw(len(flat), (height, width), recipe, generator)
    step = chunk_size(len(flat), flat[0].numel(), images.device)
    for first in range(0, len(flat), step):
        plan.apply(flat[first : first + step], noise_generator, first)
    return images


def random_coefficients(count: int, generator: torch.Generator) -> Float[Tensor, "count T T"]:
    """Coefficients of the products of powers of row and column, up to total order `ORDER`; the constant's is 0."""
    power = torch.arange(ORDER + 1)
    total = power[:, None] + power
    return torch.randn((count, ORDER + 1, ORDER + 1), generator=generator) * ((total > 0) & (total <= ORDER))


def bias_fields(
    coefficients: Float[Tensor, "K T T"], strength: Float[Tensor, "K"], size: tuple[int, int]
) -> Float[Tensor, "K H W"]:
    """Bias fields of mean 1; `strength` is the largest |log| before the division by the mean."""
    rows, columns = (_powers(side, coefficients.device) for side in size)
    field = rows @ coefficients @ columns.T
    largest = field.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    field = field.mul_(strength[:, None, None] / largest).exp_()
    return field.div_(field.mean(dim=(1, 2), keepdim=True))


def apply_bias_field(
    images: Float[Tensor, "K S H W"], coefficients: Float[Tensor, "K T T"], strength: Float[Tensor, "K"]
) -> Float[Tensor, "K S H W"]:
    """Multiply all slices of each image by its field; `images` is overwritten."""
    return images.mul_(bias_fields(coefficients, strength, (images.shape[2], images.shape[3]))[:, None])


@cache
def _powers(side: int, device: torch.device) -> Float[Tensor, "side powers"]:
    centres = (torch.arange(side, device=device, dtype=torch.float32) * 2 + 1) / side - 1
    return torch.stack([centres**power for power in range(ORDER + 1)], dim=1)


def add_noise(
    images: Float[Tensor, "K S H W"],
    std: Float[Tensor, "K"],
    kind: Literal["gaussian", "rician"],
    generator: torch.Generator,
) -> Float[Tensor, "K S H W"]:
    """Add noise everywhere, also in the background; `images` is overwritten."""

    def draw() -> Tensor:
        noise = torch.randn(images.shape, generator=generator, device=generator.device)
        return noise.to(images.device).mul_(std[:, None, None, None])

    noisy = images.add_(draw())
    return noisy.square_().add_(draw().square_()).sqrt_() if kind == "rician" else noisy
