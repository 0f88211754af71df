"""The run folder: its recipe, facts and curves, its lock, and the choice of a checkpoint to resume from.

A folder belongs to one training run and holds nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import yaml
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from rich.console import Console

import brainfound
from brainfound.data.store import Store
from brainfound.errors import BrainFoundError, RecipeError, TrainingError, UsageError
from brainfound.files import PARTIAL_PREFIX, require_json, write_atomically
from brainfound.recipes import AnyRecipe, Recipe, validate
from brainfound.report.curves import RECIPE_FILE, RunFolder, plot_curves
from brainfound.training import distributed
from brainfound.training.checkpoint import checkpoint_path, latest_valid_checkpoint, list_checkpoints, nearest_existing
from brainfound.training.process import describe_device, make_accelerator, make_console, probe_precision

FACTS_FILE = "run.json"
EXPORT_FOLDER = "export"
EMBEDDINGS_FOLDER = "embeddings"
DONE = "done"
"""Status of a completed run."""
LOCK_FILE = ".lock"
_FILES_BEFORE_RECIPE = {LOCK_FILE, FACTS_FILE, "splits.json", EMBEDDINGS_FOLDER}
"""Files of a run that was killed before it wrote recipe.yaml."""
_ENGINE_KEYS = ("log_every", "checkpoint_every", "keep_checkpoints", "max_skipped_in_a_row")
CHANGEABLE_KEYS = ("name", *(f"engine.{key}" for key in _ENGINE_KEYS))
"""What may change between any run and its continuation, because it has no effect on the weights."""


def versions() -> dict[str, str]:
    """Versions of the software that a result depends on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets", "numpy")}
    return {"brainfound": brainfound.__version__, "python": platform.python_version(), **libraries}


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (folder / RECIPE_FILE).is_file()


