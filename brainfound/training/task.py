"""The contract between the engine and what it trains: `TrainTask`, and its optional `RollbackPolicy`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brainfound.errors import TrainingError


class RollbackRequested(TrainingError):
    """Makes the engine return to the checkpoint of `step`."""

    def __init__(self, what: str, *, step: int, where: object = None, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.step = step


class RollbackPolicy:
    """When a run returns to an earlier checkpoint; this default never does.

    A policy raises `RollbackRequested` from `TrainTask.on_log_line` or `on_nonfinite_steps`; see
    `brainfound.training.checkpoint` for the mechanics. All ranks call each method alike and must get the same result.
    """

    @property
    def may_roll_back(self) -> bool:
        """Whether a rollback may be requested; the disk then holds one more checkpoint."""
        return False

    def should_keep_checkpoint(self, step: int) -> bool:
        """Whether to save a checkpoint after the evaluation at `step` and keep it until a newer one is kept."""
        return False

    def on_nonfinite_steps(self, step: int, error: TrainingError) -> None:
        """Called before too many skipped steps in a row end the run with `error`; may raise another error instead."""

    def on_rollback(self) -> Mapping[str, Any]:
        """Called after `RollbackRequested` was raised and before its checkpoint is restored.

        `TrainTask.state_dict` survives the rollback as this method leaves it, so a task can count rollbacks and lower
        its learning rate here; tensors are restored. Returns entries for the log line of the rollback.
        """
        return {}

    def on_rollback_failed(self, step: int, request: RollbackRequested, error: TrainingError) -> None:
        """Called if the requested checkpoint cannot be restored, before `error` ends the run; may raise another one.

        `TrainTask.state_dict` is then as it was before `on_rollback`.
        """


class TrainTask(ABC):
    """A model, its data and its loss. All ranks call each method together, in the same order, except where noted."""

    model: nn.Module
    """All trained weights in one module; each parameter takes part in each loss."""
    clip_norm: float = 3.0
    """Largest gradient norm of each group of `clip_groups`."""
    evaluate_every: int = 0
    """Steps between two evaluations, with one before the first step and one after the last; 0: never."""
    rollback_policy: RollbackPolicy = RollbackPolicy()

    @property
    def is_finished(self) -> bool:
        """Whether training ends now, before its last step; the same on all ranks, and kept in `state_dict`."""
        return False

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, fused; each of its groups has ``role`` (str), ``lr_scale`` (float) and ``decays`` (bool)."""

    @abstractmethod
    def batches(self, first_step: int) -> Iterator[Any]:
        """The micro-batches of this rank, `accumulation` per step, starting at `first_step`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, step: int, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, computed with `model` (`self.model`, perhaps wrapped), and its named parts."""

    @abstractmethod
    def learning_rate(self, step: int, role: str) -> float:
        """The learning rate of a role at a step, before each group's ``lr_scale``."""

    def weight_decay(self, step: int) -> float:
        """The weight decay at a step, for the groups that decay."""
        return 0.0

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named sets of parameters whose gradients are clipped separately."""
        return {"model": [p for p in self.model.parameters() if p.requires_grad]}

    def after_step(self, step: int, taken: Tensor) -> None:
        """Called after every step; `taken` (0-dim, on the device) is 1 if the optimiser stepped and 0 if it skipped.

        It is the same on all ranks. Do not wait for its value here.
        """
        return

    def scheduled_values(self, step: int) -> dict[str, float]:
        """Scheduled values besides learning rates, for the log."""
        return {}

    def health_metrics(self) -> dict[str, float]:
        """Collapse metrics of the last batch, for the log."""
        return {}

    def evaluate(self, step: int) -> dict[str, Any]:
        """Scores for the log, after `step` steps.

        Called on rank 0 only and must not wait for other ranks; with a sharded model all ranks call it, on the
        same data, and rank 0's scores count.
        """
        return {}

    def on_log_line(self, step: int, line: Mapping[str, Any]) -> None:
        """Called with each line of the log, the same on all ranks; raises `TrainingError` to end the run."""
        return

    def export_bytes(self) -> int:
        """Approximate bytes that a run writes besides its checkpoints."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint, besides the model's and the optimiser's."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore `state_tensors`."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        return
