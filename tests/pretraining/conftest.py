"""Tiny runs; see `tests/tiny_runs.py`."""

import pytest
import torch

from brainfound.pretraining.slices import PretrainBatch
from tests.tiny_runs import _few_resamples, _no_pictures, _one_thread, finished, model, recipe, store  # noqa: F401


@pytest.fixture
def batch(store):  # noqa: F811
    rows = torch.arange(0, 96, 12).numpy()
    sessions = store.slice_sessions[rows]
    return PretrainBatch(
        torch.from_numpy(store.read_slices(rows)), torch.from_numpy(store.present[sessions]), torch.from_numpy(sessions)
    )
