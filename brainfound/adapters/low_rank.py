"""Low-rank updates of weight matrices: merging them into the weights, and PiSSA.

A merged model has the outputs of the adapted one at the cost of its backbone alone; merged updates get no gradients.

PiSSA (Meng et al. 2024, arXiv 2404.02948, section 3): the R largest singular values of W = U S Vᵀ form the initial
update B₀ A₀, and W − s B₀ A₀ stays frozen (scale s = alpha / rank). Training starts from the same outputs, but the
frozen base is no longer the loaded backbone. The initial state is therefore kept, and an adapter is saved as its
difference from W,

    s (B A − B₀ A₀) = s [B | −B₀] [A ; A₀],

an ordinary update of twice the rank for the untouched backbone.

Axis legend: ``R`` rank, ``I`` input width of a matrix, ``O`` output width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brainfound.errors import ModelError, RecipeError

_ATTRIBUTE = "before_merge"


class _BeforeMerge(NamedTuple):
    """The frozen weight of a merged layer, hidden from the module's parameters."""

    weight: nn.Parameter


@torch.no_grad()
def merge(model: Any) -> None:
    """Add an adapter's updates to its model's weights, in place; a ModelError if it has none, or they are merged.

    The merged weights are copies: a shared backbone is not changed, and `unmerge` restores the frozen weights to the
    last bit. Until then, both copies of the matrices with updates are in memory.
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
    """Undo `merge` in place, to the last bit; a ModelError if the updates were not merged by `merge`."""
    layers = _updated_layers(model)
    if not all(hasattr(layer, _ATTRIBUTE) for layer in layers):
        raise ModelError("the adapter is not merged", where="unmerge", remedy="Call merge first")
    for layer in layers:
        base = layer.get_base_layer()
        frozen = getattr(layer, _ATTRIBUTE).weight
        # PEFT's own `unmerge` subtracts, which rounds; it is called only for its bookkeeping.
        layer.unmerge()
        if frozen.device != base.weight.device or frozen.dtype != base.weight.dtype:
            frozen = nn.Parameter(frozen.to(base.weight), requires_grad=False)
        base.weight = frozen
        delattr(layer, _ATTRIBUTE)


def is_merged(model: nn.Module) -> bool:
    """Whether updates are merged into the weights of a model, by `merge` or by PEFT."""
    return any(isinstance(module, LoraLayer) and module.merged for module in model.modules())


def get_base_weight(layer: Any) -> Tensor:
    """The weight of an updated layer before an adapter was attached or merged; a ModelError if it was not kept."""
    kept = principal_start(layer) or getattr(layer, _ATTRIBUTE, None)
    if kept is not None:
        return kept.weight
    if layer.merged:
        remedy = "Call unmerge_adapter() on the model first"
        raise ModelError("the adapter was merged without keeping the base", remedy=remedy)
    return layer.get_base_layer().weight


def _updated_layers(model: Any) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not isinstance(model, PeftModel) or not layers:
        raise ModelError("the model has no updates to merge", expected="a model with a low-rank adapter")
    return layers


class PrincipalStart(NamedTuple):
    """The initial state of an updated layer: loaded matrix, A₀ and B₀; on the CPU, not part of the model's state."""

    weight: Tensor
    down: Float[Tensor, "R I"]
    up: Float[Tensor, "O R"]


def attach_principal(model: nn.Module, config: LoraConfig, targets: Iterable[str]) -> PeftModel:
    """Attach updates that start as the principal part of their matrices (`targets`), and keep their initial state.

    The config must have `init_lora_weights="pissa"`. A RecipeError if a matrix has fewer singular values than the rank.
    """
    originals = {name: model.get_parameter(f"{name}.weight").detach().cpu().clone() for name in targets}
    smallest = min(min(weight.shape) for weight in originals.values())
    if config.r > smallest:
        text = "a matrix has fewer singular values than the rank"
        expected, remedy = f"at most {smallest}", "Lower rank, or use the method lora"
        raise RecipeError(text, where="rank", got=config.r, expected=expected, remedy=remedy)
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, weight in originals.items():
        layer: Any = model.get_submodule(name)
        down, up = (part["default"].weight.detach().cpu().clone() for part in (layer.lora_A, layer.lora_B))
        layer.principal_start = PrincipalStart(weight, down, up)
    return adapted


def principal_start(layer: nn.Module) -> PrincipalStart | None:
    """The initial state of a layer; None if its update did not start from the principal part."""
    return getattr(layer, "principal_start", None)


def convert_pissa_to_lora(folder: Path, body: nn.Module) -> None:
    """Rewrite the files of a saved PiSSA adapter of `body` as an ordinary adapter for the untouched backbone.

    Files of other methods are not changed.
    """
    starts = {name: start for name, module in body.named_modules() if (start := principal_start(module)) is not None}
    if not starts:
        return
    weights_path, settings_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights_path)
    for name, start in starts.items():
        down, up = (f"base_model.model.{name}.lora_{part}.weight" for part in "AB")
        tensors[down] = torch.cat((tensors[down], start.down))
        tensors[up] = torch.cat((tensors[up], -start.up), dim=1)
    save_file(tensors, weights_path, metadata={"format": "pt"})
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    # Twice the rank with twice alpha is the same scale.
    settings |= {"init_lora_weights": True, "r": 2 * settings["r"], "lora_alpha": 2 * settings["lora_alpha"]}
    settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
