"""BrainFound models: slices → slice encoder → volume, with the conventions of the transformers library.

Axis legend: B volumes, S slices, C contrasts, H W pixels, N slices of a batch in a row, P patches, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from brainfound.models.backbones import load_backbone, load_image_statistics
from brainfound.models.configuration import BrainFoundConfig, require_known_fields
from brainfound.models.decoders import SliceMixing, build_decoder
from brainfound.models.encoder import SliceEncoder
from brainfound.models.heads import (
    ClassificationHead,
    RegressionHead,
    RegressionHeadOutput,
    bin_edges,
    bins_loss,
    classification_loss,
    compute_segmentation_loss,
    regression_loss,
)
from brainfound.models.loading import load_checked
from brainfound.models.valid_slices import ValidSlices, shape_error, validate_embeddings

Pixels = Float[Tensor, "volumes slices contrasts height width"] | UInt8[Tensor, "volumes slices contrasts height width"]


@dataclass
class BrainFoundModelOutput(ModelOutput):
    """Output of `BrainFoundModel`."""

    volume_embedding: Float[Tensor, "volumes width"] | None = None
    slice_embeddings: Float[Tensor, "volumes slices width"] | None = None
    """By `config.slice_features`, by default the backbone's normalised CLS tokens; zeros at padded slices."""
    slice_weights: Float[Tensor, "volumes slices"] | None = None
    """The weight of each slice in the volume; None where the aggregator has no weights."""
    patch_embeddings: Float[Tensor, "volumes slices patches width"] | None = None
    """On request: the backbone's normalised patch tokens; zeros at padded slices."""


class BrainFoundPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation that all BrainFound models share."""

    config_class = BrainFoundConfig
    config: BrainFoundConfig
    base_model_prefix = "brainfound"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    encoder: SliceEncoder
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        # Fields may have been set one by one since the configuration was created.
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
        """Start from a plain 2-D ViT of one of `brainfound.models.backbones.FAMILIES`.

        With three contrasts, each slice's embedding equals the Hub model's CLS token to the last bit. A supervised
        ViT is converted to the architecture of DINOv2, and its images are normalised as its preprocessor says.

        Args:
            id_or_folder: a Hub id (`facebook/dinov2-small`, `google/vit-base-patch16-224`) or a folder with
                config.json and safetensors.
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
        # Read first: a new configuration resets the kernel of the ones inside it, and kernels differ in the last bit.
        attention = backbone.config._attn_implementation
        fields = {**load_image_statistics(id_or_folder, **(hub_options or {})), **config}
        own = BrainFoundConfig(
            backbone_config=backbone.config,
            # A folder of this machine means nothing elsewhere, and may name people.
            backbone_source=None if Path(id_or_folder).exists() else str(id_or_folder),
            contrasts=contrasts,
            **fields,
        )
        own._attn_implementation = attention
        return cls(own, backbone=backbone).eval()

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, *args: Any, **options: Any) -> Self:  # type: ignore[override]
        """Load a saved BrainFound model, whole or not at all.

        As in the library, further keyword arguments set fields of the configuration. A head class may start from a
        saved `BrainFoundModel`: then its head is new. Another `stem` starts from the kernels of the saved one, as it
        would from those of a plain ViT. Weights are float32 unless `dtype` is given.

        A saved head with other outputs than the requested ones (another number of classes, another `regression_head`,
        other bins) is refused, even where its shape fits. With `ignore_mismatched_sizes=True` its last layer begins
        anew, with a warning.

        Raises:
            ModelError: if the model cannot be read, weights are missing, left over or of another shape (the keys are
                named), or the saved head has other outputs.
        """
        return load_checked(cls, super().from_pretrained, str(id_or_folder), args, options)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.backbone.embeddings.patch_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called for the modules of aggregator, decoder and head that hold weights: the backbone has its own method.
        super()._init_weights(module)
        if isinstance(module, TransformerAggregator):
            init.trunc_normal_(module.class_token, std=self.config.initializer_range)
        elif isinstance(module, SliceMixing):
            init.zeros_(module.weight)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # Decoder convolutions feed group norms; a fixed 0.02 would make narrow decoders start silent.
            init.kaiming_normal_(module.weight, nonlinearity="relu")


