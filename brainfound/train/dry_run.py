"""What two real steps say about the whole run: on this machine, and on paper for N GPUs of a kind.

Of this machine everything is measured. Of others, speed follows from the operations of a step
(`brainfound.train.flops`), the kind's peak (`brainfound.train.gpus`) and an assumed utilisation; memory
follows from the sizes of the weights and from what the forward pass took here. Such an estimate is good
for choosing a machine and for finding out that something cannot fit; it is no promise.

Published utilisations of self-supervised ViTs, derived from reported images/s: DINOv2 ViT-L/14 on A100
31%, DINOv3 ViT-L on H100 19%, CAPI 58%.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from brainfound.data.augmentation import ViewsRecipe
from brainfound.errors import UsageError
from brainfound.models.encoder import SliceEncoder
from brainfound.train.engine import Engine
from brainfound.train.flops import StepFlops, step_flops
from brainfound.train.forward_memory import ForwardMemory
from brainfound.train.gpus import GPUKind, find_gpu
from brainfound.train.objectives.base import Objective
from brainfound.train.objectives.projection_head import ProjectionHead
from brainfound.train.pretrain_task import PretrainTask
from brainfound.train.running import PretrainEngineRecipe
from brainfound.train.sharding import BRANCHES

NUM_STEPS = 2
GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2
# Of a GPU's memory; the rest goes to the driver, to libraries and to gaps between blocks.
USABLE_SHARE = 0.92


@dataclass(frozen=True)
class Machine:
    """A machine on paper."""

    kind: GPUKind
    num_gpus: int = 1
    utilisation: float = 0.33
    """Assumed part of the peak that the model's own operations reach (MFU)."""

    @classmethod
    def of(cls, gpus: int | None, gpu: str | None) -> Machine | None:
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

    def require_share(self, engine: PretrainEngineRecipe) -> None:
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
class Weights:
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
    def of(cls, objective: Objective) -> Weights:
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
        return FLOAT32 * (self.student + self.teacher + self.anchor + 2 * self.trained)


@dataclass(frozen=True)
class Trial:
    """What two steps on this machine have shown."""

    device: torch.device
    precision: str
    num_processes: int
    num_images: int
    """Of a micro-batch of one process."""
    seconds_per_step: float
    forward_bytes: float
    """What the forward pass of a micro-batch takes at most beside the weights, teacher and targets included."""
    flops: StepFlops
    """Of a micro-batch of one process."""
    weights: Weights
    effective_lr: float
    loss: float
    ln_k: float | None
    """The loss of uniform answers; only objectives with prototypes have it."""


def memory_per_gpu(
    weights: Weights, forward_bytes: float, num_gpus: int, parallel: str, bf16: bool, casts_measured: bool = False
) -> dict[str, float]:
    """Bytes of each kind on one of `num_gpus` that train together.

    Weights, gradients and both moments are float32. With DDP, gradients are copied into buckets that are
    sent; bfloat16 keeps a copy of the matrices while a step lasts. With FSDP each GPU has its share, and
    beside it two gathered layers and whole heads.

    Args:
        forward_bytes: what the forward pass of its micro-batch takes.
        parallel: "ddp" or "fsdp".
        casts_measured: whether that was measured in bfloat16, and so has the copies of the matrices in it.
    """
    shares = num_gpus if parallel == "fsdp" else 1
    parts = {
        "weights": FLOAT32 * weights.student / shares,
        "gradients": FLOAT32 * weights.trained / shares,
        "optimiser": 2 * FLOAT32 * weights.trained / shares,
        "teacher": FLOAT32 * weights.teacher / shares,
        "anchor": FLOAT32 * weights.anchor / shares,
    }
    width = BFLOAT16 if bf16 else FLOAT32
    if parallel == "fsdp":
        heads = weights.student - weights.encoder
        parts["gathered"] = 2 * width * weights.layer + 2 * FLOAT32 * heads
    else:
        buckets = FLOAT32 * weights.trained if num_gpus > 1 else 0
        parts["copies"] = buckets + (BFLOAT16 * weights.student if bf16 and not casts_measured else 0)
    parts["activations"] = forward_bytes
    return parts


