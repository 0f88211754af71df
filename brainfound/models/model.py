"""BrainFound models: slices → slice encoder → volume, with the conventions of the transformers library.

Axis legend: B volumes, S slices, C contrasts, H W pixels, N valid slices of a batch, P patches, D width, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from brainfound.errors import ModelError
from brainfound.models.aggregators import AGGREGATORS, TransformerAggregator
from brainfound.models.backbones import load_backbone, load_image_statistics
from brainfound.models.configuration import BrainFoundConfig, require_known_fields
from brainfound.models.decoders import DECODERS, SliceMixing
from brainfound.models.encoder import SliceEncoder, ValidSlices, require_same_shape, validate_embeddings
from brainfound.models.heads import ClassificationHead, RegressionHead, RegressionHeadOutput, bin_edges
from brainfound.models.loading import load_checked
from brainfound.models.losses import bins_loss, classification_loss, compute_segmentation_loss, regression_loss

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
        ViT is converted to the architecture of DINOv2, and its images are normalised as its preprocessor specifies.

        Args:
            id_or_folder: a Hub id (`facebook/dinov2-small`, `google/vit-base-patch16-224`), or a folder with
                config.json and safetensors.
            drop_path_rate: stochastic depth while training; None keeps the checkpoint's.
            hub_options: `revision`, `token`, `cache_dir`, `local_files_only`.
            attn_implementation: "eager", "sdpa" or "flash_attention_2"; None lets the library choose.
            config: fields of `BrainFoundConfig`.

        Raises:
            ModelError, UsageError: if the backbone cannot be used, or a configuration argument is unknown.
        """
        require_known_fields(config)
        hub_options = hub_options or {}
        backbone = load_backbone(
            id_or_folder, drop_path_rate=drop_path_rate, attn_implementation=attn_implementation, **hub_options
        )
        # Read first: creating a configuration resets the kernel of nested ones, and kernels differ in the last bit.
        attention = backbone.config._attn_implementation
        fields = {**load_image_statistics(id_or_folder, **hub_options), **config}
        own = BrainFoundConfig(
            backbone_config=backbone.config,
            # A local path means nothing elsewhere, and may contain names of people.
            backbone_source=None if Path(id_or_folder).exists() else str(id_or_folder),
            contrasts=contrasts,
            **fields,
        )
        own._attn_implementation = attention
        return cls(own, backbone=backbone).eval()

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, *args: Any, **options: Any) -> Self:  # type: ignore[override]
        """Load a saved BrainFound model, completely or not at all.

        As in transformers, keyword arguments set fields of the configuration. The head of a class that starts from a
        saved `BrainFoundModel` is new. A different `stem` starts from the kernels of the saved one. Weights are
        float32 unless `dtype` is given. A saved head with different outputs than requested (another number of
        classes, another `regression_head`, other bins) is refused, even if its shape fits; with
        `ignore_mismatched_sizes=True` its last layer is reinitialised with a warning.

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
    """Slices → slice embeddings → volume embedding; starts from a loaded RGB ViT or from new weights."""

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = SliceEncoder(config, backbone)
        self.aggregator = AGGREGATORS[config.aggregator](config)
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
            slice_mask: False where a slice is padding; None: all are valid.
            positions_mm: position of each slice along the stack; None: 1 mm apart, centred.
            slice_embeddings: in place of `pixel_values`, the slice embeddings of an earlier pass of this model.

        Raises:
            ModelError: if shapes do not fit, a volume has no valid slice or no contrast, or both or neither of
                `pixel_values` and `slice_embeddings` are given.
        """
        patch_embeddings = None
        if slice_embeddings is not None:
            if pixel_values is not None or contrast_mask is not None or output_patch_embeddings:
                raise ModelError(
                    "slice_embeddings replace images",
                    got="pixel_values, contrast_mask or output_patch_embeddings as well",
                    remedy="Give slice_embeddings with slice_mask and positions_mm only",
                )
            slice_mask = validate_embeddings(slice_embeddings, self.config.embedding_size, slice_mask, positions_mm)
        elif pixel_values is None:
            raise ModelError("there is nothing to embed", expected="pixel_values, or slice_embeddings")
        else:
            batch = ValidSlices(
                self.encoder, self.config.slice_chunk, pixel_values, contrast_mask, slice_mask, positions_mm
            )
            slice_mask, embeddings, patches = batch.slice_mask, [], []
            for encoding in batch.encode():
                embeddings.append(encoding.embedding(self.config.slice_features))
                if output_patch_embeddings:
                    patches.append(encoding.patches)
            slice_embeddings = batch.scatter(torch.cat(embeddings))
            patch_embeddings = batch.scatter(torch.cat(patches)) if output_patch_embeddings else None
        aggregation = self.aggregator(slice_embeddings, slice_mask, positions_mm)
        output = BrainFoundModelOutput(aggregation.embedding, slice_embeddings, aggregation.weights, patch_embeddings)
        return output.to_tuple() if return_dict is False else output


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


