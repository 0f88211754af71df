"""Two real steps of a run: measured speed and memory, and the sizes that an estimate for other machines needs.

Everything about this machine is measured. On others, speed follows from the operations of a step, the peak rate of
the GPU and an assumed utilisation; memory follows from the number of weights and from the forward pass here. Such an
estimate is good for choosing a machine and for excluding one; it is no promise. Because it has to work on a laptop,
it tries out a few images instead of a whole micro-batch.

Published utilisations of self-supervised ViTs, derived from reported images/s: DINOv2 ViT-L/14 on A100
31%, DINOv3 ViT-L on H100 19%, CAPI 58%.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from brainfound.pretraining.dry_run.gpus import TargetHardware
from brainfound.pretraining.dry_run.memory import ForwardMemory
from brainfound.pretraining.execution import PretrainEngineRecipe
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.flops import StepFlops
from brainfound.pretraining.slices import PretrainBatch
from brainfound.pretraining.task import PretrainTask
from brainfound.training.distributed import BRANCHES
from brainfound.training.engine import Engine

NUM_STEPS = 2
NUM_ESTIMATE_IMAGES = 4  # of the micro-batch that is tried out for another machine
FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2


@dataclass(frozen=True)
class ParameterCounts:
    """The number of weights of each model."""

    student: int
    trained: int
    teacher: int
    anchor: int
    encoder: int
    """Of the student, without heads."""
    layer: int
    """The largest attention or MLP of a block, which sharded training gathers at a time."""

    @classmethod
    def of(cls, objective: Objective) -> ParameterCounts:
        """Count them; sharded ones count whole."""
        student, encoder = objective.student, objective.exported_encoder
        frozen = {name: _count(module) for name, module in objective.named_frozen_modules().items()}
        anchor = frozen.pop("anchor", 0)
        heads = sum(_count(module) for module in student.modules() if getattr(module, "is_shard_unit", False))
        return cls(
            student=_count(student),
            trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
            teacher=sum(frozen.values()),
            anchor=anchor,
            encoder=_count(student) - heads,
            layer=max(_count(block.get_submodule(branch)) for block in encoder.blocks for branch in BRANCHES),
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: everything in float32, and two moments of each trained weight."""
        return FLOAT32_BYTES * (self.student + self.teacher + self.anchor + 2 * self.trained)

    @property
    def dry_run_bytes(self) -> int:
        """Memory of a trial before the first step: as a checkpoint, with gradients and the starting model."""
        return self.checkpoint_bytes + FLOAT32_BYTES * (self.trained + self.encoder)


@dataclass(frozen=True)
class AnalyticCosts:
    """Costs that follow from a recipe and the size of its model, without a trial."""

    weights: ParameterCounts
    flops: Callable[[int], StepFlops]
    """Number of images in a micro-batch → its operations; not quite in proportion, as whole crops are left out."""
    may_roll_back: bool = False
    """Whether the guard may go back to a checkpoint, which is then kept."""

    @classmethod
    def of(cls, objective: Objective, may_roll_back: bool) -> AnalyticCosts:
        return cls(ParameterCounts.of(objective), objective.flops, may_roll_back)


@dataclass(frozen=True)
class DryRunMeasurement:
    """Two steps on this machine, measured."""

    device: torch.device
    precision: str
    num_processes: int
    num_images: int
    """In a micro-batch of one process."""
    images_per_second: float
    """Of all processes together."""
    forward_bytes: float
    """Peak memory of the forward pass of a micro-batch besides the weights; with that of teacher and targets."""
    half_batch_forward_bytes: float | None
    """The same for half as many images, rounded down; None where that was not measured."""
    sizes: AnalyticCosts
    loss: float
    ln_k: float | None
    """The loss of a uniform prediction; only of objectives with prototypes."""

    def activation_bytes(self, num_images: int) -> float:
        """The memory that the forward pass of another micro-batch would take.

        One part grows with the images, in proportion to the student's operations, which as the activations depend on
        the crops that are encoded. The rest, such as normalised prototypes, is constant; the two measurements
        separate them.
        """
        wanted, tried = (self.sizes.flops(n).student for n in (num_images, self.num_images))
        if self.half_batch_forward_bytes is None:
            return self.forward_bytes * wanted / tried
        half = self.sizes.flops(self.num_images // 2).student
        slope = max(self.forward_bytes - self.half_batch_forward_bytes, 0) / (tried - half)
        return self.forward_bytes + slope * (wanted - tried)


def shrink_engine_for_estimate(
    engine: PretrainEngineRecipe, machine: TargetHardware, num_processes: int
) -> PretrainEngineRecipe:
    """The engine of a trial with a few images, from which another machine is estimated."""
    num_tried = min(NUM_ESTIMATE_IMAGES, machine.micro_batch_size(engine))
    few = {"batch_size": num_tried * num_processes, "accumulation": 1, "num_workers": 0}
    return resolve_auto_for_gpu(engine).model_copy(update=few)


def resolve_auto_for_gpu(engine: PretrainEngineRecipe) -> PretrainEngineRecipe:
    """Replace each "auto" that decides about memory by the choice of a GPU, so that a CPU measures a GPU's memory."""
    choice = {"attention": "sdpa", "crops": "packed"}
    return engine.model_copy(update={key: value for key, value in choice.items() if getattr(engine, key) == "auto"})


def measure_training_steps(
    task: PretrainTask,
    engine: PretrainEngineRecipe,
    folder: Path,
    accelerator: Accelerator,
    quiet: bool,
    estimate: bool = False,
) -> DryRunMeasurement | None:
    """Train for two real steps; all ranks call it, and rank 0 gets the measurement.

    The first step shows memory and warms up, the second is timed.

    Args:
        folder: gets a log, and nothing else.
        estimate: measure the forward pass of half the images too, to estimate other numbers of images.
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
        sizes=AnalyticCosts.of(task.objective, task.guard.may_roll_back),
        loss=line["loss"],
        ln_k=line.get("ln_k"),
    )


def _first(num_images: int) -> Callable[[PretrainBatch], PretrainBatch]:
    """A function that takes the first images of a batch."""

    def first(batch: PretrainBatch) -> PretrainBatch:
        return replace(batch, **{name: part[:num_images] for name, part in vars(batch).items() if part is not None})

    return first


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
