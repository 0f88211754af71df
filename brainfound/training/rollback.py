"""Rollback: a run returns to a kept checkpoint and continues from there.

The task's `RollbackPolicy` requests it; the engine calls `Rollbacks.begin` and resumes from the checkpoint that it
returns. A rollback starts with one atomic change of the kept checkpoint's ``state.json``, which then counts one
rollback more than the checkpoints of later steps; `latest_valid_checkpoint` prefers the highest count. A process killed
at any moment therefore resumes either before the rollback or after it. The log lines of discarded steps move to
``log-before-rollback-K.jsonl``; one line of the log records the rollback.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brainfound.errors import TrainingError
from brainfound.training import checkpoint, distributed
from brainfound.training.checkpoint import Checkpoint
from brainfound.training.log import TrainingLog
from brainfound.training.task import RollbackRequested, TrainTask


class Rollbacks:
    """The rollbacks of one run, on all ranks alike.

    Args:
        checkpoint_folder: of the run.
        is_main: whether this rank writes files.
    """

    def __init__(self, task: TrainTask, checkpoint_folder: Path, log: TrainingLog, is_main: bool) -> None:
        self.task, self.checkpoint_folder, self.log, self.is_main = task, checkpoint_folder, log, is_main
        self.count = 0

    def begin(self, request: RollbackRequested, step: int) -> Path:
        """Commit a rollback that was requested at `step`.

        Returns:
            The checkpoint to resume from.

        Raises:
            TrainingError: if that checkpoint cannot be restored; the task is as before then.
        """
        task, policy = self.task, self.task.rollback_policy
        path = checkpoint.checkpoint_path(self.checkpoint_folder, request.step)
        before = task.state_dict()
        entries = policy.on_rollback()
        event = {"step": request.step, "rolled_back_from": step, "reason": request.what, **entries}
        state = {"rollbacks": self.count + 1, "rollback": event, "task": task.state_dict()}
        try:
            distributed.run_on_main_rank(lambda: update_checkpoint_state(path, state), self.is_main)
        except TrainingError as error:
            task.load_state_dict(before)
            policy.on_rollback_failed(step, request, error)
            raise
        scale = f", learning rates × {entries['lr_scale']:g}" if "lr_scale" in entries else ""
        self.log.notify(f"step {step}: {request.what}; back to step {request.step}{scale}")
        return path

    def on_resume(self, saved: Checkpoint) -> None:
        """Make folder and log agree with the checkpoint that the run resumes from."""
        self.count = checkpoint.num_rollbacks(saved.state)
        if self.is_main:
            remove_rolled_back_checkpoints(self.checkpoint_folder, saved)
            if "rollback" in saved.state:
                self.log.roll_back(saved.state["rollback"], self.count)
            self.log.truncate_after(saved.step)


def update_checkpoint_state(path: Path, changes: Mapping[str, Any]) -> None:
    """Change plain values of a checkpoint atomically.

    Raises:
        TrainingError: if the checkpoint is not whole, or writing fails.
    """
    fault = checkpoint.find_corruption(path)
    if fault is not None:
        raise TrainingError("the checkpoint to go back to is not whole", where=path, got=fault)
    with checkpoint.wrap_write_errors("the return to a checkpoint", path):
        state = {**checkpoint.read_state(path), **changes}
        checkpoint.write_atomically(path / checkpoint.STATE_FILE, json.dumps(state, indent=2))
        checkpoint.fsync(path)


def remove_rolled_back_checkpoints(folder: Path, present: Checkpoint) -> None:
    """Remove the checkpoints of the steps that the rollback to `present` has discarded."""
    for path in reversed(checkpoint.list_checkpoints(folder)):
        is_later = checkpoint.checkpoint_step(path) > present.step
        if is_later and checkpoint.num_rollbacks(checkpoint.read_state(path)) < checkpoint.num_rollbacks(present.state):
            shutil.rmtree(path)
