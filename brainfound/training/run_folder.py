"""Starting a run in a folder, or going on with the one that is there.

What a run writes besides its log and checkpoints.

Of any run: recipe, facts, curves. Of pretraining also the export with its card; fine-tuning exports a bundle.

The run folder belongs to one training at a time, and holds nothing but a run.

The main rank holds a lock on the folder from before it is looked at to the end of the run. The operating system
frees the lock when its process ends, however it ends; a reader of the folder never needs it.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import yaml
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

import brainfound
from brainfound.data.store import Store
from brainfound.errors import BrainFoundError, RecipeError, TrainingError, UsageError
from brainfound.recipes import AnyRecipe, Recipe, validate
from brainfound.report.curves import plot_curves
from brainfound.report.run_folder import RunFolder
from brainfound.training import distributed as ranks
from brainfound.training.checkpoint import (
    checkpoint_path,
    latest_valid_checkpoint,
    list_checkpoints,
    write_atomically,
)
from brainfound.training.engine import describe_device
from brainfound.training.precision import probe_precision

RECIPE_FILE = "recipe.yaml"
FACTS_FILE = "run.json"
EXPORT_FOLDER = "export"
EMBEDDINGS_FOLDER = "embeddings"
"""Where a run keeps what a frozen backbone says of its slices."""
DONE = "done"
"""The status of a run that came to its end."""
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {name: version(name) for name in _LIBRARIES}
    return {"brainfound": brainfound.__version__, "python": platform.python_version(), **found}


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (folder / RECIPE_FILE).is_file()


def start(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write recipe.yaml and run.json; of a resumed run, keep when it was first started."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**facts, "status": "running", "started": _now(), "versions": versions()}
    if (folder / FACTS_FILE).is_file():
        before = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        content |= {"started": before["started"], "resumed": [*before.get("resumed", []), _now()]}
    write_atomically(folder / FACTS_FILE, json.dumps(content, indent=2) + "\n")
    # Last: its presence says that there is a run to resume.
    write_atomically(folder / RECIPE_FILE, recipe.to_yaml())


def finish(folder: Path, status: str, exported_step: int | None, step: int) -> None:
    """Write how the run ended, and draw its curves."""
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    facts |= {"status": status, "ended": _now(), "step": step, "exported_step": exported_step}
    if rollbacks := RunFolder.read(folder).rollbacks:
        facts["rollbacks"] = [dict(event) for event in rollbacks]
    write_atomically(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")
    plot_curves(folder)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end and was exported."""
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    return facts["status"] == DONE and (folder / EXPORT_FOLDER).is_dir()


def read_saved_recipe(folder: Path) -> dict[str, Any]:
    """What the recipe of the run in a folder says.

    Raises:
        RecipeError: if it cannot be read.
    """
    path = folder / RECIPE_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        got = "an empty file" if content is None else f"a {type(content).__name__}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        content, got = None, str(error)[:200]
    if not isinstance(content, dict):
        raise RecipeError(
            "the recipe of this run cannot be read",
            where=path,
            got=got,
            expected="keys and values",
            remedy="Put back the recipe that the run began with, or start again with another --out",
        )
    return content


def require_same_recipe_and_data(folder: Path, recipe: Recipe, store: Store, changeable_keys: Sequence[str]) -> None:
    """Refuse to resume with a recipe or data that would make another run.

    Args:
        free: keys (or groups) that may differ.

    Raises:
        RecipeError: names the first key that differs, with both values.
        TrainingError: if the store holds other data.
    """
    # Validated, so that keys which did not exist when the run began have the value that means what it did.
    saved = validate(type(recipe), read_saved_recipe(folder))
    before = _flatten(saved.model_dump(mode="json"))
    now = _flatten(recipe.model_dump(mode="json"))
    for key in [*before, *(key for key in now if key not in before)]:
        is_free = any(key == name or key.startswith(f"{name}.") for name in changeable_keys)
        if not is_free and before.get(key) != now.get(key):
            raise RecipeError(
                "differs from the run that is to be resumed",
                where=key,
                got=now.get(key),
                expected=before.get(key),
                remedy=f"Set it back, give {folder / RECIPE_FILE} as the recipe, or give another --out",
            )
    data_hash = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["data_hash"]
    if data_hash != store.content_hash:
        raise TrainingError(
            "the store holds other data than the run began with",
            where=store.path,
            got=store.content_hash[:12],
            expected=data_hash[:12],
            remedy="Give the first store, or another --out",
        )


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


LOCK_FILE = ".lock"
# What a run writes before recipe.yaml, whose presence says that there is a run.
_FILES_BEFORE_RECIPE = {LOCK_FILE, FACTS_FILE, "splits.json", EMBEDDINGS_FOLDER}


