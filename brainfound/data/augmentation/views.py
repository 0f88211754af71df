"""What a view shows: which of the contrasts that a session has.

Clinical sessions lack contrasts. Views with fewer contrasts than there are let a model learn in pretraining to do
without; two views that share no contrast let it learn what the contrasts of one anatomy have in common.

Axis legend: ``n`` images (slices), ``V`` views per image, ``C`` contrasts.

The views of a batch: two global and some local random crops of each slice.

Axis legend: ``n`` images (slices), ``V`` views per image, ``C`` contrasts, ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from brainfound.data.augmentation.geometry import random_affine, sample_crops
from brainfound.data.augmentation.intensity import IntensityPlan, chunk_size
from brainfound.data.augmentation.recipe import ViewsRecipe
from brainfound.data.augmentation.sampling import random_selection, to_device
from brainfound.data.batches import to_unit_range
from brainfound.errors import RecipeError


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
        num_global: 1 makes only the first of the two global views.

    Raises:
        RecipeError: if a crop side is not a multiple of the patch size, or local crops are larger than global ones.
    """

    def __init__(self, recipe: ViewsRecipe, patch_size: int, num_global: Literal[1, 2] = 2) -> None:
        recipe.require_smaller_local_crops()
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
        self.num_global = num_global

    @torch.no_grad()
    def __call__(
        self,
        pixels: UInt8[Tensor, "n C H W"],
        present: Bool[Tensor, "n C"],
        generator: torch.Generator,
        noise_generator: torch.Generator | None = None,
        neighbours: UInt8[Tensor, "n C H W"] | None = None,
    ) -> CropViews:
        """Views of a batch.

        Args:
            pixels: slices, uint8 or float in 0–1, on the device where the views are to be made.
            present: which contrasts each slice has. Views are drawn on the CPU: from another device it is fetched,
                which waits for that device.
            generator: on the CPU; draws everything that is small (the same on every device).
            noise_generator: on the device of `pixels`; draws the pixels' noise. By default `generator`.
            neighbours: other slices of the same sessions, which the second global crops show; None: the same slices.
        """
        recipe = self.recipe
        noise_generator = noise_generator or generator
        large, local = contrast_masks(
            present.cpu(), recipe.num_local, recipe.contrast_dropout, recipe.split_contrasts, generator
        )
        large = large[:, : self.num_global]
        if neighbours is None or self.num_global == 1:
            global_sources: list[tuple[Tensor, int]] = [(pixels, self.num_global)]
        else:
            global_sources = [(pixels, 1), (neighbours, 1)]
        # Products of matrices would lose bits where a training step runs in bf16.
        with torch.autocast(pixels.device.type, enabled=False):
            global_views = self._views(
                global_sources, large, recipe.global_size, recipe.global_scale, generator, noise_generator
            )
            if recipe.num_local == 0:
                return CropViews(global_views, None)
            local_views = self._views(
                [(pixels, recipe.num_local)], local, recipe.local_size, recipe.local_scale, generator, noise_generator
            )
        return CropViews(global_views, local_views)

    def _views(
        self,
        sources: Sequence[tuple[Tensor, int]],
        shown: Bool[Tensor, "n V C"],
        side: int,
        scale: tuple[float, float],
        generator: torch.Generator,
        noise_generator: torch.Generator,
    ) -> Views:
        """Crops of `sources`, each pixels and how many views show them; a few slices at a time on a CPU."""
        num_slices, num_views, num_contrasts = shown.shape
        device, (height, width) = sources[0][0].device, sources[0][0].shape[2:]
        count = num_slices * num_views
        matrices = random_affine(count, (height, width), scale, self.recipe, generator)
        matrices = to_device(matrices.unflatten(0, (num_slices, num_views)), device)
        shown_images = rearrange(shown, "n views c -> (n c views)")
        # On a GPU equal shapes in every step are worth more than the few images that nobody sees.
        spared = shown_images if device.type == "cpu" else None
        plan = IntensityPlan.draw(count * num_contrasts, (side, side), self.recipe.intensity, generator, spared)
        mask = to_device(rearrange(shown, "n views c -> (views n) c").contiguous(), device)
        result = torch.empty(num_views, num_slices, num_contrasts, side, side, device=device)
        step = chunk_size(num_slices, num_views * num_contrasts * side**2, device)
        for first in range(0, num_slices, step):
            rows = slice(first, first + step)
            parts, view = [], 0
            for pixels, views in sources:
                parts.append(sample_crops(to_unit_range(pixels[rows]), matrices[rows, view : view + views], side))
                view += views
            crops = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
            # A view, not a copy: the crops themselves are varied.
            plan.apply(crops.view(-1, 1, side, side), noise_generator, first * num_contrasts * num_views)
            result[:, rows] = rearrange(crops, "n c views h w -> views n c h w")
        result = result.flatten(0, 1)
        if device.type == "cpu":
            result.flatten(0, 1).index_fill_(0, (~mask).flatten().nonzero()[:, 0], 0.0)
        else:
            result.mul_(mask[:, :, None, None])
        return Views(result, mask)


