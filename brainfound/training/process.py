"""The process that trains: its device, its precision and its stop signals.

The precision is measured: some processors compute bfloat16 ten times faster than float32, others 400 times slower, and
both report that they support it. So a matrix product is run in both, checked and timed.
"""

from __future__ import annotations

import atexit
import signal
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import accelerate
import torch
from rich.console import Console
from torch import Tensor

from brainfound.training import distributed

Precision = Literal["no", "bf16"]

# Rows, inner width and columns of the products. The first rules out a hopeless bfloat16 within a millisecond.
_SMALL_SHAPE, _CPU_SHAPE, _GPU_SHAPE = (64, 128, 128), (512, 768, 768), (8192, 1024, 1024)
_EARLY_EXIT_RATIO, _MIN_SPEEDUP = 2.0, 1.2
_REPEATS = 4
_TOLERANCE = 0.05
_MAX_STEPS_BETWEEN_SYNCS = 10


def process_state() -> accelerate.PartialState:
    """Accelerate's state of this process and of the others that were launched with it."""
    # Without an explicit `cpu`, processes that torchrun starts on a machine without a GPU do not join a process group,
    # and each trains alone.
    state = accelerate.PartialState(cpu=not torch.accelerator.is_available())
    # A process group left open may abort the process at exit, after all work is done.
    atexit.unregister(distributed.close_process_group)  # once is enough
    atexit.register(distributed.close_process_group)
    return state


def make_accelerator(precision: Literal["auto", "no", "bf16"]) -> accelerate.Accelerator:
    """The accelerator of this process; "auto" takes the precision that a short test finds faster."""
    device = process_state().device
    if precision == "auto":
        precision = choose_precision(device)
    shared = accelerate.state.AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") not in (None, precision):
        # Accelerate keeps one state per process; a second run in the same process may use another precision.
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
    return accelerate.Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())


def make_console(accelerator: accelerate.Accelerator, quiet: bool) -> Console:
    """Standard error of the main rank, unless quiet."""
    return Console(stderr=True, quiet=quiet or not accelerator.is_main_process, highlight=False, soft_wrap=True)


def describe_device(device: torch.device) -> tuple[str, str]:
    """The device in use and the reason for it, for run.json."""
    if device.type == "cuda":
        return str(device), f"{torch.cuda.device_count()} CUDA device(s) visible: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        forced = "CUDA devices are visible but Accelerate is set to use the CPU"
        return "cpu", forced if torch.cuda.is_available() else "this PyTorch sees no GPU"
    return str(device), f"chosen by Accelerate ({device.type})"


def describe_devices(device: torch.device, num_processes: int) -> str:
    """The device in use and the number of processes, for a model card."""
    name = device.type if device.type != "cuda" else f"cuda, {torch.cuda.get_device_name(device)}"
    return name if num_processes == 1 else f"{name} ({num_processes} processes)"


@dataclass(frozen=True)
class PrecisionProbe:
    """The choice that "auto" makes on a device, and the speed of a matrix product in 10⁹ operations per second."""

    precision: Precision
    bf16_gflops: float | None
    """None if bfloat16 does not work."""
    fp32_gflops: float


@lru_cache
def probe_precision(device: torch.device) -> PrecisionProbe:
    """Measure bfloat16 and float32 on a device, in about ten milliseconds; the result is cached."""
    if not _bf16_works(device):
        return PrecisionProbe("no", None, _gflops(device, torch.float32, _SMALL_SHAPE))
    for shape in (_SMALL_SHAPE, _CPU_SHAPE if device.type == "cpu" else _GPU_SHAPE):
        bf16, fp32 = (_gflops(device, dtype, shape) for dtype in (torch.bfloat16, torch.float32))
        if bf16 * _EARLY_EXIT_RATIO < fp32:
            break
    return PrecisionProbe("bf16" if bf16 > _MIN_SPEEDUP * fp32 else "no", bf16, fp32)


def choose_precision(device: torch.device) -> Precision:
    """Resolve "auto": bf16 only if it is faster on every rank, so that all ranks compute alike."""
    (any_slower,) = distributed.any_over_ranks(probe_precision(device).precision == "no", device=device)
    return "no" if any_slower else "bf16"


def _operands(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator) for size in ((rows, inner), (inner, columns)))
    return left.to(device, dtype), right.to(device, dtype)


def _bf16_works(device: torch.device) -> bool:
    """Whether a product and its gradient under autocast are correct to within bfloat16's precision."""
    left, right = _operands(device, torch.float32, _SMALL_SHAPE)
    right.requires_grad_()
    try:
        with torch.autocast(device.type, torch.bfloat16):
            product = left @ right
        product.float().square().sum().backward()
    except RuntimeError:  # the device has no such operation
        return False
    with torch.no_grad():
        expected = left @ right
        pairs = ((product, expected), (right.grad, 2 * left.T @ expected))
        return product.dtype == torch.bfloat16 and all(
            actual is not None and bool((actual - exact).norm() < _TOLERANCE * exact.norm()) for actual, exact in pairs
        )


@torch.no_grad()
def _gflops(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    """Speed of the fastest of a few products; slower ones were disturbed by other work."""
    left, right = _operands(device, dtype, shape)
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


class StopSignals:
    """SIGTERM and the first Ctrl-C request a stop between two steps; a second Ctrl-C ends the process at once.

    A context manager. Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, device: torch.device, log_every: int) -> None:
        self.device = device
        self.stop_requested = False
        # Ranks can only agree by making a GPU wait, so on a GPU they do it only every few steps.
        self._sync_every = 1 if device.type == "cpu" else min(log_every, _MAX_STEPS_BETWEEN_SYNCS)
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def should_stop(self, step: int) -> bool:
        """Whether to stop after `step`; the same on all ranks, true if any of them received a signal."""
        if not distributed.is_distributed():
            return self.stop_requested
        if step % self._sync_every:
            return False
        (self.stop_requested,) = distributed.any_over_ranks(self.stop_requested, device=self.device)
        return self.stop_requested

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT)
            self._previous_handlers = {number: signal.signal(number, self._handle_signal) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle_signal(self, number: int, frame: Any) -> None:
        self.stop_requested = True
        signal.signal(signal.SIGINT, self._previous_handlers[signal.SIGINT])
