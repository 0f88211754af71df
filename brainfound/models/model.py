"""BrainFound models: slices → slice encoder → volume, with the conventions of the transformers library.

Axis legend: B volumes, S slices, C contrasts, H W pixels, N slices of a batch in a row, P patches, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from brainfound.errors import ModelError
from brainfound.models.aggregators import TransformerAggregator, build_aggregator
from brainfound.models.backbone import load_backbone
from brainfound.models.configuration import BrainFoundConfig, require_known_fields
from brainfound.models.encoder import SliceEncoder, SliceEncoding
from brainfound.models.loading import load_checked

Pixels = Float[Tensor, "volumes slices contrasts height width"] | UInt8[Tensor, "volumes slices contrasts height width"]


@dataclass
class BrainFoundModelOutput(ModelOutput):
    """What `BrainFoundModel` gives."""

    volume_embedding: Float[Tensor, "volumes width"] | None = None
    slice_embeddings: Float[Tensor, "volumes slices width"] | None = None
    """The backbone's normalised CLS tokens; zeros at padded slices."""
    slice_weights: Float[Tensor, "volumes slices"] | None = None
    """What each slice weighed in the volume; None where the aggregator has no such weights."""
    patch_embeddings: Float[Tensor, "volumes slices patches width"] | None = None
    """On request: the backbone's normalised patch tokens; zeros at padded slices."""


class BrainFoundPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation that all BrainFound models share."""

    config_class = BrainFoundConfig
    config: BrainFoundConfig
    base_model_prefix = "brainfound"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: BrainFoundConfig) -> None:
        # Fields may have been set one by one since the configuration was made.
        config.require_valid()
        super().__init__(config)

    @classmethod
    def from_backbone(
        cls,
        id_or_folder: str | Path,
        contrasts: Sequence[str] = ("T1w", "T2w", "FLAIR"),
        *,
        drop_path_rate: float | None = None,
        hub_options: dict[str, Any] | None = None,
        attn_implementation: str | None = None,
        **config: Any,
    ) -> Self:
        """Start from a plain 2-D ViT.

        With three contrasts, each slice's embedding equals the Hub model's CLS token to the last bit.

        Args:
            id_or_folder: a Hub id (`facebook/dinov2-small`) or a folder with config.json and safetensors.
            contrasts: the contrasts of axis C, in order.
            drop_path_rate: stochastic depth while training; None keeps the checkpoint's.
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only`.
            attn_implementation: "eager", "sdpa" or "flash_attention_2"; None lets the library choose.
            config: fields of `BrainFoundConfig`.

        Raises:
            ModelError: if the backbone cannot be used.
            UsageError: if a configuration argument is unknown.
        """
        require_known_fields(config)
        backbone = load_backbone(
            id_or_folder, drop_path_rate=drop_path_rate, attn_implementation=attn_implementation, **(hub_options or {})
        )
        own = BrainFoundConfig(
            backbone_config=backbone.config,
            backbone_source=str(id_or_folder),
            contrasts=contrasts,
            attn_implementation=backbone.config._attn_implementation,
            **config,
        )
        return cls(own, backbone=backbone).eval()

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, *args: Any, **options: Any) -> Self:  # type: ignore[override]
        """Load a saved BrainFound model, whole or not at all.

        As in the library, further keyword arguments set fields of the configuration. A head class may
        start from a saved `BrainFoundModel`: then its head is new. Weights are float32 unless `dtype` is given.

        Raises:
            ModelError: if the model cannot be read, or weights are missing or left over (the keys are named).
        """
        return load_checked(cls, super().from_pretrained, str(id_or_folder), args, options)

    def get_input_embeddings(self) -> nn.Module:
        encoder = self.encoder if isinstance(self, BrainFoundModel) else self.brainfound.encoder
        return encoder.backbone.embeddings.patch_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Reached by the aggregator, decoder and head only: the backbone is a model of its own and has its own.
        super()._init_weights(module)
        if isinstance(module, TransformerAggregator):
            init.trunc_normal_(module.class_token, std=self.config.initializer_range)


class BrainFoundModel(BrainFoundPreTrainedModel):
    """Slices → slice embeddings → volume embedding.

    Args:
        config: what the model is made of.
        backbone: a loaded RGB ViT to start from; `from_backbone` gives it.
    """

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = SliceEncoder(config, backbone)
        self.aggregator = build_aggregator(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Pixels,
        contrast_mask: Bool[Tensor, "volumes contrasts"] | None = None,
        slice_mask: Bool[Tensor, "volumes slices"] | None = None,
        positions_mm: Float[Tensor, "volumes slices"] | None = None,
        output_patch_embeddings: bool = False,
        return_dict: bool | None = None,
    ) -> BrainFoundModelOutput | tuple[Tensor, ...]:
        """Embed volumes.

        Args:
            pixel_values: 0–1, or uint8.
            contrast_mask: True where a volume has the contrast; None: all are present.
            slice_mask: True where a slice is valid, False where it is padding; None: all are valid.
            positions_mm: position of each slice along the stack; None: 1 mm apart, centred.
            output_patch_embeddings: also return the patch tokens.
            return_dict: False returns a tuple.

        Raises:
            ModelError: if shapes do not fit, or a volume has no valid slice or no contrast.
        """
        batch = SliceBatch(self, pixel_values, contrast_mask, slice_mask, positions_mm)
        cls_tokens, patches = [], []
        for encoding in batch.encode():
            cls_tokens.append(encoding.cls)
            if output_patch_embeddings:
                patches.append(encoding.patches)
        slice_embeddings = batch.scatter(torch.cat(cls_tokens))
        aggregation = self.aggregator(slice_embeddings, batch.slice_mask, positions_mm)
        output = BrainFoundModelOutput(
            volume_embedding=aggregation.embedding,
            slice_embeddings=slice_embeddings,
            slice_weights=aggregation.weights,
            patch_embeddings=batch.scatter(torch.cat(patches)) if output_patch_embeddings else None,
        )
        return output.to_tuple() if return_dict is False else output


class SliceBatch:
    """The valid slices of a batch of volumes: checked, encoded in chunks, and put back in their places.

    Padding is never encoded, so that it costs nothing and cannot change a result.
    """

    def __init__(
        self,
        model: BrainFoundModel,
        pixel_values: Tensor,
        contrast_mask: Tensor | None,
        slice_mask: Tensor | None,
        positions_mm: Tensor | None = None,
    ) -> None:
        self.encoder: SliceEncoder = model.encoder
        self.chunk = model.config.slice_chunk
        if pixel_values.dim() != 5:
            raise ModelError(
                "pixel_values must have five axes",
                got=f"shape {tuple(pixel_values.shape)}",
                expected="(volumes, slices, contrasts, height, width)",
                remedy="Add the missing axis, for one volume with pixel_values[None]",
            )
        self.encoder.require_shape(pixel_values)
        if pixel_values.dtype != torch.uint8 and not pixel_values.is_floating_point():
            raise ModelError("pixel_values must be float in 0–1 or uint8", got=pixel_values.dtype)
        num_volumes, num_slices, num_contrasts = pixel_values.shape[:3]
        self.volumes_slices = (num_volumes, num_slices)
        self.contrast_mask = _as_mask("contrast_mask", contrast_mask, (num_volumes, num_contrasts))
        self.slice_mask = _as_mask("slice_mask", slice_mask, self.volumes_slices)
        if positions_mm is not None and tuple(positions_mm.shape) != self.volumes_slices:
            raise _wrong_shape("positions_mm", positions_mm, self.volumes_slices)
        self.pixels = pixel_values.flatten(0, 1)
        self.index = None if self.slice_mask is None else self.slice_mask.flatten().nonzero()[:, 0]
        self._require_something_to_see()

    def encode(self, layers: Sequence[int] = ()) -> Iterator[SliceEncoding]:
        """Encode the valid slices, at most `config.slice_chunk` at once."""
        num_slices_each = self.volumes_slices[1]
        for rows in self._rows().split(self.chunk):
            # All slices valid and in one chunk is the common case, and needs no copy of the pixels.
            whole = self.index is None and len(rows) == len(self.pixels)
            contrast_mask = None if self.contrast_mask is None else self.contrast_mask[rows // num_slices_each]
            yield self.encoder(self.pixels if whole else self.pixels[rows], contrast_mask, layers=layers)

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the valid slices (N, …) → (B, S, …), zeros at padded slices."""
        if self.index is not None:
            num_all = self.volumes_slices[0] * self.volumes_slices[1]
            values = values.new_zeros(num_all, *values.shape[1:]).index_copy(0, self.index, values)
        return values.unflatten(0, self.volumes_slices)

    def select(self, values: Tensor) -> Tensor:
        """Values (B, S, …) → those of the valid slices (N, …)."""
        values = values.flatten(0, 1)
        return values if self.index is None else values[self.index]

    def slices_per_volume(self) -> list[int]:
        """The number of valid slices of each volume."""
        num_volumes, num_slices = self.volumes_slices
        return [num_slices] * num_volumes if self.slice_mask is None else self.slice_mask.sum(dim=1).tolist()

    def _rows(self) -> Tensor:
        return torch.arange(len(self.pixels), device=self.pixels.device) if self.index is None else self.index

    def _require_something_to_see(self) -> None:
        if not all(self.volumes_slices) or (self.slice_mask is not None and not self.slice_mask.any(dim=1).all()):
            raise ModelError(
                "a volume has no valid slice", where="slice_mask", remedy="Leave such volumes out of the batch"
            )
        if self.contrast_mask is not None and not self.contrast_mask.any(dim=1).all():
            raise ModelError(
                "a volume has no contrast", where="contrast_mask", remedy="Leave such volumes out of the batch"
            )


def _as_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise _wrong_shape(name, mask, shape)
    return mask.bool()


def _wrong_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> ModelError:
    return ModelError(f"{name} does not fit pixel_values", got=f"shape {tuple(value.shape)}", expected=f"shape {shape}")
