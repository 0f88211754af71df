"""Checkpoints: complete or absent, with everything that an exact resume needs.

    checkpoints/step-000100/
        model.safetensors   the trained weights
        task.safetensors    the task's other tensors (teacher, anchor)
        optimizer.pt        the optimiser's state (tensors and plain values)
        state.json          step, versions, the task's counters, and the size and SHA-256 of each file

A checkpoint is written into a temporary folder and renamed, so a killed process leaves a complete one or none. A disk
may still corrupt a file later: with `state.json`, `latest_valid_checkpoint` detects that and falls back to an earlier
checkpoint. One checkpoint may be kept beyond the newest ones, for a rollback (`brainfound.training.rollback`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from brainfound.errors import TrainingError

STATE_FILE = "state.json"
_PREFIX = "step-"
_NAME = re.compile(rf"{_PREFIX}[0-9]+")
_TEMPORARY = ".writing-"
_FREE_SPACE_FACTOR = 1.05


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    step: int
    model: dict[str, Tensor]
    task: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """Plain values: the engine's and the task's counters, versions, world size."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into `folder`, then remove all but the newest `keep` and the newest that is marked as kept.

    Checkpoints of later steps are corrupt ones that the run has fallen back from; they stay and do not count.

    Raises:
        TrainingError: if the disk has no room for it (nothing is written then), or if writing fails.
    """
    model, task = _to_contiguous_cpu(checkpoint.model), _to_contiguous_cpu(checkpoint.task)
    with wrap_write_errors("the checkpoint", checkpoint_path(folder, checkpoint.step)):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_checkpoints(folder)
        _require_space(folder, checkpoint)
        try:
            return _write(folder, checkpoint, model, task, keep)
        finally:
            # A partial checkpoint takes space that the export of the run may need.
            remove_partial_checkpoints(folder)


@contextmanager
def wrap_write_errors(what: str, where: Path) -> Iterator[None]:
    """Turn the many exceptions of a full disk, a quota or a lost server into one.

    Raises:
        TrainingError: in place of an exception of the system, safetensors or torch.save.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainingError(
            f"{what} cannot be written",
            where=where,
            got=str(error)[:200],
            remedy="Free some space (or ask for a larger quota) and continue with --resume",
        ) from error


def _write(folder: Path, checkpoint: Checkpoint, model: dict[str, Tensor], task: dict[str, Tensor], keep: int) -> Path:
    final = checkpoint_path(folder, checkpoint.step)
    temporary = folder / f"{_TEMPORARY}{final.name}"
    temporary.mkdir()
    save_file(model, temporary / "model.safetensors")
    save_file(task, temporary / "task.safetensors")
    torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
    files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
    state = {"step": checkpoint.step, **checkpoint.state, "files": files}
    write_atomically(temporary / STATE_FILE, json.dumps(state, indent=2))
    for path in temporary.iterdir():
        fsync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync(folder)
    so_far = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= checkpoint.step]
    kept = [path for path in so_far if read_state(path).get("kept")]
    for old in so_far[:-keep]:
        if old not in kept[-1:]:
            shutil.rmtree(old)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint, whether it exists or not."""
    return folder / f"{_PREFIX}{step:06d}"


def num_rollbacks(state: Mapping[str, Any]) -> int:
    """The number of rollbacks before a checkpoint, from its state."""
    return int(state.get("rollbacks", 0))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `latest_valid_checkpoint` has verified; tensors are on the CPU."""
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    return Checkpoint(
        step=state["step"],
        model=load_file(path / "model.safetensors"),
        task=load_file(path / "task.safetensors"),
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        state=state,
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or not."""
    # The full match leaves out a folder that a user has renamed (step-000002.bak).
    return sorted((path for path in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint, from its folder name."""
    return int(path.name.removeprefix(_PREFIX))


def read_task_states(folder: Path) -> list[dict[str, Any]]:
    """The task's plain values in each readable checkpoint of a folder, oldest first."""
    return [state["task"] for path in list_checkpoints(folder) if "task" in (state := read_state(path))]


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint with intact files; warns about each corrupt one that it skips."""
    # After more rollbacks means newer; the sort is stable, so steps stay in order otherwise.
    for path in reversed(sorted(list_checkpoints(folder), key=lambda path: num_rollbacks(read_state(path)))):
        fault = find_corruption(path)
        if fault is None:
            return path
        warnings.warn(f"the checkpoint {path.name} is torn ({fault}); going back to the one before", stacklevel=2)
    return None


def find_corruption(path: Path) -> str | None:
    """The first fault of a checkpoint's files, or None."""
    files = read_state(path).get("files")
    if files is None:
        return f"{STATE_FILE} cannot be read"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes of {expected['bytes']}"
        if _fingerprint(file) != expected:
            return f"{name} has changed"
    return None


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove checkpoints that a killed process left half-written."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part of it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path)


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json; empty if it cannot be read."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _to_contiguous_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_space(folder: Path, checkpoint: Checkpoint) -> None:
    moments = [value for state in checkpoint.optimizer.get("state", {}).values() for value in state.values()]
    tensors = [*checkpoint.model.values(), *checkpoint.task.values(), *(t for t in moments if isinstance(t, Tensor))]
    needed = int(sum(tensor.nbytes for tensor in tensors) * _FREE_SPACE_FACTOR)
    _require_free_space(folder, needed, "the next checkpoint", "Free some space and continue with --resume")


def require_space_for_run(folder: Path, num_checkpoints: int, checkpoint_bytes: int, other_bytes: int) -> None:
    """Refuse to start or resume a run whose files do not fit on the disk.

    Args:
        folder: of the checkpoints; later ones replace those that exist.
        num_checkpoints: largest number on the disk at one time.
        other_bytes: of the export and other files.

    Raises:
        TrainingError: if the disk has too little free space.
    """
    existing = sum(file.stat().st_size for path in list_checkpoints(folder) for file in path.iterdir())
    needed = int(num_checkpoints * checkpoint_bytes * _FREE_SPACE_FACTOR + other_bytes) - existing
    what = f"this run ({num_checkpoints} checkpoints of {_gib(checkpoint_bytes)}, and the export)"
    remedy = "Free some space, lower engine.keep_checkpoints, or give an --out elsewhere"
    _require_free_space(folder, needed, what, remedy)


def _require_free_space(folder: Path, needed: int, what_for: str, remedy: str) -> None:
    # No folder is created for a run that may be refused.
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < needed:
        raise TrainingError(
            f"the disk has no room for {what_for}",
            where=folder,
            got=f"{_gib(free)} free",
            expected=_gib(needed),
            remedy=remedy,
        )


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
