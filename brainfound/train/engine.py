"""The engine: one readable loop for pretraining and fine-tuning.

A `TrainTask` says what is trained and how a loss is made; the engine does what all training has in
common: it accumulates gradients, checks them before they can do harm, clips, steps, schedules, logs,
probes, saves, resumes exactly and stops politely. It runs on a CPU, on one GPU and, through
Accelerate, on many.

Resume is exact because nothing that a step depends on is hidden in generators or schedulers: the
order of the data, augmentation, dropout, learning rates and temperatures are functions of
(seed, step, rank), and everything else (weights, optimiser, the task's tensors and counters) is in the
checkpoint.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import accelerate
import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field
from torch import Tensor, nn

import brainfound
from brainfound.errors import TrainingError
from brainfound.recipes import Recipe
from brainfound.train import checkpoint as checkpoints
from brainfound.train import ranks, sharding
from brainfound.train.log import TrainingLog
from brainfound.train.randomness import seed_dropout


class EngineRecipe(Recipe):
    """Length, batch, precision, and how often to look."""

    steps: int = Field(default=10_000, ge=1)
    """Optimiser steps of the whole run."""
    batch_size: int = Field(default=128, ge=1)
    """Images of one optimiser step, over all ranks and micro-batches."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches that a step is divided into, to save memory."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Computation in bfloat16 or float32; "auto" takes bfloat16 on a GPU that has it. Weights stay float32."""
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

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser; each of its groups has ``role`` (str), ``lr_scale`` (float) and ``decays`` (bool)."""

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

    def scheduled(self, step: int) -> dict[str, float]:
        """Scheduled values besides learning rates, for the log."""
        return {}

    def gauges(self) -> dict[str, float]:
        """Health of the last batch, for the log."""
        return {}

    def evaluate(self, step: int) -> dict[str, Any]:
        """Scores for the log, after `step` steps.

        Called on rank 0 only, where nothing may wait for other ranks; of a sharded model on all ranks,
        which then look at the same data together. Rank 0's scores count.
        """
        return {}

    def look(self, step: int, line: Mapping[str, Any]) -> None:
        """See a line of the log; all ranks see the same. A TrainingError stops the run."""
        return

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
        if recipe.parallel == "fsdp" and ranks.active() and not self.sharded:
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
        self.step = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self._saved_step = -1
        self._asked_to_stop = False

    def resume(self, path: Path) -> None:
        """Take over a checkpoint; `run` then goes on from its step."""
        saved = checkpoints.load_checkpoint(path)
        model = self.accelerator.unwrap_model(self.model)
        model.load_state_dict(sharding.cut_like(saved.model, model.state_dict()))
        self.optimizer.load_state_dict(sharding.cut_optimizer_state(saved.optimizer, self.optimizer))
        self.task.load_state_tensors(sharding.cut_like(saved.task, self.task.state_tensors()))
        self.task.load_state_dict(saved.state["task"])
        self.step = self._saved_step = saved.step
        self.skipped = saved.state["engine"]["skipped"]
        self.skipped_in_a_row = saved.state["engine"]["skipped_in_a_row"]
        self.log.forget_after(saved.step)
        if saved.state["world_size"] != ranks.world_size():
            warnings.warn(
                f"saved by {saved.state['world_size']} processes, resumed by {ranks.world_size()}: "
                "training goes on, but not with the same random views as before",
                stacklevel=2,
            )

    def run(self, save: bool = True) -> None:
        """Train to the last step; without `save`, a trial that leaves no checkpoint.

        Raises:
            TrainingError: too many steps in a row were not finite, the task asked to stop, or the
                process was told to end (a checkpoint is saved then).
        """
        recipe, task = self.recipe, self.task
        with self.log, self._polite_signals():
            self.model.train()
            if self.step == 0:
                self._evaluate()
            batches = task.batches(self.step)
            while self.step < recipe.steps:
                started = time.perf_counter()
                metrics = self._train_step(batches)
                self.step += 1
                last = self.step == recipe.steps
                if self.step % recipe.log_every == 0 or last:
                    self._log(metrics, time.perf_counter() - started)
                if task.evaluate_every and (self.step % task.evaluate_every == 0 or last):
                    self._evaluate()
                if save and (self.step % recipe.checkpoint_every == 0 or last or self._asked_to_stop):
                    self.save()
                if self._asked_to_stop and not last:
                    raise TrainingError(
                        "stopped by a signal after saving a checkpoint",
                        where=f"step {self.step} of {recipe.steps}",
                        remedy="Continue with --resume",
                    )
                self.log.advance(self.step, metrics.get("loss"))

    def _train_step(self, batches: Iterator[Any]) -> dict[str, Any]:
        """One optimiser step, or none where the loss or a gradient is not finite on any rank."""
        task, accelerator, step = self.task, self.accelerator, self.step
        rates = self._set_rates(step)
        num_micro_batches = self.recipe.accumulation
        sums: dict[str, Tensor] = {}
        for micro_batch in range(num_micro_batches):
            batch = next(batches)
            seed_dropout(self.seed, step, micro_batch, accelerator.process_index)
            last = micro_batch == num_micro_batches - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss, parts = task.loss(self.model, batch, step, micro_batch)
                accelerator.backward(loss / num_micro_batches)
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value / num_micro_batches
        norms = {
            name: sharding.whole(nn.utils.clip_grad_norm_(parameters, task.clip_norm))
            for name, parameters in task.clip_groups().items()
        }
        finite = bool(torch.isfinite(torch.stack([sums["loss"].float(), *norms.values()])).all())
        # One answer for all ranks: a rank that skipped alone would wait for the others for ever.
        broken, self._asked_to_stop = ranks.any_over_ranks(not finite, self._asked_to_stop, device=accelerator.device)
        if not broken:
            self.optimizer.step()
        task.after_step(step, torch.tensor(float(not broken), device=accelerator.device))
        self.optimizer.zero_grad(set_to_none=True)
        self._count_skipped(broken)
        return {**sums, **rates, **{f"grad_norm/{name}": norm for name, norm in norms.items()}}

    def _count_skipped(self, broken: bool) -> None:
        self.skipped += broken
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if broken else 0
        if self.skipped_in_a_row >= self.recipe.max_skipped_in_a_row:
            raise TrainingError(
                f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a row",
                where=f"step {self.step}",
                remedy="Lower the learning rate, or look for damaged input",
            )

    def _set_rates(self, step: int) -> dict[str, float]:
        rates: dict[str, float] = {}
        decay = self.task.weight_decay(step)
        for group in self.optimizer.param_groups:
            rate = self.task.learning_rate(step, group["role"])
            group["lr"] = rate * group["lr_scale"]
            group["weight_decay"] = decay if group["decays"] else 0.0
            rates[f"lr/{group['role']}"] = rate
        return rates | {"lr": max(rates.values())}

    def _log(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Write a log line and show it to the task: tensors as means over ranks, and the same line on all ranks."""
        device = self.accelerator.device
        measured = {name: float(value) for name, value in metrics.items() if isinstance(value, Tensor)}
        line: dict[str, Any] = {"step": self.step, **ranks.mean_over_ranks(measured, device)}
        line |= {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
        line["grad_norm"] = math.hypot(*(v for name, v in line.items() if name.startswith("grad_norm/")))
        line |= self.task.scheduled(self.step - 1) | self.task.gauges()
        line |= {"skipped_steps": self.skipped, "seconds_per_step": seconds}
        line["images_per_second"] = self.recipe.batch_size / seconds
        if device.type == "cuda":
            line["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        self._publish(line)

    def _evaluate(self) -> None:
        if not self.task.evaluate_every:
            return
        # A rank that held its slices back would leave the others waiting for them.
        takes_part = self.accelerator.is_main_process or self.sharded
        scores = self.task.evaluate(self.step) if takes_part else {}
        self.model.train()
        self._publish({"step": self.step, **scores})

    def _publish(self, line: dict[str, Any]) -> None:
        (line,) = broadcast_object_list([line], from_process=0)
        self.log.write(line)
        self.task.look(self.step, line)

    def save(self) -> None:
        """Write a checkpoint of this moment, unless the newest one is of it already."""
        if self._saved_step == self.step:
            return
        failure: TrainingError | None = None
        is_main = self.accelerator.is_main_process
        snapshot = self._snapshot(keep=is_main) if is_main or self.sharded else None
        if is_main and snapshot is not None:
            try:
                checkpoints.save_checkpoint(self.checkpoint_folder, snapshot, self.recipe.keep_checkpoints)
            except TrainingError as error:
                failure = error
        # Also the barrier: nobody goes on before the checkpoint is whole, and all stop if it cannot be.
        (failed,) = ranks.any_over_ranks(failure is not None, device=self.accelerator.device)
        if failed:
            raise failure or TrainingError("rank 0 could not save a checkpoint", where=f"step {self.step}")
        self._saved_step = self.step

    def _snapshot(self, keep: bool = True) -> checkpoints.Checkpoint:
        """This moment in whole tensors; without `keep`, only to help rank 0 make its own of a sharded model."""
        return checkpoints.Checkpoint(
            step=self.step,
            model=sharding.gather(self.accelerator.unwrap_model(self.model).state_dict(), keep),
            task=sharding.gather(self.task.state_tensors(), keep),
            optimizer=sharding.gather(self.optimizer.state_dict(), keep),
            state={
                "versions": {"brainfound": brainfound.__version__, "torch": torch.__version__},
                "world_size": ranks.world_size(),
                "engine": {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row},
                "task": self.task.state_dict(),
            },
        )

    @contextmanager
    def _polite_signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end the run after the current step; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = {kind: signal.getsignal(kind) for kind in kinds}

        def ask(kind: int, frame: Any) -> None:
            self._asked_to_stop = True
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        for kind in kinds:
            signal.signal(kind, ask)
        try:
            yield
        finally:
            for kind in kinds:
                signal.signal(kind, before[kind])


def make_accelerator(precision: Literal["auto", "no", "bf16"]) -> accelerate.Accelerator:
    """The accelerator of this process; "auto" takes bfloat16 where a GPU computes it natively."""
    if precision == "auto":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "no"
    shared = accelerate.state.AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") not in (None, precision):
        # Accelerate keeps one state per process; a second run in the same process may want another precision.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
    # Said in so many words: without it, processes that torchrun starts on a machine without a GPU do not
    # join a process group, and each trains by itself.
    return accelerate.Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())


def device_and_reason(device: torch.device) -> tuple[str, str]:
    """The device that is used, and why, in words."""
    if device.type == "cuda":
        return str(device), f"{torch.cuda.device_count()} CUDA device(s) visible: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        reason = (
            "CUDA devices are visible but Accelerate was told to use the CPU" if torch.cuda.is_available() else None
        )
        return "cpu", reason or "this PyTorch sees no GPU"
    return str(device), f"chosen by Accelerate ({device.type})"
