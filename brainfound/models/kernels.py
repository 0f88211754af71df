"""Attention over packed sequences: crops of several sizes in one sequence that do not attend to each other.

- ``sdpa``: PyTorch's scaled-dot-product attention, one call per run of equal lengths. The reference; runs everywhere.
- ``matmul``: matrix products and softmaxes, a few sequences at a time, so that their scores stay in the cache of a
  CPU. Probabilities are recomputed in the backward pass, as in FlashAttention (Dao et al. 2022, arXiv 2205.14135,
  section 3.1). It is a custom operator: recomputation, compilers and FLOP counters see one operation.
- ``varlen``: PyTorch's variable-length flash attention; CUDA, half precision.
- ``xformers``: xFormers' memory-efficient attention with a block-diagonal mask (Lefaudeux et al. 2022); CUDA.

Axis legend: ``n`` sequences, ``H`` heads, ``T`` tokens of all sequences, ``L`` tokens of one sequence, ``d`` width of a
head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface

from brainfound.errors import ModelError
from brainfound.models.model_folder import first_line

# Size of the scores of one piece: about the cache of one core.
_PIECE_BYTES = {"cpu": 2 * 2**20}
_PIECE_BYTES_ELSEWHERE = 512 * 2**20


def attention_in_pieces(
    query: Float[Tensor, "n H L d"], key: Float[Tensor, "n H L d"], value: Float[Tensor, "n H L d"], scaling: float
) -> Float[Tensor, "n H L d"]:
    """softmax(q kᵀ · scaling) v; scores have the dtype of the inputs, but the softmax sums in float32 or wider."""
    return _forward(query, key, value, scaling).transpose(1, 2)


@torch.library.custom_op("brainfound::attention_in_pieces", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(n H L d) → (n L H d)."""
    output = _empty(query)
    for piece in _pieces(query):
        rows, columns, values = (_batched(tensor[piece]) for tensor in (query, key, value))
        output[piece] = _unbatched(torch.bmm(_probabilities(rows, columns, scaling), values), query)
    return output


