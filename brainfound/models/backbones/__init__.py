"""Backbones: plain 2-D ViTs from the Hugging Face Hub or a folder, read whole or refused.

`FAMILIES` is the registry: one line per family. The supported model types, the error texts, the checks of
`BrainFoundConfig` and the loading derive from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTModel,
)

from brainfound.errors import ModelError
from brainfound.models.backbones.family import Family, get_image_size, get_patch_size
from brainfound.models.backbones.supervised_vit import SupervisedViT
from brainfound.models.hub import LOAD_FAILURES, require_findable, unreadable_model_error

__all__ = [
    "FAMILIES",
    "SUPPORTED_BACKBONES",
    "Family",
    "build_backbone",
    "get_image_size",
    "get_patch_size",
    "load_backbone",
    "load_backbone_config",
    "load_image_statistics",
]

FAMILIES: dict[str, Family] = {
    "dinov2": Family(Dinov2Model),
    "dinov2_with_registers": Family(Dinov2WithRegistersModel),
    "vit": SupervisedViT(ViTModel),
}
"""Model type → family, of every ViT that a model can start from."""
SUPPORTED_BACKBONES = tuple(name for name, family in FAMILIES.items() if family.becomes is None)
"""The model types that a BrainFound model can have as `backbone_config`; the first one is the default."""


def load_backbone(
    id_or_folder: str | Path,
    *,
    drop_path_rate: float | None = None,
    attn_implementation: str | None = None,
    **hub_options: Any,
) -> PreTrainedModel:
    """A Hub ViT with float32 weights, every one of them read from its file.

    A supervised ViT (model type "vit") is returned as a Dinov2 model that computes the same function.

    Args:
        id_or_folder: a Hub id, or a folder with config.json and safetensors.
        drop_path_rate: stochastic depth while training; None keeps the checkpoint's.
        attn_implementation: the library's name of an attention kernel; None lets the library choose.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only` of the library.

    Raises:
        ModelError: if it cannot be read, is of another family, or lacks weights (the keys are named).
    """
    source = str(id_or_folder)
    config = _read_config(source, hub_options)
    family = _require_family(source, config)
    return family.load(source, config, drop_path_rate, attn_implementation, hub_options)


def load_backbone_config(id_or_folder: str | Path, **hub_options: Any) -> PreTrainedConfig:
    """The configuration of the model that `load_backbone` returns, without its weights.

    Raises:
        ModelError: if it cannot be read, or is of another family.
    """
    source = str(id_or_folder)
    config = _read_config(source, hub_options)
    return _require_family(source, config).resolve_config(source, config)


def load_image_statistics(id_or_folder: str | Path, **hub_options: Any) -> dict[str, float]:
    """`image_mean` and `image_std` of a checkpoint, where they are not the default of `BrainFoundConfig`.

    Raises:
        ModelError: if the checkpoint's configuration or preprocessor cannot be read.
    """
    source = str(id_or_folder)
    config = _read_config(source, hub_options)
    return _require_family(source, config).image_statistics(source, hub_options)


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """The ViT of a configuration, with new weights."""
    return AutoModel.from_config(config)


def _read_config(source: str, hub_options: dict[str, Any]) -> PreTrainedConfig:
    require_findable(source)
    try:
        return AutoConfig.from_pretrained(source, **hub_options)
    except LOAD_FAILURES as error:
        raise unreadable_model_error(source, error) from error


def _require_family(source: str, config: PreTrainedConfig) -> Family:
    if config.model_type not in FAMILIES:
        is_ours = config.model_type == "brainfound"
        raise ModelError(
            f"a {config.model_type!r} model is not a supported backbone",
            where=source,
            expected=f"one of {', '.join(FAMILIES)}",
            remedy="Load it with BrainFoundModel.from_pretrained" if is_ours else "Give the id of a DINOv2 model",
        )
    return FAMILIES[config.model_type]
