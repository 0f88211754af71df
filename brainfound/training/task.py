"""What the engine trains: the contract between the engine and a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brainfound.errors import TrainingError


class RollbackRequested(TrainingError):
    """The run is to go back to a kept checkpoint, and on from there with a lower learning rate.

    Args:
        step: of the kept checkpoint that is to be restored.
    """

    def __init__(self, what: str, *, step: int, where: object = None, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.step = step


class TrainTask(ABC):
    """What the engine trains.

    All ranks call every method together, in the same order, except where a method says otherwise.
    """

    model: nn.Module
    """Everything that is trained, as one module; each parameter takes part in each loss."""
    clip_norm: float = 3.0
    """Largest gradient norm of each group of `clip_groups`."""
    evaluate_every: int = 0
    """Steps between two evaluations; 0: never. With any other value also before the first step and after the last."""
    may_roll_back: bool = False
    """Whether `on_log_line` may raise `RollbackRequested`; the disk then has to hold one more checkpoint."""

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, fused; each of its groups has ``role`` (str), ``lr_scale`` (float) and ``decays`` (bool)."""

    @abstractmethod
    def batches(self, first_step: int) -> Iterator[Any]:
        """The micro-batches of this rank, `accumulation` per step, from `first_step` on."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, step: int, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, through `model` (which is `self.model`, perhaps wrapped), and named parts."""

    @abstractmethod
    def learning_rate(self, step: int, role: str) -> float:
        """The learning rate of a role at a step, before each group's ``lr_scale``."""

    def weight_decay(self, step: int) -> float:
        """The weight decay at a step, of the groups that decay."""
        return 0.0

    def clip_groups(self) -> dict[str, list[nn.Parameter]]:
        """Named sets of parameters whose gradients are clipped apart from each other."""
        return {"model": [p for p in self.model.parameters() if p.requires_grad]}

    def after_step(self, step: int, taken: Tensor) -> None:
        """Called after every step.

        Args:
            taken: a 0-dim float on the device, 1 where the optimiser moved and 0 where it skipped the step,
                alike on all ranks; nothing here may wait for its value.
        """
        return

    def scheduled_values(self, step: int) -> dict[str, float]:
        """Scheduled values besides learning rates, for the log."""
        return {}

    def health_metrics(self) -> dict[str, float]:
        """Health of the last batch, for the log."""
        return {}

    def evaluate(self, step: int) -> dict[str, Any]:
        """Scores for the log, after `step` steps.

        Called on rank 0 only, where nothing may wait for other ranks; of a sharded model on all ranks,
        which then look at the same data together. Rank 0's scores count.
        """
        return {}

    def on_log_line(self, step: int, line: Mapping[str, Any]) -> None:
        """See a line of the log; all ranks see the same.

        Raises:
            RollBack: the run goes back to the kept checkpoint that it names, and on from there.
            TrainingError: any other ends the run.
        """
        return

    def should_keep_checkpoint(self, step: int) -> bool:
        """Asked after every evaluation: whether a checkpoint of this moment is to be made and kept.

        The newest kept one outlives ``keep_checkpoints``, so that a rollback has somewhere to go. All ranks
        give the same answer.
        """
        return False

    def on_nonfinite_steps(self, step: int, error: TrainingError) -> None:
        """Called before too many skipped steps in a row end the run with `error`; all ranks alike.

        Raises:
            RollBack: the run goes back instead.
            TrainingError: ends the run in the place of `error`.
        """
        return

    def on_rollback(self, from_step: int, reason: str) -> Mapping[str, Any]:
        """Called between a `RollbackRequested` and the return to its checkpoint.

        The plain values of `state_dict` are those of the moment when `RollbackRequested` was raised, and what this
        leaves in them is taken along: a task can count its rollbacks and lower its learning rate here. All
        tensors are then those of the checkpoint.

        Returns:
            Entries for the line of the log that tells of it.
        """
        return {}

    def on_rollback_failed(self, step: int, rollback_request: RollbackRequested, error: TrainingError) -> None:
        """Called where the checkpoint that `rollback_request` names cannot be gone back to, before `error` ends the run.

        All ranks call it alike; `state_dict` is as before `on_rollback` again.

        Raises:
            TrainingError: ends the run in the place of `error`.
        """
        return

    def export_bytes(self) -> int:
        """About how many bytes a run leaves besides its checkpoints."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors beside the model's and the optimiser's that a checkpoint must hold."""
        return {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` gave."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a checkpoint must hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        return
