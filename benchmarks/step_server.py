"""Lets another process drive a training loop step by step. Needs only torch; used by the worker of each tool.

The tool's own loop calls `boundary` between two steps. It answers the last command (a line of JSON on the original
stdout; all other output goes to stderr) and waits for the next one (a line of JSON on stdin).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from matrix_products import Replay, StepProducts
from step_breakdown import StepProfile


class StepServer:
    """One tool's side of the conversation.

    Commands: ``step``, ``count`` (a step whose matrix products are recorded), ``profile`` (a step under the
    profiler), ``products`` (the recorded products alone), ``matmul_peak``, ``memory``, ``stop``.

    Args:
        settings: as the parent process gave them.

    Attributes:
        facts: sent with the first answer.
        extra: commands of the worker itself.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.facts: dict[str, Any] = {}
        self.command: dict[str, Any] = {"do": "ready"}
        self.extra: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._started = time.perf_counter()
        self._stack = ExitStack()
        self._products: list[Any] = []
        self._watch: StepProducts | StepProfile | None = None

    def boundary(self) -> None:
        """Between two steps: answer, then wait for the next command that runs a step."""
        self._synchronise()
        seconds = time.perf_counter() - self._started
        self._stack.close()
        self._answer({"seconds": seconds} | self._watched(seconds))
        while True:
            line = sys.stdin.readline()
            self.command = json.loads(line) if line else {"do": "stop"}
            match self.command["do"]:
                case "stop":
                    # At once, without a checkpoint and an export.
                    os._exit(0)
                case "memory":
                    self._answer(peak_memory_gib())
                case "products":
                    # The operands are not kept: they would take memory from the other tools.
                    self._answer({"seconds": Replay(self._products).seconds(self._synchronise)})
                case "matmul_peak":
                    self._answer({"flops_per_second": matmul_peak(self.command["side"], self._synchronise)})
                case name if name in self.extra:
                    self._answer({"result": self.extra[name](self.command)})
                case name:
                    self._start(name)
                    return

    def _start(self, name: str) -> None:
        if name in ("count", "profile"):
            torch.compiler.set_stance("force_eager" if name == "count" else "default")
            self._watch = StepProducts() if name == "count" else StepProfile(self.settings["prototypes"])
            self._stack.enter_context(self._watch)
        self._synchronise()
        self._started = time.perf_counter()

    def _watched(self, seconds: float) -> dict[str, Any]:
        watch, self._watch = self._watch, None
        if isinstance(watch, StepProducts):
            torch.compiler.set_stance("default")
            self._products = watch.products
            return {"flops": watch.flops, "products": len(watch.products)}
        if isinstance(watch, StepProfile):
            return watch.shares(seconds)
        return {} if self.command["do"] != "ready" else {"facts": self.facts}

    def _answer(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), file=self._answers, flush=True)

    def _synchronise(self) -> None:
        if self.settings["device"] == "cuda":
            torch.cuda.synchronize()


def peak_memory_gib() -> dict[str, float]:
    """Largest resident memory of this process, and of the GPU what tensors took."""
    peak = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            peak["resident"] = int(line.split()[1]) / 2**20
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


def matmul_peak(side: int, synchronise: Callable[[], None], repeats: int = 20) -> float:
    """FLOP/s of a large square product in bfloat16 on the GPU."""
    left, right = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = left @ right
    synchronise()
    started = time.perf_counter()
    for _ in range(repeats):
        torch.mm(left, right, out=out)
    synchronise()
    return repeats * 2 * side**3 / (time.perf_counter() - started)
