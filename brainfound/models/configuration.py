"""The configuration of every BrainFound model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from brainfound.errors import ModelError, UsageError, did_you_mean

SUPPORTED_BACKBONES = ("dinov2", "dinov2_with_registers")
STEMS = ("channels",)
AGGREGATORS = ("mean", "attention", "transformer")
DECODERS = ("linear", "fpn", "unetr")
SEGMENTATION_LOSSES = ("dice_cross_entropy", "dice_focal", "tversky", "focal_tversky")


class BrainFoundConfig(PreTrainedConfig):
    """What a BrainFound model is made of.

    The fields are plain values so that `config.json` can be read by a person. Fields of the backbone
    itself (width, depth, patch size) are those of its own configuration under `backbone_config`.
    """

    model_type = "brainfound"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (the base class declares it so)
    # The library's Trainer adds this to a list of its own.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "volume_embedding",
        "slice_embeddings",
        "patch_embeddings",
        "slice_weights",
    ]

    backbone_config: Any = None
    """Configuration of the 2-D ViT, or its content as a dict: Dinov2 or Dinov2WithRegisters; None: Dinov2's default."""
    backbone_source: str | None = None
    """Hub id or folder that the backbone's first weights came from."""
    contrasts: Sequence[str] = ("T1w", "T2w", "FLAIR")
    """The contrasts of axis C, in order."""
    stem: str = "channels"
    """How contrasts enter the backbone: "channels" (one contrast per input channel)."""
    image_mean: float | list[float] = 0.449
    """Subtracted from pixels in 0–1; one value, or one per contrast. The default is the mean of the ImageNet values;
    `from_backbone` of a supervised ViT takes that of its preprocessor."""
    image_std: float | list[float] = 0.226
    """Pixels are divided by it after `image_mean`; one value, or one per contrast."""
    slice_chunk: int = 64
    """The largest number of slices that are encoded at once; bounds the memory of a forward pass."""
    aggregator: str = "mean"
    """Slice embeddings → volume embedding: "mean", "attention" or "transformer"."""
    aggregator_layers: int = 1
    """Layers of the transformer aggregator."""
    aggregator_width: int = 128
    """Hidden width of the gated attention."""
    decoder: str = "fpn"
    """Patch tokens → voxels: "linear", "fpn", or "unetr" (with skips from the image)."""
    decoder_layers: list[int] | None = None
    """1-based backbone blocks whose patch tokens are decoded; None: four evenly spaced ones, fewer if shallow."""
    decoder_width: int = 128
    """Channels of the decoder's feature maps."""
    decoder_slice_mixing: bool = False
    """Mix neighbouring slices in the decoder with a depthwise convolution along the slice axis."""
    overlapping_labels: bool = False
    """Segmentation: each label is a yes or no of its own (sigmoid), without a background class; a pixel may have any
    number of them."""
    segmentation_loss: str = "dice_cross_entropy"
    """Segmentation: "dice_cross_entropy", "dice_focal", "tversky" or "focal_tversky"; the last three are for small
    structures."""
    tversky_alpha: float = 0.3
    """Weight of false positives in the Tversky losses."""
    tversky_beta: float = 0.7
    """Weight of false negatives in the Tversky losses."""
    tversky_gamma: float = 4 / 3
    """"focal_tversky" is the Tversky loss to the power 1/this."""
    focal_gamma: float = 2.0
    """"dice_focal": a pixel's cross-entropy is weighed with (1 − probability of the truth) to this power."""
    head_dropout: float = 0.1
    """Dropout before the head's last layer."""
    target_mean: float = 0.0
    """Regression: mean of the target, in its unit; predictions come out in that unit."""
    target_std: float = 1.0
    """Regression: standard deviation of the target, in its unit."""
    regression_uncertainty: bool = False
    """Regression: also predict a standard deviation, trained by the Gaussian likelihood."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initialisation of new linear layers."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = _as_backbone_config(self.backbone_config)
        self.contrasts = [str(name) for name in self.contrasts]
        super().__post_init__(**kwargs)
        self.require_valid()

    def require_valid(self) -> None:
        """Check the choices, and bring the backbone's configuration in line with them.

        Raises:
            ModelError: names the field, what came and what is known.
        """
        for field, known in (
            ("stem", STEMS),
            ("aggregator", AGGREGATORS),
            ("decoder", DECODERS),
            ("segmentation_loss", SEGMENTATION_LOSSES),
        ):
            _require_known(field, getattr(self, field), known)
        _require_known("backbone_config.model_type", self.backbone_config.model_type, SUPPORTED_BACKBONES)
        if not self.contrasts or len(set(self.contrasts)) != len(self.contrasts):
            raise ModelError(
                "contrasts must be one or more different names", where="config.contrasts", got=list(self.contrasts)
            )
        for field in ("image_mean", "image_std"):
            value = getattr(self, field)
            if isinstance(value, Iterable) and len(list(value)) != len(self.contrasts):
                raise ModelError(
                    "one value, or one per contrast, is needed",
                    where=f"config.{field}",
                    got=value,
                    expected=f"{len(self.contrasts)} values",
                )
        for field in ("slice_chunk", "aggregator_layers", "aggregator_width", "decoder_width"):
            if int(getattr(self, field)) < 1:
                raise ModelError("must be at least 1", where=f"config.{field}", got=getattr(self, field))
        for field, smallest in (("tversky_alpha", 0), ("tversky_beta", 0), ("focal_gamma", 0), ("tversky_gamma", 1)):
            if not getattr(self, field) >= smallest:
                raise ModelError(f"must be at least {smallest}", where=f"config.{field}", got=getattr(self, field))
        if self.target_std <= 0:
            raise ModelError("must be positive", where="config.target_std", got=self.target_std)
        depth = self.backbone_config.num_hidden_layers
        if any(not 1 <= layer <= depth for layer in self.decoder_layers or ()):
            raise ModelError(
                "blocks are counted from 1",
                where="config.decoder_layers",
                got=self.decoder_layers,
                expected=f"numbers from 1 to {depth}",
            )
        self.backbone_config.num_channels = len(self.contrasts)
        if hasattr(self.backbone_config, "use_mask_token"):
            # Masked-image objectives need it, and a checkpoint without one starts it at zero.
            self.backbone_config.use_mask_token = True

    @property
    def num_contrasts(self) -> int:
        return len(self.contrasts)

    @property
    def num_classes(self) -> int:
        """Class scores of a head, K: `num_labels`, which is 2 until labels are named."""
        return int(self.num_labels or 2)

    @property
    def hidden_size(self) -> int:
        """Width D of every embedding."""
        return int(self.backbone_config.hidden_size)

    @property
    def resolved_decoder_layers(self) -> list[int]:
        """The blocks that are decoded: `decoder_layers`, or up to four evenly spaced ones that end with the last."""
        if self.decoder_layers is not None:
            return sorted(set(self.decoder_layers))
        depth = int(self.backbone_config.num_hidden_layers)
        num_taken = min(4, depth)
        return [round(depth * (index + 1) / num_taken) for index in range(num_taken)]


def config_fields() -> list[str]:
    """The fields that callers may set by name: BrainFound's own, and the labels of the task."""
    own = [name for name in BrainFoundConfig.__annotations__ if name not in ("backbone_config", "backbone_source")]
    return [*own, "id2label", "label2id", "num_labels", "problem_type"]


def require_known_fields(given: Iterable[str]) -> None:
    """Refuse configuration arguments that no field has.

    Raises:
        UsageError: with the nearest known field.
    """
    known = config_fields()
    for name in given:
        if name not in known:
            raise UsageError(f"unknown configuration argument {name!r}", remedy=did_you_mean(name, known))


def _require_known(field: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ModelError(f"{value!r} is not available", where=f"config.{field}", expected=f"one of {', '.join(known)}")


def _as_backbone_config(value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if value is None:
        return AutoConfig.for_model("dinov2")
    if isinstance(value, PreTrainedConfig):
        return value
    content = dict(value)
    model_type = content.pop("model_type", "dinov2")
    _require_known("backbone_config.model_type", model_type, SUPPORTED_BACKBONES)
    return AutoConfig.for_model(model_type, **content)
