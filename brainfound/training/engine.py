"""The engine: one readable loop for pretraining and fine-tuning.

A `TrainTask` says what is trained and how a loss is made; the engine does what all training has in
common: it accumulates gradients, checks them before they can do harm, clips, steps, schedules, logs,
probes, saves, resumes exactly, goes back where the task asks for it and stops politely. It runs on a
CPU, on one GPU and, through Accelerate, on many; between two log lines it never waits for a GPU.

Resume is exact because nothing that a step depends on is hidden in generators or schedulers: the
order of the data, augmentation, dropout, learning rates and temperatures are functions of
(seed, step, rank), and everything else (weights, optimiser, the task's tensors and counters) is in the
checkpoint.
"""

from __future__ import annotations

import atexit
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
from brainfound.training import checkpoint as checkpoints
from brainfound.training import distributed as ranks
from brainfound.training import distributed as sharding
from brainfound.training.health import NonfiniteStepMonitor, StopSignals, step_unless_nonfinite
from brainfound.training.log import ThroughputMeter, TrainingLog
from brainfound.training.optim import allocate_moments, clip_gradients
from brainfound.training.precision import choose_precision
from brainfound.training.prefetch import closing_generator
from brainfound.training.randomness import seed_dropout
from brainfound.training.task import RollbackRequested, TrainTask


