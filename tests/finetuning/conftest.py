"""Tiny runs; see `tests/tiny_runs.py`."""

from tests.tiny_backbones import _seed, backbone_folder  # noqa: F401
from tests.tiny_runs import _few_resamples, _no_pictures, _one_thread, finished, model, recipe, store  # noqa: F401
