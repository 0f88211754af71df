"""Recomputation in the backward pass that repeats no matrix product.

Of a residual branch the results of matrix products and attention are kept, and norms, activations, softmaxes and
casts are computed again: they pass over memory once and hold most of what a backward pass needs.

Source: selective recomputation (Korthikanti et al. 2022, arXiv 2205.05198, section 5), by operation as in
PyTorch's selective activation checkpointing. That one demands each operation of the first pass in the second one,
one by one. Sharded training gathers weights in between, at one time more often than at another, and must
do so again; here only products are counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

# Parts of the names of operations that are too much work to repeat; attention comes from other libraries, too.
_PRODUCTS = ("mm", "linear", "convolution")
_ATTENTION = ("attention", "attn", "flash", "fmha")


def recompute_all_but_products(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``; its backward pass repeats what is cheap. It may be called once.

    Raises:
        RuntimeError: in the backward pass, if the function does other products there than it did at first, or
            changes the result of one in place.
    """
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, context_fn=_contexts)  # type: ignore[assignment]
    return result


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: deque[_Kept] = deque()
    return _Keep(kept), _Reuse(kept)


class _Kept:
    """The result of a product: tensors, and numbers such as seeds."""

    def __init__(self, operation: Any, result: Any) -> None:
        self.operation = operation
        self._result = tree_map_only(Tensor, _without_graph, result)
        self._versions = self._read_versions()

    def take(self, operation: Any) -> Any:
        if operation is not self.operation:
            raise RuntimeError(f"computed again, {operation.name()} came where {self.operation.name()} had been")
        if self._read_versions() != self._versions:
            raise RuntimeError(f"the result of {operation.name()} was changed in place, and cannot be used again")
        return self._result

    def _read_versions(self) -> list[int]:
        versions: list[int] = []
        tree_map_only(Tensor, lambda tensor: versions.append(tensor._version), self._result)
        return versions


def _without_graph(tensor: Tensor) -> Tensor:
    # Beneath autograd a view would get a version counter of its own, and hide changes in place.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _Keep(TorchDispatchMode):
    """Keeps the results of products, first to last."""

    def __init__(self, kept: deque[_Kept]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_product(func):
            self._kept.append(_Kept(func, result))
        return result


class _Reuse(_Keep):
    """Gives them back in this order instead of computing them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_product(func):
            return func(*args, **(kwargs or {}))
        if not self._kept:
            raise RuntimeError(f"computed again, {func.name()} came once more than at first")
        return self._kept.popleft().take(func)


_KNOWN: dict[Any, bool] = {}


def _is_product(operation: Any) -> bool:
    if operation not in _KNOWN:
        library, _, name = operation.name().partition("::")
        parts = (*_PRODUCTS, *_ATTENTION) if library == "aten" else _ATTENTION
        _KNOWN[operation] = any(part in name for part in parts)
    return _KNOWN[operation]