class EngineRecipe(Recipe):
    """Length, batch, precision, and how often to look."""

    steps: int = Field(default=10_000, ge=1)
    """Optimiser steps of the whole run."""
    batch_size: int = Field(default=128, ge=1)
    """Images of one optimiser step, over all ranks and micro-batches."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches that a step is divided into, to save memory. Losses that compare images with each other
    (Sinkhorn-Knopp's balance, KoLeo) see one micro-batch of all ranks, so this is not quite one large batch."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Computation in bfloat16 or float32; "auto" tries both and takes bfloat16 where it is clearly faster.
    Weights stay float32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How many processes share a model: "ddp" keeps all of it on each GPU, "fsdp" a slice of each weight (FSDP2)."""
    log_every: int = Field(default=20, ge=1)
    """Steps between two log lines."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    max_skipped_in_a_row: int = Field(default=20, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    num_workers: int = Field(default=2, ge=0)
    """Processes per rank that read slices; 0 reads in the training process."""

    def max_checkpoints_on_disk(self, may_roll_back: bool) -> int:
        """How many are on the disk at the worst moment: a new one is whole before an old one goes.

        Args:
            may_roll_back: one more stays to go back to.
        """
        return self.keep_checkpoints + 1 + may_roll_back

    @field_validator("precision", mode="before")
    @classmethod
    def _parse_yaml_no(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare no as false


class Engine:
    """Runs a task in a run folder.

    Args:
        task: what is trained; its tensors beside the model are on the accelerator's device already.
        recipe: length, batch, precision.
        run_folder: gets ``log.jsonl`` and ``checkpoints/``.
        accelerator: as `make_accelerator` gives it.
        seed: of dropout and stochastic depth.
        quiet: no progress bar.
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
        self.checkpoint_folder = run_folder / "checkpoints"
        self.sharded = sharding.is_sharded(task.model)
        if recipe.parallel == "fsdp" and ranks.is_distributed() and not self.sharded:
            raise TrainingError(
                "this training cannot be sharded",
                where="engine.parallel",
                got="fsdp",
                expected="ddp",
                remedy="Set engine.parallel=ddp",
            )
        optimizer = task.make_optimizer()
        if self.sharded:
            self.model, self.optimizer = task.model, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self.log = TrainingLog(run_folder / "log.jsonl", recipe.steps, quiet, accelerator.is_main_process)
        self.health = NonfiniteStepMonitor(accelerator.device, recipe.max_skipped_in_a_row)
        self.signals = StopSignals(accelerator.device, recipe.log_every)
        self.throughput = ThroughputMeter()
        self.step = 0
        self.rollbacks = 0
        self._saved_step = -1

    def resume(self, path: Path) -> None:
        """Take over a checkpoint; `run` then goes on from its step."""
        saved = checkpoints.load_checkpoint(path)
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(sharding.shard_like(saved.model, model.state_dict()))
        self.optimizer.load_state_dict(sharding.shard_optimizer_state(saved.optimizer, self.optimizer))
        self.task.load_state_tensors(sharding.shard_like(saved.task, self.task.state_tensors()))
        self.task.load_state_dict(saved.state["task"])
        self.health.load(saved.state["engine"])
        self.step = self._saved_step = saved.step
        self.rollbacks = checkpoints.num_rollbacks(saved.state)
        self._reconcile_files(saved)
        if saved.state["world_size"] != ranks.world_size():
            warnings.warn(
                f"saved by {saved.state['world_size']} processes, resumed by {ranks.world_size()}: "
                "training goes on, but not with the same random views as before",
                stacklevel=2,
            )

    def run(self, save: bool = True) -> None:
        """Train to the last step; without `save`, a trial that leaves no checkpoint.

        Raises:
            TrainingError: too many steps in a row were not finite, the task asked to stop, the disk is too
                small, or the process was told to end (a checkpoint is saved then).
        """
        with self.log, self.signals:
            if self.recipe.steps == 0:
                # Nothing is trained: the start is looked at, and there is nothing to go on from.
                self._evaluate(save=False)
                return
            while self.step < self.recipe.steps:
                try:
                    self._train(save)
                except RollbackRequested as rollback_request:
                    if not save:
                        raise
                    self._roll_back(rollback_request)

    def _train(self, save: bool) -> None:
        """Train from the present step to the last one."""
        recipe, task = self.recipe, self.task
        allocate_moments(self.optimizer)
        self.model.train()
        if self.step == 0 and self._saved_step != 0:
            self._evaluate(save)
        with closing_generator(task.batches(self.step)) as batches:
            self.throughput = ThroughputMeter()
            while self.step < recipe.steps:
                metrics = self._train_step(batches)
                self.step += 1
                last = self.step == recipe.steps
                if self.step % recipe.log_every == 0 or last:
                    self._log(metrics)
                if task.evaluate_every and (self.step % task.evaluate_every == 0 or last):
                    self._evaluate(save)
                stop = self.signals.stop(self.step)
                if save and (self.step % recipe.checkpoint_every == 0 or last or stop):
                    self.save()
                if stop and not last:
                    raise TrainingError(
                        "stopped by a signal after saving a checkpoint",
                        where=f"step {self.step} of {recipe.steps}",
                        remedy="Continue with --resume",
                    )
                self.log.advance(self.step)

    def _train_step(self, batches: Iterator[Any]) -> dict[str, Any]:
        """One optimiser step, or none where the loss or a gradient is not finite on any rank.

        On a GPU nothing here waits for it: what comes back are orders, not yet numbers.
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
        nonfinite = self.health.check_finite([sums["loss"], *norms.values()])
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
        """Write a log line and show it to the task: tensors as means over ranks, and the same line on all ranks."""
        device = self.accelerator.device
        measured = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        line: dict[str, Any] = {"step": self.step, **ranks.mean_over_ranks(measured, device)}
        # The means are numbers now, so the device has caught up; what follows is no part of a step.
        throughput = self.throughput.read(self.recipe.batch_size)
        with self.throughput.paused():
            line |= {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
            line["grad_norm"] = math.hypot(*(v for name, v in line.items() if name.startswith("grad_norm/")))
            line |= self.task.scheduled_values(self.step - 1) | self.task.health_metrics()
            line["skipped_steps"] = self._read_step_counts()["skipped"]
            line |= throughput
            if device.type == "cuda":
                line["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            self._broadcast_and_log(line)

    def _read_step_counts(self) -> dict[str, int]:
        try:
            return self.health.read(self.step)
        except TrainingError as error:
            self.task.on_nonfinite_steps(self.step, error)
            raise

    def _evaluate(self, save: bool) -> None:
        if not self.task.evaluate_every:
            return
        with self.throughput.paused():
            # A rank that held its slices back would leave the others waiting for them.
            takes_part = self.accelerator.is_main_process or self.sharded
            scores = self.task.evaluate(self.step) if takes_part else {}
            self.model.train()
            self._broadcast_and_log({"step": self.step, **scores})
        if save and self.task.should_keep_checkpoint(self.step):
            self.save(kept=True)

    def _broadcast_and_log(self, line: dict[str, Any]) -> None:
        (line,) = broadcast_object_list([line], from_process=0)
        self._run_on_main_rank(lambda: self.log.write(line))
        self.task.on_log_line(self.step, line)

    def save(self, kept: bool = False) -> None:
        """Write a checkpoint of this moment, unless the newest one is of it already.

        Args:
            kept: it stays until a newer one is kept, for a rollback.
        """
        if self._saved_step == self.step:
            return
        is_main = self.accelerator.is_main_process
        with self.throughput.paused():
            counts = self._read_step_counts()
            snapshot = self._snapshot(counts, kept, keep=is_main) if is_main or self.sharded else None

            def write() -> None:
                assert snapshot is not None
                checkpoints.save_checkpoint(self.checkpoint_folder, snapshot, self.recipe.keep_checkpoints)

            self._run_on_main_rank(write)
        self._saved_step = self.step

    def _snapshot(self, counts: Mapping[str, int], kept: bool, keep: bool = True) -> checkpoints.Checkpoint:
        """This moment in whole tensors; without `keep`, only to help rank 0 make its own of a sharded model."""
        return checkpoints.Checkpoint(
            step=self.step,
            model=sharding.gather(self.accelerator.unwrap_model(self.model).state_dict(), keep),
            task=sharding.gather(self.task.state_tensors(), keep),
            optimizer=sharding.gather(self.optimizer.state_dict(), keep),
            state={
                "versions": {"brainfound": brainfound.__version__, "torch": torch.__version__},
                "world_size": ranks.world_size(),
                "kept": kept,
                "rollbacks": self.rollbacks,
                "engine": dict(counts),
                "task": self.task.state_dict(),
            },
        )

    def _roll_back(self, rollback_request: RollbackRequested) -> None:
        """Go back to a kept checkpoint, as a process would that was killed just after deciding so."""
        path = checkpoints.checkpoint_path(self.checkpoint_folder, rollback_request.step)
        before = self.task.state_dict()
        told = self.task.on_rollback(self.step, rollback_request.what)
        event = {"step": rollback_request.step, "rolled_back_from": self.step, "reason": rollback_request.what, **told}
        state = {"rollbacks": self.rollbacks + 1, "rollback": event, "task": self.task.state_dict()}
        try:
            # From this one atomic write on, whatever came after the kept checkpoint counts no more.
            self._run_on_main_rank(lambda: checkpoints.update_checkpoint_state(path, state))
        except TrainingError as error:
            # There is no way back: the run is where it was, and ends there.
            self.task.load_state_dict(before)
            self.task.on_rollback_failed(self.step, rollback_request, error)
            raise
        self.resume(path)
        scale = f", learning rates × {told['lr_scale']:g}" if "lr_scale" in told else ""
        self.log.notify(
            f"step {event['rolled_back_from']}: {rollback_request.what}; back to step {rollback_request.step}{scale}"
        )

    def _reconcile_files(self, saved: checkpoints.Checkpoint) -> None:
        """Make folder and log agree with the checkpoint that the run goes on from."""
        self.accelerator.wait_for_everyone()  # others may still be reading what is removed here
        if self.accelerator.is_main_process:
            checkpoints.remove_rolled_back_checkpoints(self.checkpoint_folder, saved)
            if "rollback" in saved.state:
                self.log.roll_back(saved.state["rollback"], self.rollbacks)
            self.log.truncate_after(saved.step)
        self.accelerator.wait_for_everyone()

    def require_space(self) -> None:
        """Refuse a run whose files would not fit on the disk; for before anything is written.

        Raises:
            TrainingError: on all ranks.
        """
        if self.recipe.steps:
            self._run_on_main_rank(self._require_space)

    def _require_space(self) -> None:
        task = self.task
        tensors = [*self.accelerator.unwrap_model(self.model).state_dict().values(), *task.state_tensors().values()]
        moments = [parameter for group in self.optimizer.param_groups for parameter in group["params"]] * 2
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *moments))
        num_checkpoints = self.recipe.max_checkpoints_on_disk(task.may_roll_back)
        checkpoints.require_space_for_run(self.checkpoint_folder, num_checkpoints, num_bytes, task.export_bytes())

    def _run_on_main_rank(self, work: Callable[[], Any]) -> None:
        ranks.run_on_main_rank(work, self.accelerator.is_main_process)


def process_state() -> accelerate.PartialState:
    """What Accelerate knows of this process, and of the others that were started with it."""
    # Said in so many words: without it, processes that torchrun starts on a machine without a GPU do not
    # join a process group, and each trains by itself.
    state = accelerate.PartialState(cpu=not torch.accelerator.is_available())
    # The threads of a group that is left open now and then abort the process that exits, when all its work is done.
    atexit.unregister(ranks.close_process_group)  # once is enough
    atexit.register(ranks.close_process_group)
    return state


def make_accelerator(precision: Literal["auto", "no", "bf16"]) -> accelerate.Accelerator:
    """The accelerator of this process; "auto" takes the precision that a short test finds faster."""
    device = process_state().device
    if precision == "auto":
        precision = choose_precision(device)
    shared = accelerate.state.AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") not in (None, precision):
        # Accelerate keeps one state per process; a second run in the same process may want another precision.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
    return accelerate.Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())


def describe_device(device: torch.device) -> tuple[str, str]:
    """The device that is used, and why, in words."""
    if device.type == "cuda":
        return str(device), f"{torch.cuda.device_count()} CUDA device(s) visible: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        reason = (
            "CUDA devices are visible but Accelerate was told to use the CPU" if torch.cuda.is_available() else None
        )
        return "cpu", reason or "this PyTorch sees no GPU"
    return str(device), f"chosen by Accelerate ({device.type})"