class _ModelWithHead(BrainFoundPreTrainedModel):
    """A volume model with a head on top."""

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.brainfound = BrainFoundModel(config, backbone)

    @property
    def encoder(self) -> SliceEncoder:  # type: ignore[override]
        return self.brainfound.encoder


class _VolumeModel(_ModelWithHead):
    """A model whose head reads the volume embedding."""

    head_class: ClassVar[type[nn.Module]]
    output_class: ClassVar[type[ModelOutput]]

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.head = self.head_class(config)
        self.post_init()

    @abstractmethod
    def answer(self, scores: Any, labels: Tensor | None) -> dict[str, Tensor | None]:
        """Turn the output of the head into predictions and, if there are labels, their loss."""

    def forward(
        self,
        pixel_values: Pixels | None = None,
        contrast_mask: Bool[Tensor, "volumes contrasts"] | None = None,
        slice_mask: Bool[Tensor, "volumes slices"] | None = None,
        positions_mm: Float[Tensor, "volumes slices"] | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        slice_embeddings: Float[Tensor, "volumes slices width"] | None = None,
    ) -> ModelOutput | tuple[Tensor, ...]:
        """Predictions for volumes, and with `labels` their loss. Other inputs as for `BrainFoundModel`."""
        volume = self.brainfound(
            pixel_values, contrast_mask, slice_mask, positions_mm, slice_embeddings=slice_embeddings
        )
        output = self.output_class(
            **self.answer(self.head(volume.volume_embedding), labels),
            volume_embedding=volume.volume_embedding,
            slice_embeddings=volume.slice_embeddings,
            slice_weights=volume.slice_weights,
        )
        return output.to_tuple() if return_dict is False else output


class BrainFoundForClassification(_VolumeModel):
    """One label per volume, or several with `config.problem_type = "multi_label_classification"`.

    `labels` are (B,), or (B, K) for multi-label.
    """

    head_class = ClassificationHead
    output_class = BrainFoundClassifierOutput

    def answer(self, scores: Float[Tensor, "volumes classes"], labels: Tensor | None) -> dict[str, Tensor | None]:
        settings = self.config.problem_type, self.config.class_weights, self.config.classification_focal_gamma
        return {"loss": None if labels is None else classification_loss(scores, labels, *settings), "logits": scores}


class BrainFoundForRegression(_VolumeModel):
    """One number per volume; `labels` (B,) and predictions are in the unit of the target."""

    head_class = RegressionHead
    output_class = BrainFoundRegressionOutput

    def answer(self, scores: RegressionHeadOutput, labels: Tensor | None) -> dict[str, Tensor | None]:
        center, scale = self.config.target_mean, self.config.target_std
        return {
            "loss": None if labels is None else self._loss(scores, (labels.float() - center) / scale),
            "predictions": scores.mean * scale + center,
            "prediction_std": None if scores.std is None else scores.std * scale,
            "bin_probabilities": None if scores.bin_logits is None else scores.bin_logits.softmax(dim=1),
        }

    def _loss(self, scores: RegressionHeadOutput, target: Float[Tensor, "volumes"]) -> Tensor:
        config = self.config
        if scores.bin_logits is not None:
            edges = bin_edges(config).to(target.device)
            return bins_loss(scores.bin_logits, target, edges, config.regression_label_width)
        return regression_loss(scores.mean, scores.log_variance, target, config.regression_loss, config.huber_delta)


class BrainFoundForSegmentation(_ModelWithHead):
    """One class per pixel of every slice, class 0 the background; or with `config.overlapping_labels` any of K labels.

    `labels` are (B, S, H, W), or (B, S, K, H, W) of 0 and 1 where they overlap; −100 where unknown.
    """

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.decoder = DECODERS[config.decoder](config)
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
        """Class scores of pixels, and with `labels` their loss. Other inputs as for `BrainFoundModel`."""
        batch = ValidSlices(
            self.encoder, self.config.slice_chunk, pixel_values, contrast_mask, slice_mask, positions_mm
        )
        height, width = pixel_values.shape[-2:]
        per_pixel = (self.config.num_classes,) if self.config.overlapping_labels else ()
        require_same_shape("labels", labels, (*pixel_values.shape[:2], *per_pixel, height, width))
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
