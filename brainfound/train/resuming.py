"""Starting a run in a folder, or going on with the one that is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
from accelerate.utils import broadcast_object_list

from brainfound.data.store import Store
from brainfound.errors import TrainingError
from brainfound.recipes import AnyRecipe, Recipe
from brainfound.train import ranks, run_files
from brainfound.train.checkpoint import folder_of, latest_valid, list_checkpoints
from brainfound.train.engine import device_and_reason
from brainfound.train.precision import probe_precision


def checkpoint_to_resume(
    folder: Path,
    recipe: Recipe,
    store: Store,
    resume: bool,
    free: Sequence[str],
    accelerator: accelerate.Accelerator,
) -> Path | None:
    """Check the run in a folder that `only_one_training` keeps for it, on all ranks alike.

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
    run_files.require_same(folder, recipe, store, free)
    checkpoints = folder / "checkpoints"
    # One rank looks and chooses: a network disk may show an older folder to another, and hashing takes long.
    has_checkpoint, name = False, None
    if accelerator.is_main_process:
        has_checkpoint, newest = bool(list_checkpoints(checkpoints)), latest_valid(checkpoints)
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


def has_ended(folder: Path, checkpoint: Path | None, num_steps: int) -> bool:
    """Whether a run that is to be resumed has nothing left to do; one whose last checkpoint was lost does not count.

    Args:
        checkpoint: what `checkpoint_to_resume` gave.
    """
    last = folder_of(folder / "checkpoints", num_steps) if num_steps else None
    return checkpoint == last and run_files.is_finished(folder)


def as_begun(folder: Path, recipe: AnyRecipe, keys: Sequence[str], resume: bool) -> AnyRecipe:
    """A recipe with what a run to be resumed was begun with, for the keys of its engine that say "auto".

    A second trial of the device might come out otherwise, and would make another run of it.
    """
    engine: Any = recipe.engine  # type: ignore[attr-defined]
    left_open = [key for key in keys if getattr(engine, key) == "auto"]
    if not (left_open and resume and run_files.holds_run(folder)):
        return recipe
    before = run_files.saved_recipe(folder).get("engine")
    settled = {key: before[key] for key in left_open if key in before} if isinstance(before, dict) else {}
    return recipe.model_copy(update={"engine": engine.model_copy(update=settled)})


def common_facts(store: Store, accelerator: accelerate.Accelerator, seed: int) -> dict[str, Any]:
    """What every run.json says: device and why, ranks, precision and how fast either would be, seed, data."""
    device, reason = device_and_reason(accelerator.device)
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
