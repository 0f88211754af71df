"""Backbones: plain 2-D ViTs from the Hugging Face Hub or a folder, loaded completely or refused.

`FAMILIES` is the registry: a new family is one line there and, where it differs from DINOv2, a subclass of `Family`.
The supported model types, the checks of `BrainFoundConfig` and loading derive from it.

Sources: DINOv2 (arXiv 2304.07193), ViT (2010.11929), DeiT (2012.12877).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTModel,
)

from brainfound.errors import ModelError
from brainfound.models.model_folder import (
    find_file,
    reading_model,
    require_coverage,
    require_findable,
    require_finite,
    silence_transformers,
)

# Weights that a pretrained ViT may lack: the mask token starts at zero, and poolers are unused.
_MAY_BE_MISSING = ("mask_token", "pooler.")


class Family:
    """A family of 2-D ViTs in transformers, given by its plain encoder class. The defaults are those of DINOv2."""

    becomes: ClassVar[str | None] = None
    """Model type to which checkpoints are converted; None: no conversion."""
    load_options: ClassVar[dict[str, Any]] = {}
    """Extra arguments for the transformers `from_pretrained`."""
    on_top: ClassVar[tuple[str, ...] | None] = None
    """Allowed prefixes of extra checkpoint weights on top of the encoder; others are refused. None: no check."""
    blocks: ClassVar[str] = "encoder.layer"
    """Path of the transformer blocks in the model."""
    norm: ClassVar[str] = "layernorm"
    """Path of the last layer norm in the model."""

    def __init__(self, model_class: type[PreTrainedModel]) -> None:
        self.model_class = model_class

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return self.model_class.config_class  # type: ignore[return-value]

    def resolve_config(self, source: str, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the backbone that `load` returns; raises ModelError if it is unsupported."""
        return config

    def load(self, source: str, config: PreTrainedConfig, drop_path_rate: float | None, **options: Any) -> Any:
        """Load the backbone of a checkpoint; arguments and errors as in `load_backbone`."""
        if drop_path_rate is not None:
            config.drop_path_rate = float(drop_path_rate)
        model = self.read(source, config, options)
        # The source is kept in `backbone_source`; here a local path would end up in every saved configuration.
        model.config.name_or_path = ""
        if model.embeddings.mask_token is None:
            model.embeddings.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size))
        return model

    def read(self, source: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> Any:
        """The transformers model in float32 with all weights from the checkpoint; a missing mask token is zero."""
        # Any: with output_loading_info it returns a pair, which its annotations omit.
        from_pretrained: Any = self.model_class.from_pretrained
        with reading_model(source), silence_transformers():
            model, info = from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **self.load_options,
                **options,
            )
        left_over = [] if self.on_top is None else [k for k in info["unexpected_keys"] if not k.startswith(self.on_top)]
        if left_over:
            raise ModelError(
                f"the checkpoint holds {len(left_over)} weights that its configuration has no place for:"
                f" {min(left_over)}",
                where=source,
                remedy="Give the configuration that the weights were saved with",
            )
        missing = [key for key in info["missing_keys"] if not any(part in key for part in _MAY_BE_MISSING)]
        require_coverage(source, missing, total=len(model.state_dict()))
        if any("mask_token" in key for key in info["missing_keys"]):
            with torch.no_grad():
                model.embeddings.mask_token.zero_()
        require_finite(source, model.state_dict())
        return model

    def image_statistics(self, source: str, hub_options: Mapping[str, Any]) -> dict[str, float]:
        """`image_mean` and `image_std` of a checkpoint, where they differ from the defaults of `BrainFoundConfig`."""
        return {}


_PREPROCESSOR_FILE = "preprocessor_config.json"
# The defaults of the transformers ViTImageProcessor.
_VIT_MEAN, _VIT_STD = 0.5, 0.5


