"""What a pretraining run costs: kinds of GPU, sizes of the models, memory of a forward pass, measured or on paper.

On a GPU the allocator reports what a forward pass takes; on a CPU every new tensor is counted while it lives. Rates of
GPUs are peaks of dense matrix products with float32 accumulation. Their memory is the part that a program can use.

Sources: NVIDIA data sheets of V100 (2020), A10 (2021), A100 (2021), H100 (2023), H200 (2024) and HGX B200
(2024), of RTX A6000 and A40 (2021), L40 (2022), L40S, L4 and RTX 6000 Ada (2023); NVIDIA white papers of the GA102
(2021, table 9: RTX 3090) and AD102 (2023, appendix A: RTX 4090) GPUs.
"""

from __future__ import annotations

import os
import platform
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brainfound.errors import UsageError, did_you_mean
from brainfound.pretraining.objectives.base import Objective, StepFlops
from brainfound.training.distributed import BRANCHES
from brainfound.training.engine import EngineRecipe


@dataclass(frozen=True)
class GPUSpec:
    """One kind of GPU; `bf16_tflops` is None if it has no bfloat16, `float32_tflops` is without TF32."""

    name: str
    memory_gib: float
    bf16_tflops: float | None
    float32_tflops: float

    def tflops(self, precision: str) -> tuple[float, str]:
        """The peak at a precision ("bf16" or "no"), and the precision used: float32 if there is no bfloat16."""
        if precision == "bf16" and self.bf16_tflops is not None:
            return self.bf16_tflops, "bfloat16"
        return self.float32_tflops, "float32"


GPU_SPECS = {
    kind.name: kind
    for kind in (
        GPUSpec("V100-16GB", 15.7, None, 15.7),
        GPUSpec("V100-32GB", 31.7, None, 15.7),
        GPUSpec("RTX-3090", 23.6, 71.0, 35.6),
        GPUSpec("RTX-4090", 23.6, 165.2, 82.6),
        GPUSpec("A10", 22.1, 125.0, 31.2),
        GPUSpec("L4", 22.0, 121.0, 30.3),
        GPUSpec("RTX-A6000", 47.5, 154.8, 38.7),
        GPUSpec("A40", 44.3, 149.7, 37.4),
        GPUSpec("L40", 44.4, 181.0, 90.5),
        GPUSpec("L40S", 44.4, 362.0, 91.6),
        GPUSpec("RTX-6000-Ada", 44.4, 364.2, 91.1),
        GPUSpec("A100-40GB", 39.4, 312.0, 19.5),
        GPUSpec("A100-80GB", 79.2, 312.0, 19.5),
        GPUSpec("H100", 79.2, 989.0, 67.0),
        GPUSpec("H200", 139.8, 989.0, 67.0),
        GPUSpec("B200", 178.0, 2250.0, 75.0),
    )
}


def find_gpu(name: str) -> GPUSpec:
    """The GPU with a name such as "rtx 4090", ignoring case; for an unknown one, a UsageError suggests the nearest."""
    wanted = name.strip().lower().replace(" ", "-").replace("_", "-")
    for known, kind in GPU_SPECS.items():
        if known.lower() == wanted:
            return kind
    sizes = [known for known in GPU_SPECS if known.lower().startswith(f"{wanted}-")]
    remedy = f"Name one: {' or '.join(sizes)}" if sizes else did_you_mean(wanted, GPU_SPECS)
    raise UsageError("this kind of GPU is not in the table", where="--gpu", got=name, remedy=remedy)


@dataclass(frozen=True)
class TargetHardware:
    """A machine on paper."""

    kind: GPUSpec
    num_gpus: int = 1
    utilisation: float = 0.33
    """Assumed fraction of the peak that the model's own operations reach (MFU)."""

    @classmethod
    def of(cls, gpus: int | None, gpu: str | None) -> TargetHardware | None:
        """The machine that the command line names, if any; a UsageError for a number without a kind."""
        if gpu is None and gpus is None:
            return None
        if gpu is None:
            raise UsageError("--gpu is missing", where="--gpus", got=gpus, remedy="Give --gpu too, such as A100-80GB")
        if gpus is not None and gpus < 1:
            raise UsageError("there is no such number of GPUs", where="--gpus", got=gpus, expected="1 or more")
        return cls(find_gpu(gpu), gpus or 1)

    @property
    def parallel_modes(self) -> tuple[str, ...]:
        return ("ddp", "fsdp") if self.num_gpus > 1 else ("ddp",)

    def micro_batch_size(self, engine: EngineRecipe) -> int:
        """Images that one GPU processes at a time."""
        return engine.batch_size // (self.num_gpus * engine.accumulation)

    def require_divisible_batch(self, engine: EngineRecipe) -> None:
        """Raise a UsageError for a batch that the GPUs cannot share, naming the nearest ones that they can."""
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