def write_start(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write recipe.yaml and run.json; a resumed run keeps the time of its first start."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**facts, "status": "running", "started": _now(), "versions": versions()}
    if (folder / FACTS_FILE).is_file():
        before = read_facts(folder, "started")
        content |= {"started": before["started"], "resumed": [*before.get("resumed", []), _now()]}
    write_atomically(folder / FACTS_FILE, json.dumps(content, indent=2) + "\n")
    # Last: its presence marks the folder as a run.
    write_atomically(folder / RECIPE_FILE, recipe.to_yaml())


def write_end(folder: Path, status: str, exported_step: int | None, step: int) -> None:
    """Write the run's status and last step into run.json, and draw its curves."""
    facts = read_facts(folder)
    facts |= {"status": status, "ended": _now(), "step": step, "exported_step": exported_step}
    if rollbacks := RunFolder.read(folder).rollbacks:
        facts["rollbacks"] = [dict(event) for event in rollbacks]
    write_atomically(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")
    plot_curves(folder)


def read_saved_recipe(folder: Path) -> dict[str, Any]:
    """The content of a run's recipe.yaml; RecipeError if it cannot be read."""
    path = folder / RECIPE_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        got = "an empty file" if content is None else f"a {type(content).__name__}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        content, got = None, str(error)[:200]
    if not isinstance(content, dict):
        what = "the recipe of this run cannot be read"
        remedy = "Put back the recipe that the run began with, or start again with another --out"
        raise RecipeError(what, where=path, got=got, expected="keys and values", remedy=remedy)
    return content


def require_same_recipe_and_data(folder: Path, recipe: Recipe, store: Store, changeable_keys: Sequence[str]) -> None:
    """Refuse to resume with other data, or with a recipe that differs in other keys.

    `CHANGEABLE_KEYS` and `changeable_keys` (keys or groups) may differ.

    Raises:
        RecipeError, TrainingError: naming the first key that differs, or the store.
    """
    # Validated, so that keys added since the run began get their default.
    try:
        saved = validate(type(recipe), read_saved_recipe(folder))
    except RecipeError as error:
        what = f"the run in this folder has a recipe of another kind ({error.where}: {error.what})"
        raise RecipeError(what, where=folder, remedy="Give another --out, or resume it with its own verb") from None
    before, now = (_flatten(content.model_dump(mode="json")) for content in (saved, recipe))
    for key in [*before, *(key for key in now if key not in before)]:
        may_differ = any(key == name or key.startswith(f"{name}.") for name in (*CHANGEABLE_KEYS, *changeable_keys))
        if not may_differ and before.get(key) != now.get(key):
            what = "differs from the run that is to be resumed"
            remedy = f"Set it back, give {folder / RECIPE_FILE} as the recipe, or give another --out"
            raise RecipeError(what, where=key, got=now.get(key), expected=before.get(key), remedy=remedy)
    data_hash = read_facts(folder, "data_hash")["data_hash"]
    if data_hash != store.content_hash:
        what, remedy = "the store holds other data than the run began with", "Give the first store, or another --out"
        got, expected = store.content_hash[:12], data_hash[:12]
        raise TrainingError(what, where=store.path, got=got, expected=expected, remedy=remedy)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def short_name(model: str | Path) -> str:
    """The last part of the id or path of a model, or the name of its run, for pages that should not show folders."""
    path = Path(model)
    return path.parent.name if path.name == "export" and path.parent.name else path.name


def read_facts(folder: Path, *names: str) -> dict[str, Any]:
    """The content of a run's run.json; TrainingError if it cannot be read, or lacks one of `names`."""
    path, remedy = folder / FACTS_FILE, "Put back the run.json that the run wrote"
    facts: dict[str, Any] = require_json(path, remedy, TrainingError)
    if unusable := [name for name in names if not _is_usable(name, facts.get(name))]:
        got = ", ".join(f"{name} {json.dumps(facts.get(name))[:60]}" for name in unusable)
        raise TrainingError("the facts of this run are damaged", where=path, got=got, remedy=remedy)
    return facts


def _is_usable(name: str, value: Any) -> bool:
    if name == "target":
        return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("task", "column"))
    return isinstance(value, str)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def lock_run_folder(folder: Path, resume: bool, accelerator: accelerate.Accelerator) -> Iterator[None]:
    """Lock a run folder, which must hold a run if `resume`; a lock ends with its process. All ranks raise together.

    Raises:
        UsageError: the folder is a file, holds files of something else, or holds no run to resume.
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
    place = nearest_existing(folder)
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
    foreign = {name for name in names - _FILES_BEFORE_RECIPE if not name.startswith(PARTIAL_PREFIX)}
    # A leftover lock marks a run that was killed before it wrote its recipe.
    if foreign or (names - {EMBEDDINGS_FOLDER} and LOCK_FILE not in names):
        what, got = "the folder is not empty and holds no run", ", ".join(sorted(foreign or names)[:3])
        raise UsageError(what, where=folder, got=got, remedy="Give another --out")


def _acquire_lock(folder: Path) -> FileLock | None:
    """Acquire the lock of a folder; None if the file system has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            remedy = "Wait for its end, or give another --out"
            raise TrainingError("another process is training in this folder", where=folder, remedy=remedy) from None
        except NotImplementedError:
            warnings.warn(f"{folder}: its file system has no locks; do not start a second training there", stacklevel=2)
            return None
        if path.exists():
            return lock
        lock.release()  # its last holder has just removed the file, so this lock would exclude nobody


def _release(lock: FileLock, folder: Path, created: bool) -> None:
    """Release the folder, and remove it if it was created only for the lock."""
    # Removed while the lock is held, so that a process waiting on this file notices.
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
    """The checkpoint to resume from, the same on all ranks; None to start at the first step.

    Call it within `lock_run_folder`.

    Raises:
        RecipeError, TrainingError: as in `require_same_recipe_and_data`, or no checkpoint is intact.
    """
    accelerator.wait_for_everyone()
    if not resume:
        return None
    require_same_recipe_and_data(folder, recipe, store, changeable_keys)
    checkpoints = folder / "checkpoints"
    # Only one rank chooses: a network disk may show the others an older state, and hashing is slow.
    has_checkpoint, name = False, None
    if accelerator.is_main_process:
        has_checkpoint, newest = bool(list_checkpoints(checkpoints)), latest_valid_checkpoint(checkpoints)
        name = None if newest is None else newest.name
    has_checkpoint, name = broadcast_object_list([has_checkpoint, name], from_process=0)
    if not has_checkpoint:
        return None  # killed before the first checkpoint: the same run from its first step
    if name is None:
        remedy = "Start again with another --out"
        raise TrainingError("every checkpoint of this run is damaged", where=checkpoints, remedy=remedy)
    (missing,) = distributed.any_over_ranks(not (checkpoints / name).is_dir(), device=accelerator.device)
    if missing:
        remedy = "Give an --out on a disk that all machines share, or wait until they all see it"
        raise TrainingError("the newest checkpoint is not on every machine", where=checkpoints / name, remedy=remedy)
    return checkpoints / name


def is_run_complete(folder: Path, checkpoint: Path | None) -> bool:
    """Whether a run to be resumed at `checkpoint` has nothing left to do; it must still have its last checkpoint."""
    facts = read_facts(folder, "status")
    if facts["status"] != DONE or not (folder / EXPORT_FOLDER).is_dir():
        return False
    return checkpoint == (checkpoint_path(folder / "checkpoints", facts["step"]) if facts.get("step") else None)


def start_process(
    folder: Path, recipe: AnyRecipe, auto_keys: Sequence[str], resume: bool, quiet: bool
) -> tuple[AnyRecipe, accelerate.Accelerator, Console]:
    """The recipe with the precision in use, the accelerator, and the console, which only the main rank prints on.

    A run to be resumed keeps its precision and its choice of `auto_keys`: a second measurement could differ.
    """
    engine: Any = recipe.engine  # type: ignore[attr-defined]
    auto_keys = [key for key in ("precision", *auto_keys) if getattr(engine, key) == "auto"]
    if auto_keys and resume and is_run_folder(folder):
        before = read_saved_recipe(folder).get("engine")
        resolved = {key: before[key] for key in auto_keys if key in before} if isinstance(before, dict) else {}
        engine = engine.model_copy(update=resolved)
    accelerator = make_accelerator(engine.precision)
    engine = engine.model_copy(update={"precision": accelerator.mixed_precision})
    return recipe.model_copy(update={"engine": engine}), accelerator, make_console(accelerator, quiet)


def common_run_info(store: Store, accelerator: accelerate.Accelerator, seed: int) -> dict[str, Any]:
    """The entries of every run.json: device and reason, ranks, precision and its measurement, seed, data."""
    device, reason = describe_device(accelerator.device)
    return {
        "device": device,
        "device_reason": reason,
        "world_size": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
        "precision_probe": asdict(probe_precision(accelerator.device)),
        "seed": seed,
        "data_hash": store.content_hash,
        "num_sessions": len(store),
    }
