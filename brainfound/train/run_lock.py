"""The run folder belongs to one training at a time, and holds nothing but a run.

The main rank holds a lock on the folder from before it is looked at to the end of the run. The operating system
frees the lock when its process ends, however it ends; a reader of the folder never needs it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import accelerate
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from brainfound.errors import BrainFoundError, TrainingError, UsageError
from brainfound.train import run_files

LOCK_FILE = ".lock"
# What a run writes before recipe.yaml, whose presence says that there is a run.
_BEFORE_THE_RECIPE = {LOCK_FILE, run_files.FACTS_FILE, "splits.json", run_files.EMBEDDINGS_FOLDER}


@contextmanager
def only_one_training(folder: Path, resume: bool, accelerator: accelerate.Accelerator) -> Iterator[None]:
    """Keep a run folder for this training, on all ranks alike.

    Args:
        resume: whether the folder is to hold a run already.

    Raises:
        UsageError: the folder is a file, holds something that is no run, or no run where one is to be resumed.
        TrainingError: another process is training in the folder.
    """
    lock, created, refusal = None, False, None
    if accelerator.is_main_process:
        try:
            _require_fit(folder, resume)
            created = not folder.exists()
            lock = _locked(folder)
        except BrainFoundError as error:
            refusal = error
    (refusal,) = broadcast_object_list([refusal], from_process=0)
    if refusal is not None:
        raise refusal
    try:
        yield
    finally:
        if lock is not None:
            _release(lock, folder, created)


def _require_fit(folder: Path, resume: bool) -> None:
    """Refuse a folder that this training must not write into."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError("a file is in the way of the run folder", where=place, remedy="Give another --out")
    if run_files.holds_run(folder):
        if not resume:
            remedy = "Give --resume to go on, or another --out"
            raise UsageError("this folder already holds a run", where=folder, remedy=remedy)
        return
    if resume:
        raise UsageError("there is no run to resume", where=folder, remedy="Leave out --resume to start one")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = {name for name in names - _BEFORE_THE_RECIPE if not name.endswith(".partial")}
    # A lock that stayed behind tells of a run that was killed before it had its recipe.
    if foreign or (names - {run_files.EMBEDDINGS_FOLDER} and LOCK_FILE not in names):
        raise UsageError(
            "the folder is not empty and holds no run",
            where=folder,
            got=", ".join(sorted(foreign or names)[:3]),
            remedy="Give another --out",
        )


def _locked(folder: Path) -> FileLock | None:
    """The lock of a folder, held; None where the file system has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise TrainingError(
                "another process is training in this folder",
                where=folder,
                remedy="Wait for its end, or give another --out",
            ) from None
        except NotImplementedError:
            text = f"{folder}: its file system has no locks; do not start a second training there"
            warnings.warn(text, stacklevel=2)
            return None
        if path.exists():
            return lock
        lock.release()  # its last holder removed the file just before: that lock would keep nobody out


def _release(lock: FileLock, folder: Path, created: bool) -> None:
    """Give the folder back; one that was made only for the lock goes too."""
    # While the lock is held: whoever opened the file before will see that it has gone.
    (folder / LOCK_FILE).unlink(missing_ok=True)
    lock.release()
    if created:
        with suppress(OSError):  # not empty: there is a run now
            os.rmdir(folder)
