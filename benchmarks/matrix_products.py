"""The matrix products of one training step: recorded, counted, and replayed alone. Needs only torch.

Counted are matrix products and convolutions, forward and backward, as the dispatcher sees them. Fused
attention counts as the products that it replaces (two forward, four backward; recomputation to save memory
is not counted), so that steps with different attention kernels can be compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_CONVOLUTIONS = ("convolution", "convolution_backward")
_FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "attention_in_pieces",
)


@dataclass(frozen=True)
class TensorSpec:
    """How a tensor lies in memory; the place of its operand keeps inputs and outputs in different buffers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    place: str

    @classmethod
    def of(cls, tensor: Tensor, place: str) -> TensorSpec:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device, place)

    def make(self) -> Tensor:
        length = 1 + sum((n - 1) * stride for n, stride in zip(self.size, self.stride, strict=True))
        values = torch.randn(max(length, 1), device=self.device).to(self.dtype)
        return values.as_strided(self.size, self.stride)


@dataclass(frozen=True)
class Product:
    """One call, to be repeated with numbers drawn anew."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    out: TensorSpec | None
    flops: int


@dataclass
class StepProducts(TorchDispatchMode):
    """Records the products of what runs inside.

    Anything compiled must run eagerly meanwhile (`torch.compiler.set_stance("force_eager")`), else it is not seen.
    """

    products: list[Product] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in _PRODUCTS and all(operand.numel() for operand in args[:3] if isinstance(operand, Tensor)):
            self.products.append(_product(name, args, out))
        elif name in _CONVOLUTIONS:
            flops = flop_registry[getattr(torch.ops.aten, name)](*args, **(kwargs or {}), out_val=out)
            self.products.append(Product(func, _specs(args), None, flops))
        elif name.removesuffix("_backward") in _FUSED_ATTENTION:
            self.products += _attention_products(args, backward=name.endswith("_backward"))
        return out


def _product(name: str, args: tuple[Any, ...], out: Tensor) -> Product:
    packet = getattr(torch.ops.aten, name)
    # Outputs are allocated beforehand: run alone, a product must not wait for fresh pages of memory.
    return Product(packet.out, _specs(args), TensorSpec.of(out, "out"), flop_registry[packet](*args, out_val=out))


def _specs(args: tuple[Any, ...]) -> tuple[Any, ...]:
    def spec(leaf: Any, place: str) -> Any:
        return TensorSpec.of(leaf, place) if isinstance(leaf, Tensor) else leaf

    return tuple(tree_map(partial(spec, place=f"in {index}"), operand) for index, operand in enumerate(args))


def _attention_products(args: tuple[Any, ...], backward: bool) -> Iterator[Product]:
    """The products that a fused attention stands for; axes (batch, heads, tokens, width)."""
    query, key = args[1:3] if backward else args[:2]
    batch, rows, columns, width = math.prod(query.shape[:2]), query.shape[2], key.shape[2], query.shape[3]
    scores, values, turned = (rows, width, columns), (rows, columns, width), (columns, rows, width)
    # Backward: of the values, of the probabilities, of the query, of the key.
    for m, k, n in (turned, scores, values, turned) if backward else (scores, values):
        left, right, out = ((batch, *shape) for shape in ((m, k), (k, n), (m, n)))
        specs = [
            TensorSpec(shape, (shape[1] * shape[2], shape[2], 1), query.dtype, query.device, place)
            for shape, place in ((left, "in 0"), (right, "in 1"), (out, "out"))
        ]
        yield Product(torch.ops.aten.bmm.out, tuple(specs[:2]), specs[2], 2 * batch * m * k * n)


class Replay:
    """The recorded products in their order, with nothing between them."""

    def __init__(self, products: list[Product]) -> None:
        buffers: dict[TensorSpec, Tensor] = {}

        def tensor(leaf: Any) -> Any:
            return buffers.setdefault(leaf, leaf.make()) if isinstance(leaf, TensorSpec) else leaf

        self._calls = [
            (product.call, tree_map(tensor, product.args), {"out": tensor(product.out)} if product.out else {})
            for product in products
        ]

    def seconds(self, synchronise: Callable[[], None]) -> float:
        synchronise()
        started = time.perf_counter()
        with torch.no_grad():
            for call, args, kwargs in self._calls:
                call(*args, **kwargs)
        synchronise()
        return time.perf_counter() - started
