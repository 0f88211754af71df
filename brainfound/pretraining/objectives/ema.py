"""The exponential moving average that makes a teacher of a student."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from brainfound.training.distributed import to_local_tensors

_FOREACH_CHUNK = 64  # tensors; bounds the memory of the differences


@torch.no_grad()
def ema_update(averages: Iterable[Tensor], values: Iterable[Tensor], weight: Float[Tensor, ""]) -> None:
    """average ← average + weight · (value − average), in place, without waiting for the weight's value.

    An average that equals its value stays as it is to the last bit, and so do all where the weight is 0.

    Args:
        averages, values: in the same order; of cut tensors each rank moves its own slice.
        weight: on the device of the tensors.
    """
    old, new = to_local_tensors(averages), to_local_tensors(values)
    if not old or old[0].device.type == "cpu":
        for average, value in zip(old, new, strict=True):
            average.lerp_(value, weight.to(average.dtype))
        return
    # A GPU would spend its time on launching one small operation per tensor.
    for first in range(0, len(old), _FOREACH_CHUNK):
        some = old[first : first + _FOREACH_CHUNK]
        differences = torch._foreach_sub(new[first : first + _FOREACH_CHUNK], some)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(some, differences)
