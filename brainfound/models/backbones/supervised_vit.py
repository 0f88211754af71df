"""Supervised ViTs (ViT, DeiT) as a backbone: their weights in the architecture of Dinov2.

Both are pre-norm transformers. Dinov2 scales each residual branch by a learned vector and a supervised ViT does not:
with that scale at one the two compute the same function. The library resamples both position grids by one rule
(bicubic, by size; for the supervised ViT with `interpolate_pos_encoding=True`).

Sources: ViT (arXiv 2010.11929), DeiT (2012.12877), Dinov2 (2304.07193).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from transformers import AutoModel, Dinov2Config, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from brainfound.errors import ModelError
from brainfound.models.backbones.family import Family, get_image_size, get_patch_size

_PREPROCESSOR_FILE = "preprocessor_config.json"
# The defaults of the library's ViTImageProcessor.
_FAMILY_MEAN, _FAMILY_STD = 0.5, 0.5
_RENAMED = {"layernorm_before.": "norm1.", "layernorm_after.": "norm2."}


class SupervisedViT(Family):
    """Google's ViT and DeiT without distillation (model type "vit"); each becomes a Dinov2."""

    becomes: ClassVar[str | None] = "dinov2"
    load_options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False, "use_mask_token": True}
    # The classifier, the pooler, SimMIM's pixel decoder.
    on_top: ClassVar[tuple[str, ...] | None] = ("classifier.", "pooler.", "decoder.", "vit.pooler.")

    def resolve_config(self, source: str, config: PreTrainedConfig) -> PreTrainedConfig:
        _require_convertible(source, config)
        return _dinov2_config(config)

    def load(
        self,
        source: str,
        config: PreTrainedConfig,
        drop_path_rate: float | None,
        attn_implementation: str | None,
        hub_options: Mapping[str, Any],
    ) -> PreTrainedModel:
        get_patch_size(config)
        _require_convertible(source, config)
        if config.attention_probs_dropout_prob:
            warnings.warn(
                f"{source}: config.attention_probs_dropout_prob {config.attention_probs_dropout_prob:g} is taken as 0:"
                " it is no part of what the weights compute, and training here has no dropout of attention",
                stacklevel=3,
            )
        return _to_dinov2(self.read(source, config, attn_implementation, hub_options), drop_path_rate)

    def image_statistics(self, source: str, hub_options: Mapping[str, Any]) -> dict[str, float]:
        """The mean and standard deviation that the checkpoint's images were normalised with.

        Both are means over red, green and blue, because contrasts are no colours; without a preprocessor, 0.5 and 0.5.
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


def _require_convertible(source: str, config: PreTrainedConfig) -> None:
    """Refuse a ViT whose function a Dinov2 cannot compute."""
    width, heads = config.hidden_size, config.num_attention_heads
    # (field, value, whether it fits, expected)
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
        (
            "image_size",
            config.image_size,
            len(set(get_image_size(config))) == 1,
            "a square, for its position grid to be resampled",
        ),
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


def _dinov2_config(config: PreTrainedConfig, drop_path_rate: float | None = None) -> PreTrainedConfig:
    """The configuration of the Dinov2 model with the same function as a supervised ViT."""
    return Dinov2Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size // config.hidden_size,
        hidden_act=config.hidden_act,
        attention_probs_dropout_prob=0.0,  # packed crops have no dropout of attention; `load` warns of it
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        qkv_bias=config.qkv_bias,
        layerscale_value=1.0,
        drop_path_rate=float(drop_path_rate or 0.0),
    )


def _to_dinov2(vit: PreTrainedModel, drop_path_rate: float | None = None) -> PreTrainedModel:
    """A Dinov2 model with the same function: the weights of the ViT, and layer scales of one.

    `vit` has a mask token and no pooler.
    """
    config = vit.config
    converted = _dinov2_config(config, drop_path_rate)
    weights = {_dinov2_name(name): tensor.detach().clone() for name, tensor in vit.state_dict().items()}
    weights["embeddings.mask_token"] = weights["embeddings.mask_token"].flatten(0, 1)
    for layer in range(config.num_hidden_layers):
        for scale in ("layer_scale1", "layer_scale2"):
            weights[f"encoder.layer.{layer}.{scale}.lambda1"] = torch.ones(config.hidden_size)
    # On the meta device: every weight is assigned, so none needs to be drawn.
    with torch.device("meta"):
        model = AutoModel.from_config(converted, attn_implementation=config._attn_implementation)
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        # The flag by which the library's `post_init` leaves loaded weights alone.
        module._is_hf_initialized = True
    return model.eval()


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
    """The mean over channels, rounded to hide the last digits of binary fractions."""
    numbers = value if isinstance(value, list) else [value]
    return round(fmean(float(number) for number in numbers), 6)


def _bad_preprocessor(source: str, why: str) -> ModelError:
    return ModelError(
        f"{_PREPROCESSOR_FILE} cannot be used: {why[:200]}",
        where=source,
        remedy="Mend the file, or set image_mean and image_std",
    )
