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


def move_unless(optimizer: torch.optim.Optimizer, broken: Float[Tensor, ""]) -> None:
    """One step of a fused optimiser; weights, moments and step counters stay bit for bit where `broken` is 1.

    Raises:
        ValueError: if the optimiser is not fused, as others would not look at `broken`.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the optimiser
    if not all(group.get("fused") for group in inner.param_groups):
        raise ValueError("only a fused optimiser can skip a step on the device: make it with fused=True")
    inner.grad_scale, inner.found_inf = None, broken
    optimizer.step()


class StepHealth:
    """Counts the skipped steps of a run.

    Args:
        most_in_a_row: that many skipped steps in a row end the run.
    """

    def __init__(self, device: torch.device, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        # Skipped so far; skipped in a row now; the longest row since it was last read.
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def judge(self, values: Iterable[Tensor]) -> Float[Tensor, ""]:
        """1 where any of the values (the loss, gradient norms) is not finite on any rank, else 0; counts it."""
        finite = torch.isfinite(torch.stack([value.detach().float() for value in values])).all()
        # One answer for all ranks: a rank that skipped alone would have other weights from then on.
        broken = ranks.max_over_ranks((~finite).float())
        skipped, in_a_row, longest = self._counts.unbind()
        now = broken.long()
        in_a_row = (in_a_row + now) * now
        self._counts = torch.stack([skipped + now, in_a_row, torch.maximum(longest, in_a_row)])
        return broken

    def read(self, step: int) -> dict[str, int]:
        """The counters, as a checkpoint keeps them; waits for the device.

        Raises:
            TrainingError: if too many steps in a row were skipped since they were last read.
        """
        skipped, in_a_row, longest = self._counts.tolist()
        if longest >= self.most_in_a_row:
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


_KINDS = (signal.SIGTERM, signal.SIGINT)
_STEPS_TO_AGREE = 10


class StopSignals:
    """SIGTERM and the first Ctrl-C ask for a stop; a second Ctrl-C ends the process at once.

    Used as a context manager. Outside of the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, device: torch.device, log_every: int) -> None:
        self.device = device
        self.asked = False
        # Agreeing over ranks makes a GPU wait, so it is done only now and then there.
        self._agree_every = 1 if device.type == "cpu" else min(log_every, _STEPS_TO_AGREE)
        self._before: dict[signal.Signals, Any] = {}

    def stop(self, step: int) -> bool:
        """Whether to stop after `step`: all ranks say the same, if any of them was asked."""
        if not ranks.active():
            return self.asked
        if step % self._agree_every:
            return False
        (self.asked,) = ranks.any_over_ranks(self.asked, device=self.device)
        return self.asked

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._ask) for kind in _KINDS}
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._before = {}

    def _ask(self, kind: int, frame: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
