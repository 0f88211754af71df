"""What a view shows: which of the contrasts that a session has.

Clinical sessions lack contrasts. Views with fewer contrasts than there are let a model learn in pretraining to do
without; two views that share no contrast let it learn what the contrasts of one anatomy have in common.

Axis legend: ``n`` images (slices), ``V`` views per image, ``C`` contrasts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from brainfound.data.augmentation.drawing import choose


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


def shown_contrasts(
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
    is_split[can_split] = choose(int(can_split.sum()), split, generator)
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
