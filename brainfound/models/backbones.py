"""Plain 2-D ViTs from the Hugging Face Hub or a folder: loaded whole, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from brainfound.errors import ModelError
from brainfound.models.configuration import SUPPORTED_BACKBONES, silence_transformers
from brainfound.models.supervised_vit import MODEL_TYPE as SUPERVISED_VIT
from brainfound.models.supervised_vit import (
    as_dinov2,
    dinov2_config,
    input_statistics,
    load_supervised_vit,
    require_convertible,
)

# What the library and the file system raise for a folder or an id that cannot be read.
LOAD_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
# A pretrained ViT may lack these: masking starts from zeros, and no pooler is used.
_MAY_BE_MISSING = ("mask_token", "pooler.")
_NUM_KEYS_SHOWN = 4
# What a model may start from; a supervised ViT becomes a Dinov2.
INIT_MODEL_TYPES = (*SUPPORTED_BACKBONES, SUPERVISED_VIT)


def load_backbone(
    id_or_folder: str | Path,
    *,
    drop_path_rate: float | None = None,
    attn_implementation: str | None = None,
    **hub_options: Any,
) -> PreTrainedModel:
    """A Hub ViT with float32 weights, every one of them read from its file.

    A supervised ViT (model type "vit") comes back as a Dinov2 model that computes the same.

    Args:
        id_or_folder: a Hub id, or a folder with config.json and safetensors.
        drop_path_rate: stochastic depth while training; None keeps the checkpoint's.
        attn_implementation: the library's name of an attention kernel; None lets the library choose.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only` of the library.

    Raises:
        ModelError: if it cannot be read, is of another family, or lacks weights (the keys are named).
    """
    source = str(id_or_folder)
    config = _load_config(source, hub_options)
    _require_family(source, config)
    if config.model_type == SUPERVISED_VIT:
        return _load_converted(source, config, drop_path_rate, attn_implementation, hub_options)
    if drop_path_rate is not None:
        config.drop_path_rate = float(drop_path_rate)
    try:
        with silence_transformers():
            model, info = AutoModel.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **hub_options,
            )
    except LOAD_FAILURES as error:
        raise unreadable_model_error(source, error) from error
    _require_whole(source, model, info)
    # Kept in `backbone_source`; here it would travel inside every saved configuration as a path of this machine.
    model.config.name_or_path = ""
    with torch.no_grad():
        mask_token = model.embeddings.mask_token
        if mask_token is None:
            model.embeddings.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size))
        elif any("mask_token" in key for key in info["missing_keys"]):
            mask_token.zero_()
    return model


def load_backbone_config(id_or_folder: str | Path, **hub_options: Any) -> PreTrainedConfig:
    """The configuration that `load_backbone`'s answer has, without the weights.

    Raises:
        ModelError: if it cannot be read, or is of another family.
    """
    source = str(id_or_folder)
    config = _load_config(source, hub_options)
    _require_family(source, config)
    if config.model_type == SUPERVISED_VIT:
        require_convertible(source, config)
        return dinov2_config(config)
    return config


def load_image_statistics(id_or_folder: str | Path, **hub_options: Any) -> dict[str, float]:
    """`image_mean` and `image_std` that a checkpoint asks for, where they are not the default of `BrainFoundConfig`.

    A DINOv2 asks for the default; a supervised ViT for what its images were normalised with.

    Raises:
        ModelError: if the checkpoint's configuration or preprocessor cannot be read.
    """
    source = str(id_or_folder)
    if _load_config(source, hub_options).model_type != SUPERVISED_VIT:
        return {}
    return input_statistics(source, hub_options)


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """The ViT of a configuration, with new weights."""
    return AutoModel.from_config(config)


def get_patch_size(config: PreTrainedConfig) -> int:
    """The side of the backbone's square patches, in pixels."""
    rows, columns = _pair(config.patch_size)
    if rows != columns:
        raise ModelError("patches must be square", where="backbone_config.patch_size", got=config.patch_size)
    return rows


