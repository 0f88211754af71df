"""What the losses and the engine need to know about the other ranks.

Every function is the identity when no process group runs, so the same code serves a laptop and a
cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from brainfound.errors import BrainFoundError, RecipeError, TrainingError, UsageError


def active() -> bool:
    """Whether more than one process trains together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if active() else 1


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise sum over ranks, in place, without a gradient."""
    if active():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise maximum over ranks, in place, without a gradient."""
    if active():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_over_ranks(*flags: bool, device: torch.device) -> tuple[bool, ...]:
    """For each flag, whether any rank raised it; the answer is the same on all ranks."""
    if not active():
        return flags
    raised = max_over_ranks(torch.tensor([float(flag) for flag in flags], device=device))
    return tuple(bool(value) for value in raised.tolist())


def on_main_rank(work: Callable[[], Any], is_main: bool) -> None:
    """Do something on the main rank; all ranks wait for it, and if it fails all raise the same error.

    Raises:
        UsageError, RecipeError, TrainingError: what `work` raised.
        TrainingError: in the place of any other `BrainFoundError`, or an `OSError`.
    """
    failure: BrainFoundError | None = None
    cause: Exception | None = None
    if is_main:
        try:
            work()
        except (TrainingError, UsageError, RecipeError) as error:
            failure, cause = error, error.__cause__ if isinstance(error.__cause__, Exception) else None
        except (BrainFoundError, OSError) as error:
            failure, cause = _as_training_error(error), error
    if active():
        told = [failure]
        dist.broadcast_object_list(told, src=0)
        failure = failure or told[0]
    if failure is not None:
        raise failure from cause


def _as_training_error(error: BrainFoundError | OSError) -> TrainingError:
    if isinstance(error, BrainFoundError):
        return TrainingError(error.what, where=error.where, got=error.got, expected=error.expected, remedy=error.remedy)
    remedy = "Mend that (free space, a quota, rights), and continue with --resume"
    return TrainingError("a file cannot be written", where=error.filename, got=error.strerror or error, remedy=remedy)


def mean_over_ranks(values: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """The mean of each 0-dim value over ranks, in one transfer; the names must be the same on all ranks."""
    if not values:
        return {}
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    total = sum_over_ranks(torch.stack([value.detach().to(device, exact) for value in values.values()]))
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rank, ctx.num_rows = dist.get_rank(), rows.shape[0]
        pieces = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, rows.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Each rank computes the same loss from the same gathered rows, so the sum over ranks of the
        # gradients of these rows is R times this rank's own; no communication is needed. The average
        # that DistributedDataParallel takes afterwards then gives the gradient of that loss.
        start = ctx.rank * ctx.num_rows
        return gradient[start : start + ctx.num_rows] * dist.get_world_size()


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (B, …) of all ranks in rank order, (R·B, …).

    B must be equal on all ranks. The gradient is right where every rank computes the same loss from
    the gathered rows, as KoLeo does.
    """
    return _GatherRows.apply(rows) if active() else rows
