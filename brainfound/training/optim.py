"""Optimisation: learning-rate schedules, parameter groups, gradient clipping, and steps skipped as not finite.

Schedules are pure functions of the step (optimiser updates, from 0), so that a resumed run needs no scheduler state.
A step never reads a number from a GPU, which would wait for all pending work: a fused optimiser decides on the device
whether to step (`found_inf`, made for loss scaling). Skipped steps are counted there too.

Sources: DINOv2 (arXiv 2304.07193, appendix B) for the cosine of the teacher's momentum and the warm-up of its
temperature; layer-wise decay of the learning rate (BEiT, arXiv 2106.08254; ELECTRA, 2003.10555), patch embedding × 0.2
as in DINOv2, AdamW (1711.05101). No weight decay on biases, norms and layer scales as in DINOv2, nor on tokens and
positions as in BEiT. The head warm-up is ours, for released weights, which come without heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from brainfound.adapters.attach import block_number
from brainfound.errors import TrainingError
from brainfound.recipes import Recipe
from brainfound.training.distributed import max_over_ranks, to_full_tensor

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


_TOKENS = ("cls_token", "class_token", "register_tokens", "position_embeddings")
NEW_TOKENS = ("mask_token", "contrast_embedding")
"""Parameters of an encoder that a plain ViT lacks, or has untrained."""
_HEAD = re.compile(r"(?:^|\.)heads?\.")


class OptimRecipe(Recipe):
    """AdamW with layer-wise decay."""

    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate at a global batch of 128; the effective one is lr · sqrt(batch / 128)."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    """Factor on the learning rate from each block to the one below it."""
    patch_embed_scale: float = Field(default=0.2, ge=0, le=1)
    """Further factor on the learning rate of the patch embedding."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay of matrices; biases, norms, layer scales and tokens have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of AdamW's second moment; 0.99 forgets a bad batch in 100 steps, 0.999 in 1,000."""
    clip_norm: float = Field(default=3.0, gt=0)
    """Largest gradient norm of each sub-module (backbone, each head)."""


@dataclass(frozen=True)
class ParameterSettings:
    role: Role
    lr_scale: float
    decays: bool


def parameter_settings(name: str, parameter: nn.Parameter, num_layers: int, recipe: OptimRecipe) -> ParameterSettings:
    """Role, learning-rate scale and weight decay of a parameter, by its name.

    Layer 0 is the embeddings, 1 … `num_layers` the blocks, and the last norm is above them; the scale of a layer is
    ``layer_decay ** (num_layers + 1 − layer)``. Heads, mask token (zero in released checkpoints) and contrast
    embeddings are "new" and learn at the full rate from the first step.
    """
    # DoRA's magnitudes are scales, as those of a norm.
    undecayed = (*_TOKENS, *NEW_TOKENS, "lora_magnitude_vector")
    decays = parameter.ndim > 1 and not any(part in name for part in undecayed)
    if _HEAD.search(name):
        return ParameterSettings("last_layer" if "last_layer" in name else "new", 1.0, decays)
    if any(part in name for part in NEW_TOKENS):
        return ParameterSettings("new", 1.0, decays)
    if ".lora_" in name:
        # Low-rank updates wait for the heads as the backbone does. They need no layer decay: the frozen matrix keeps
        # what an early layer has learnt, and weight decay pulls back towards it.
        return ParameterSettings("backbone", 1.0, decays)
    layer = block_number(name)
    if layer is None:
        layer = 0 if "embeddings" in name else num_layers + 1
    scale = recipe.layer_decay ** (num_layers + 1 - layer)
    if "patch_embeddings" in name:
        scale *= recipe.patch_embed_scale
    return ParameterSettings("backbone", scale, decays)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], num_layers: int, recipe: OptimRecipe
) -> list[dict[str, Any]]:
    """Each trainable parameter in exactly one group of equal ``role``, ``lr_scale`` and ``decays``.

    Groups are ordered by their first parameter, so that a saved optimiser state still matches.
    """
    groups: dict[ParameterSettings, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            settings = parameter_settings(name, parameter, num_layers, recipe)
            groups.setdefault(settings, {"params": [], **asdict(settings)})["params"].append(parameter)
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]], recipe: OptimRecipe) -> torch.optim.AdamW:
    """Fused AdamW over the groups; the engine sets their learning rates before each step."""
    return torch.optim.AdamW(
        groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay, fused=True
    )


def allocate_moments(optimizer: Any) -> None:
    """Allocate the moments of a fused AdamW before its first step; other optimisers are left alone.

    Allocated in the first step, they would fragment the memory that the first backward pass has freed.
    """
    optimizer = _unwrap(optimizer)
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }


def clip_gradients(groups: Mapping[str, list[nn.Parameter]], max_norm: float) -> dict[str, Tensor]:
    """Scale each group's gradients down to `max_norm` without waiting for the device; returns the norms before."""
    return {name: to_full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)) for name, parameters in groups.items()}


def step_unless_nonfinite(optimizer: torch.optim.Optimizer, nonfinite: Float[Tensor, ""]) -> None:
    """One step of a fused optimiser; if `nonfinite` is 1, weights, moments and step counters do not change."""
    inner = _unwrap(optimizer)
    if not all(group.get("fused") for group in inner.param_groups):
        raise ValueError("only a fused optimiser can skip a step on the device: make it with fused=True")
    inner.grad_scale, inner.found_inf = None, nonfinite
    optimizer.step()


def _unwrap(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the optimiser


class NonfiniteStepMonitor:
    """Counts the skipped steps of a run on the device; `max_consecutive_skips` in a row end the run."""

    def __init__(self, device: torch.device, max_consecutive_skips: int) -> None:
        self.max_consecutive_skips = max_consecutive_skips
        # Skipped so far; skipped in a row at present; the longest such row since the last reading.
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def check_finite(self, values: Iterable[Tensor]) -> Float[Tensor, ""]:
        """1 if any value (the loss, gradient norms) is not finite on any rank, else 0; counts it."""
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values])).all()
        # All ranks must agree: a rank that skipped alone would have different weights from then on.
        nonfinite = max_over_ranks((~finite).float())
        skipped, in_a_row, longest = self._counts.unbind()
        skip = nonfinite.long()
        in_a_row = (in_a_row + skip) * skip
        self._counts = torch.stack([skipped + skip, in_a_row, torch.maximum(longest, in_a_row)])
        return nonfinite

    def read(self, step: int) -> dict[str, int]:
        """The counters for a checkpoint; waits for the device.

        Raises:
            TrainingError: too many steps in a row were skipped since the last reading.
        """
        skipped, in_a_row, longest = self._counts.tolist()
        if longest >= self.max_consecutive_skips:
            what = f"the loss or its gradient was not finite in {longest} steps in a row"
            remedy = "Lower the learning rate, or look for damaged input"
            raise TrainingError(what, where=f"step {step}", remedy=remedy)
        self._counts[2] = in_a_row
        return {"skipped": skipped, "skipped_in_a_row": in_a_row}

    def load(self, counts: Mapping[str, int]) -> None:
        """Restore the counters that `read` returned."""
        in_a_row = counts["skipped_in_a_row"]
        self._counts = torch.tensor([counts["skipped"], in_a_row, in_a_row], device=self._counts.device)
