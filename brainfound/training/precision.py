"""Which precision to compute in: found out by trying, not by asking what the hardware claims.

Some processors compute bfloat16 ten times faster than float32, others 400 times slower, and both say
that they can. So a matrix product is run in both, checked and timed.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from brainfound.training import distributed as ranks

Precision = Literal["no", "bf16"]

# Rows, inner and columns of the products. The first is small enough to find a hopeless bfloat16 in a millisecond.
_SMALL_SHAPE = (64, 128, 128)
_CPU, _GPU = (512, 768, 768), (8192, 1024, 1024)
_EARLY_EXIT_RATIO = 2.0
_MIN_SPEEDUP = 1.2
_REPEATS = 4
_TOLERANCE = 0.05


@dataclass(frozen=True)
class PrecisionProbe:
    """What was found on one device."""

    precision: Precision
    """What "auto" takes: bf16 if it works and is clearly faster."""
    bf16_gflops: float | None
    """Speed of a matrix product in bfloat16, in 10⁹ operations per second; None where it does not work."""
    fp32_gflops: float
    """The same in float32."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@lru_cache
def probe_precision(device: torch.device) -> PrecisionProbe:
    """Try bfloat16 and float32 on a device, in some ten milliseconds; the answer is remembered."""
    if not _bf16_works(device):
        return PrecisionProbe("no", None, _gflops(device, torch.float32, _SMALL_SHAPE))
    large = _CPU if device.type == "cpu" else _GPU
    for shape in (_SMALL_SHAPE, large):
        bf16, fp32 = (_gflops(device, kind, shape) for kind in (torch.bfloat16, torch.float32))
        if bf16 * _EARLY_EXIT_RATIO < fp32:
            break
    return PrecisionProbe("bf16" if bf16 > _MIN_SPEEDUP * fp32 else "no", bf16, fp32)


def choose_precision(device: torch.device) -> Precision:
    """What "auto" means here: bf16 only if every rank's device is faster with it, so that all compute alike."""
    (somewhere_slower,) = ranks.any_over_ranks(probe_precision(device).precision == "no", device=device)
    return "no" if somewhere_slower else "bf16"


def _operands(device: torch.device, kind: torch.dtype, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(inner, columns, generator=generator)
    return left.to(device, kind), right.to(device, kind)


def _bf16_works(device: torch.device) -> bool:
    """Whether a product and its gradient under autocast are right, to bfloat16's precision."""
    left, right = _operands(device, torch.float32, _SMALL_SHAPE)
    right.requires_grad_()
    try:
        with torch.autocast(device.type, torch.bfloat16):
            product = left @ right
        product.float().square().sum().backward()
    except RuntimeError:  # PyTorch's word for a device that has no such operation
        return False
    with torch.no_grad():
        expected = left @ right
        gradient = 2 * left.T @ expected
        pairs = ((product, expected), (right.grad, gradient))
        return product.dtype == torch.bfloat16 and all(
            found is not None and bool((found - wanted).norm() < _TOLERANCE * wanted.norm()) for found, wanted in pairs
        )


@torch.no_grad()
def _gflops(device: torch.device, kind: torch.dtype, shape: tuple[int, int, int]) -> float:
    """Speed of the fastest of a few products: the others were disturbed."""
    left, right = _operands(device, kind, shape)
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one also loads kernels
        _synchronize(device)
        began = time.perf_counter()
        left @ right
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2e-9 * shape[0] * shape[1] * shape[2] / max(min(seconds[1:]), 1e-9)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
