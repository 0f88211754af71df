"""Jobs distributed over fresh processes of one thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def in_processes(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    """The result of `work` for each job, in their order; in this process for one worker."""
    if workers == 1:
        return [work(*job) for job in jobs]
    # "spawn" does not copy the locks of threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [made.result() for made in [pool.submit(work, *job) for job in jobs]]
