"""Checkpoints: complete or absent, with everything that an exact resume needs.

    checkpoints/step-000100/
        model.safetensors   the trained weights
        task.safetensors    the task's other tensors (teacher, anchor)
        optimizer.pt        the optimiser's state (tensors and plain values)
        state.json          step, versions, the task's counters, and the size and SHA-256 of each file

A checkpoint is written into a temporary folder and renamed, so a killed process leaves a complete one or none. If a
file is corrupted later, `latest_valid_checkpoint` falls back to an earlier one.

One checkpoint may be kept beyond the newest ones, for a rollback. A rollback starts with one atomic change of its
``state.json``, which then records one more rollback than the checkpoints of later steps; `latest_valid_checkpoint`
prefers the highest count. A process killed at any moment therefore resumes either before the rollback or after it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from brainfound.errors import TrainingError
from brainfound.files import fsync, write_atomically

STATE_FILE = "state.json"
_PREFIX = "step-"
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
    """Write a checkpoint into `folder`, then remove all but the newest `keep` and the newest one marked as kept.

    Checkpoints of later steps are corrupt ones that the run has fallen back from; they are left alone and not counted.
    """
    tensors = {
        name: {key: tensor.detach().cpu().contiguous() for key, tensor in part.items()}
        for name, part in (("model", checkpoint.model), ("task", checkpoint.task))
    }
    # Before the writes, so that a failing device is not reported as a full disk.
    optimizer = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, checkpoint.optimizer)
    with wrap_write_errors("the checkpoint", checkpoint_path(folder, checkpoint.step)):
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_checkpoints(folder)
        _require_space(folder, checkpoint)
        try:
            return _write(folder, replace(checkpoint, optimizer=optimizer), tensors, keep)
        finally:
            # A partial checkpoint takes space that the export of the run may need.
            remove_partial_checkpoints(folder)


@contextmanager
def wrap_write_errors(what: str, where: Path) -> Iterator[None]:
    """Turn the exceptions that a full disk, a quota or a lost server raises into one TrainingError.

    Only for writes: tensors are on the CPU by then, and nothing else is read or computed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = "Free some space (or get a larger quota) and continue with --resume"
        raise TrainingError(f"{what} cannot be written", where=where, got=str(error)[:200], remedy=remedy) from error


def _write(folder: Path, checkpoint: Checkpoint, tensors: dict[str, dict[str, Tensor]], keep: int) -> Path:
    final = checkpoint_path(folder, checkpoint.step)
    temporary = folder / f"{_TEMPORARY}{final.name}"
    temporary.mkdir()
    for name, part in tensors.items():
        save_file(part, temporary / f"{name}.safetensors")
    try:
        torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
    except RuntimeError as error:  # PyTorch's own writer, on a full disk
        raise OSError(str(error)) from error
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
    return folder / f"{_PREFIX}{step:06d}"


def num_rollbacks(state: Mapping[str, Any]) -> int:
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
    """The checkpoints in a folder, oldest first, intact or not."""
    # The full match skips folders that a user has renamed (step-000002.bak).
    folders = (path for path in folder.glob(f"{_PREFIX}*") if re.fullmatch(rf"{_PREFIX}[0-9]+", path.name))
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def read_task_states(folder: Path) -> list[dict[str, Any]]:
    """The task's plain values in each readable checkpoint of a folder, oldest first."""
    return [state["task"] for path in list_checkpoints(folder) if "task" in (state := read_state(path))]


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint with intact files; warns about each corrupt one that it skips."""
    # More rollbacks means newer; the sort is stable, so otherwise steps stay in order.
    for path in reversed(sorted(list_checkpoints(folder), key=lambda path: num_rollbacks(read_state(path)))):
        fault = find_corruption(path)
        if fault is None:
            return path
        warnings.warn(f"the checkpoint {path.name} is damaged ({fault}); the one before is used", stacklevel=2)
    return None


def find_corruption(path: Path) -> str | None:
    """The first fault found in a checkpoint's files; None if they are intact."""
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


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json; empty if it cannot be read."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _require_space(folder: Path, checkpoint: Checkpoint) -> None:
    moments = [value for state in checkpoint.optimizer.get("state", {}).values() for value in state.values()]
    tensors = [*checkpoint.model.values(), *checkpoint.task.values(), *(t for t in moments if isinstance(t, Tensor))]
    needed = int(sum(tensor.nbytes for tensor in tensors) * _FREE_SPACE_FACTOR)
    _require_free_space(folder, needed, "the next checkpoint", "Free some space and continue with --resume")


def require_space_for_run(folder: Path, num_checkpoints: int, checkpoint_bytes: int, other_bytes: int) -> None:
    """Refuse to start or resume a run whose files do not fit on the disk.

    Checkpoints already in `folder` make room for later ones; `num_checkpoints` is the most on disk at one time.
    """
    existing = sum(file.stat().st_size for path in list_checkpoints(folder) for file in path.iterdir())
    needed = int(num_checkpoints * checkpoint_bytes * _FREE_SPACE_FACTOR + other_bytes) - existing
    what = f"this run ({num_checkpoints} checkpoints of {_gib(checkpoint_bytes)}, and the export)"
    remedy = "Free some space, lower engine.keep_checkpoints, or give an --out elsewhere"
    _require_free_space(folder, needed, what, remedy)


def _require_free_space(folder: Path, needed: int, what_for: str, remedy: str) -> None:
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < needed:
        what, got = f"the disk has no room for {what_for}", f"{_gib(free)} free"
        raise TrainingError(what, where=folder, got=got, expected=_gib(needed), remedy=remedy)


def update_checkpoint_state(path: Path, changes: Mapping[str, Any]) -> None:
    """Change plain values of a checkpoint atomically; TrainingError if it is corrupt or cannot be written."""
    if fault := find_corruption(path):
        remedy = "Continue from another checkpoint with --resume"
        raise TrainingError("the checkpoint to return to is damaged", where=path, got=fault, remedy=remedy)
    with wrap_write_errors("the return to a checkpoint", path):
        write_atomically(path / STATE_FILE, json.dumps({**read_state(path), **changes}, indent=2))
        fsync(path)


def remove_rolled_back_checkpoints(folder: Path, present: Checkpoint) -> None:
    """Remove the checkpoints of the steps that the rollback to `present` has discarded."""
    for path in reversed(list_checkpoints(folder)):
        is_later = checkpoint_step(path) > present.step
        if is_later and num_rollbacks(read_state(path)) < num_rollbacks(present.state):
            shutil.rmtree(path)


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