def most_memory_gib(device: torch.device) -> float:
    """The most memory that this process has had: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def as_on_gpu(engine: PretrainEngineRecipe) -> PretrainEngineRecipe:
    """What "auto" comes to on a GPU where it decides about memory, so that a CPU measures what a GPU would need."""
    choice = {"attention": "sdpa", "local_crops": "packed"}
    return engine.model_copy(update={key: value for key, value in choice.items() if getattr(engine, key) == "auto"})


def try_out(
    task: PretrainTask,
    views: ViewsRecipe,
    engine: PretrainEngineRecipe,
    folder: Path,
    accelerator: Accelerator,
    quiet: bool,
) -> Trial | None:
    """Train for two real steps; all ranks call it, and rank 0 is told what they have shown.

    The first step shows memory and warms up, the second is timed.

    Args:
        folder: gets a log, and nothing else.
    """
    short = engine.model_copy(update={"steps": NUM_STEPS, "log_every": 1})
    forward = ForwardMemory(task.loss, accelerator.device)
    task.loss = forward  # type: ignore[method-assign, assignment]
    Engine(task, short, folder, accelerator, task.seed, quiet).run(save=False)
    if not accelerator.is_main_process:
        return None
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    num_images = engine.batch_size // (accelerator.num_processes * engine.accumulation)
    return Trial(
        device=accelerator.device,
        precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        num_images=num_images,
        seconds_per_step=line["seconds_per_step"],
        forward_bytes=forward.most_bytes,
        flops=step_flops(task.objective, views, num_images),
        weights=Weights.of(task.objective),
        effective_lr=task.effective_lr,
        loss=line["loss"],
        ln_k=line.get("ln_k"),
    )


def report(trial: Trial, engine: PretrainEngineRecipe, lr: float, machine: Machine | None) -> Iterator[str]:
    """Lines about this machine and, if one is named, about a machine on paper."""
    yield from _here(trial, engine, lr)
    if machine is not None:
        yield ""
        yield from _on_paper(trial, engine, machine)


def _here(trial: Trial, engine: PretrainEngineRecipe, lr: float) -> Iterator[str]:
    steps, batch, seconds = engine.steps, engine.batch_size, trial.seconds_per_step
    per_image = trial.flops.total / trial.num_images
    words = "bfloat16" if trial.precision == "bf16" else "float32"
    weights = trial.weights
    yield f"this machine, measured: {trial.num_processes} process(es) on {trial.device.type}, {words}"
    yield f"  effective learning rate  {trial.effective_lr:.3g}  ({lr:g} at batch 128, this batch {batch})"
    yield f"  speed                    {batch / seconds:.1f} images/s, {seconds:.2f} s per step"
    yield (
        f"  arithmetic               {per_image / 1e9:.3g} GFLOP per image, {per_image * batch / seconds / 1e12:.3g}"
        " TFLOP/s over all processes"
    )
    yield f"  memory                   {most_memory_gib(trial.device):.2f} GiB at most in this process"
    yield f"  whole run                {steps} steps, about {_hours(steps * seconds)} without probes"
    yield (
        f"  weights                  {weights.student / 1e6:.4g} M (trained {weights.trained / 1e6:.4g} M), "
        f"teacher {weights.teacher / 1e6:.4g} M, anchor {weights.anchor / 1e6:.4g} M"
    )
    yield f"  disk                     {disk_bytes(weights, engine) / GIB:.2f} GiB: {_disk_in_words(weights, engine)}"
    ln_k = "" if trial.ln_k is None else f"  (ln K = {trial.ln_k:.4f})"
    yield f"  loss                     {trial.loss:.4f}{ln_k}"


def _on_paper(trial: Trial, engine: PretrainEngineRecipe, machine: Machine) -> Iterator[str]:
    kind, num_gpus = machine.kind, machine.num_gpus
    tflops, words = kind.tflops("no" if engine.precision == "no" else "bf16")
    per_image = trial.flops.total / trial.num_images
    images_per_second = num_gpus * tflops * 1e12 * machine.utilisation / per_image
    seconds = engine.batch_size / images_per_second
    yield f"{num_gpus} × {kind.name}, an estimate on paper and no measurement:"
    yield (
        f"  assumed                  {machine.utilisation:.0%} of {tflops:g} TFLOP/s ({words}) per GPU; published"
        " runs reach 19 to 58%"
    )
    if words == "float32" and engine.precision != "no":
        yield f"                           a {kind.name.split('-')[0]} has no bfloat16, and float16 is not offered"
    yield f"  speed                    {images_per_second:.4g} images/s, {seconds:.3g} s per step"
    yield f"  whole run                {engine.steps} steps, about {_hours(engine.steps * seconds)} without probes"
    yield "  effective learning rate  as above: engine.batch_size is the batch of all GPUs together"
    yield f"  memory per GPU           {kind.memory_gib:g} GiB, of which {USABLE_SHARE:.0%} are counted on"
    bf16 = words == "bfloat16"
    fitting = False
    for parallel in ("ddp", "fsdp") if num_gpus > 1 else ("ddp",):
        parts = _parts(trial, engine, machine, parallel, engine.accumulation, bf16)
        total, fits = sum(parts.values()), _fits(parts, kind)
        name = parallel if num_gpus > 1 else "one GPU"
        fitting |= fits and parallel == engine.parallel
        yield f"    {name:<8} {total / GIB:7.2f} GiB  {'fits' if fits else 'does not fit'}"
        yield "             " + ", ".join(f"{part} {size / GIB:.3g}" for part, size in parts.items() if size)
    if bf16 and trial.precision != "bf16":
        yield "    activations were measured in float32; in bfloat16 they take between half of that and all of it"
    if not fitting:
        yield f"    {advice(trial, engine, machine, bf16)}"
    yield f"  disk                     {disk_bytes(trial.weights, engine) / GIB:.2f} GiB, written by one process"


def advice(trial: Trial, engine: PretrainEngineRecipe, machine: Machine, bf16: bool) -> str:
    """The smallest changes that let a recipe fit into a GPU's memory, in words."""
    per_step = engine.batch_size // machine.num_gpus
    finer = [a for a in range(engine.accumulation, per_step + 1) if per_step % a == 0]
    ways = ("ddp", "fsdp") if machine.num_gpus > 1 else ("ddp",)
    found = []
    for parallel in ways:
        for accumulation in finer:
            if _fits(_parts(trial, engine, machine, parallel, accumulation, bf16), machine.kind):
                changes = [f"engine.parallel={parallel}"] if parallel != engine.parallel else []
                changes += [f"engine.accumulation={accumulation}"] if accumulation != engine.accumulation else []
                found.append(" and ".join(changes))
                break
    if found:
        return f"It would fit with {', or '.join(found)}."
    least = min(sum(_parts(trial, engine, machine, parallel, finer[-1], bf16).values()) for parallel in ways)
    others = [] if engine.gradient_checkpointing else ["engine.gradient_checkpointing=true (not measured here)"]
    others += ["more GPUs with engine.parallel=fsdp", "larger GPUs"]
    return f"With one image at a time it still needs {least / GIB:.3g} GiB. Try {', or '.join(others)}."


