"""The parent's side of the workers: start them, request steps, stop them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from rounds import THREAD_VARIABLES

HERE = Path(__file__).parent
SCRIPTS = {
    "brainfound": HERE / "worker_brainfound.py",
    "lightlytrain": HERE / "worker_lightlytrain.py",
    "finetune": HERE / "worker_finetune.py",
}


class Worker:
    """One tool in a process of its own, which takes a step on command.

    Args:
        tool: "brainfound" or "lightlytrain".
        python: the interpreter of its environment.
        folder: for its files; must not exist.
        settings: of its training.

    Raises:
        RuntimeError: the process ended; the message holds the end of its log.
    """

    def __init__(self, tool: str, python: str, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True)
        self.tool, self.log = tool, folder / "worker.log"
        content = settings | {"out": str(folder / "run")}
        file = folder / "settings.json"
        file.write_text(json.dumps(content), encoding="utf-8")
        threads = dict.fromkeys(THREAD_VARIABLES, str(settings["threads"]))
        hidden = {} if settings["device"] == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        environment = os.environ | threads | hidden | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, str(SCRIPTS[tool]), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.facts: dict[str, Any] = self._answer()["facts"]

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """One command and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            end = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
            raise RuntimeError(f"the worker of {self.tool} ended with code {code}:\n{end}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.wait()
