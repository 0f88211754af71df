"""Schedules: pure functions of the step (optimiser updates, from 0), so that a resumed run needs no scheduler state.

Source: DINOv2 (arXiv 2304.07193, appendix B) for the cosine of the teacher's momentum and the warm-up of its
temperature. The head warm-up is ours, for released weights, which come without heads.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from brainfound.recipes import Recipe

Shape = Literal["cosine", "linear", "constant"]
Role = Literal["backbone", "new", "last_layer"]
"""A parameter of the checkpoint, a new one (heads, mask and contrast tokens), or the prototypes."""


class ScheduleRecipe(Recipe):
    """Learning rates over the run."""

    shape: Shape = "cosine"
    """The curve after the warm-up."""
    warmup_steps: int = Field(default=500, ge=0)
    """Steps of the linear warm-up; the backbone's begins after `head_warmup_steps`."""
    head_warmup_steps: int = Field(default=1000, ge=0)
    """Initial steps, in which only heads, mask token and contrast embeddings learn. 0 when training from scratch."""
    freeze_last_layer_steps: int = Field(default=0, ge=0)
    """Initial steps, in which the prototypes of the heads are frozen."""
    final_lr_ratio: float = Field(default=0.01, ge=0, le=1)
    """Learning rate of the last step, as a fraction of the peak."""


def cosine(step: int, start: float, end: float, num_steps: int) -> float:
    """From `start` at step 0 to `end` at `num_steps` along half a cosine; `end` afterwards.

    >>> cosine(0, 1.0, 0.0, 10), cosine(5, 1.0, 0.0, 10), cosine(10, 1.0, 0.0, 10)
    (1.0, 0.5, 0.0)
    """
    return end if step >= num_steps else end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / num_steps))


def linear(step: int, start: float, end: float, num_steps: int) -> float:
    """From `start` at step 0 to `end` at `num_steps` along a line; `end` afterwards."""
    return end if step >= num_steps else start + (end - start) * step / num_steps


def warmup_schedule(
    step: int, peak: float, final: float, warmup_steps: int, num_steps: int, shape: Shape = "cosine"
) -> float:
    """A line from near 0 to `peak` over `warmup_steps`, then `shape` from `peak` to `final` at the last step.

    The first step of the warm-up is ``peak / warmup_steps``, not 0, so that no step is wasted.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    curve = cosine if shape == "cosine" else linear
    return curve(step - warmup_steps, peak, final, max(num_steps - 1 - warmup_steps, 1))


def effective_lr(base_lr: float, global_batch: int) -> float:
    """The peak learning rate at this batch: base_lr · sqrt(global_batch / 128).

    >>> effective_lr(1e-4, 512)
    0.0002
    """
    return base_lr * math.sqrt(global_batch / 128)


def learning_rate(
    step: int,
    role: Role | str,
    *,
    peak: float,
    final: float,
    num_steps: int,
    warmup_steps: int,
    head_warmup_steps: int = 0,
    freeze_last_layer_steps: int = 0,
    shape: Shape = "cosine",
) -> float:
    """The learning rate of a parameter by its role, before layer-wise decay.

    New parameters learn from step 0. The backbone has learning rate 0 for `head_warmup_steps` and then warms up: random
    heads would damage it. It still gets gradients, as data-parallel training requires. The last layer of the heads may
    wait too, as in DINO.
    """
    waiting_steps = {"backbone": head_warmup_steps, "last_layer": freeze_last_layer_steps}.get(role, 0)
    if step < waiting_steps:
        return 0.0
    delay = head_warmup_steps if role == "backbone" else 0  # only the backbone's warm-up begins later
    return warmup_schedule(step - delay, peak, final, warmup_steps, num_steps - delay, shape)
