"""The EMA teacher: its update, and what is left of its initial weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from brainfound.training.distributed import to_local_tensors
from brainfound.training.optim import cosine

_FOREACH_CHUNK = 64  # tensors; bounds the memory of the differences


@torch.no_grad()
def ema_update(averages: Iterable[Tensor], values: Iterable[Tensor], weight: Float[Tensor, ""]) -> None:
    """average ← average + weight · (value − average), in place, without waiting for the weight's value.

    An average that equals its value stays bit-identical, and so do all if the weight is 0. Of sharded tensors, each
    rank updates its own shard.
    """
    old, new = to_local_tensors(averages), to_local_tensors(values)
    if not old or old[0].device.type == "cpu":
        for average, value in zip(old, new, strict=True):
            average.lerp_(value, weight.to(average.dtype))
        return
    # A GPU would spend its time launching one small operation per tensor.
    for first in range(0, len(old), _FOREACH_CHUNK):
        some = old[first : first + _FOREACH_CHUNK]
        differences = torch._foreach_sub(new[first : first + _FOREACH_CHUNK], some)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(some, differences)


def initial_weight_fraction(start: float, end: float, num_steps: int, head_warmup_steps: int = 0) -> float:
    """The fraction of its initial weights that the EMA teacher still holds after the run.

    The student's backbone does not change in the first `head_warmup_steps`.
    """
    return math.prod(cosine(step, start, end, num_steps) for step in range(head_warmup_steps, num_steps))