GIB = 2**30
FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2


class ForwardMemory:
    """Measures the memory of the first forward pass of a task, in place of its `loss`.

    `part` cuts a smaller batch out of a batch; the smaller one is measured first.
    """

    def __init__(
        self, loss: Callable[..., Any], device: torch.device, part: Callable[[Any], Any] | None = None
    ) -> None:
        self.loss, self.device, self.part = loss, device, part
        self.peak_bytes: int | None = None
        self.part_peak_bytes: int | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.peak_bytes is not None:
            return self.loss(*arguments)
        if self.part is not None:
            model, batch, *others = arguments
            # The first call fills caches, such as the grid of a crop size, which would count in one measurement only.
            self.loss(model, self.part(batch), *others)
            _, self.part_peak_bytes = self._measure_peak(model, self.part(batch), *others)
            model.zero_grad()
        result, self.peak_bytes = self._measure_peak(*arguments)
        return result

    def _measure_peak(self, *arguments: Any) -> tuple[Any, int]:
        """The loss, and the peak memory of its computation in bytes."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            result = self.loss(*arguments)
            return result, torch.cuda.max_memory_allocated(self.device) - before
        with LiveTensors() as live:
            result = self.loss(*arguments)
        return result, live.peak_bytes


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in old:  # neither a view nor changed in place
                old.add(storage._cdata)
                self.num_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.num_bytes)
                weakref.finalize(storage, self._untrack, storage.nbytes())
        return result

    def _untrack(self, size: int) -> None:
        self.num_bytes -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if type(leaf) in (Tensor, nn.Parameter)]


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory of this process: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def available_memory_bytes(device: torch.device) -> int:
    """The free memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # Other systems only report the size of the machine.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class ParameterCounts:
    """The number of weights of each model; the encoder is the student without heads."""

    student: int
    trained: int
    teacher: int
    anchor: int
    encoder: int
    layer: int
    """The largest attention or MLP of a block; sharded training gathers one of them at a time."""

    @classmethod
    def of(cls, objective: Objective) -> ParameterCounts:
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
        """One checkpoint: everything in float32, and two moments of each trained weight."""
        return FLOAT32_BYTES * (self.student + self.teacher + self.anchor + 2 * self.trained)

    @property
    def dry_run_bytes(self) -> int:
        """Memory before the first step: that of a checkpoint, plus gradients and the starting model."""
        return self.checkpoint_bytes + FLOAT32_BYTES * (self.trained + self.encoder)


@dataclass(frozen=True)
class AnalyticCosts:
    """Costs that follow from a recipe and the size of its model, without a trial."""

    weights: ParameterCounts
    flops: Callable[[int], StepFlops]
    """Number of images in a micro-batch → its FLOPs; not quite proportional, as whole crops are masked or dropped."""
    may_roll_back: bool = False


@dataclass(frozen=True)
class DryRunMeasurement:
    """Two steps on this machine; `num_images` per micro-batch and process, images/s over all processes."""

    device: torch.device
    precision: str
    num_processes: int
    num_images: int
    images_per_second: float
    forward_bytes: float
    """Peak memory of a micro-batch's forward pass, including teacher and targets, without the weights."""
    half_batch_forward_bytes: float | None
    """The same for half as many images, rounded down, if it was measured."""
    sizes: AnalyticCosts
    loss: float
    ln_k: float | None
    """The loss of a uniform prediction; None for objectives without prototypes."""

    def activation_bytes(self, num_images: int) -> float:
        """The memory that the forward pass of another micro-batch would take.

        One part grows in proportion to the student's FLOPs; the rest, such as normalised prototypes, is constant. The
        two measurements separate them.
        """
        wanted, tried = (self.sizes.flops(n).student for n in (num_images, self.num_images))
        if self.half_batch_forward_bytes is None:
            return self.forward_bytes * wanted / tried
        half = self.sizes.flops(self.num_images // 2).student
        slope = max(self.forward_bytes - self.half_batch_forward_bytes, 0) / (tried - half)
        return self.forward_bytes + slope * (wanted - tried)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
