"""Attention by matrix products, a few sequences at a time, so that their scores stay in the processor's cache.

Axis legend: ``n`` sequences, ``H`` heads, ``L`` tokens of one sequence, ``d`` width of a head.

Probabilities are computed again in the backward pass and never kept, as in FlashAttention (Dao et al. 2022,
arXiv 2205.14135, section 3.1); unlike there a whole row of scores is held at once, which crops of some hundred tokens
allow. On processors the products of a piece run at the speed of large ones, where fused kernels do not.

It is an operator of its own (``torch.ops.brainfound.attention_in_pieces``), so that recomputation, compilers and
counters of work see one operation and not its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Scores of one piece: about the share of the cache that a core has for itself.
_PIECE_BYTES = {"cpu": 2 * 2**20}
_PIECE_BYTES_ELSEWHERE = 512 * 2**20


def attention_in_pieces(
    query: Float[Tensor, "n H L d"], key: Float[Tensor, "n H L d"], value: Float[Tensor, "n H L d"], scaling: float
) -> Float[Tensor, "n H L d"]:
    """softmax(q kᵀ · scaling) v; scores have the type of the inputs, their softmax is summed in float32 or wider."""
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
    """(n L H d) → of query, key and value, (n L H d) each."""
    found = (_empty(query), _empty(key), _empty(value))
    of_query, of_key, of_value = found
    for piece in _pieces(query):
        rows, columns, values = (_batched(tensor[piece]) for tensor in (query, key, value))
        of_output = _batched(gradient[piece].transpose(1, 2))
        shares = _probabilities(rows, columns, scaling)
        of_value[piece] = _unbatched(torch.bmm(shares.transpose(1, 2), of_output), query)
        of_shares = torch.bmm(of_output, values.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_query[piece] = _unbatched(torch.bmm(of_scores, columns).mul_(scaling), query)
        of_key[piece] = _unbatched(torch.bmm(of_scores.transpose(1, 2), rows).mul_(scaling), query)
    return found


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    return _empty(query)


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(key), _empty(value)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    of_query, of_key, of_value = _backward(gradient, *ctx.saved_tensors, ctx.scaling)
    return of_query.transpose(1, 2), of_key.transpose(1, 2), of_value.transpose(1, 2), None


_forward.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.brainfound.attention_in_pieces)
def _flops(query: torch.Size, *_: Any, **__: Any) -> int:
    """Two products; the backward pass four, what it computes again not counted."""
    count, heads, length, width = query
    return 2 * 2 * count * heads * length * length * width


@register_flop_formula(torch.ops.brainfound.attention_in_pieces_backward)
def _flops_backward(gradient: torch.Size, query: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _flops(query)


def _probabilities(rows: Tensor, columns: Tensor, scaling: float) -> Tensor:
    return torch.softmax(torch.bmm(rows * scaling, columns.transpose(1, 2)), dim=-1)


def _pieces(query: Tensor) -> Iterator[slice]:
    """Sequences that are worked on together."""
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