class SupervisedViT(Family):
    """Google's ViT and DeiT without distillation (model type "vit"), converted to Dinov2.

    Both are pre-norm transformers. Dinov2 scales each residual branch by a learned vector and a supervised ViT does
    not: with that scale set to one, both compute the same function. Both position grids are resampled alike (bicubic,
    by size; for the supervised ViT with `interpolate_pos_encoding=True`).
    """

    becomes: ClassVar[str | None] = "dinov2"
    load_options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False, "use_mask_token": True}
    # The classifier, the pooler, SimMIM's pixel decoder.
    on_top: ClassVar[tuple[str, ...] | None] = ("classifier.", "pooler.", "decoder.", "vit.pooler.")

    def resolve_config(self, source: str, config: PreTrainedConfig) -> PreTrainedConfig:
        _require_convertible(source, config)
        return _to_dinov2_config(config)

    def load(self, source: str, config: PreTrainedConfig, drop_path_rate: float | None, **options: Any) -> Any:
        get_patch_size(config)
        _require_convertible(source, config)
        if config.attention_probs_dropout_prob:
            warnings.warn(
                f"{source}: config.attention_probs_dropout_prob {config.attention_probs_dropout_prob:g} is taken as 0:"
                " it is no part of what the weights compute, and training here has no dropout of attention",
                stacklevel=3,
            )
        return _to_dinov2(self.read(source, config, options), drop_path_rate)

    def image_statistics(self, source: str, hub_options: Mapping[str, Any]) -> dict[str, float]:
        """The statistics of the preprocessor, averaged over RGB, because contrasts are not colours."""
        path = _find_preprocessor(source, hub_options)
        if path is None:
            return {"image_mean": _VIT_MEAN, "image_std": _VIT_STD}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not content.get("do_normalize", True):
                return {"image_mean": 0.0, "image_std": 1.0}
            mean = _channel_mean(content.get("image_mean", _VIT_MEAN))
            std = _channel_mean(content.get("image_std", _VIT_STD))
        except (ValueError, TypeError, AttributeError) as error:
            raise _preprocessor_error(source, str(error)) from error
        if not std > 0:
            raise _preprocessor_error(source, f"image_std {std:g} is not positive")
        return {"image_mean": mean, "image_std": std}


