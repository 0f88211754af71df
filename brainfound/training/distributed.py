"""Processes that train together: reductions over ranks, and fully sharded training (FSDP2).

Reductions are the identity when no process group runs, so the same code serves a laptop and a cluster.

Trained and frozen weights (teacher, anchor) are sharded alike, along the first axis over one mesh of all ranks: a
teacher's shard covers the same rows as the student's, so the EMA needs no communication.

    unit                                gathered in      released
    attention, MLP of each block        bf16 | float32   after its forward pass
    rest of an encoder                  float32          after its forward pass
    each head, and the trained module   float32          trained: after the backward pass; frozen: after the forward

The rest of an encoder (stem, tokens, norms, layer scales) is small; float32 keeps the residual stream precise.
Gradients are summed in float32. Checkpoints hold full tensors (`gather`), so a run may resume on more or fewer ranks.

Source: PyTorch FSDP (arXiv 2304.11277), in its second version, `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from brainfound.errors import EXIT_USAGE, BrainFoundError, TrainingError, UsageError
from brainfound.models.encoder import SliceEncoder


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def close_process_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise sum over ranks, in place, without a gradient."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise maximum over ranks, in place, without a gradient."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def any_over_ranks(*flags: bool, device: torch.device) -> tuple[bool, ...]:
    """For each flag, whether any rank raised it; the result is the same on all ranks."""
    if not is_distributed():
        return flags
    raised = max_over_ranks(torch.tensor([float(flag) for flag in flags], device=device))
    return tuple(bool(value) for value in raised.tolist())


def run_on_main_rank(work: Callable[[], Any], is_main: bool) -> None:
    """Call `work` on the main rank; all ranks wait for it, and if it fails all raise the same error.

    File errors, and every `BrainFoundError` except `UsageError`, become `TrainingError`.
    """
    failure: BrainFoundError | None = None
    cause: Exception | None = None
    if is_main:
        try:
            work()
        except (TrainingError, UsageError) as error:
            failure, cause = error, error.__cause__ if isinstance(error.__cause__, Exception) else None
        except (BrainFoundError, OSError) as error:
            failure, cause = _as_training_error(error), error
    if is_distributed():
        broadcast = [failure]
        dist.broadcast_object_list(broadcast, src=0)
        failure = failure or broadcast[0]
    if failure is not None:
        raise failure from cause


def _as_training_error(error: BrainFoundError | OSError) -> TrainingError:
    if isinstance(error, BrainFoundError):
        fields = {name: getattr(error, name) for name in ("where", "got", "expected", "remedy")}
        return TrainingError(error.what, **fields, usage=error.exit_code == EXIT_USAGE)
    remedy = "Repair the cause (free space, a quota, permissions), and continue with --resume"
    return TrainingError("a file cannot be written", where=error.filename, got=error.strerror or error, remedy=remedy)


def mean_over_ranks(values: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """The mean of each 0-dim value over ranks, in one transfer; the names must be the same on all ranks."""
    if not values:
        return {}
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    total = sum_over_ranks(torch.stack([value.detach().to(device, dtype) for value in values.values()]))
    return dict(zip(values, (total / world_size()).tolist(), strict=True))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rank, ctx.num_rows = dist.get_rank(), rows.shape[0]
        pieces = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, rows.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Each rank computes the same loss from the same gathered rows, so the sum over ranks of the gradients of these
        # rows is R times this rank's own. The average that DistributedDataParallel takes gives the loss's gradient.
        start = ctx.rank * ctx.num_rows
        return gradient[start : start + ctx.num_rows] * dist.get_world_size()


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (B, …) of all ranks in rank order, (R·B, …); B must be equal on all ranks.

    The gradient is correct if every rank computes the same loss from the gathered rows, as KoLeo does.
    """
    return _GatherRows.apply(rows) if is_distributed() else rows


BRANCHES = ("attention", "mlp")
"""The parts of a block that hold its matrices; every forward pass of a block calls them."""


def shard(trained: nn.Module, frozen: Sequence[nn.Module], device: torch.device, precision: str) -> None:
    """Shard modules over all ranks, in place; all ranks must start with the same weights, on any device.

    A module with ``is_shard_unit`` is gathered as one unit.

    Args:
        trained: the trained module; a forward pass must begin by calling the module itself.
        frozen: frozen modules, whose encoders and heads may be called separately, by all ranks together.
        precision: "bf16" gathers the blocks' matrices in bfloat16; anything else in float32.
    """
    # PyTorch warns in each pass about in-place changes to outputs that are views; none are made here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = {"mesh": mesh, "mp_policy": policy} if precision == "bf16" else {"mesh": mesh}
    for root in (trained, *frozen):
        reshard = root is not trained
        for encoder in [module for module in root.modules() if isinstance(module, SliceEncoder)]:
            for block in encoder.blocks:
                for branch in BRANCHES:
                    fully_shard(block.get_submodule(branch), reshard_after_forward=True, **blocks)
            fully_shard(encoder, mesh=mesh, reshard_after_forward=True)
            for method in ("embed", "transform"):
                _register_forward_method(encoder, method)
        for head in [module for module in root.modules() if getattr(module, "is_shard_unit", False)]:
            fully_shard(head, mesh=mesh, reshard_after_forward=reshard)
        if not isinstance(root, FSDPModule):
            fully_shard(root, mesh=mesh, reshard_after_forward=reshard)
        root.to(device)  # buffers
        _mark_fsdp_root(root)


def _register_forward_method(encoder: SliceEncoder, name: str) -> None:
    """Make a method gather the encoder's weights as `forward` does, unless an enclosing call has gathered them."""
    plain, norm = getattr(encoder, name), encoder.norm
    register_fsdp_forward_method(encoder, name)
    gathering = getattr(encoder, name)

    def call_method(*args: Any, **kwargs: Any) -> Any:
        return (gathering if isinstance(norm.weight, DTensor) else plain)(*args, **kwargs)

    setattr(encoder, name, call_method)


def _mark_fsdp_root(root: nn.Module) -> None:
    """Mark `root` as the outermost sharded module, before one of its parts is called separately."""
    assert isinstance(root, FSDPModule)
    hook = "_first_forward"
    setattr(root, hook, lambda: None)
    register_fsdp_forward_method(root, hook)
    getattr(root, hook)()
    delattr(root, hook)
    root.reshard()


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def to_full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded; all ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards as plain tensors that share their memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def gather(tree: Any, keep: bool = True) -> Any:
    """Nested dicts, lists and tuples with each sharded tensor replaced by the full one, on the CPU.

    All ranks call it together; ranks that write nothing do not `keep` the tensors. Only one at a time is on the device.
    """
    if isinstance(tree, DTensor):
        full = tree.full_tensor()
        return full.detach().cpu() if keep else full.new_empty(0, device="cpu")
    if isinstance(tree, Mapping):
        return {name: gather(value, keep) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gather(value, keep) for value in tree)
    return tree


def shard_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard full tensors like those of the same name in `like`, without communication."""
    return {name: _shard_tensor(tensor, like[name]) if name in like else tensor for name, tensor in tensors.items()}


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard the full state of an optimiser (`gather` of its ``state_dict()``) like its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: _shard_tensor(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def _shard_tensor(tensor: Any, like: Tensor) -> Any:
    """`tensor` sharded like `like`; step counters and already sharded tensors are returned unchanged."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or getattr(tensor, "shape", None) != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
