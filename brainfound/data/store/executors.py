"""Writing shards in this process, in several on this machine, or on a dask cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from typing import Literal, get_args

from brainfound.data.store.writer import ShardJob, write_shard
from brainfound.data.worker_processes import map_in_processes
from brainfound.errors import StoreError, UsageError

Executor = Literal["processes", "dask"]

_DASK_RETRIES = 3
_CONNECT_TIMEOUT_S = 30


def run_jobs(
    jobs: Sequence[ShardJob], *, workers: int = 1, executor: Executor = "processes", scheduler: str | None = None
) -> Iterator[ShardJob]:
    """Write shards; yields each finished one, in any order.

    A shard may be written twice if a worker is lost. Both results are equal, and a shard is renamed when complete.
    ``scheduler`` is the address of a dask scheduler, such as ``tcp://host:8786``, whose workers see the same folders.
    """
    if executor == "dask":
        yield from _on_dask(jobs, scheduler)
    else:
        yield from _in_processes(jobs, workers)


def require_executor(executor: str, scheduler: str | None) -> None:
    """Raise a UsageError for an unknown executor, or a scheduler without dask."""
    if executor not in get_args(Executor):
        raise UsageError("no such executor", where="executor", got=executor, expected=" or ".join(get_args(Executor)))
    if scheduler is not None and executor != "dask":
        raise UsageError("a scheduler is for dask", where="scheduler", got=scheduler, remedy="Add --executor dask")


def _in_processes(jobs: Sequence[ShardJob], workers: int) -> Iterator[ShardJob]:
    try:
        for job, _ in map_in_processes(write_shard, jobs, workers):
            yield job
    except BrokenProcessPool:
        raise StoreError(
            "a worker process was ended from outside, perhaps for want of memory",
            remedy="Repeat the command with fewer workers: what was done is kept",
        ) from None


def _on_dask(jobs: Sequence[ShardJob], scheduler: str | None) -> Iterator[ShardJob]:
    try:
        from dask.distributed import Client, as_completed
        from distributed.scheduler import KilledWorker
    except ImportError:
        remedy = 'Install it: pip install "brainfound[dask]"'
        raise UsageError("dask is not installed", where="executor", remedy=remedy) from None
    if not scheduler:
        remedy = "Give its address: --scheduler tcp://HOST:8786"
        raise UsageError("which dask scheduler?", where="scheduler", remedy=remedy)
    try:
        client = Client(scheduler, timeout=_CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        what = f"no dask scheduler answers: {(str(error) or type(error).__name__).splitlines()[0]}"
        remedy = "Start one with: dask scheduler"
        raise UsageError(what, where="scheduler", got=scheduler, remedy=remedy) from None
    with client:
        by_key = {job.key: job for job in jobs}
        # The cluster forgets a result whose future is gone, so all futures are kept.
        options = {"pure": False, "retries": _DASK_RETRIES}
        futures = [client.submit(write_shard, job, key=key, **options) for key, job in by_key.items()]
        try:
            for future in as_completed(futures, loop=client.loop):
                future.result()
                yield by_key[future.key]
        except CancelledError:
            remedy = "Start it and repeat: what was done is kept"
            raise StoreError("the dask scheduler is gone", where="scheduler", remedy=remedy) from None
        except KilledWorker:
            raise StoreError(
                "several dask workers were ended while they wrote the same sessions, perhaps for want of memory",
                remedy="Repeat the command with more memory per worker: what was done is kept",
            ) from None
