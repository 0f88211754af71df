"""The pretraining loop over the transformer blocks of a Hub ViT, with selective recomputation.

It calls the sub-modules of the transformers blocks, so adapters, sharding and hooks on them keep working.

- Stochastic depth (1603.09382) by subsets of the batch as in DINOv2 (arXiv 2304.07193, section 5): a fixed number of
  sequences of each group passes through a residual branch and is scaled by n / kept.
- Selective recomputation (Korthikanti et al. 2022, arXiv 2205.05198, section 5): results of matrix products and
  attention are kept; norms, activations, softmaxes and casts are recomputed. PyTorch's selective checkpointing requires
  identical operations in both passes, but sharded training gathers weights more often in one: match products only.

Axis legend: ``n`` sequences of a group, ``L`` tokens of each, ``T`` tokens of all groups, ``D`` width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from brainfound.models.kernels import Kernel, Packing

Branch = Callable[[Any, Tensor, Packing, Kernel], Tensor]
SavedActivations = Literal["all", "products", "inputs"]
"""The activations of a residual branch that are kept for the backward pass; the rest is recomputed."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of matrix products with this tensor: that of autocast if enabled, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def attention_branch(block: Any, tokens: Float[Tensor, "1 T D"], packing: Packing, kernel: Kernel) -> Tensor:
    """The first residual branch of a block, without the residual."""
    # Cast once: autocast would cast the same tokens for query, key and value, and keep all three copies.
    tokens = block.norm1(tokens)
    output, _ = block.attention(tokens.to(compute_dtype(tokens)), packing=packing, kernel=kernel)
    return block.layer_scale1(output)


def mlp_branch(block: Any, tokens: Float[Tensor, "1 T D"], packing: Packing, kernel: Kernel) -> Tensor:
    """The second residual branch of a block, without the residual."""
    tokens = block.norm2(tokens)
    return block.layer_scale2(block.mlp(tokens.to(compute_dtype(tokens))))


@dataclass(frozen=True)
class BlockRunner:
    """Runs packed groups of sequences through transformer blocks."""

    kernel: Kernel = "sdpa"
    attention: Branch = attention_branch
    mlp: Branch = mlp_branch
    kept: SavedActivations = "all"
    """What a branch keeps for its backward pass: "all", "products" (of matrices and attention) or "inputs" alone."""

    def compiled(self) -> BlockRunner:
        """A copy with both branches compiled: one graph per shape, shared by all blocks."""
        # Student, teacher and anchor share these functions, each with its own shapes, with and without adapters.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        attention, mlp = (torch.compile(branch, dynamic=False) for branch in (attention_branch, mlp_branch))
        # In a compiled branch the compiler chooses the kept activations, by the same rule as "products".
        kept: SavedActivations = "inputs" if self.kept == "inputs" else "all"
        return replace(self, attention=attention, mlp=mlp, kept=kept)

    def run(
        self, blocks: nn.ModuleList, groups: Sequence[Float[Tensor, "n L D"]], drop_path: float = 0.0
    ) -> list[Float[Tensor, "n L D"]]:
        """Run groups of sequences through the blocks; sequences do not attend to each other.

        `drop_path` is the share of each group's sequences that a residual branch skips, drawn anew for each branch.
        """
        packing = Packing(tuple((group.shape[0], group.shape[1]) for group in groups))
        tokens = torch.cat([group.flatten(0, 1) for group in groups])
        for block in blocks:
            for branch in (self.attention, self.mlp):
                tokens = self._residual(branch, block, tokens, packing, drop_path)
        parts = tokens.split(packing.run_sizes)
        return [part.unflatten(0, run) for part, run in zip(parts, packing.runs, strict=True)]

    def _residual(
        self, branch: Branch, block: Any, tokens: Float[Tensor, "T D"], packing: Packing, drop_path: float
    ) -> Float[Tensor, "T D"]:
        if drop_path == 0:
            return tokens + self._call(branch, block, tokens, packing)
        kept = kept_packing(packing, drop_path)
        index = sample_kept_tokens(packing, kept, tokens.device)
        outputs = self._call(branch, block, tokens.index_select(0, index), kept).split(kept.run_sizes)
        # In place: the branch read a copy, so no backward pass needs these tokens.
        tokens = tokens if tokens.requires_grad else tokens.clone()
        for output, rows, run, kept_run in zip(
            outputs, index.split(kept.run_sizes), packing.runs, kept.runs, strict=True
        ):
            tokens = tokens.index_add_(0, rows, output.to(tokens.dtype), alpha=run[0] / kept_run[0])
        return tokens

    def _call(self, branch: Branch, block: Any, tokens: Float[Tensor, "T D"], packing: Packing) -> Float[Tensor, "T D"]:
        if self.kept == "all" or not torch.is_grad_enabled():
            return branch(block, tokens[None], packing, self.kernel)[0]
        arguments = (branch, block, tokens[None], packing, self.kernel)
        if self.kept == "inputs":
            return checkpoint(*arguments, use_reentrant=False)[0]  # type: ignore[index]
        with _autocast_without_cache(tokens.device.type):
            return checkpoint_except_matmuls(*arguments)[0]


def _autocast_without_cache(kind: str) -> AbstractContextManager[Any]:
    """The current autocast without its weight cache, which would hold the cast weights of all blocks at once."""
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


def kept_packing(packing: Packing, drop_path: float) -> Packing:
    """The sequences of each run that pass through a branch: at least one, so that every weight gets a gradient."""
    return Packing(tuple((max(1, round(count * (1 - drop_path))), length) for count, length in packing.runs))


def sample_kept_tokens(packing: Packing, kept: Packing, device: torch.device) -> Int[Tensor, "kept_tokens"]:
    """The token positions of randomly chosen sequences, run by run, drawn on the device."""
    pieces, start = [], 0
    for (count, length), (num_kept, _) in zip(packing.runs, kept.runs, strict=True):
        # A uniform choice: the first entries of a random permutation.
        chosen = torch.rand(count, device=device).argsort()[:num_kept]
        pieces.append((start + chosen[:, None] * length + torch.arange(length, device=device)).flatten())
        start += count * length
    return torch.cat(pieces)


def checkpoint_except_matmuls(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call ``function(*arguments)`` so that its backward pass, which may run once, recomputes all but products.

    The backward pass raises RuntimeError if it meets other products, or a kept result was changed in place.
    """

    def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
        kept: deque[_CachedResult] = deque()
        return _RecordMode(kept), _ReplayMode(kept)

    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)  # type: ignore[assignment]
    return result


class _CachedResult:
    """The result of a product: tensors and numbers such as seeds."""

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


class _RecordMode(TorchDispatchMode):
    """Records the results of products, first to last."""

    def __init__(self, kept: deque[_CachedResult]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_product(func):
            self._kept.append(_CachedResult(func, result))
        return result


class _ReplayMode(_RecordMode):
    """Returns the recorded results in order instead of recomputing the products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_product(func):
            return func(*args, **(kwargs or {}))
        if not self._kept:
            raise RuntimeError(f"computed again, {func.name()} came once more than at first")
        return self._kept.popleft().take(func)


# Parts of the names of operations that cost too much to repeat; attention may come from other libraries.
_PRODUCTS = ("mm", "linear", "convolution")
_ATTENTION = ("attention", "attn", "flash", "fmha")


@cache
def _is_product(operation: Any) -> bool:
    library, _, name = operation.name().partition("::")
    return any(part in name for part in ((*_PRODUCTS, *_ATTENTION) if library == "aten" else _ATTENTION))
