"""Worker processes that do not import the caller's script.

A process of `multiprocessing` that is not forked first runs the script that started it, all but what stands under
``if __name__ == "__main__":``. Without that line the script would begin again in every worker; a script from standard
input cannot be found at all. Workers here run functions of this package only, so they leave the script alone.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import context, current_process, get_all_start_methods, get_start_method
from typing import Any, TypeVar

from brainfound.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

_PARENT_POLL_S = 2.0
_swapping = threading.Lock()


class _Process(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        # `multiprocessing` looks for the script in the main module.
        with _swapping:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                return context.SpawnProcess._Popen(process_obj)  # type: ignore[attr-defined]
            finally:
                sys.modules["__main__"] = main


class WorkerContext(context.SpawnContext):
    """The start method "spawn" without the caller's script."""

    Process = _Process  # type: ignore[assignment]


def loader_context(num_workers: int) -> context.BaseContext | None:
    """The context of a data loader's workers: None, the library's choice, where they are forked or absent."""
    method = get_start_method(allow_none=True) or get_all_start_methods()[0]
    return None if num_workers == 0 or method == "fork" else WorkerContext()


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, ``function(item)``) as they are finished, in any order.

    With one worker, in a daemonic process (which may have no children), or for objects of the caller's script, which
    workers do not know, everything runs in this process, in order.

    Raises:
        UsageError: this process is itself importing the script of its parent.
        BrokenProcessPool: a worker was ended from outside.
    """
    workers = min(workers, len(items))
    if workers <= 1 or current_process().daemon or b"__main__" in pickle.dumps((function, items)):
        for item in items:
            yield item, function(item)
        return
    require_main_guard()
    with ProcessPoolExecutor(
        workers, mp_context=WorkerContext(), initializer=_exit_with_parent, initargs=(os.getpid(),)
    ) as pool:
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def require_main_guard() -> None:
    """Refuse to start or wait in a process that is still importing its parent's script."""
    if getattr(current_process(), "_inheriting", False):
        raise UsageError(
            "a worker process runs the whole script again",
            where=getattr(sys.modules["__main__"], "__file__", None),
            remedy='Put the calls of the script under the line: if __name__ == "__main__":',
        )


def _exit_with_parent(parent: int) -> None:
    """End this worker when its parent process is gone, even if that was killed."""

    def poll_parent() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=poll_parent, daemon=True).start()
