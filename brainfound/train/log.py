"""log.jsonl and the progress bar of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from brainfound.train.checkpoint import write_atomically


class TrainingLog:
    """Appends lines to ``log.jsonl`` and moves the bar; does nothing on ranks other than the first.

    Numbers are written as Python prints them, unrounded, so that two runs can be compared exactly. Each
    line is flushed. Used as a context manager around the run.
    """

    def __init__(self, path: Path, num_steps: int, quiet: bool, is_main: bool) -> None:
        self.path, self.num_steps, self.is_main = path, num_steps, is_main
        self.shows_bar = is_main and not quiet
        self._file: IO[str] | None = None
        self._bar: Any = None
        self._bar_task: Any = None

    def forget_after(self, step: int) -> None:
        """Drop lines after `step`, and a torn last line: a run resumed at `step` writes them again."""
        if not self.is_main or not self.path.is_file():
            return
        kept = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if line["step"] <= step:
                kept.append(text + "\n")
        write_atomically(self.path, "".join(kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def advance(self, step: int, loss: Tensor | None) -> None:
        """Show that `step` steps are done."""
        if self._bar is not None:
            # Reading the loss waits for the device; a terminal is not worth that at every step.
            text = f"loss {float(loss):.4f}" if loss is not None and (step % 10 == 0 or step < 10) else None
            self._bar.update(self._bar_task, completed=step, **({"loss": text} if text else {}))

    def __enter__(self) -> TrainingLog:
        if self.is_main:
            self._file = self.path.open("a", encoding="utf-8")
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
        if self._file is not None:
            self._file.close()
        self._file = self._bar = None