def disk_bytes(weights: Weights, engine: PretrainEngineRecipe) -> int:
    """What a run needs on disk: kept checkpoints, one that is being written, the best encoder and the export."""
    return (engine.keep_checkpoints + 1) * weights.checkpoint_bytes + 2 * FLOAT32 * weights.encoder


def _disk_in_words(weights: Weights, engine: PretrainEngineRecipe) -> str:
    return (
        f"{engine.keep_checkpoints} checkpoints of {weights.checkpoint_bytes / GIB:.3g} GiB and one being written, "
        "the best encoder, the export"
    )


def _parts(
    trial: Trial, engine: PretrainEngineRecipe, machine: Machine, parallel: str, accumulation: int, bf16: bool
) -> dict[str, float]:
    num_images = engine.batch_size / (machine.num_gpus * accumulation)
    forward_bytes = trial.forward_bytes / trial.num_images * num_images
    measured = trial.precision == "bf16"
    return memory_per_gpu(trial.weights, forward_bytes, machine.num_gpus, parallel, bf16, measured)


def _fits(parts: dict[str, float], kind: GPUKind) -> bool:
    return sum(parts.values()) <= USABLE_SHARE * kind.memory_gib * GIB


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.2f} h" if hours < 100 else f"{hours / 24:.0f} days"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
