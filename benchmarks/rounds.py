"""Shared by every comparison here: one core, interleaved rounds, ratios, machine facts, the table of targets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

THREAD_VARIABLES = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
        "ARROW_NUM_THREADS",
    ),
    "1",
)
"""To be set before numpy, torch, pyarrow or ITK is imported."""

_LIBRARIES = (
    "brainfound", "numpy", "scipy", "nibabel", "datasets", "pyarrow", "torch", "isal", "torchio", "monai", "simpleitk",
)  # fmt: skip


def use_one_core() -> int | None:
    """Bind this process and its children to one core, so that a hidden thread of any tool gains nothing.

    Returns:
        The core's number, or None where the system cannot bind a process (then the thread variables alone hold).
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    # The first core answers most interrupts.
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def use_one_thread(offline: bool) -> None:
    """One thread per process and no progress bars of libraries, to be called before they are imported."""
    os.environ.update(THREAD_VARIABLES, HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def interleave(
    tools: Mapping[str, Callable[[], Any]], rounds: int, timed_by_themselves: Collection[str] = ()
) -> dict[str, list[float]]:
    """Seconds of each tool in each round: one warm-up of all, then A B C, A B C, …

    A disturbance of the machine affects neighbours in a round alike, so ratios are taken within rounds.

    Args:
        timed_by_themselves: tools that prepare something first and return the seconds that count.
    """
    for run in tools.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    for _ in range(rounds):
        for name, run in tools.items():
            started = time.perf_counter()
            measured = run()
            taken = time.perf_counter() - started
            seconds[name].append(measured if name in timed_by_themselves else taken)
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Median of the ratios within each round, and the smallest and largest of them."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": figure(statistics.median(ratios)), "min": figure(min(ratios)), "max": figure(max(ratios))}


def figure(value: float) -> float:
    """Four digits that mean something."""
    return float(f"{value:.4g}")


def ends_of(interval: Any) -> list[float]:
    """Low and high of an interval of `brainfound.metrics.statistics`."""
    return [figure(interval.low), figure(interval.high)]


def say(what: str) -> None:
    """Print the next step to standard error."""
    print(what, file=sys.stderr, flush=True)


def machine_facts() -> dict[str, Any]:
    """Processor, memory and versions; nothing that names the machine or its owner."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in _LIBRARIES},
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
    }


def version_of(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def keep(file: Path, content: Any) -> None:
    """Write answers as JSON, whole or not at all: an interrupted run is not taken for a finished one."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.rename(file)


class Table:
    """A table of targets in Markdown."""

    def __init__(self) -> None:
        self.lines = ["| what | measured | target | met |", "|---|---|---|---|"]

    def row(
        self, what: str, value: float | None, at_least: float | None = None, at_most: float | None = None, why: str = ""
    ) -> None:
        target, met = "", ""
        if at_least is not None:
            target, met = f"≥ {at_least:,g}", "yes" if value is not None and value >= at_least else "no"
        elif at_most is not None:
            target, met = f"≤ {at_most:,g}", "yes" if value is not None and value <= at_most else "no"
        shown = f"{value:,}" if value is not None else f"not measured: {why}"
        self.lines.append(f"| {what} | {shown} | {target} | {met if value is not None else ''} |")
