"""The settings of random views."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from brainfound.errors import RecipeError
from brainfound.recipes import Recipe

MAX_BLUR_SIGMA_PIXELS = 1.5
"""The kernel of `brainfound.data.augmentation.transforms.gaussian_blur` would cut a wider Gaussian."""


def _require_increasing(recipe: Recipe, *names: str) -> None:
    for name in names:
        low, high = getattr(recipe, name)
        if not 0 < low <= high:
            raise ValueError(f"{name} must be two increasing positive numbers, got {low}, {high}")


class IntensityRecipe(Recipe):
    """Random intensities, varied independently for each contrast of a view.

    A probability is the share of a batch's images that an effect is drawn for. The artefacts of a scanner (bias field,
    Gibbs ringing, thick pixels) are off by default.
    """

    gamma_probability: float = Field(default=0.5, ge=0, le=1)
    """Probability of raising the grey values to a random power."""
    gamma: tuple[float, float] = (0.7, 1.5)
    """Range of that power (drawn log-uniformly)."""
    contrast_probability: float = Field(default=0.8, ge=0, le=1)
    """Probability of varying gain and contrast."""
    brightness: float = Field(default=0.2, ge=0, lt=1)
    """The gain is drawn from 1 ± this."""
    contrast: float = Field(default=0.25, ge=0, lt=1)
    """The distance from the foreground's mean is scaled by 1 ± this."""
    bias_field_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability of multiplying the image by a smooth field, an effect of coils and the head's conductivity."""
    bias_field: float = Field(default=0.4, ge=0, lt=2)
    """Largest strength of the field: before normalisation it lies between exp(−this) and exp(this)."""
    blur_probability: float = Field(default=0.3, ge=0, le=1)
    """Probability of blurring an image."""
    blur_sigma_pixels: tuple[float, float] = (0.3, 1.2)
    """Range of the sigma of the Gaussian blur, at most 1.5."""
    low_resolution_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability of thick pixels, along rows, columns or both (as in axial slices of a sagittal scan)."""
    low_resolution: tuple[float, float] = (1.25, 3.0)
    """Range of the size of a thick pixel, in pixels."""
    gibbs_probability: float = Field(default=0.0, ge=0, le=1)
    """Probability of a sharp cutoff of the spectrum along one axis, which makes edges ring."""
    gibbs_kept: tuple[float, float] = (0.4, 0.8)
    """Range of the share of that axis's spectrum that is kept."""
    noise_probability: float = Field(default=0.3, ge=0, le=1)
    """Probability of adding noise to the foreground."""
    noise_std: float = Field(default=0.05, ge=0)
    """Largest standard deviation of the noise, on the 0–1 scale."""
    noise: Literal["gaussian", "rician"] = "gaussian"
    """Rician is the noise of a magnitude image, which brightens dark pixels."""

    @model_validator(mode="after")
    def _ranges_increase(self) -> IntensityRecipe:
        _require_increasing(self, "gamma", "blur_sigma_pixels", "low_resolution", "gibbs_kept")
        if self.blur_sigma_pixels[1] > MAX_BLUR_SIGMA_PIXELS:
            got = self.blur_sigma_pixels[1]
            raise ValueError(f"blur_sigma_pixels must be at most {MAX_BLUR_SIGMA_PIXELS}, got {got}")
        if self.low_resolution[0] < 1:
            raise ValueError(f"low_resolution must not make pixels thinner than they are, got {self.low_resolution[0]}")
        if self.gibbs_kept[1] > 1:
            raise ValueError(f"gibbs_kept is a part of the spectrum, at most 1, got {self.gibbs_kept[1]}")
        return self


class ViewsRecipe(Recipe):
    """Random views of each slice for teacher and student."""

    num_local: int = Field(default=8, ge=0)
    """Local crops per slice, for the student only. There are always two global crops."""
    global_size: int = Field(default=224, ge=1)
    """Side of a global crop in pixels; a multiple of the patch size."""
    local_size: int = Field(default=98, ge=1)
    """Side of a local crop in pixels; a multiple of the patch size."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Range of the area of a global crop, as a fraction of the slice."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Range of the area of a local crop, as a fraction of the slice."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a crop's height over its width before it is resized to a square."""
    rotation_degrees: float = Field(default=10.0, ge=0, le=45)
    """Largest in-plane rotation, to either side."""
    shear: float = Field(default=0.05, ge=0, lt=1)
    """Largest in-plane shear, to either side."""
    flip_left_right: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring a view; 0 by default, since the side of a lesion is information."""
    neighbour_mm: float = Field(default=0.0, ge=0)
    """The second global crop comes from another slice of the session within this distance; 0 for the same slice."""
    contrast_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a view drops a present contrast; one contrast always stays."""
    split_contrasts: float = Field(default=0.0, ge=0, le=1)
    """Probability that the global crops divide the present contrasts between them; local crops have random subsets."""
    slice_margin: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of a session's slices left out at each end, where there is little brain."""
    intensity: IntensityRecipe = IntensityRecipe()

    @model_validator(mode="after")
    def _ranges_increase(self) -> ViewsRecipe:
        _require_increasing(self, "global_scale", "local_scale", "aspect")
        for name in ("global_scale", "local_scale"):
            if (largest := getattr(self, name)[1]) > 1:
                raise ValueError(f"{name} is a fraction of the slice, at most 1, got {largest}")
        return self

    def require_smaller_local_crops(self) -> None:
        """Raise a RecipeError if there are local crops and they are larger than the global ones."""
        if self.num_local and self.local_size > self.global_size:
            text, where, got = "local crops are larger than global ones", "views.local_size", self.local_size
            remedy = "Set views.local_size to about half of views.global_size"
            expected = f"at most views.global_size={self.global_size}"
            raise RecipeError(text, where=where, got=got, expected=expected, remedy=remedy)
