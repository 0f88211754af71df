"""Ending a run politely: a signal is noted, and the run stops between two steps.

Steps whose loss or gradient is not finite: skipped and counted on the device.

Reading a number from a GPU makes the host wait until all that it has ordered is done, and then the GPU
waits for new orders. So nothing is read within a step: a fused optimiser is told on the device whether
to move (`found_inf`, which PyTorch made for loss scaling), and the counters are read at log lines and
checkpoints.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from brainfound.errors import TrainingError
from brainfound.training import distributed as ranks


def step_unless_nonfinite(optimizer: torch.optim.Optimizer, nonfinite: Float[Tensor, ""]) -> None:
    """One step of a fused optimiser; weights, moments and step counters stay bit for bit where `nonfinite` is 1.

    Raises:
        ValueError: if the optimiser is not fused, as others would not look at `nonfinite`.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the optimiser
    if not all(group.get("fused") for group in inner.param_groups):
        raise ValueError("only a fused optimiser can skip a step on the device: make it with fused=True")
    inner.grad_scale, inner.found_inf = None, nonfinite
    optimizer.step()


class NonfiniteStepMonitor:
    """Counts the skipped steps of a run.

    Args:
        most_in_a_row: that many skipped steps in a row end the run.
    """

    def __init__(self, device: torch.device, max_consecutive_skips: int) -> None:
        self.max_consecutive_skips = max_consecutive_skips
        # Skipped so far; skipped in a row now; the longest row since it was last read.
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def check_finite(self, values: Iterable[Tensor]) -> Float[Tensor, ""]:
        """1 where any of the values (the loss, gradient norms) is not finite on any rank, else 0; counts it."""
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values])).all()
        # One answer for all ranks: a rank that skipped alone would have other weights from then on.
        nonfinite = ranks.max_over_ranks((~finite).float())
        skipped, in_a_row, longest = self._counts.unbind()
        now = nonfinite.long()
        in_a_row = (in_a_row + now) * now
        self._counts = torch.stack([skipped + now, in_a_row, torch.maximum(longest, in_a_row)])
        return nonfinite

    def read(self, step: int) -> dict[str, int]:
        """The counters, as a checkpoint keeps them; waits for the device.

        Raises:
            TrainingError: if too many steps in a row were skipped since they were last read.
        """
        skipped, in_a_row, longest = self._counts.tolist()
        if longest >= self.max_consecutive_skips:
            raise TrainingError(
                f"the loss or its gradient was not finite in {longest} steps in a row",
                where=f"step {step}",
                remedy="Lower the learning rate, or look for damaged input",
            )
        self._counts[2] = in_a_row
        return {"skipped": skipped, "skipped_in_a_row": in_a_row}

    def load(self, counts: Mapping[str, int]) -> None:
        """Take over what `read` gave."""
        row = counts["skipped_in_a_row"]
        self._counts = torch.tensor([counts["skipped"], row, row], device=self._counts.device)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_MAX_STEPS_BETWEEN_SYNCS = 10


class StopSignals:
    """SIGTERM and the first Ctrl-C ask for a stop; a second Ctrl-C ends the process at once.

    Used as a context manager. Outside of the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, device: torch.device, log_every: int) -> None:
        self.device = device
        self.stop_requested = False
        # Agreeing over ranks makes a GPU wait, so it is done only now and then there.
        self._sync_every = 1 if device.type == "cpu" else min(log_every, _MAX_STEPS_BETWEEN_SYNCS)
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def stop(self, step: int) -> bool:
        """Whether to stop after `step`: all ranks say the same, if any of them was asked."""
        if not ranks.is_distributed():
            return self.stop_requested
        if step % self._sync_every:
            return False
        (self.stop_requested,) = ranks.any_over_ranks(self.stop_requested, device=self.device)
        return self.stop_requested

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {kind: signal.signal(kind, self._handle_signal) for kind in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self._previous_handlers.items():
            signal.signal(kind, handler)
        self._previous_handlers = {}

    def _handle_signal(self, kind: int, frame: Any) -> None:
        self.stop_requested = True
        signal.signal(signal.SIGINT, self._previous_handlers[signal.SIGINT])
