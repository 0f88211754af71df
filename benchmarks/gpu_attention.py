"""Agreement and speed of the packed-attention kernels on a GPU, at the sequence lengths of pretraining."""

from __future__ import annotations

import time
from typing import Any

import torch
from rounds import figure

from brainfound.models.kernels import Packing, available_kernels, packed_attention

REFERENCE = "sdpa"
PACKING = Packing(((32, 257), (128, 50)))
"""Two global and eight local crops of 16 slices, with one CLS token each."""
NUM_HEADS, HEAD_WIDTH, REPEATS = 12, 64, 20


def compare_attention() -> dict[str, dict[str, Any]]:
    """Each kernel in bfloat16: why it cannot be used, or its seconds and how far it is from the reference in float32.

    The difference is the largest of output and gradients, over the largest value of the reference.
    """
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, NUM_HEADS, PACKING.num_tokens, HEAD_WIDTH, generator=generator).to(device)
    expected = _with_gradients(inputs, REFERENCE)
    result: dict[str, dict[str, Any]] = {}
    for kernel, fault in available_kernels(device, torch.bfloat16, HEAD_WIDTH).items():
        if fault:
            result[kernel] = {"fault": fault}
            continue
        low = inputs.bfloat16()
        found = _with_gradients(low, kernel)
        difference = max(
            ((a - b.float()).abs().max() / a.abs().max()).item() for a, b in zip(expected, found, strict=True)
        )
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(REPEATS):
            _with_gradients(low, kernel)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / REPEATS
        result[kernel] = {"difference": figure(difference), "seconds": figure(seconds)}
    return result


def _with_gradients(inputs: torch.Tensor, kernel: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = inputs.detach().clone().requires_grad_()
    output = packed_attention(*inputs.unbind(0), PACKING, kernel)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), inputs)
    return output.detach(), gradient