class BrainFoundModel(BrainFoundPreTrainedModel):
    """Slices → slice embeddings → volume embedding.

    Args:
        config: the configuration.
        backbone: a loaded RGB ViT to start from; `from_backbone` loads it.
    """

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = SliceEncoder(config, backbone)
        self.aggregator = build_aggregator(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Pixels | None = None,
        contrast_mask: Bool[Tensor, "volumes contrasts"] | None = None,
        slice_mask: Bool[Tensor, "volumes slices"] | None = None,
        positions_mm: Float[Tensor, "volumes slices"] | None = None,
        output_patch_embeddings: bool = False,
        return_dict: bool | None = None,
        slice_embeddings: Float[Tensor, "volumes slices width"] | None = None,
    ) -> BrainFoundModelOutput | tuple[Tensor, ...]:
        """Embed volumes.

        Args:
            pixel_values: 0–1, or uint8.
            contrast_mask: True where a volume has the contrast; None: all are present.
            slice_mask: True where a slice is valid, False where it is padding; None: all are valid.
            positions_mm: position of each slice along the stack; None: 1 mm apart, centred.
            output_patch_embeddings: also return the patch tokens.
            return_dict: False returns a tuple.
            slice_embeddings: in place of `pixel_values`, the slice embeddings of an earlier pass of this model.

        Raises:
            ModelError: if shapes do not fit, a volume has no valid slice or no contrast, or both or neither of
                `pixel_values` and `slice_embeddings` are given.
        """
        if slice_embeddings is not None:
            self._require_only_embeddings(pixel_values, contrast_mask, output_patch_embeddings)
            slice_mask = validate_embeddings(slice_embeddings, self.config.embedding_size, slice_mask, positions_mm)
            aggregation = self.aggregator(slice_embeddings, slice_mask, positions_mm)
            given = BrainFoundModelOutput(aggregation.embedding, slice_embeddings, aggregation.weights)
            return given.to_tuple() if return_dict is False else given
        if pixel_values is None:
            raise ModelError("there is nothing to embed", expected="pixel_values, or slice_embeddings")
        batch = ValidSlices(
            self.encoder, self.config.slice_chunk, pixel_values, contrast_mask, slice_mask, positions_mm
        )
        embeddings, patches = [], []
        for encoding in batch.encode():
            embeddings.append(encoding.embedding(self.config.slice_features))
            if output_patch_embeddings:
                patches.append(encoding.patches)
        slice_embeddings = batch.scatter(torch.cat(embeddings))
        aggregation = self.aggregator(slice_embeddings, batch.slice_mask, positions_mm)
        output = BrainFoundModelOutput(
            volume_embedding=aggregation.embedding,
            slice_embeddings=slice_embeddings,
            slice_weights=aggregation.weights,
            patch_embeddings=batch.scatter(torch.cat(patches)) if output_patch_embeddings else None,
        )
        return output.to_tuple() if return_dict is False else output

    @staticmethod
    def _require_only_embeddings(pixel_values: Any, contrast_mask: Any, output_patch_embeddings: bool) -> None:
        if pixel_values is not None or contrast_mask is not None or output_patch_embeddings:
            raise ModelError(
                "slice_embeddings replace images",
                got="pixel_values, contrast_mask or output_patch_embeddings as well",
                remedy="Give slice_embeddings with slice_mask and positions_mm only",
            )


@dataclass
class BrainFoundClassifierOutput(ModelOutput):
    """Output of `BrainFoundForClassification`."""

    loss: Tensor | None = None
    logits: Float[Tensor, "volumes classes"] | None = None
    volume_embedding: Float[Tensor, "volumes width"] | None = None
    slice_embeddings: Float[Tensor, "volumes slices width"] | None = None
    slice_weights: Float[Tensor, "volumes slices"] | None = None


@dataclass
class BrainFoundRegressionOutput(ModelOutput):
    """Output of `BrainFoundForRegression`."""

    loss: Tensor | None = None
    """In standardised units."""
    predictions: Float[Tensor, "volumes"] | None = None
    """In the unit of the target."""
    prediction_std: Float[Tensor, "volumes"] | None = None
    """In the unit of the target; None with `config.regression_head = "point"`."""
    volume_embedding: Float[Tensor, "volumes width"] | None = None
    slice_embeddings: Float[Tensor, "volumes slices width"] | None = None
    slice_weights: Float[Tensor, "volumes slices"] | None = None
    bin_probabilities: Float[Tensor, "volumes bins"] | None = None
    """With `config.regression_head = "bins"`: the distribution over equal bins of `config.regression_range`."""


@dataclass
class BrainFoundSegmentationOutput(ModelOutput):
    """Output of `BrainFoundForSegmentation`."""

    loss: Tensor | None = None
    logits: Float[Tensor, "volumes slices classes height width"] | None = None
    """Class scores of every pixel; zeros at padded slices."""


class _BrainFoundModelWithHead(BrainFoundPreTrainedModel):
    """A volume model with a head on top."""

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.brainfound = BrainFoundModel(config, backbone)

    @property
    def encoder(self) -> SliceEncoder:  # type: ignore[override]
        return self.brainfound.encoder


