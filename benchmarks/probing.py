"""Frozen probes of many models on one store, several at a time, each result kept next to the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from frozen_probes import FOLDS, PATCH_SLICES, REPEATS, SLICES, FrozenProbes, Outcome
from shifted_cohorts import key_of
from worker_processes import in_processes

from brainfound.data.store import Store
from brainfound.models import BrainFoundModel
from brainfound.models.loading import load_initial_model

PROTOCOL = (SLICES, PATCH_SLICES, FOLDS, REPEATS)
RANDOM = "random:"
"""Before a model's name: new weights in its architecture instead of its own."""


def outcomes_of(
    models: Mapping[str, Sequence[str]], store: Path, patch_size: int, workers: int
) -> tuple[dict[str, list[Outcome]], np.ndarray]:
    """The outcomes of each model's runs and of knowing no image at all, and who is ill (N,)."""
    probes = FrozenProbes(Store.open(store), patch_size)
    jobs = [(source, store, patch_size) for sources in models.values() for source in sources]
    made = iter(in_processes(_outcome, jobs, workers))
    found = {name: [next(made) for _ in sources] for name, sources in models.items()}
    return {"trivial": [probes.trivial()]} | found, probes.ill


def _outcome(source: str, store: Path, patch_size: int) -> Outcome:
    import torch

    torch.set_num_threads(1)
    kept = store.parent / f"outcome-{key_of({'model': source, 'protocol': PROTOCOL})}.npz"
    if kept.is_file():
        return Outcome.load(kept)
    opened = Store.open(store)
    outcome = FrozenProbes(opened, patch_size).run(_encoder(source, opened))
    outcome.save(kept)
    return outcome


def _encoder(source: str, store: Store):
    import torch

    model = load_initial_model(BrainFoundModel, source.removeprefix(RANDOM), store.contrasts)
    if source.startswith(RANDOM):
        torch.manual_seed(0)
        model = BrainFoundModel(model.config)
    return model.encoder
