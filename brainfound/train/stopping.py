"""Ending a run politely: a signal is noted, and the run stops between two steps."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch

from brainfound.train import ranks

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
