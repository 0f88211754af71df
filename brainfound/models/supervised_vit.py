"""Supervised ViTs (Google's ViT, DeiT) as a start: their weights in the architecture of Dinov2.

Both are pre-norm transformers. Dinov2 scales each residual branch by a learned vector and a supervised ViT
does not: with that scale at one the two compute the same function. Position grids are resampled alike, since
the library has one rule for both (bicubic, by size; of the supervised ViT with `interpolate_pos_encoding=True`).

Sources: ViT (arXiv 2010.11929), DeiT (2012.12877), Dinov2 (2304.07193).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViTModel
from transformers.utils import cached_file

from brainfound.errors import ModelError
from brainfound.models.configuration import silence_transformers

MODEL_TYPE = "vit"
_PREPROCESSOR_FILE = "preprocessor_config.json"
# What the library's ViTImageProcessor takes where a checkpoint says nothing.
_FAMILY_MEAN, _FAMILY_STD = 0.5, 0.5
# Parts of a checkpoint that sit on top of the encoder: the classifier, the pooler, SimMIM's pixel decoder.
_ON_TOP = ("classifier.", "pooler.", "decoder.", "vit.pooler.")
_RENAMED = {"layernorm_before.": "norm1.", "layernorm_after.": "norm2."}


def load_supervised_vit(
    source: str, config: PreTrainedConfig, attn_implementation: str | None, hub_options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The library's model of a supervised ViT, and the library's account of what was loaded.

    Raises:
        ModelError: if Dinov2 cannot compute what this ViT computes, or the file holds more of an encoder than the
            configuration has (the keys are named).
    """
    require_convertible(source, config)
    if config.attention_probs_dropout_prob:
        warnings.warn(
            f"{source}: config.attention_probs_dropout_prob {config.attention_probs_dropout_prob:g} is taken as 0:"
            " it is no part of what the weights compute, and training here has no dropout of attention",
            stacklevel=4,
        )
    # With the account of what was loaded the library gives two things, which its types do not say.
    load: Any = ViTModel.from_pretrained
    with silence_transformers():
        model, info = load(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation=attn_implementation,
            add_pooling_layer=False,
            use_mask_token=True,
            output_loading_info=True,
            **hub_options,
        )
    left_over = sorted(key for key in info["unexpected_keys"] if not key.startswith(_ON_TOP))
    if left_over:
        raise ModelError(
            f"the checkpoint holds {len(left_over)} weights that its configuration has no place for: {left_over[0]}",
            where=source,
            remedy="Give the configuration that the weights were saved with",
        )
    return model, info


