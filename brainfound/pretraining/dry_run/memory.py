"""Memory: of the first forward pass of a task, of this process, and of this machine.

On a GPU the allocator knows what a forward pass takes; on a CPU every new tensor is counted while it lives.
"""

from __future__ import annotations

import os
import platform
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
_PLAIN = (Tensor, nn.Parameter)


class ForwardMemory:
    """Measures the memory of the first forward pass of a task, in place of its `loss`.

    Args:
        loss: called with a model, a batch and further arguments.
        part: makes a smaller batch of a batch, which is measured first; None: it is not.
    """

    def __init__(
        self, loss: Callable[..., Any], device: torch.device, part: Callable[[Any], Any] | None = None
    ) -> None:
        self.loss, self.device, self.part = loss, device, part
        self.peak_bytes = 0
        self.part_peak_bytes: int | None = None
        self._done = False

    def __call__(self, *arguments: Any) -> Any:
        if self._done:
            return self.loss(*arguments)
        self._done = True
        if self.part is not None:
            model, batch, *others = arguments
            # The first call fills caches, such as the grid of a crop size, which would count in one measurement only.
            self.loss(model, self.part(batch), *others)
            _, self.part_peak_bytes = self._measure_peak(model, self.part(batch), *others)
            model.zero_grad()
        answer, self.peak_bytes = self._measure_peak(*arguments)
        return answer

    def _measure_peak(self, *arguments: Any) -> tuple[Any, int]:
        """The loss, and its peak of memory in bytes."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            answer = self.loss(*arguments)
            return answer, torch.cuda.max_memory_allocated(self.device) - before
        with LiveTensors() as live:
            answer = self.loss(*arguments)
        return answer, live.peak_bytes


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if type(t) in _PLAIN}
        for tensor in tree_leaves(result):
            if type(tensor) in _PLAIN:
                storage = tensor.untyped_storage()
                if storage._cdata not in old:  # neither a view nor changed in place
                    old.add(storage._cdata)
                    self._track(storage)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.num_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        weakref.finalize(storage, self._untrack, size)

    def _untrack(self, size: int) -> None:
        self.num_bytes -= size


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
    known = Path("/proc/meminfo")
    if known.is_file():
        for line in known.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Other systems only report the size of the machine.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