def drop_contrasts(present: Bool[Tensor, "n C"], probability: float, generator: torch.Generator) -> Bool[Tensor, "n C"]:
    """Withhold each present contrast with `probability`; one present contrast of each row always stays."""
    order = torch.rand(present.shape, generator=generator).masked_fill(~present, -1.0)
    survivor = F.one_hot(order.argmax(dim=1), present.shape[1]).bool()
    kept = torch.rand(present.shape, generator=generator) >= probability
    return present & (kept | survivor)


def random_subsets(present: Bool[Tensor, "n C"], withheld: int, generator: torch.Generator) -> Bool[Tensor, "n C"]:
    """A random non-empty subset of the present contrasts of each row, at least `withheld` of them left out.

    The size is drawn first, so that small and large subsets are equally frequent. Every row must have more than
    `withheld` contrasts.
    """
    order = torch.rand(present.shape, generator=generator).masked_fill(~present, 2.0)
    rank = order.argsort(dim=1).argsort(dim=1)  # present contrasts have the ranks from 0 on, in random order
    most = present.sum(dim=1) - withheld
    size = 1 + (torch.rand(len(present), generator=generator) * most).floor().clamp(max=most - 1)
    return present & (rank < size[:, None])


def contrast_masks(
    present: Bool[Tensor, "n C"],
    num_local: int,
    dropout: float,
    split: float,
    generator: torch.Generator,
) -> tuple[Bool[Tensor, "n 2 C"], Bool[Tensor, "n V C"]]:
    """What the two global and the local crops of each image show; never nothing.

    Args:
        present: what there is to be shown, on the CPU.
        num_local: local crops per image, V.
        dropout: how often a contrast is withheld from a view.
        split: part of the images with two or more contrasts whose global crops share them out: every contrast is in
            one of the two, and both have some, less dropout. Each local crop of such an image shows a random subset.
    """
    num_images = len(present)
    can_split = present.sum(dim=1) >= 2
    is_split = torch.zeros(num_images, dtype=torch.bool)
    is_split[can_split] = random_selection(int(can_split.sum()), split, generator)
    large = present[:, None].repeat(1, 2, 1)
    local = present[:, None].repeat(1, num_local, 1)
    if is_split.any():
        first = random_subsets(present[is_split], 1, generator)
        large[is_split] = torch.stack([first, present[is_split] & ~first], dim=1)
        split_local = local[is_split].flatten(0, 1)
        local[is_split] = random_subsets(split_local, 0, generator).unflatten(0, (-1, num_local))
    large = drop_contrasts(large.flatten(0, 1), dropout, generator).unflatten(0, (num_images, 2))
    local = drop_contrasts(local.flatten(0, 1), dropout, generator).unflatten(0, (num_images, num_local))
    return large, local
