"""Preflight checks of a recipe and a store, before the model is loaded and before anything is written.

A recipe that cannot work is refused; one that may not work as its author expects gets a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from brainfound.data.store import Store
from brainfound.errors import RecipeError, UsageError
from brainfound.models.loading import read_patch_size
from brainfound.pretraining.monitoring.probe_targets import require_probe_target
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.objectives.registry import OBJECTIVES_BY_KIND
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.pretraining.slices import SliceNeighbours, usable_rows
from brainfound.pretraining.starting_model import FROM_SCRATCH

MIN_AFFECTED_FRACTION = 0.5  # of the slices that an ablation changes; below it, a note


def run_preflight_checks(recipe: PretrainRecipe, store: Store, num_processes: int = 1) -> list[str]:
    """Refuse a recipe that cannot work with a store, and return the notes for its author.

    Raises:
        RecipeError, UsageError: a setting or the starting model cannot work with this store.
        ModelError: the starting model's configuration cannot be read.
    """
    if recipe.probe.every and recipe.probe.target != "auto":
        require_probe_target(store, recipe.probe.target)
    return [
        *_check_slices(recipe, store),
        *_check_views(recipe, store),
        *_check_batches(recipe, store),
        *_objective(recipe).preflight(recipe.objective, recipe.schedule, recipe.engine.steps),
        *_check_ignored_settings(recipe, num_processes),
    ]


def _objective(recipe: PretrainRecipe) -> type[Objective]:
    return OBJECTIVES_BY_KIND[recipe.objective.kind]


def _check_slices(recipe: PretrainRecipe, store: Store) -> Iterator[str]:
    if _objective(recipe).uses_multi_crop:
        recipe.views.require_smaller_local_crops()
    height, width = store.preprocessing.size
    if recipe.init.source == FROM_SCRATCH:
        patch: int | None = recipe.init.scratch.patch_size
    else:
        patch = read_patch_size(recipe.init.source, store.contrasts)
    if patch and (height % patch or width % patch):
        nearest = ",".join(str(max(1, side // patch) * patch) for side in (height, width))
        if recipe.probe.every:
            raise UsageError(
                "the slices are not made of whole patches, and a probe reads them as they are",
                where=store.path,
                got=f"{height} × {width} pixels",
                expected=f"multiples of the patch size {patch}",
                remedy=f"Prepare the store with --set 'size=[{nearest}]', or set probe.every=0",
            )
        yield (
            f"slices of {height} × {width} pixels cannot be cut into patches of {patch}: the model that this run makes"
            f" cannot read them whole. Prepare the store with --set 'size=[{nearest}]'"
        )
    side = recipe.views.global_size
    if min(height, width) < side:
        smaller = min(height, width) // (patch or 1) * (patch or 1)
        yield (
            f"slices are {height} × {width} pixels, global crops {side} × {side}: they are enlarged."
            f" Prepare the store with --set 'size=[{side},{side}]'"
            + (f", or set views.global_size={smaller}" if smaller else "")
        )


def _check_views(recipe: PretrainRecipe, store: Store) -> Iterator[str]:
    views = recipe.views
    if not _objective(recipe).uses_multi_crop:
        return
    rows = usable_rows(store, views.slice_margin)
    if views.neighbour_mm:
        share = float(np.mean(SliceNeighbours(store, rows, views.neighbour_mm).num_others > 0))
        if share == 0:
            nearest = _smallest_distance_mm(store, rows)
            raise RecipeError(
                "no slice has another one of its session within this distance",
                where="views.neighbour_mm",
                got=f"{views.neighbour_mm:g}",
                expected="0, as sessions have one slice each" if nearest is None else f"{nearest:.3g} or more, or 0",
                remedy=f"Set views.neighbour_mm={0 if nearest is None else f'{nearest:.3g}'}",
            )
        if share < MIN_AFFECTED_FRACTION:
            yield (
                f"views.neighbour_mm={views.neighbour_mm:g}: {share:.0%} of the slices have another one of their"
                " session within that distance; the others are paired with themselves"
            )
    if views.split_contrasts:
        several = store.present[store.slice_sessions[rows]].sum(axis=1) >= 2
        if not several.any():
            raise RecipeError(
                "no session has two contrasts to share out",
                where="views.split_contrasts",
                got=f"{views.split_contrasts:g}",
                expected="0 for this store",
                remedy="Set views.split_contrasts=0",
            )
        if several.mean() < MIN_AFFECTED_FRACTION:
            yield (
                f"views.split_contrasts={views.split_contrasts:g}: {several.mean():.0%} of the slices are of sessions"
                " with two or more contrasts; the others are not split"
            )


def _smallest_distance_mm(store: Store, rows: np.ndarray) -> float | None:
    """The smallest between two slices of a session; None if sessions have one slice each."""
    together = np.diff(store.slice_sessions[rows]) == 0
    distances = np.diff(store.slice_positions_mm[rows].astype(np.float64))[together]
    return float(distances.min()) if len(distances) else None


def _check_batches(recipe: PretrainRecipe, store: Store) -> Iterator[str]:
    num_slices, batch = len(usable_rows(store, recipe.views.slice_margin)), recipe.engine.batch_size
    if recipe.engine.steps and batch > num_slices:
        yield (
            f"engine.batch_size is {batch}, and there are {num_slices} slices: each is in a batch about"
            f" {batch / num_slices:.2g} times. Set engine.batch_size={num_slices} or less"
        )


def _check_ignored_settings(recipe: PretrainRecipe, num_processes: int) -> Iterator[str]:
    """Notes on changed settings that have no effect here, or a different one."""
    trained, views, kind = recipe.trained, recipe.views, recipe.objective.kind
    ignored = {f"trained.{key}": getattr(trained, key) for key in trained.ignored_keys()}
    yield from _note_ignored(f"trained.part is {trained.part}", ignored)
    if not _objective(recipe).uses_multi_crop:
        default = type(views)()
        changed = {
            f"views.{key}": getattr(views, key)
            for key in ("num_local", "neighbour_mm")
            if getattr(views, key) not in (0, getattr(default, key))
        }
        yield from _note_ignored(f"objective.kind is {kind}", changed)
        if views.split_contrasts:
            yield (
                f"objective.kind is {kind}: views.split_contrasts={views.split_contrasts:g} has no second crop"
                " to share contrasts out to; it withholds some of them"
            )
    if recipe.engine.parallel == "fsdp" and num_processes > 1 and recipe.engine.crops == "separate":
        yield "engine.parallel is fsdp: crops are packed, not separate, as sharded weights have one backward pass"


def _note_ignored(cause: str, settings: Mapping[str, Any]) -> Iterator[str]:
    named = ", ".join(
        f"{key}=[{','.join(value)}]" if isinstance(value, tuple) else f"{key}={value:g}"
        for key, value in settings.items()
    )
    if settings:
        yield f"{cause}: {named} {'has' if len(settings) == 1 else 'have'} no effect"
