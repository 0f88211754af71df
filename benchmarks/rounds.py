"""Shared by every comparison here: one core for all tools, interleaved rounds, medians of ratios, machine facts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
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


def interleave(
    tools: Mapping[str, Callable[[], Any]], rounds: int, timed_by_themselves: Collection[str] = ()
) -> dict[str, list[float]]:
    """Seconds of each tool in each round: one warm-up of all, then A B C, A B C, …

    What disturbs the machine for a while disturbs neighbours in a round alike, so ratios are taken within rounds.

    Args:
        timed_by_themselves: tools that prepare something first; they give back the seconds of what counts.
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


def machine_facts() -> dict[str, Any]:
    """What a reader needs to place the figures; nothing that names the machine or its owner."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
    }


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
    """Write what was answered, whole or not at all: a run that is cut off is not taken for a finished one."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.rename(file)
