"""How much memory a forward pass takes: on a GPU by its allocator, on a CPU by following tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PLAIN = (Tensor, nn.Parameter)


class ForwardMemory:
    """Measures what the first forward pass of a task takes, by standing in the place of its `loss`.

    On a GPU the allocator knows; on a CPU every tensor that an operation makes is followed until it goes.

    Args:
        loss: called with a model, a batch and whatever follows them.
        part: makes a smaller batch of a batch, which is measured before it; None: it is not.
    """

    def __init__(
        self, loss: Callable[..., Any], device: torch.device, part: Callable[[Any], Any] | None = None
    ) -> None:
        self.loss, self.device, self.part = loss, device, part
        self.most_bytes = 0
        self.part_bytes: int | None = None
        self._done = False

    def __call__(self, *arguments: Any) -> Any:
        if self._done:
            return self.loss(*arguments)
        self._done = True
        if self.part is not None:
            model, batch, *others = arguments
            # What the first call leaves behind, such as the grid of a crop size, would count in one measurement only.
            self.loss(model, self.part(batch), *others)
            _, self.part_bytes = self._measured(model, self.part(batch), *others)
            model.zero_grad()
        answer, self.most_bytes = self._measured(*arguments)
        return answer

    def _measured(self, *arguments: Any) -> tuple[Any, int]:
        """The loss, and the most bytes that it took at any time."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            answer = self.loss(*arguments)
            return answer, torch.cuda.max_memory_allocated(self.device) - before
        with LiveTensors() as live:
            answer = self.loss(*arguments)
        return answer, live.most_bytes


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made inside it and still there; `most_bytes` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.most_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if type(t) in _PLAIN}
        for tensor in tree_leaves(result):
            if type(tensor) in _PLAIN:
                storage = tensor.untyped_storage()
                if storage._cdata not in old:  # neither a view nor changed in place
                    old.add(storage._cdata)
                    self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.num_bytes += size
        self.most_bytes = max(self.most_bytes, self.num_bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.num_bytes -= size
