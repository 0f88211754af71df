"""Updates added into the weights they belong to, and taken out again.

A merged model answers as before but has no products more than its backbone. It is meant for answering: the
updates of a merged model get no gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from brainfound.adapters.pissa import principal_start
from brainfound.errors import ModelError

_ATTRIBUTE = "before_merge"


class _BeforeMerge(NamedTuple):
    """The frozen weight of a layer, kept out of the module's parameters while a merged one is in its place."""

    weight: nn.Parameter


@torch.no_grad()
def merge(model: Any) -> None:
    """Add an adapter's updates into the weights of its model, in place.

    The merged weights are copies, so a backbone that others share is left alone, and `unmerge` gives back the
    frozen weights to the last bit. Until then both are in memory, for the matrices that have updates.

    Raises:
        ModelError: if the model has no updates, or they are merged.
    """
    layers = _updated_layers(model)
    if is_merged(model):
        raise ModelError("the adapter is already merged", where="merge", remedy="Call unmerge first")
    for layer in layers:
        base = layer.get_base_layer()
        frozen = base.weight
        base.weight = nn.Parameter(frozen.detach().clone(), requires_grad=False)
        layer.merge()
        setattr(layer, _ATTRIBUTE, _BeforeMerge(frozen))


@torch.no_grad()
def unmerge(model: Any) -> None:
    """Undo `merge`, in place; the frozen weights are again what they were.

    Raises:
        ModelError: if the model has no updates, or they were not merged by `merge`.
    """
    layers = _updated_layers(model)
    if not all(hasattr(layer, _ATTRIBUTE) for layer in layers):
        raise ModelError("the adapter is not merged", where="unmerge", remedy="Call merge first")
    for layer in layers:
        base = layer.get_base_layer()
        frozen = getattr(layer, _ATTRIBUTE).weight
        # The library's own way out subtracts, which rounds; it is called for its bookkeeping.
        layer.unmerge()
        if frozen.device != base.weight.device or frozen.dtype != base.weight.dtype:
            frozen = nn.Parameter(frozen.to(base.weight), requires_grad=False)
        base.weight = frozen
        delattr(layer, _ATTRIBUTE)


def is_merged(model: nn.Module) -> bool:
    """Whether updates are merged into the weights of a model, by `merge` or by the library."""
    return any(isinstance(module, LoraLayer) and module.merged for module in model.modules())


def weight_before(layer: Any) -> Tensor:
    """The weight of an updated layer as it was before an adapter was attached or merged.

    Raises:
        ModelError: if it was merged in a way that does not keep it.
    """
    start = principal_start(layer)
    if start is not None:
        return start.weight
    kept = getattr(layer, _ATTRIBUTE, None)
    if kept is not None:
        return kept.weight
    if layer.merged:
        raise ModelError(
            "the adapter was merged without keeping the base", remedy="Call unmerge_adapter() on the model first"
        )
    return layer.get_base_layer().weight


def _updated_layers(model: Any) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not isinstance(model, PeftModel) or not layers:
        raise ModelError("the model has no updates to merge", expected="a model with a low-rank adapter")
    return layers
