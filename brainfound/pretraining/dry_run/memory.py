"""Costs of pretraining: sizes of the models, memory of a forward pass, and the measurement of two real steps.

On a GPU the allocator reports what a forward pass takes; on a CPU every new tensor is counted while it lives.
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

from brainfound.pretraining.objectives.base import Objective, StepFlops
from brainfound.training.distributed import BRANCHES

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
