"""The log of a run: ``log.jsonl``, the progress bar, and throughput between two lines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from brainfound.errors import TrainingError
from brainfound.files import write_atomically


class TrainingLog:
    """Appends lines to ``log.jsonl`` and updates the progress bar, on the main rank only; a context manager.

    Numbers are not rounded, so that two runs can be compared exactly; non-finite ones are null. Each line is flushed.
    """

    def __init__(self, path: Path, num_steps: int, quiet: bool, is_main: bool) -> None:
        self.path, self.num_steps, self.is_main = path, num_steps, is_main
        self.shows_bar = is_main and not quiet
        self._file: IO[str] | None = None
        self._bar: Any = None
        self._bar_task: Any = None

    def truncate_after(self, step: int) -> None:
        """Drop lines after `step`, and a truncated last line: a run resumed at `step` writes them again."""
        if self.is_main and self.path.is_file():
            self._rewrite([line for line in self._lines() if line["step"] <= step])

    def roll_back(self, event: dict[str, Any], number: int) -> None:
        """Move the lines after the step of `event` to ``log-before-rollback-{number}.jsonl``, and append `event`.

        Does nothing if it was already done by a process that was killed afterwards.
        """
        if not self.is_main or not self.path.is_file():
            return
        event = _nonfinite_to_none({"step": event["step"], "rollback": number, **event})
        lines = self._lines()
        if event in lines:
            return
        moved = [line for line in lines if line["step"] > event["step"]]
        write_atomically(self.path.with_name(f"log-before-rollback-{number}.jsonl"), _to_jsonl(moved))
        self._rewrite([*(line for line in lines if line["step"] <= event["step"]), event])

    def _lines(self) -> list[dict[str, Any]]:
        """All lines, without a damaged last one, which a killed process left; TrainingError if an earlier one is."""
        texts = [(n, text) for n, text in enumerate(self.path.read_bytes().split(b"\n"), start=1) if text.strip()]
        lines = []
        for number, text in texts:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
            elif number != texts[-1][0]:
                what, remedy = "a line of the log is damaged", "Remove this line, then continue with --resume"
                got = text[:60].decode(errors="replace")
                where, expected = f"{self.path}:{number}", '{"step": …}'
                raise TrainingError(what, where=where, got=got, expected=expected, remedy=remedy)
        return lines

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        is_open = self._file is not None
        self._close()
        write_atomically(self.path, _to_jsonl(lines))
        if is_open:
            self._open()

    def write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(_to_jsonl([line]))
            self._file.flush()
        if self._bar is not None and "loss" in line:
            self._bar.update(self._bar_task, loss=f"loss {line['loss']:.4f}")

    def notify(self, text: str) -> None:
        """Print a note on standard error, above the bar, unless quiet."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.shows_bar:
            print(text, file=sys.stderr)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=step)

    def _open(self) -> None:
        if self.is_main:
            self._file = self.path.open("a", encoding="utf-8")

    def _close(self) -> None:
        if self._file is not None:
            # Each line was flushed, so a full disk has already raised its error.
            with suppress(OSError):
                self._file.close()
        self._file = None

    def __enter__(self) -> TrainingLog:
        self._open()
        if self.shows_bar:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True))
            self._bar_task = self._bar.add_task("training", total=self.num_steps, loss="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None
        self._close()


def _to_jsonl(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(_nonfinite_to_none(line), allow_nan=False) + "\n" for line in lines)


def _nonfinite_to_none(line: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }


class ThroughputMeter:
    """Wall time of steps, without evaluations and checkpoints.

    The host runs ahead of a GPU, so only times between two log lines, where it waits for the device, are meaningful.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._began = time.perf_counter()
        self._waited = self._paused = 0.0
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this context as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in this context out of the training time."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def count_step(self) -> None:
        self._steps += 1

    def read(self, batch_size: int) -> dict[str, float]:
        """Throughput since the last reading, for the log; call it when the device has caught up."""
        seconds = max(time.perf_counter() - self._began - self._paused, 1e-9)
        steps, data_wait = max(self._steps, 1), min(self._waited / seconds, 1.0)
        self._restart()
        return {
            "seconds_per_step": seconds / steps,
            "images_per_second": steps * batch_size / seconds,
            "data_wait": data_wait,
        }
