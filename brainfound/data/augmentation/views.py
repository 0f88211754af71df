"""The views of a batch: two global and several local random crops of each slice, and the contrasts of each view.

Clinical sessions often lack contrasts. In pretraining, views with fewer contrasts teach a model to work without them;
two views that share no contrast teach it what the contrasts of one anatomy have in common.

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

from brainfound.data.augmentation.intensity import IntensityPlan, chunk_size
from brainfound.data.augmentation.recipe import ViewsRecipe
from brainfound.data.augmentation.transforms import random_affine, random_selection, sample_crops, to_device
from brainfound.data.batches import to_unit_range
from brainfound.errors import RecipeError


@dataclass(frozen=True)
class Views:
    """A batch of views; rows are view-major: all images in crop 0, then all images in crop 1, …

    Grey values are in 0–1; the mask is True where the view contains the contrast; the pixels of other contrasts are 0.
    """

    pixels: Float[Tensor, "V·n C H W"]
    contrast_mask: Bool[Tensor, "V·n C"]


@dataclass(frozen=True)
class CropViews:
    """The global and local views of the same images; `local_views` is None without local crops."""

    global_views: Views
    local_views: Views | None


class MultiCrop:
    """Two global and `num_local` local random views of each slice; `num_global=1` computes only the first global view.

    Raises:
        RecipeError: if a crop side is not a multiple of the patch size, or local crops are larger than global ones.
    """

    def __init__(self, recipe: ViewsRecipe, patch_size: int, num_global: Literal[1, 2] = 2) -> None:
        recipe.require_smaller_local_crops()
        for key in ("global_size", "local_size"):
            side = getattr(recipe, key)
            if side % patch_size and (key == "global_size" or recipe.num_local):
                text, where = "a crop's side must be a multiple of the backbone's patch size", f"views.{key}"
                remedy = f"Set {where}={max(1, round(side / patch_size)) * patch_size}"
                raise RecipeError(text, where=where, got=side, expected=f"a multiple of {patch_size}", remedy=remedy)
        self.recipe = recipe
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
        """Views of a batch, on the device of `pixels`.

        Args:
            pixels: slices, uint8 or float in 0–1.
            present: True where a slice has the contrast; best on the CPU, since copying it there synchronises.
            generator: on the CPU; draws all random numbers but the noise (the same on every device).
            noise_generator: on the device of `pixels`; None uses `generator`.
            neighbours: other slices of the same sessions, for the second global crops; None for the same slices.
        """
        recipe = self.recipe
        noise_generator = noise_generator or generator
        global_mask, local_mask = contrast_masks(
            present.cpu(), recipe.num_local, recipe.contrast_dropout, recipe.split_contrasts, generator
        )
        global_mask = global_mask[:, : self.num_global]
        sources = [pixels] if neighbours is None or self.num_global == 1 else [pixels, neighbours]
        generators = (generator, noise_generator)
        # Matrix products in a bf16 training step would lose precision.
        with torch.autocast(pixels.device.type, enabled=False):
            global_views = self._views(sources, global_mask, recipe.global_size, recipe.global_scale, *generators)
            if recipe.num_local == 0:
                return CropViews(global_views, None)
            local_views = self._views([pixels], local_mask, recipe.local_size, recipe.local_scale, *generators)
        return CropViews(global_views, local_views)

    def _views(
        self,
        sources: Sequence[Tensor],
        visible: Bool[Tensor, "n V C"],
        side: int,
        scale: tuple[float, float],
        generator: torch.Generator,
        noise_generator: torch.Generator,
    ) -> Views:
        """Views shared equally between `sources`, which have one shape; on a CPU, a few slices at a time."""
        num_slices, num_views, num_contrasts = visible.shape
        device, (height, width) = sources[0].device, sources[0].shape[2:]
        count = num_slices * num_views
        matrices = random_affine(count, (height, width), scale, self.recipe, generator)
        matrices = to_device(matrices.unflatten(0, (num_slices, num_views)), device)
        # Skipping invisible images pays on a CPU; a GPU is faster with equal shapes in every step.
        visible_images = rearrange(visible, "n views c -> (n c views)") if device.type == "cpu" else None
        plan = IntensityPlan.draw(count * num_contrasts, (side, side), self.recipe.intensity, generator, visible_images)
        mask = to_device(rearrange(visible, "n views c -> (views n) c").contiguous(), device)
        result = torch.empty(num_views, num_slices, num_contrasts, side, side, device=device)
        step = chunk_size(num_slices, num_views * num_contrasts * side**2, device)
        for first in range(0, num_slices, step):
            rows = slice(first, first + step)
            sampled = zip(sources, matrices[rows].chunk(len(sources), dim=1), strict=True)
            parts = [sample_crops(to_unit_range(pixels[rows]), part, side) for pixels, part in sampled]
            crops = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
            # `crops.view` is no copy: the plan changes the crops in place.
            plan.apply(crops.view(-1, 1, side, side), noise_generator, first * num_contrasts * num_views)
            result[:, rows] = rearrange(crops, "n c views h w -> views n c h w")
        result = result.flatten(0, 1)
        if device.type == "cpu":
            result.flatten(0, 1).index_fill_(0, (~mask).flatten().nonzero()[:, 0], 0.0)
        else:
            result.mul_(mask[:, :, None, None])
        return Views(result, mask)


def drop_contrasts(present: Bool[Tensor, "n C"], probability: float, generator: torch.Generator) -> Bool[Tensor, "n C"]:
    """Drop each present contrast with `probability`; one present contrast of each row always stays."""
    order = torch.rand(present.shape, generator=generator).masked_fill(~present, -1.0)
    survivor = F.one_hot(order.argmax(dim=1), present.shape[1]).bool()
    kept = torch.rand(present.shape, generator=generator) >= probability
    return present & (kept | survivor)


def random_subsets(present: Bool[Tensor, "n C"], num_dropped: int, generator: torch.Generator) -> Bool[Tensor, "n C"]:
    """A random non-empty subset of each row's present contrasts that leaves out at least `num_dropped` of them.

    The size is drawn first, so that small and large subsets are equally frequent.
    """
    order = torch.rand(present.shape, generator=generator).masked_fill(~present, 2.0)
    rank = order.argsort(dim=1).argsort(dim=1)  # present contrasts have the lowest ranks, in random order
    max_size = present.sum(dim=1) - num_dropped
    size = 1 + (torch.rand(len(present), generator=generator) * max_size).floor().clamp(max=max_size - 1)
    return present & (rank < size[:, None])


def contrast_masks(
    present: Bool[Tensor, "n C"], num_local: int, dropout: float, split: float, generator: torch.Generator
) -> tuple[Bool[Tensor, "n 2 C"], Bool[Tensor, "n V C"]]:
    """The contrasts of the two global and the `num_local` local crops of each image, on the CPU; at least one each.

    A share `split` of the images with two or more contrasts is divided between the global crops: before dropout, every
    contrast is in exactly one of the two, and both have some. The local crops of such an image have random subsets.
    """
    can_split = present.sum(dim=1) >= 2
    is_split = torch.zeros(len(present), dtype=torch.bool)
    is_split[can_split] = random_selection(int(can_split.sum()), split, generator)
    global_mask = present[:, None].repeat(1, 2, 1)
    local_mask = present[:, None].repeat(1, num_local, 1)
    if is_split.any():
        first = random_subsets(present[is_split], 1, generator)
        global_mask[is_split] = torch.stack([first, present[is_split] & ~first], dim=1)
        split_local = local_mask[is_split].flatten(0, 1)
        local_mask[is_split] = random_subsets(split_local, 0, generator).unflatten(0, (-1, num_local))
    global_mask = drop_contrasts(global_mask.flatten(0, 1), dropout, generator).view_as(global_mask)
    return global_mask, drop_contrasts(local_mask.flatten(0, 1), dropout, generator).view_as(local_mask)
