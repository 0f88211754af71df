"""Bias field: a smooth multiplicative change of brightness, from coils that hear some places better than others.

Physics: the signal is multiplied by the sensitivity of the receiving coils and by the inhomogeneity of the transmitted
field, both of which vary over centimetres. Model: the exponential of a polynomial of low order over the image, as
in the correction of Van Leemput et al. 1999 (IEEE TMI 18:885), whose inverse this is.

Axis legend: ``K`` images, ``S`` slices, ``T`` powers of an axis, ``H W`` pixels.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

ORDER = 3


def random_coefficients(count: int, generator: torch.Generator) -> Float[Tensor, "count T T"]:
    """Of the powers of row and column, up to a total of `ORDER`; the constant is 0, since the mean of a field is 1."""
    power = torch.arange(ORDER + 1)
    total = power[:, None] + power
    return torch.randn((count, ORDER + 1, ORDER + 1), generator=generator) * ((total > 0) & (total <= ORDER))


def bias_fields(
    coefficients: Float[Tensor, "K T T"], strength: Float[Tensor, "K"], size: tuple[int, int]
) -> Float[Tensor, "K H W"]:
    """Fields of mean 1, of which the largest |log| is `strength` before the mean is made 1."""
    rows, columns = (_powers(side, coefficients.device) for side in size)
    field = rows @ coefficients @ columns.T
    largest = field.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    field = field.mul_(strength[:, None, None] / largest).exp_()
    return field.div_(field.mean(dim=(1, 2), keepdim=True))


def multiply_by_field(
    images: Float[Tensor, "K S H W"], coefficients: Float[Tensor, "K T T"], strength: Float[Tensor, "K"]
) -> Float[Tensor, "K S H W"]:
    """Each image times its field, the same for all its slices; `images` is overwritten."""
    return images.mul_(bias_fields(coefficients, strength, (images.shape[2], images.shape[3]))[:, None])


@cache
def _powers(side: int, device: torch.device) -> Float[Tensor, "side powers"]:
    centres = (torch.arange(side, device=device, dtype=torch.float32) * 2 + 1) / side - 1
    return torch.stack([centres**power for power in range(ORDER + 1)], dim=1)