def get_image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width in pixels that the position grid was made for."""
    return _pair(config.image_size)


def require_coverage(source: str, missing: Iterable[str], total: int) -> None:
    """Refuse a checkpoint that leaves weights at random.

    Raises:
        ModelError: counts the missing weights and names the first ones.
    """
    missing = sorted(missing)
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} of the model's {total} weights: {list_keys(missing)}",
            where=source,
            remedy="Give a complete checkpoint of this model",
        )


def list_keys(keys: Iterable[str]) -> str:
    """The first few of many keys, in one line."""
    keys = sorted(keys)
    more = f" and {len(keys) - _NUM_KEYS_SHOWN} more" if len(keys) > _NUM_KEYS_SHOWN else ""
    return ", ".join(keys[:_NUM_KEYS_SHOWN]) + more


def is_hub_id(source: str) -> bool:
    """Whether a source reads owner/name and no such folder or file is here."""
    path = Path(source)
    is_path = path.is_absolute() or source.startswith((".", "~")) or path.exists()
    return source.count("/") == 1 and not is_path


def require_findable(source: str) -> None:
    """Refuse a path that is not there before the Hub is asked for it: a Hub id reads owner/name.

    Raises:
        ModelError: if `source` can only be a path, and no such folder exists.
    """
    path = Path(source)
    if not is_hub_id(source) and not path.is_dir():
        what = "this is a file, not a model folder" if path.is_file() else "no such model folder"
        raise ModelError(what, where=source, remedy="Give a folder with config.json and safetensors, or a Hub id")


def unreadable_model_error(source: str, error: Exception) -> ModelError:
    """One line for a model that cannot be read, with the remedy that fits what `source` looks like."""
    folder = Path(source)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            return ModelError(
                "this is an adapter without the model that it was trained on",
                where=source,
                remedy="Load that model and give both to peft.PeftModel.from_pretrained, or save a bundle",
            )
        if not (folder / "config.json").is_file():
            export = folder / "export"
            remedy = f"Give its export: {export}" if export.is_dir() else "Give a folder that holds a model"
            return ModelError("this folder has no config.json", where=source, remedy=remedy)
        if (folder / "bundle.json").is_file():
            return ModelError(
                "this is what a fine-tuning exported, not a model to start from",
                where=source,
                remedy="Give the model that it was fine-tuned from",
            )
        if not any(folder.glob("*.safetensors")):
            return ModelError(
                "this folder has no safetensors weights",
                where=source,
                remedy="Convert the weights to safetensors; pickled weights are refused because they can run code",
            )
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return ModelError(
            f"the model cannot be read: {first_line}", where=source, remedy="Check that the files are whole"
        )
    return ModelError(
        "neither a folder nor a model that can be fetched from the Hugging Face Hub",
        where=source,
        got=type(error).__name__,
        remedy="Check the name and the connection, or give a local folder",
    )


def _load_config(source: str, hub_options: dict[str, Any]) -> PreTrainedConfig:
    require_findable(source)
    try:
        return AutoConfig.from_pretrained(source, **hub_options)
    except LOAD_FAILURES as error:
        raise unreadable_model_error(source, error) from error


def _require_family(source: str, config: PreTrainedConfig) -> None:
    if config.model_type not in INIT_MODEL_TYPES:
        is_ours = config.model_type == "brainfound"
        raise ModelError(
            f"a {config.model_type!r} model is not a supported backbone",
            where=source,
            expected=f"one of {', '.join(INIT_MODEL_TYPES)}",
            remedy="Load it with BrainFoundModel.from_pretrained" if is_ours else "Give the id of a DINOv2 model",
        )


def _load_converted(
    source: str,
    config: PreTrainedConfig,
    drop_path_rate: float | None,
    attn_implementation: str | None,
    hub_options: dict[str, Any],
) -> PreTrainedModel:
    get_patch_size(config)
    try:
        vit, info = load_supervised_vit(source, config, attn_implementation, hub_options)
    except LOAD_FAILURES as error:
        raise unreadable_model_error(source, error) from error
    _require_whole(source, vit, info)
    if any("mask_token" in key for key in info["missing_keys"]):
        with torch.no_grad():
            vit.embeddings.mask_token.zero_()
    return as_dinov2(vit, drop_path_rate)


def _require_whole(source: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    missing = [key for key in info["missing_keys"] if not any(part in key for part in _MAY_BE_MISSING)]
    require_coverage(source, missing, total=len(model.state_dict()))


def _pair(value: int | Iterable[int]) -> tuple[int, int]:
    if isinstance(value, Iterable):
        first, second = value
        return int(first), int(second)
    return int(value), int(value)
