"""Adapters: what is trained on top of a backbone, and the bundle that it is saved in."""

from brainfound.adapters.attach import AdapterRecipe, ParameterCount, attach_adapter, count_parameters
from brainfound.adapters.bundle import Bundle, load_bundle, save_bundle
from brainfound.adapters.roles import ROLES, resolve_targets

__all__ = [
    "ROLES",
    "AdapterRecipe",
    "Bundle",
    "ParameterCount",
    "attach_adapter",
    "count_parameters",
    "load_bundle",
    "resolve_targets",
    "save_bundle",
]
