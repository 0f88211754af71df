"""The engine: one readable loop for pretraining and fine-tuning.

A `TrainTask` defines what is trained and how its loss is computed; the engine does the rest. It runs on a CPU, on one
GPU and, through Accelerate, on many; between two log lines it never waits for a GPU.

Resume is exact: data order, augmentation, dropout, learning rates and temperatures are functions of (seed, step, rank),
and everything else (weights, optimiser, the task's tensors and counters) is in the checkpoint.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import accelerate
import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field, field_validator
from torch import Tensor

import brainfound
from brainfound.errors import TrainingError
from brainfound.recipes import Recipe
from brainfound.training import checkpoint, distributed
from brainfound.training.data_loading import closing_generator
from brainfound.training.log import ThroughputMeter, TrainingLog
from brainfound.training.optim import NonfiniteStepMonitor, allocate_moments, clip_gradients, step_unless_nonfinite
from brainfound.training.process import StopSignals
from brainfound.training.randomness import seed_dropout
from brainfound.training.task import RollbackRequested, TrainTask


class EngineRecipe(Recipe):
    """Length, batch size, precision, and the intervals of logging and saving."""

    steps: int = Field(default=10_000, ge=1)
    """Optimiser steps in the whole run."""
    batch_size: int = Field(default=128, ge=1)
    """Images in one optimiser step, over all ranks and micro-batches."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches per step, to save memory. Losses that compare images with each other (Sinkhorn-Knopp's balance,
    KoLeo) see one micro-batch of all ranks, so this is not quite one large batch."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Computation in bfloat16 or float32; "auto" tries both and takes bfloat16 where it is clearly faster.
    Weights stay float32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How processes share a model: "ddp" keeps all of it on each GPU, "fsdp" a shard of each weight (FSDP2)."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two log lines."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of most recent checkpoints to keep on disk."""
    max_skipped_in_a_row: int = Field(default=20, ge=1)
    """Number of consecutive steps with a non-finite loss or gradient after which the run stops."""

    def max_checkpoints_on_disk(self, may_roll_back: bool) -> int:
        """The most on disk at once: a new one is complete before an old one goes, and one is kept for rollbacks."""
        return self.keep_checkpoints + 1 + may_roll_back

    @field_validator("precision", mode="before")
    @classmethod
    def _parse_yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false


class Engine:
    """Runs a task in a run folder, which gets ``log.jsonl`` and ``checkpoints/``.

    The task's tensors outside the model must already be on the accelerator's device; `seed` seeds dropout and
    stochastic depth.
    """

    def __init__(
        self,
        task: TrainTask,
        recipe: EngineRecipe,
        run_folder: Path,
        accelerator: accelerate.Accelerator,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        self.task, self.recipe, self.accelerator, self.seed = task, recipe, accelerator, seed
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        self.checkpoint_folder = run_folder / "checkpoints"
        self.sharded = distributed.is_sharded(task.model)
        if recipe.parallel == "fsdp" and distributed.is_distributed() and not self.sharded:
            what, remedy = "this training cannot be sharded", "Set engine.parallel=ddp"
            raise TrainingError(what, where="engine.parallel", got="fsdp", expected="ddp", remedy=remedy)
        optimizer = task.make_optimizer()
        if self.sharded:
            self.model, self.optimizer = task.model, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self.log = TrainingLog(run_folder / "log.jsonl", recipe.steps, quiet, self.is_main)
        self.num_rollbacks = 0
        self.nonfinite_steps = NonfiniteStepMonitor(self.device, recipe.max_skipped_in_a_row)
        self.signals = StopSignals(self.device, recipe.log_every)
        self.throughput = ThroughputMeter()
        self.step = 0
        self._saved_step = -1

    def run(self, save: bool = True) -> None:
        """Train to the last step, or until the task is finished; without `save` (in a trial), no checkpoint is written.

        Raises:
            TrainingError: too many steps in a row were not finite, the task stopped the run, the disk is full, or the
                process received a stop signal (a checkpoint is saved then).
        """
        with self.log, self.signals:
            if self.recipe.steps == 0:
                self._evaluate(save=False)
            while not self._is_finished:
                try:
                    self._train(save)
                except RollbackRequested as request:
                    self.resume(self._begin_rollback(request))

    @property
    def _is_finished(self) -> bool:
        return self.step >= self.recipe.steps or self.task.is_finished

    def _train(self, save: bool) -> None:
        recipe, task = self.recipe, self.task
        allocate_moments(self.optimizer)
        self.model.train()
        if self.step == 0 and self._saved_step != 0:
            self._evaluate(save)
        with closing_generator(task.batches(self.step)) as batches:
            self.throughput = ThroughputMeter()
            while not self._is_finished:
                metrics = self._train_step(batches)
                self.step += 1
                last = self.step == recipe.steps
                if self.step % recipe.log_every == 0 or last:
                    self._log(metrics)
                if task.evaluate_every and (self.step % task.evaluate_every == 0 or last):
                    self._evaluate(save)
                stop = self.signals.should_stop(self.step)
                if save and (self.step % recipe.checkpoint_every == 0 or self._is_finished or stop):
                    self.save()
                if stop and not self._is_finished:
                    what, where = "stopped by a signal after saving a checkpoint", f"step {self.step} of {recipe.steps}"
                    raise TrainingError(what, where=where, remedy="Continue with --resume")
                self.log.advance(self.step)

    def _train_step(self, batches: Iterator[Any]) -> dict[str, Any]:
        """One optimiser step, or none if the loss or a gradient is not finite on any rank.

        Returns values for the log; on a GPU they are tensors, because nothing here waits for it.
        """
        task, accelerator, step = self.task, self.accelerator, self.step
        rates = self._set_learning_rates(step)
        num_micro_batches = self.recipe.accumulation
        sums: dict[str, Any] = {}
        for micro_batch in range(num_micro_batches):
            with self.throughput.waiting():
                batch = next(batches)
            seed_dropout(self.seed, step, micro_batch, accelerator.process_index)
            last = micro_batch == num_micro_batches - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss, parts = task.loss(self.model, batch, step, micro_batch)
                accelerator.backward(loss / num_micro_batches)
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value / num_micro_batches
        norms = clip_gradients(task.clip_groups(), task.clip_norm)
        nonfinite = self.nonfinite_steps.check_finite([sums["loss"], *norms.values()])
        step_unless_nonfinite(self.optimizer, nonfinite)
        task.after_step(step, 1 - nonfinite)
        self.optimizer.zero_grad(set_to_none=True)
        self.throughput.count_step()
        return {**sums, **rates, **{f"grad_norm/{name}": norm for name, norm in norms.items()}}

    def _set_learning_rates(self, step: int) -> dict[str, float]:
        rates: dict[str, float] = {}
        decay = self.task.weight_decay(step)
        for group in self.optimizer.param_groups:
            rate = self.task.learning_rate(step, group["role"])
            group["lr"] = rate * group["lr_scale"]
            group["weight_decay"] = decay if group["decays"] else 0.0
            rates[f"lr/{group['role']}"] = rate
        return rates | {"lr": max(rates.values())}

    def _log(self, metrics: Mapping[str, Any]) -> None:
        """Log one line, the same on all ranks; tensors are averaged over ranks."""
        measured = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        line: dict[str, Any] = {"step": self.step, **distributed.mean_over_ranks(measured, self.device)}
        # The means are numbers now, so the device has caught up; the rest does not count as step time.
        throughput = self.throughput.read(self.recipe.batch_size)
        with self.throughput.paused():
            line |= {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
            line["grad_norm"] = math.hypot(*(v for name, v in line.items() if name.startswith("grad_norm/")))
            line |= self.task.scheduled_values(self.step - 1) | self.task.health_metrics()
            line["skipped_steps"] = self._read_step_counts()["skipped"]
            line |= throughput
            if self.device.type == "cuda":
                line["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            self._broadcast_and_log(line)

    def _evaluate(self, save: bool) -> None:
        """Log the task's scores, and save a checkpoint if the rollback policy keeps this step."""
        if not self.task.evaluate_every:
            return
        with self.throughput.paused():
            # All ranks gather the weights of a sharded model together.
            scores = self.task.evaluate(self.step) if self.is_main or self.sharded else {}
            self.model.train()
            self._broadcast_and_log({"step": self.step, **scores})
        if save and self.task.rollback_policy.should_keep_checkpoint(self.step):
            self.save(kept=True)

    def _broadcast_and_log(self, line: dict[str, Any]) -> None:
        (line,) = broadcast_object_list([line], from_process=0)
        distributed.run_on_main_rank(lambda: self.log.write(line), self.is_main)
        self.task.on_log_line(self.step, line)

    def _read_step_counts(self) -> dict[str, int]:
        try:
            return self.nonfinite_steps.read(self.step)
        except TrainingError as error:
            self.task.rollback_policy.on_nonfinite_steps(self.step, error)
            raise

    def save(self, kept: bool = False) -> None:
        """Write a checkpoint of the current step, unless already saved; a `kept` one is reserved for rollbacks."""
        if self._saved_step == self.step:
            return
        with self.throughput.paused():
            content = self.checkpoint_folder, self._snapshot(kept), self.recipe.keep_checkpoints
            distributed.run_on_main_rank(lambda: checkpoint.save_checkpoint(*content), self.is_main)
        self._saved_step = self.step

    def _snapshot(self, kept: bool) -> checkpoint.Checkpoint:
        """The current state in full tensors; ranks other than the main one only help to gather a sharded model."""
        counts = self._read_step_counts()
        return checkpoint.Checkpoint(
            step=self.step,
            model=distributed.gather(self.accelerator.unwrap_model(self.model).state_dict(), self.is_main),
            task=distributed.gather(self.task.state_tensors(), self.is_main),
            optimizer=distributed.gather(self.optimizer.state_dict(), self.is_main),
            state={
                "versions": {"brainfound": brainfound.__version__, "torch": torch.__version__},
                "world_size": distributed.world_size(),
                "kept": kept,
                "rollbacks": self.num_rollbacks,
                "engine": counts,
                "task": self.task.state_dict(),
            },
        )

    def resume(self, path: Path) -> None:
        """Restore a checkpoint; `run` then continues from its step."""
        saved = checkpoint.load_checkpoint(path)
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(distributed.shard_like(saved.model, model.state_dict()))
        self.optimizer.load_state_dict(distributed.shard_optimizer_state(saved.optimizer, self.optimizer))
        self.task.load_state_tensors(distributed.shard_like(saved.task, self.task.state_tensors()))
        self.task.load_state_dict(saved.state["task"])
        self.nonfinite_steps.load(saved.state["engine"])
        self.step = self._saved_step = saved.step
        self.num_rollbacks = checkpoint.num_rollbacks(saved.state)
        self.accelerator.wait_for_everyone()  # other ranks may still be reading files that are removed here
        if self.is_main:
            checkpoint.remove_rolled_back_checkpoints(self.checkpoint_folder, saved)
            if "rollback" in saved.state:
                self.log.roll_back(saved.state["rollback"], self.num_rollbacks)
            self.log.truncate_after(saved.step)
        self.accelerator.wait_for_everyone()
        if saved.state["world_size"] != distributed.world_size():
            warnings.warn(
                f"saved by {saved.state['world_size']} processes, resumed by {distributed.world_size()}: "
                "training goes on, but not with the same random views as before",
                stacklevel=2,
            )

    def _begin_rollback(self, request: RollbackRequested) -> Path:
        """Commit a rollback; returns the checkpoint to resume from.

        If that checkpoint cannot be used, the task's state is put back.
        """
        task, policy = self.task, self.task.rollback_policy
        path = checkpoint.checkpoint_path(self.checkpoint_folder, request.step)
        before = task.state_dict()
        entries = policy.on_rollback()
        event = {"step": request.step, "rolled_back_from": self.step, "reason": request.what, **entries}
        state = {"rollbacks": self.num_rollbacks + 1, "rollback": event, "task": task.state_dict()}
        try:
            distributed.run_on_main_rank(lambda: checkpoint.update_checkpoint_state(path, state), self.is_main)
        except TrainingError as error:
            task.load_state_dict(before)
            policy.on_rollback_failed(self.step, request, error)
            raise
        scale = f", learning rates × {entries['lr_scale']:g}" if "lr_scale" in entries else ""
        self.log.notify(f"step {self.step}: {request.what}; back to step {request.step}{scale}")
        return path

    def begin(self, write_start: Callable[[], None], path: Path | None) -> None:
        """Require space on the disk, write the start of the run, and restore the checkpoint at `path`, if any."""
        self.require_space()
        distributed.run_on_main_rank(write_start, self.is_main)
        if path is None:
            self.log.truncate_after(-1)  # lines of a run that was killed before its first checkpoint
        else:
            self.resume(path)
            self.log.notify(f"resumed from {path.name}")
        self.accelerator.wait_for_everyone()

    def require_space(self) -> None:
        """Refuse, on all ranks, a run whose files do not fit on the disk; called before anything is written."""
        if not self.recipe.steps:
            return
        task = self.task
        tensors = [*self.accelerator.unwrap_model(self.model).state_dict().values(), *task.state_tensors().values()]
        moments = [parameter for group in self.optimizer.param_groups for parameter in group["params"]] * 2
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *moments))
        num_checkpoints = self.recipe.max_checkpoints_on_disk(task.rollback_policy.may_roll_back)
        needs = self.checkpoint_folder, num_checkpoints, num_bytes, task.export_bytes()
        distributed.run_on_main_rank(lambda: checkpoint.require_space_for_run(*needs), self.is_main)