@contextmanager
def lock_run_folder(folder: Path, resume: bool, accelerator: accelerate.Accelerator) -> Iterator[None]:
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
            _require_usable_folder(folder, resume)
            created = not folder.exists()
            lock = _acquire_lock(folder)
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


def _require_usable_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that this training must not write into."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError("a file is in the way of the run folder", where=place, remedy="Give another --out")
    if is_run_folder(folder):
        if not resume:
            remedy = "Give --resume to go on, or another --out"
            raise UsageError("this folder already holds a run", where=folder, remedy=remedy)
        return
    if resume:
        raise UsageError("there is no run to resume", where=folder, remedy="Leave out --resume to start one")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = {name for name in names - _FILES_BEFORE_RECIPE if not name.endswith(".partial")}
    # A lock that stayed behind tells of a run that was killed before it had its recipe.
    if foreign or (names - {EMBEDDINGS_FOLDER} and LOCK_FILE not in names):
        raise UsageError(
            "the folder is not empty and holds no run",
            where=folder,
            got=", ".join(sorted(foreign or names)[:3]),
            remedy="Give another --out",
        )


def _acquire_lock(folder: Path) -> FileLock | None:
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


def find_resume_checkpoint(
    folder: Path,
    recipe: Recipe,
    store: Store,
    resume: bool,
    changeable_keys: Sequence[str],
    accelerator: accelerate.Accelerator,
) -> Path | None:
    """Check the run in a folder that `lock_run_folder` keeps for it, on all ranks alike.

    Args:
        free: recipe keys (or groups) that may differ from the run that is there.

    Returns:
        The checkpoint to go on from; None to start with the first step.

    Raises:
        RecipeError, TrainingError: the run there is of another recipe or of other data, or no checkpoint is whole.
    """
    accelerator.wait_for_everyone()
    if not resume:
        return None
    require_same_recipe_and_data(folder, recipe, store, changeable_keys)
    checkpoints = folder / "checkpoints"
    # One rank looks and chooses: a network disk may show an older folder to another, and hashing takes long.
    has_checkpoint, name = False, None
    if accelerator.is_main_process:
        has_checkpoint, newest = bool(list_checkpoints(checkpoints)), latest_valid_checkpoint(checkpoints)
        name = None if newest is None else newest.name
    has_checkpoint, name = broadcast_object_list([has_checkpoint, name], from_process=0)
    if not has_checkpoint:
        return None  # killed before the first checkpoint: the same run from its first step
    if name is None:
        raise TrainingError(
            "no checkpoint of this run is whole", where=checkpoints, remedy="Start again with another --out"
        )
    (missing,) = ranks.any_over_ranks(not (checkpoints / name).is_dir(), device=accelerator.device)
    if missing:
        raise TrainingError(
            "the newest checkpoint is not on every machine",
            where=checkpoints / name,
            remedy="Give an --out on a disk that all machines share, or wait until they all see it",
        )
    return checkpoints / name


def is_run_complete(folder: Path, checkpoint: Path | None, num_steps: int) -> bool:
    """Whether a run that is to be resumed has nothing left to do; one whose last checkpoint was lost does not count.

    Args:
        checkpoint: what `find_resume_checkpoint` gave.
    """
    last = checkpoint_path(folder / "checkpoints", num_steps) if num_steps else None
    return checkpoint == last and is_finished(folder)


def restore_auto_settings(folder: Path, recipe: AnyRecipe, keys: Sequence[str], resume: bool) -> AnyRecipe:
    """A recipe with what a run to be resumed was begun with, for the keys of its engine that say "auto".

    A second trial of the device might come out otherwise, and would make another run of it.
    """
    engine: Any = recipe.engine  # type: ignore[attr-defined]
    left_open = [key for key in keys if getattr(engine, key) == "auto"]
    if not (left_open and resume and is_run_folder(folder)):
        return recipe
    before = read_saved_recipe(folder).get("engine")
    settled = {key: before[key] for key in left_open if key in before} if isinstance(before, dict) else {}
    return recipe.model_copy(update={"engine": engine.model_copy(update=settled)})


def common_run_info(store: Store, accelerator: accelerate.Accelerator, seed: int) -> dict[str, Any]:
    """What every run.json says: device and why, ranks, precision and how fast either would be, seed, data."""
    device, reason = describe_device(accelerator.device)
    return {
        "device": device,
        "device_reason": reason,
        "world_size": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "precision_probe": probe_precision(accelerator.device).to_dict(),
        "seed": seed,
        "data_hash": store.content_hash,
        "num_sessions": len(store),
    }
