"""What two real steps say about the whole run: on this machine, and on paper for N GPUs of a kind.

Of this machine everything is measured. Of others, speed follows from the operations of a step
(`cost`), the kind's peak (`gpus`) and an assumed utilisation; memory
follows from the sizes of the weights and from what the forward pass took here. Such an estimate is good
for choosing a machine and for finding out that something cannot fit; it is no promise.

An estimate for others has to work on a laptop: a few images are tried out instead of a micro-batch of
theirs, and where not even the weights fit, only what follows from sizes is said. The lines themselves are
made in `brainfound.pretraining.dry_run.report`.

Published utilisations of self-supervised ViTs, derived from reported images/s: DINOv2 ViT-L/14 on A100
31%, DINOv3 ViT-L on H100 19%, CAPI 58%.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from brainfound.data.augmentation import ViewsRecipe
from brainfound.errors import UsageError
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.dry_run.cost import ForwardMemory, StepFlops, step_flops
from brainfound.pretraining.dry_run.gpus import GPUSpec, find_gpu
from brainfound.pretraining.execution import PretrainEngineRecipe
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.heads import ProjectionHead
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.task import PretrainTask
from brainfound.training.distributed import BRANCHES
from brainfound.training.engine import Engine

NUM_STEPS = 2
NUM_ESTIMATE_IMAGES = 4  # images of the micro-batch that stands for another machine's
GIB = 2**30
FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2


@dataclass(frozen=True)
class TargetHardware:
    """A machine on paper."""

    kind: GPUSpec
    num_gpus: int = 1
    utilisation: float = 0.33
    """Assumed part of the peak that the model's own operations reach (MFU)."""

    @classmethod
    def of(cls, gpus: int | None, gpu: str | None) -> TargetHardware | None:
        """The machine that the command line names; None if it names none.

        Raises:
            UsageError: for an unknown kind, or a number without one.
        """
        if gpu is None and gpus is None:
            return None
        if gpu is None:
            raise UsageError("which GPUs?", where="--gpus", got=gpus, remedy="Give --gpu KIND too, such as A100-80GB")
        if gpus is not None and gpus < 1:
            raise UsageError("there is no such number of GPUs", where="--gpus", got=gpus, expected="1 or more")
        return cls(find_gpu(gpu), gpus or 1)

    def micro_batch_size(self, engine: PretrainEngineRecipe) -> int:
        """Images that one GPU has at a time."""
        return engine.batch_size // (self.num_gpus * engine.accumulation)

    def require_divisible_batch(self, engine: PretrainEngineRecipe) -> None:
        """Refuse a batch that the GPUs cannot share.

        Raises:
            UsageError: names batches that they can.
        """
        parts = self.num_gpus * engine.accumulation
        if engine.batch_size % parts:
            above = (engine.batch_size // parts + 1) * parts
            raise UsageError(
                f"{self.num_gpus} GPUs with {engine.accumulation} micro-batches each cannot share the batch",
                where="engine.batch_size",
                got=engine.batch_size,
                expected=f"a multiple of {parts}",
                remedy=f"Set engine.batch_size={above}" + (f" or {above - parts}" if above > parts else ""),
            )


@dataclass(frozen=True)
class ParameterCounts:
    """How many weights there are of each kind."""

    student: int
    trained: int
    teacher: int
    anchor: int
    encoder: int
    """Of the student, without heads."""
    layer: int
    """The largest attention or MLP of a block: what sharded training gathers at a time."""

    @classmethod
    def of(cls, objective: Objective) -> ParameterCounts:
        """Count them; sharded ones count whole."""
        student, encoder = objective.student, objective.exported_encoder
        # An anchor is a bare encoder; a teacher has heads.
        is_anchor = {module: isinstance(module, SliceEncoder) for module in objective.frozen_modules()}
        heads = sum(_count(module) for module in student.modules() if isinstance(module, ProjectionHead))
        return cls(
            student=_count(student),
            trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
            teacher=sum(_count(module) for module, anchor in is_anchor.items() if not anchor),
            anchor=sum(_count(module) for module, anchor in is_anchor.items() if anchor),
            encoder=_count(student) - heads,
            layer=max(_count(block.get_submodule(branch)) for block in encoder.blocks for branch in BRANCHES),
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: everything in float32, and two moments of each trained weight."""
        return FLOAT32_BYTES * (self.student + self.teacher + self.anchor + 2 * self.trained)

    @property
    def dry_run_bytes(self) -> int:
        """What a trial takes before anything is computed: as a checkpoint, with gradients and the model as it was."""
        return self.checkpoint_bytes + FLOAT32_BYTES * (self.trained + self.encoder)


@dataclass(frozen=True)
class AnalyticCosts:
    """What follows from a recipe and the sizes of its model, without a trial."""

    weights: ParameterCounts
    flops: Callable[[int], StepFlops]
    """The operations of a micro-batch of so many images; not quite in proportion, as whole crops are left out."""
    may_roll_back: bool = False
    """Whether the guard may go back to a checkpoint, which then stays."""

    @classmethod
    def of(cls, objective: Objective, views: ViewsRecipe, may_roll_back: bool) -> AnalyticCosts:
        weights = ParameterCounts.of(objective)
        return cls(weights, lambda num_images: step_flops(objective, views, num_images), may_roll_back)


@dataclass(frozen=True)
class DryRunMeasurement:
    """What two steps on this machine have shown."""

    device: torch.device
    precision: str
    num_processes: int
    num_images: int
    """Of a micro-batch of one process."""
    images_per_second: float
    """Of all processes together."""
    forward_bytes: float
    """What the forward pass of a micro-batch takes at most beside the weights, teacher and targets included."""
    half_batch_forward_bytes: float | None
    """The same of half as many images, rounded down; None where that was not measured."""
    sizes: AnalyticCosts
    loss: float
    ln_k: float | None
    """The loss of uniform answers; only objectives with prototypes have it."""

    def activation_bytes(self, num_images: int) -> float:
        """What the forward pass of another micro-batch would take.

        Part of it depends on the images: by how much, the student's operations tell, which as the activations follow
        the crops that go through. The rest, such as normalised prototypes, does not; a few images and half as many
        tell the two apart.
        """
        wanted, tried = (self.sizes.flops(n).student for n in (num_images, self.num_images))
        if self.half_batch_forward_bytes is None:
            return self.forward_bytes * wanted / tried
        half = self.sizes.flops(self.num_images // 2).student
        slope = max(self.forward_bytes - self.half_batch_forward_bytes, 0) / (tried - half)
        return self.forward_bytes + slope * (wanted - tried)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has had: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def available_memory_bytes(device: torch.device) -> int:
    """Memory that a trial may take: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = Path("/proc/meminfo")
    if known.is_file():
        for line in known.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Elsewhere only the size of the machine is told.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def shrink_engine_for_estimate(
    engine: PretrainEngineRecipe, machine: TargetHardware, num_processes: int
) -> PretrainEngineRecipe:
    """A recipe of which a few images are tried out, to reckon with for another machine."""
    num_tried = min(NUM_ESTIMATE_IMAGES, machine.micro_batch_size(engine))
    few = {"batch_size": num_tried * num_processes, "accumulation": 1, "num_workers": 0}
    return resolve_auto_for_gpu(engine).model_copy(update=few)


def resolve_auto_for_gpu(engine: PretrainEngineRecipe) -> PretrainEngineRecipe:
    """What "auto" comes to on a GPU where it decides about memory, so that a CPU measures what a GPU would need."""
    choice = {"attention": "sdpa", "crops": "packed"}
    return engine.model_copy(update={key: value for key, value in choice.items() if getattr(engine, key) == "auto"})


def measure_training_steps(
    task: PretrainTask,
    views: ViewsRecipe,
    engine: PretrainEngineRecipe,
    folder: Path,
    accelerator: Accelerator,
    quiet: bool,
    estimate: bool = False,
) -> DryRunMeasurement | None:
    """Train for two real steps; all ranks call it, and rank 0 is told what they have shown.

    The first step shows memory and warms up, the second is timed.

    Args:
        folder: gets a log, and nothing else.
        estimate: measure the forward pass of half the images too, to reckon with for other numbers of them.
    """
    short = engine.model_copy(update={"steps": NUM_STEPS, "log_every": 1})
    num_images = engine.batch_size // (accelerator.num_processes * engine.accumulation)
    halve = _first(num_images // 2) if estimate and num_images > 1 else None
    forward = ForwardMemory(task.loss, accelerator.device, halve)
    task.loss = forward  # type: ignore[method-assign, assignment]
    Engine(task, short, folder, accelerator, task.seed, quiet).run(save=False)
    if not accelerator.is_main_process:
        return None
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return DryRunMeasurement(
        device=accelerator.device,
        precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        num_images=num_images,
        images_per_second=engine.batch_size / line["seconds_per_step"],
        forward_bytes=forward.peak_bytes,
        half_batch_forward_bytes=forward.part_peak_bytes,
        sizes=AnalyticCosts.of(task.objective, views, task.guard.may_roll_back),
        loss=line["loss"],
        ln_k=line.get("ln_k"),
    )


def _first(num_images: int) -> Callable[[PretrainBatch], PretrainBatch]:
    """What takes the first images of a batch."""

    def first(batch: PretrainBatch) -> PretrainBatch:
        return replace(batch, **{name: part[:num_images] for name, part in vars(batch).items() if part is not None})

    return first


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