def _require_convertible(source: str, config: PreTrainedConfig) -> None:
    """Refuse a ViT whose function a Dinov2 cannot compute."""
    width, heads, mlp_width = config.hidden_size, config.num_attention_heads, config.intermediate_size
    head_width, is_square = getattr(config, "head_dim", None), len(set(get_image_size(config))) == 1
    # (field, value, whether it fits, expected)
    rules = (
        ("hidden_act", config.hidden_act, config.hidden_act == "gelu", "gelu"),
        ("hidden_dropout_prob", config.hidden_dropout_prob, not config.hidden_dropout_prob, "0"),
        ("intermediate_size", mlp_width, mlp_width % width == 0, f"a multiple of hidden_size={width}"),
        ("hidden_size", width, width % heads == 0, f"a multiple of num_attention_heads={heads}"),
        (
            "head_dim",
            head_width,
            head_width in (None, width // heads),
            f"hidden_size / num_attention_heads = {width // heads}",
        ),
        ("image_size", config.image_size, is_square, "a square, for its position grid to be resampled"),
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


def _to_dinov2_config(config: PreTrainedConfig, drop_path_rate: float | None = None) -> PreTrainedConfig:
    """The configuration of the Dinov2 model with the same function as a supervised ViT."""
    same = "hidden_size num_hidden_layers num_attention_heads hidden_act initializer_range layer_norm_eps image_size"
    return Dinov2Config(
        **{name: getattr(config, name) for name in f"{same} patch_size num_channels qkv_bias".split()},
        mlp_ratio=config.intermediate_size // config.hidden_size,
        attention_probs_dropout_prob=0.0,  # packed attention has no dropout; `load` warns about it
        layerscale_value=1.0,
        drop_path_rate=float(drop_path_rate or 0.0),
    )


def _to_dinov2(vit: PreTrainedModel, drop_path_rate: float | None) -> PreTrainedModel:
    """The weights of a ViT (with a mask token, without a pooler) in a Dinov2 model, with layer scales of one."""
    config = vit.config
    weights = {_to_dinov2_name(name): tensor.detach().clone() for name, tensor in vit.state_dict().items()}
    weights["embeddings.mask_token"] = weights["embeddings.mask_token"].flatten(0, 1)
    for layer in range(config.num_hidden_layers):
        for scale in ("layer_scale1", "layer_scale2"):
            weights[f"encoder.layer.{layer}.{scale}.lambda1"] = torch.ones(config.hidden_size)
    converted = _to_dinov2_config(config, drop_path_rate)
    # On the meta device: every weight is assigned below, so none needs initialising.
    with torch.device("meta"):
        model = AutoModel.from_config(converted, attn_implementation=config._attn_implementation)
    model.load_state_dict(weights, assign=True)
    mark_as_loaded(model)
    return model.eval()


def _to_dinov2_name(name: str) -> str:
    if name.startswith("layers."):
        name = f"encoder.layer.{name.removeprefix('layers.')}"
    return name.replace("layernorm_before.", "norm1.").replace("layernorm_after.", "norm2.")


def _find_preprocessor(source: str, hub_options: Mapping[str, Any]) -> Path | None:
    try:
        return find_file(source, _PREPROCESSOR_FILE, **hub_options)
    except OSError:
        warnings.warn(
            f"{_PREPROCESSOR_FILE} of {source} cannot be fetched: its images are taken to have been normalised with"
            f" mean {_VIT_MEAN:g} and standard deviation {_VIT_STD:g}, as is usual for a ViT",
            stacklevel=4,
        )
        return None


def _channel_mean(value: float | list[float]) -> float:
    """The mean over channels, rounded to hide floating-point noise."""
    return round(fmean(float(number) for number in (value if isinstance(value, list) else [value])), 6)


def _preprocessor_error(source: str, why: str) -> ModelError:
    return ModelError(
        f"{_PREPROCESSOR_FILE} cannot be used: {why[:200]}",
        where=source,
        remedy="Correct the file, or set image_mean and image_std",
    )


FAMILIES: dict[str, Family] = {
    "dinov2": Family(Dinov2Model),
    "dinov2_with_registers": Family(Dinov2WithRegistersModel),
    "vit": SupervisedViT(ViTModel),
}
"""Model type → family of every ViT that a model can start from."""
SUPPORTED_BACKBONES = tuple(name for name, family in FAMILIES.items() if family.becomes is None)
"""The model types that a BrainFound model can have as `backbone_config`; the first one is the default."""


def load_backbone(
    id_or_folder: str | Path,
    *,
    drop_path_rate: float | None = None,
    attn_implementation: str | None = None,
    **hub_options: Any,
) -> PreTrainedModel:
    """Load a ViT from the Hub or a folder, with float32 weights; arguments as in `from_backbone`.

    A supervised ViT (model type "vit") is returned as a Dinov2 model that computes the same function.

    Raises:
        ModelError: if it cannot be read, belongs to an unsupported family, or lacks weights (the error names them).
    """
    source, config, family = _find_family(id_or_folder, hub_options)
    return family.load(source, config, drop_path_rate, attn_implementation=attn_implementation, **hub_options)


def load_backbone_config(id_or_folder: str | Path, **hub_options: Any) -> PreTrainedConfig:
    """The configuration of the model that `load_backbone` returns, without its weights."""
    source, config, family = _find_family(id_or_folder, hub_options)
    return family.resolve_config(source, config)


def load_image_statistics(id_or_folder: str | Path, **hub_options: Any) -> dict[str, float]:
    """`image_mean` and `image_std` of a checkpoint, where they differ from the defaults of `BrainFoundConfig`."""
    source, _, family = _find_family(id_or_folder, hub_options)
    return family.image_statistics(source, hub_options)


def _find_family(id_or_folder: str | Path, hub_options: dict[str, Any]) -> tuple[str, PreTrainedConfig, Family]:
    source = str(id_or_folder)
    require_findable(source)
    with reading_model(source):
        config = AutoConfig.from_pretrained(source, **hub_options)
    if config.model_type not in FAMILIES:
        is_ours = config.model_type == "brainfound"
        raise ModelError(
            f"a {config.model_type!r} model is not a supported backbone",
            where=source,
            expected=f"one of {', '.join(FAMILIES)}",
            remedy="Call from_pretrained of the same class instead" if is_ours else "Give the id of a DINOv2 model",
        )
    return source, config, FAMILIES[config.model_type]


def mark_as_loaded(module: nn.Module) -> None:
    """Set the flag that makes the transformers `post_init` leave loaded weights alone."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]


def get_patch_size(config: PreTrainedConfig) -> int:
    """The side of the backbone's square patches, in pixels."""
    rows, columns = _pair(config.patch_size)
    if rows != columns:
        raise ModelError("patches must be square", where="backbone_config.patch_size", got=config.patch_size)
    return rows


def get_image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that the position grid was made for."""
    return _pair(config.image_size)


def _pair(value: int | Iterable[int]) -> tuple[int, int]:
    rows, columns = value if isinstance(value, Iterable) else (value, value)
    return int(rows), int(columns)