class BrainFoundForClassification(_BrainFoundModelWithHead):
    """One label per volume, or several with `config.problem_type = "multi_label_classification"`."""

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.head = ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Pixels | None = None,
        contrast_mask: Bool[Tensor, "volumes contrasts"] | None = None,
        slice_mask: Bool[Tensor, "volumes slices"] | None = None,
        positions_mm: Float[Tensor, "volumes slices"] | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        slice_embeddings: Float[Tensor, "volumes slices width"] | None = None,
    ) -> BrainFoundClassifierOutput | tuple[Tensor, ...]:
        """Class scores of volumes. Inputs as for `BrainFoundModel`; `labels` (B,), or (B, K) for multi-label."""
        volume = self.brainfound(
            pixel_values, contrast_mask, slice_mask, positions_mm, slice_embeddings=slice_embeddings
        )
        logits = self.head(volume.volume_embedding)
        loss = None
        if labels is not None:
            config = self.config
            loss = classification_loss(
                logits, labels, config.problem_type, config.class_weights, config.classification_focal_gamma
            )
        output = BrainFoundClassifierOutput(
            loss=loss,
            logits=logits,
            volume_embedding=volume.volume_embedding,
            slice_embeddings=volume.slice_embeddings,
            slice_weights=volume.slice_weights,
        )
        return output.to_tuple() if return_dict is False else output


class BrainFoundForRegression(_BrainFoundModelWithHead):
    """One number per volume, in the unit of the target (`config.target_mean`, `config.target_std`)."""

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.head = RegressionHead(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Pixels | None = None,
        contrast_mask: Bool[Tensor, "volumes contrasts"] | None = None,
        slice_mask: Bool[Tensor, "volumes slices"] | None = None,
        positions_mm: Float[Tensor, "volumes slices"] | None = None,
        labels: Float[Tensor, "volumes"] | None = None,
        return_dict: bool | None = None,
        slice_embeddings: Float[Tensor, "volumes slices width"] | None = None,
    ) -> BrainFoundRegressionOutput | tuple[Tensor, ...]:
        """Predictions for volumes. Inputs as for `BrainFoundModel`; `labels` (B,) in the unit of the target."""
        volume = self.brainfound(
            pixel_values, contrast_mask, slice_mask, positions_mm, slice_embeddings=slice_embeddings
        )
        scores = self.head(volume.volume_embedding)
        center, scale = self.config.target_mean, self.config.target_std
        loss = None
        if labels is not None:
            loss = self._loss(scores, (labels.float() - center) / scale)
        output = BrainFoundRegressionOutput(
            loss=loss,
            predictions=scores.mean * scale + center,
            prediction_std=None if scores.std is None else scores.std * scale,
            bin_probabilities=None if scores.bin_logits is None else scores.bin_logits.softmax(dim=1),
            volume_embedding=volume.volume_embedding,
            slice_embeddings=volume.slice_embeddings,
            slice_weights=volume.slice_weights,
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(self, scores: RegressionHeadOutput, target: Float[Tensor, "volumes"]) -> Tensor:
        config = self.config
        if scores.bin_logits is not None:
            edges = bin_edges(config).to(target.device)
            return bins_loss(scores.bin_logits, target, edges, config.regression_label_width)
        return regression_loss(scores.mean, scores.log_variance, target, config.regression_loss, config.huber_delta)


class BrainFoundForSegmentation(_BrainFoundModelWithHead):
    """One class per pixel of every slice, class 0 the background; or with `config.overlapping_labels` any of K labels.

    `labels` are (B, S, H, W), or (B, S, K, H, W) of 0 and 1 where they overlap; −100 where unknown.
    """

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.decoder = build_decoder(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Pixels,
        contrast_mask: Bool[Tensor, "volumes contrasts"] | None = None,
        slice_mask: Bool[Tensor, "volumes slices"] | None = None,
        positions_mm: Float[Tensor, "volumes slices"] | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> BrainFoundSegmentationOutput | tuple[Tensor, ...]:
        """Class scores of pixels. Inputs as for `BrainFoundModel`; `labels` (B, S, H, W) or (B, S, K, H, W)."""
        batch = ValidSlices(
            self.encoder, self.config.slice_chunk, pixel_values, contrast_mask, slice_mask, positions_mm
        )
        height, width = pixel_values.shape[-2:]
        per_pixel = (self.config.num_classes,) if self.config.overlapping_labels else ()
        expected = (*pixel_values.shape[:2], *per_pixel, height, width)
        if labels is not None and tuple(labels.shape) != expected:
            raise shape_error("labels", labels, expected)
        grid = self.encoder.grid(height, width)
        fused = [
            self.decoder.fuse(encoding.hidden, grid) for encoding in batch.encode(self.config.resolved_decoder_layers)
        ]
        slices_per_volume = batch.slices_per_volume()
        pixels = presence = None
        if self.decoder.reads_image:
            pixels = batch.select(pixel_values)
            if batch.contrast_mask is not None:
                counts = torch.tensor(slices_per_volume, device=batch.contrast_mask.device)
                presence = batch.contrast_mask.repeat_interleave(counts, dim=0)
        logits = self.decoder(torch.cat(fused), slices_per_volume, (height, width), pixels, presence)
        output = BrainFoundSegmentationOutput(
            loss=None if labels is None else compute_segmentation_loss(self.config, logits, batch.select(labels)),
            logits=batch.scatter(logits),
        )
        return output.to_tuple() if return_dict is False else output
