"""The base of all families of 2-D ViTs: how a checkpoint is read, and where the parts of the model are.

A new family is one line of `brainfound.models.backbones.FAMILIES`; where it differs from DINOv2, it is a subclass of
`Family` in a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from brainfound.errors import ModelError
from brainfound.models.hub import LOAD_FAILURES, require_coverage, silence_transformers, unreadable_model_error

# A pretrained ViT may lack these: masking starts from zeros, and no pooler is used.
_MAY_BE_MISSING = ("mask_token", "pooler.")


class Family:
    """A family of 2-D ViTs of the library. The defaults are those of DINOv2 (arXiv 2304.07193).

    Args:
        model_class: the library's class of the plain encoder.
    """

    becomes: ClassVar[str | None] = None
    """The model type that its checkpoints are converted to; None: no conversion."""
    load_options: ClassVar[dict[str, Any]] = {}
    """Further arguments of the library's `from_pretrained`."""
    on_top: ClassVar[tuple[str, ...] | None] = None
    """Prefixes of the weights above the encoder that a file may hold; others are refused. None: no check."""
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
        """The configuration of the backbone that `load` returns.

        Raises:
            ModelError: if a ViT of this configuration cannot be used.
        """
        return config

    def load(
        self,
        source: str,
        config: PreTrainedConfig,
        drop_path_rate: float | None,
        attn_implementation: str | None,
        hub_options: Mapping[str, Any],
    ) -> PreTrainedModel:
        """The backbone of a checkpoint; arguments and errors as `brainfound.models.backbones.load_backbone`."""
        if drop_path_rate is not None:
            config.drop_path_rate = float(drop_path_rate)
        model = self.read(source, config, attn_implementation, hub_options)
        # Kept in `backbone_source`; here it would travel inside every saved configuration as a path of this machine.
        model.config.name_or_path = ""
        if model.embeddings.mask_token is None:
            model.embeddings.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size))
        return model

    def read(
        self, source: str, config: PreTrainedConfig, attn_implementation: str | None, hub_options: Mapping[str, Any]
    ) -> Any:
        """The library's model in float32 with every weight from its file; a mask token that it lacks is zero.

        Raises:
            ModelError: if the file cannot be read, lacks weights, or holds others (the keys are named).
        """
        # With the loading info the library returns two values, which its types omit.
        from_pretrained: Any = self.model_class.from_pretrained
        try:
            with silence_transformers():
                model, info = from_pretrained(
                    source,
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    attn_implementation=attn_implementation,
                    output_loading_info=True,
                    **self.load_options,
                    **hub_options,
                )
        except LOAD_FAILURES as error:
            raise unreadable_model_error(source, error) from error
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
        return model

    def image_statistics(self, source: str, hub_options: Mapping[str, Any]) -> dict[str, float]:
        """`image_mean` and `image_std` of a checkpoint, where they are not the default of `BrainFoundConfig`.

        Raises:
            ModelError: if the preprocessor's file cannot be understood.
        """
        return {}


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
    if isinstance(value, Iterable):
        first, second = value
        return int(first), int(second)
    return int(value), int(value)