@torch.library.custom_op("brainfound::attention_in_pieces_backward", mutates_args=())
def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient (n L H d) → gradients of query, key and value (n L H d)."""
    gradients = (_empty(query), _empty(key), _empty(value))
    grad_query, grad_key, grad_value = gradients
    for piece in _pieces(query):
        rows, columns, values = (_batched(tensor[piece]) for tensor in (query, key, value))
        grad_output = _batched(gradient[piece].transpose(1, 2))
        weights = _probabilities(rows, columns, scaling)
        grad_value[piece] = _unbatched(torch.bmm(weights.transpose(1, 2), grad_output), query)
        grad_weights = torch.bmm(grad_output, values.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query[piece] = _unbatched(torch.bmm(grad_scores, columns).mul_(scaling), query)
        grad_key[piece] = _unbatched(torch.bmm(grad_scores.transpose(1, 2), rows).mul_(scaling), query)
    return gradients


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return _empty(query)


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(key), _empty(value)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    grad_query, grad_key, grad_value = _backward(gradient, *ctx.saved_tensors, ctx.scaling)
    return grad_query.transpose(1, 2), grad_key.transpose(1, 2), grad_value.transpose(1, 2), None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.brainfound.attention_in_pieces)
def _flops(query: torch.Size, *_: Any, **__: Any) -> int:
    """Two products; four in the backward pass, without recomputation."""
    count, heads, length, width = query
    return 2 * 2 * count * heads * length * length * width


@register_flop_formula(torch.ops.brainfound.attention_in_pieces_backward)
def _flops_backward(gradient: torch.Size, query: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _flops(query)


def _probabilities(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    return torch.softmax(torch.bmm(rows * scaling, columns.transpose(1, 2)), dim=-1)


def _pieces(query: Tensor) -> Iterator[slice]:
    """Slices over the sequences, of those that are processed together."""
    count, heads, length, _ = query.shape
    most = _PIECE_BYTES.get(query.device.type, _PIECE_BYTES_ELSEWHERE)
    size = max(1, most // max(1, heads * length * length * query.element_size()))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _empty(query: Tensor) -> Tensor:
    count, heads, length, width = query.shape
    return query.new_empty(count, length, heads, width)


def _batched(tensor: Tensor) -> Tensor:
    """(n H L d) → (n·H L d)."""
    return tensor.reshape(-1, *tensor.shape[2:])


def _unbatched(tensor: Tensor, query: Tensor) -> Tensor:
    """(n·H L d) → (n L H d)."""
    return tensor.unflatten(0, (-1, query.shape[1])).transpose(1, 2)


Kernel = Literal["sdpa", "matmul", "varlen", "xformers"]
PACKED = "brainfound_packed"
"""The name under which packed attention is registered with the transformers library."""
# Errors of a kernel that cannot run here: no operator for the device, no such build, a wrong dtype.
_KERNEL_FAILURES = (ImportError, NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError)
_CLEARLY_FASTER = 1.15
_USE_SDPA = 'Load the model with attn_implementation="sdpa"'
# Relative to the largest value.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Packing:
    """The layout of packed sequences: runs of equal lengths, first to last."""

    runs: tuple[tuple[int, int], ...]
    """(number of sequences, tokens of each), in order."""

    @property
    def num_tokens(self) -> int:
        return sum(self.run_sizes)

    @property
    def longest(self) -> int:
        return max(length for _, length in self.runs)

    @property
    def run_sizes(self) -> list[int]:
        """Tokens of each run."""
        return [count * length for count, length in self.runs]

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [length for count, length in self.runs for _ in range(count)]

    @lru_cache(maxsize=64)  # noqa: B019  (a packing is a few numbers)
    def cumulative_lengths(self, device: torch.device) -> Int[Tensor, "sequences_plus_one"]:
        """0, and the end of each sequence, as int32."""
        return torch.tensor([0, *self.lengths()], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def packed_attention(
    query: Float[Tensor, "H T d"],
    key: Float[Tensor, "H T d"],
    value: Float[Tensor, "H T d"],
    packing: Packing,
    kernel: Kernel = "sdpa",
    scaling: float | None = None,
) -> Float[Tensor, "T H d"]:
    """softmax(q kᵀ · scaling) v within each sequence of a packing; scaling None: 1 / sqrt(d)."""
    assert packing.num_tokens == query.shape[1], "the packing must fit the tokens"
    return _KERNELS[kernel](query, key, value, packing, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _per_run(
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> Callable[[Tensor, Tensor, Tensor, Packing, float], Tensor]:
    """A kernel for equal lengths, ``(n H L d) → (n H L d)``, as a kernel for packings."""

    def packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
        heads, _, width = query.shape
        outputs, start = [], 0
        for count, length in packing.runs:
            end = start + count * length
            parts = [t[:, start:end].unflatten(1, (count, length)).transpose(0, 1) for t in (query, key, value)]
            output = attend(parts[0], parts[1], parts[2], scaling)
            outputs.append(output.transpose(1, 2).reshape(count * length, heads, width))
            start = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return packed


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scaling)


def _varlen(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = packing.cumulative_lengths(query.device), packing.longest
    query, key, value = (tensor.transpose(0, 1).contiguous() for tensor in (query, key, value))
    return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _block_diagonal_mask(packing: Packing) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(packing.lengths())


def _xformers(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    tokens = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return memory_efficient_attention(*tokens, attn_bias=_block_diagonal_mask(packing), scale=scaling)[0]


_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Packing, float], Tensor]] = {
    "sdpa": _per_run(_sdpa),
    "matmul": _per_run(attention_in_pieces),
    "varlen": _varlen,
    "xformers": _xformers,
}


def available_kernels(device: torch.device, dtype: torch.dtype, head_width: int = 64) -> dict[str, str]:
    """Kernel → "" if it agrees with the reference on a small packing, forward and backward; else the reason."""
    return {kernel: _find_kernel_failure(kernel, device, dtype, head_width) for kernel in _KERNELS}


def _find_kernel_failure(kernel: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    packing = Packing(((2, 5), (3, 3)))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, packing.num_tokens, head_width, generator=generator).to(device, dtype)
    try:
        # The reference in float32 or wider: two kernels that round differently are both right.
        wide = inputs.to(torch.promote_types(dtype, torch.float32))
        expected, actual = _with_gradients("sdpa", wide, packing), _with_gradients(kernel, inputs, packing)
    except _KERNEL_FAILURES as error:
        return first_line(error)
    difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, actual, strict=True))
    # Not `>`: a NaN is a fault too.
    return "" if difference <= _TOLERANCE.get(dtype, 1e-5) else f"differs from the reference by {difference:.2g}"


def _with_gradients(kernel: str, inputs: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    inputs = inputs.detach().clone().requires_grad_()
    query, key, value = inputs.unbind(0)
    output = packed_attention(query, key, value, packing, kernel)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(output.float().square().sum(), inputs)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return output.detach(), gradient


def choose_kernel(
    packing: Packing, num_heads: int, head_width: int, device: torch.device, dtype: torch.dtype, repeats: int = 3
) -> tuple[Kernel, dict[str, float | str]]:
    """The fastest kernel that works here, and for each kernel its seconds or the reason why it cannot be used.

    Timed forward and backward at the lengths of `packing`. The reference is chosen unless another kernel is clearly
    faster, so that the choice does not depend on noise.
    """
    small = Packing(tuple((min(count, 4), length) for count, length in packing.runs))
    results: dict[str, float | str] = dict(available_kernels(device, dtype, head_width))
    inputs = torch.randn(3, num_heads, small.num_tokens, head_width, device=device, dtype=dtype)
    for kernel in [name for name, fault in results.items() if not fault]:
        seconds = []
        try:
            for _ in range(repeats + 1):
                started = time.perf_counter()
                _with_gradients(kernel, inputs, small)
                seconds.append(time.perf_counter() - started)
        except _KERNEL_FAILURES as error:
            if kernel == "sdpa":  # the reference; without it there is nothing to fall back to
                raise
            results[kernel] = first_line(error)
            continue
        results[kernel] = min(seconds[1:])
    working: dict[str, float] = {name: value for name, value in results.items() if isinstance(value, float)}
    fastest = min(working, key=lambda name: working[name])
    return (fastest if working[fastest] * _CLEARLY_FASTER < working["sdpa"] else "sdpa"), results  # type: ignore[return-value]


def _interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    kernel: Kernel = "sdpa",
    attend: Callable[[Tensor, Tensor, Tensor, float | None], Tensor] = _sdpa,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with the transformers interface: q, k, v ``(1, H, T, d)``, or without a packing ``(B, H, L, d)``."""
    if attention_mask is not None or dropout:
        raise ModelError("this attention has neither masks nor dropout", remedy=_USE_SDPA)
    if packing is None:
        return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None
    return packed_attention(query[0], key[0], value[0], packing, kernel, scaling)[None], None


def _xformers_batch(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """``attn_implementation="xformers"`` for a batch ``(B, H, L, d)``."""
    fault = _xformers_fault(query.device, query.dtype, query.shape[-1])
    if fault:
        raise ModelError(
            f"xFormers' attention does not work here: {fault}", where=f"{query.device}, {query.dtype}", remedy=_USE_SDPA
        )
    from xformers.ops import memory_efficient_attention

    tokens = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return memory_efficient_attention(*tokens, scale=scaling).transpose(1, 2)


@lru_cache(maxsize=16)
def _xformers_fault(device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    return _find_kernel_failure("xformers", device, dtype, head_width)


AttentionInterface.register("xformers", partial(_interface, attend=_xformers_batch))
AttentionInterface.register(PACKED, _interface)
