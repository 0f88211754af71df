"""Adapters: the trained part of a model, and the bundle that it is saved in."""

from brainfound.adapters.attach import (
    ROLES,
    AdapterRecipe,
    ParameterCount,
    attach_adapter,
    count_parameters,
    resolve_targets,
)
from brainfound.adapters.bundle import save_bundle
from brainfound.adapters.bundle_reader import AdapterSet, Bundle, load_adapters, load_bundle
from brainfound.adapters.low_rank import is_merged, merge, unmerge

__all__ = [
    "ROLES", "AdapterRecipe", "AdapterSet", "Bundle", "ParameterCount", "attach_adapter", "count_parameters",
    "is_merged", "load_adapters", "load_bundle", "merge", "resolve_targets", "save_bundle", "unmerge",
]  # fmt: skip