def require_convertible(source: str, config: PreTrainedConfig) -> None:
    """Refuse a ViT that Dinov2 does not compute alike.

    Raises:
        ModelError: names the field, what came and what is expected.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    sides = (config.image_size,) if isinstance(config.image_size, int) else tuple(config.image_size)
    # (field, what it is, whether it fits, what fits)
    rules = (
        ("hidden_act", config.hidden_act, config.hidden_act == "gelu", "gelu"),
        ("hidden_dropout_prob", config.hidden_dropout_prob, not config.hidden_dropout_prob, "0"),
        (
            "intermediate_size",
            config.intermediate_size,
            config.intermediate_size % width == 0,
            f"a multiple of hidden_size={width}",
        ),
        ("hidden_size", width, width % heads == 0, f"a multiple of num_attention_heads={heads}"),
        (
            "head_dim",
            getattr(config, "head_dim", None),
            getattr(config, "head_dim", None) in (None, width // heads),
            f"hidden_size / num_attention_heads = {width // heads}",
        ),
        ("image_size", config.image_size, len(set(sides)) == 1, "a square, for its position grid to be resampled"),
    )
    for field, got, fits, expected in rules:
        if not fits:
            raise ModelError(
                f"this supervised ViT has a {field} that is not supported",
                where=f"{source}: config.{field}",
                got=got,
                expected=expected,
                remedy="Start from another checkpoint",
            )


def dinov2_config(config: PreTrainedConfig, drop_path_rate: float | None = None) -> PreTrainedConfig:
    """The configuration of the Dinov2 model that computes what a supervised ViT does."""
    return AutoConfig.for_model(
        "dinov2",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size // config.hidden_size,
        hidden_act=config.hidden_act,
        attention_probs_dropout_prob=0.0,  # packed crops have no dropout of attention; `load_supervised_vit` says so
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        qkv_bias=config.qkv_bias,
        layerscale_value=1.0,
        drop_path_rate=float(drop_path_rate or 0.0),
    )


def as_dinov2(vit: PreTrainedModel, drop_path_rate: float | None = None) -> PreTrainedModel:
    """The same function as a Dinov2 model: every weight is carried over, and layer scales are one.

    Args:
        vit: a ViTModel with mask token and without pooler, as `load_supervised_vit` gives it.
        drop_path_rate: stochastic depth while training; None: none, as in the checkpoint.
    """
    config = vit.config
    converted = dinov2_config(config, drop_path_rate)
    weights = {_dinov2_name(name): tensor.detach().clone() for name, tensor in vit.state_dict().items()}
    weights["embeddings.mask_token"] = weights["embeddings.mask_token"].flatten(0, 1)
    for layer in range(config.num_hidden_layers):
        for scale in ("layer_scale1", "layer_scale2"):
            weights[f"encoder.layer.{layer}.{scale}.lambda1"] = torch.ones(config.hidden_size)
    # Made without memory: every weight is given, so no random number needs to be drawn for one.
    with torch.device("meta"):
        model = AutoModel.from_config(converted, attn_implementation=config._attn_implementation)
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        # The flag by which the library's `post_init` knows loaded weights.
        module._is_hf_initialized = True
    return model.eval()


def input_statistics(source: str, hub_options: Mapping[str, Any]) -> dict[str, float]:
    """The mean and standard deviation that a supervised ViT's images were normalised with.

    As the default of `BrainFoundConfig` they are means over red, green and blue: contrasts are no colours. Without a
    preprocessor beside the checkpoint they are those of the family (0.5 and 0.5).

    Returns:
        `image_mean` and `image_std`.

    Raises:
        ModelError: if the preprocessor's file cannot be understood.
    """
    path = _preprocessor_path(source, hub_options)
    if path is None:
        return {"image_mean": _FAMILY_MEAN, "image_std": _FAMILY_STD}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content.get("do_normalize", True):
            return {"image_mean": 0.0, "image_std": 1.0}
        mean = _channel_mean(content.get("image_mean", _FAMILY_MEAN))
        std = _channel_mean(content.get("image_std", _FAMILY_STD))
    except (ValueError, TypeError, AttributeError) as error:
        raise _bad_preprocessor(source, str(error)) from error
    if not std > 0:
        raise _bad_preprocessor(source, f"image_std {std:g} is not positive")
    return {"image_mean": mean, "image_std": std}


def _dinov2_name(name: str) -> str:
    if name.startswith("layers."):
        name = f"encoder.layer.{name.removeprefix('layers.')}"
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _preprocessor_path(source: str, hub_options: Mapping[str, Any]) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / _PREPROCESSOR_FILE
        return path if path.is_file() else None
    try:
        found = cached_file(source, _PREPROCESSOR_FILE, _raise_exceptions_for_missing_entries=False, **hub_options)
    except OSError:
        warnings.warn(
            f"{_PREPROCESSOR_FILE} of {source} cannot be fetched: its images are taken to have been normalised with"
            f" mean {_FAMILY_MEAN:g} and standard deviation {_FAMILY_STD:g}, as is usual for a ViT",
            stacklevel=4,
        )
        return None
    return None if found is None else Path(found)


def _channel_mean(value: float | list[float]) -> float:
    """One value for all channels, without the last digits that a mean of decimal fractions brings."""
    numbers = value if isinstance(value, list) else [value]
    return round(fmean(float(number) for number in numbers), 6)


def _bad_preprocessor(source: str, why: str) -> ModelError:
    return ModelError(
        f"{_PREPROCESSOR_FILE} cannot be used: {why[:200]}",
        where=source,
        remedy="Mend the file, or set image_mean and image_std",
    )
