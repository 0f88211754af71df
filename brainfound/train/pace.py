"""How fast a run goes between two lines of its log, and how much of that it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Wall time of steps, without evaluations and checkpoints.

    A GPU works through its orders while the host is ahead of it, so the time of a single step says
    little; from one log line (where the host waits for the device) to the next it is true.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._began = time.perf_counter()
        self._waited = self._paused = 0.0
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def count_step(self) -> None:
        """One more step is done."""
        self._steps += 1

    def read(self, batch_size: int) -> dict[str, float]:
        """The pace since the last reading, for the log; call it when the device has caught up."""
        seconds = max(time.perf_counter() - self._began - self._paused, 1e-9)
        steps = max(self._steps, 1)
        pace = {
            "seconds_per_step": seconds / steps,
            "images_per_second": steps * batch_size / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
        }
        self._restart()
        return pace
