"""The configuration of all BrainFound models; the registries define the names of its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from brainfound.errors import ModelError, UsageError, closest_name, did_you_mean
from brainfound.models.aggregators import AGGREGATORS, STATISTICS
from brainfound.models.backbones import FAMILIES, SUPPORTED_BACKBONES
from brainfound.models.decoders import DECODERS
from brainfound.models.stem import STEMS

SLICE_FEATURES = ("cls", "patches", "cls_and_patches")
_KNOWN_NAMES: dict[str, Iterable[str]] = {
    "stem": STEMS,
    "slice_features": SLICE_FEATURES,
    "aggregator": AGGREGATORS,
    "head_norm": ("layer", "none"),
    "decoder": DECODERS,
    "segmentation_loss": ("dice_cross_entropy", "dice_focal", "tversky", "focal_tversky"),
    "regression_head": ("point", "gaussian", "bins"),
    "regression_loss": ("smooth_l1", "l1", "huber"),
}
_SMALLEST = {
    **dict.fromkeys(("slice_chunk", "aggregator_layers", "aggregator_width", "decoder_width", "tversky_gamma"), 1),
    **dict.fromkeys(("tversky_alpha", "tversky_beta", "focal_gamma", "classification_focal_gamma"), 0),
}
_POSITIVE = ("image_std", "target_std", "huber_delta", "regression_label_width", "initializer_range")
_FINITE = ("image_mean", "target_mean")


class BrainFoundConfig(PreTrainedConfig):
    """The configuration of a BrainFound model; width, depth and patch size are in `backbone_config`."""

    model_type = "brainfound"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  (the base class declares it so)
    # A list, because the transformers Trainer concatenates it with one.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        "volume_embedding",
        "slice_embeddings",
        "patch_embeddings",
        "slice_weights",
        "bin_probabilities",
    ]

    backbone_config: Any = None
    """Configuration of the 2-D ViT, of a type in `SUPPORTED_BACKBONES`, or its content as a dict; None: a Dinov2."""
    backbone_source: str | None = None
    """Hub id of the backbone's initial weights; None for a local folder."""
    contrasts: Sequence[str] = ("T1w", "T2w", "FLAIR")
    """The contrasts of axis C, in order."""
    stem: str = "channels"
    """How contrasts enter the backbone: "channels" (one contrast per input channel), "per_contrast" (each present
    contrast as a grey image, outputs averaged) or "slices" (z−1, z, z+1 of a single contrast as three channels)."""
    image_mean: float | list[float] = 0.449
    """Subtracted from pixels in 0–1; one value, or one per contrast. The default is the mean over ImageNet."""
    image_std: float | list[float] = 0.226
    """Divides pixels after `image_mean` is subtracted; one value, or one per contrast."""
    slice_chunk: int = 64
    """The largest number of images that the backbone encodes at once, which bounds the memory. An image is a slice, or
    with the stem "per_contrast" one contrast of a slice; the contrasts of a slice stay together."""
    slice_features: str = "cls"
    """The embedding of a slice: "cls" (the class token), "patches" (the mean of the patch tokens) or "cls_and_patches"
    (both concatenated, as in DINOv2's linear evaluation)."""
    feature_layers: list[int] | None = None
    """1-based backbone blocks, each followed by the backbone's last layer norm, whose `slice_features` are concatenated
    in the given order; None: the last block alone."""
    aggregator: str = "mean"
    """Slice embeddings → volume embedding: "mean", "max", several statistics ("mean_std", "mean_max", "mean_std_max"),
    "attention" or "transformer"."""
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
    """Segmentation: each label has its own sigmoid, without a background class; a pixel may have several."""
    segmentation_loss: str = "dice_cross_entropy"
    """"dice_cross_entropy", or for small structures "dice_focal", "tversky" or "focal_tversky"."""
    tversky_alpha: float = 0.3
    """Weight of false positives in the Tversky losses."""
    tversky_beta: float = 0.7
    """Weight of false negatives in the Tversky losses."""
    tversky_gamma: float = 4 / 3
    """"focal_tversky" is the Tversky loss to the power 1 / `tversky_gamma`."""
    focal_gamma: float = 2.0
    """"dice_focal": a pixel's cross-entropy is multiplied by (1 − probability of the truth) to this power."""
    head_norm: str = "layer"
    """Norm of the volume embedding before the head's last layer: "layer" (layer norm) or "none"."""
    head_dropout: float = 0.1
    """Dropout before the head's last layer."""
    target_mean: float = 0.0
    """Regression: mean of the target, in its unit; predictions come out in that unit."""
    target_std: float = 1.0
    """Regression: standard deviation of the target, in its unit."""
    regression_head: str = "point"
    """Regression: "point" (one number), "gaussian" (also a standard deviation, trained by the Gaussian likelihood) or
    "bins" (a distribution over bins of the target, whose expectation is the prediction)."""
    regression_loss: str = "smooth_l1"
    """Loss of the point head on the standardised target: "smooth_l1", "l1" or "huber"."""
    huber_delta: float = 1.0
    """The error at which the Huber loss turns from quadratic to linear, in standard deviations of the target."""
    regression_bins: int = 40
    """Bins of the head "bins"."""
    regression_range: list[float] | None = None
    """Lower edge of the first bin and upper edge of the last one, in the unit of the target; "bins" needs it."""
    regression_label_width: float = 1.0
    """Standard deviation of the Gaussian soft label that trains the bins, in widths of a bin."""
    class_weights: list[float] | None = None
    """Classification: loss weight of each class; with multi-label targets, of the positives of each label."""
    classification_focal_gamma: float = 0.0
    """Classification: the exponent of the focal loss; 0: cross-entropy."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initialisation of new linear layers."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone_config = _as_backbone_config(self.backbone_config)
        self.contrasts = [str(name) for name in self.contrasts]
        super().__post_init__(**kwargs)
        self.require_valid()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a different number of classes drops the saved class names and weights."""
        content = dict(config_dict)
        saved, requested = _count_labels(content), _count_labels(kwargs)
        if requested is not None and requested != (saved or 2):
            for name in ("class_weights", "id2label", "label2id", "num_labels"):
                content.pop(name, None)
        return super().from_dict(content, **kwargs)

    def require_valid(self) -> None:
        """Validate the fields (raises ModelError) and adapt the backbone's configuration to them."""
        for field, known in _KNOWN_NAMES.items():
            _require_known(field, getattr(self, field), known)
        _require_known("backbone_config.model_type", self.backbone_config.model_type, SUPPORTED_BACKBONES)
        contrasts = list(self.contrasts)
        if not contrasts or len(set(contrasts)) != len(contrasts):
            what, remedy = "contrasts must be one or more different names", "Name each contrast once"
            raise ModelError(what, where="config.contrasts", got=contrasts, remedy=remedy)
        if self.stem == "slices" and len(contrasts) > 1:
            raise ModelError(
                "the stem 'slices' reads neighbouring slices of one contrast",
                where="config.contrasts",
                got=", ".join(contrasts),
                expected="one contrast",
                remedy="Name one contrast, or take the stem channels or per_contrast",
            )
        for field in ("image_mean", "image_std"):
            value = getattr(self, field)
            if isinstance(value, Iterable) and len(list(value)) != len(contrasts):
                raise ModelError(
                    "one value, or one per contrast, is needed",
                    where=f"config.{field}",
                    got=value,
                    expected=f"{len(contrasts)} values",
                    remedy=f"Give a number, or a list for {', '.join(contrasts)}",
                )
        for field, smallest in _SMALLEST.items():
            self._require(field, partial(_is_at_least, smallest), f"at least {smallest}")
        for field in _POSITIVE:
            self._require(field, lambda value: 0 < value < math.inf, "positive")
        for field in _FINITE:
            self._require(field, math.isfinite, "a finite number")
        self._require("head_dropout", lambda value: 0 <= value < 1, "at least 0 and below 1")
        if not self.tversky_alpha + self.tversky_beta > 0:
            what, remedy = "one of tversky_alpha and tversky_beta must be positive", "Set one of them above 0"
            raise ModelError(what, where="config.tversky_alpha", got=0, remedy=remedy)
        self._require_valid_head()
        depth = self.backbone_config.num_hidden_layers
        for field, reader in {"decoder_layers": "a decoder reads", "feature_layers": "an embedding has"}.items():
            layers = getattr(self, field)
            if layers is not None and (not layers or any(not 1 <= layer <= depth for layer in layers)):
                expected, remedy = f"numbers from 1 to {depth}", "Leave it out for the default"
                what = f"{reader} one block or more, counted from 1"
                raise ModelError(what, where=f"config.{field}", got=layers, expected=expected, remedy=remedy)
        # Input channels of the stem's patch convolution.
        self.backbone_config.num_channels = STEMS[self.stem].fixed_channels or len(contrasts)
        if hasattr(self.backbone_config, "use_mask_token"):
            # Masked-image objectives need it; in a checkpoint without one it starts at zero.
            self.backbone_config.use_mask_token = True

    def _require(self, field: str, fits: Callable[[float], bool], expected: str) -> None:
        """Raise a ModelError unless the number of a field, or each of its numbers, fits."""
        value = getattr(self, field)
        if not all(fits(number) for number in (value if isinstance(value, Iterable) else [value])):
            remedy = f"Set {field} to a number that is {expected}"
            raise ModelError(f"must be {expected}", where=f"config.{field}", got=value, remedy=remedy)

    def _require_valid_head(self) -> None:
        if self.regression_head != "point" and self.regression_loss != "smooth_l1":
            raise ModelError(
                f"the head {self.regression_head!r} has a loss of its own",
                where="config.regression_loss",
                got=self.regression_loss,
                remedy='Choose regression_head = "point" for this loss',
            )
        if self.regression_head == "bins":
            ends = list(self.regression_range or ())
            if len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
                where, remedy = "config.regression_range", "Give the lowest and the highest target: [20, 90]"
                raise ModelError("bins need a range", where=where, got=ends, expected="low < high", remedy=remedy)
            self._require("regression_bins", partial(_is_at_least, 2), "at least 2")
        weights = self.class_weights
        if weights is not None and (len(weights) != self.num_classes or not all(0 < w < math.inf for w in weights)):
            raise ModelError(
                "one positive weight per class is needed",
                where="config.class_weights",
                got=list(weights),
                expected=f"{self.num_classes} values",
                remedy="Give a weight above 0 for each class, or leave them out",
            )

    @property
    def num_contrasts(self) -> int:
        return len(self.contrasts)

    @property
    def num_classes(self) -> int:
        """Number K of head outputs: `num_labels`, 2 by default."""
        return int(self.num_labels or 2)

    @property
    def hidden_size(self) -> int:
        """Width D of every token."""
        return int(self.backbone_config.hidden_size)

    @property
    def embedding_size(self) -> int:
        """Width of a slice embedding: for each of `feature_layers` D, or 2 D with "cls_and_patches"."""
        per_layer = self.hidden_size * (2 if self.slice_features == "cls_and_patches" else 1)
        return per_layer * len(self.feature_layers or (None,))

    @property
    def volume_embedding_size(self) -> int:
        """Width of a volume embedding: that of a slice, times the number of statistics of the aggregator."""
        return self.embedding_size * len(STATISTICS.get(self.aggregator, ("",)))

    def describe_features(self) -> str:
        """What a head reads, as ``cls_and_patches of blocks 6, 12, mean_std``; the default is ``cls``."""
        blocks = "" if self.feature_layers is None else f" of blocks {', '.join(map(str, self.feature_layers))}"
        statistics = f", {self.aggregator}" if self.aggregator in STATISTICS else ""
        return f"{self.slice_features}{blocks}{statistics}{'' if self.head_norm == 'layer' else ', not normalised'}"

    @property
    def resolved_decoder_layers(self) -> list[int]:
        """The blocks to decode: `decoder_layers`, or up to four evenly spaced ones ending with the last."""
        if self.decoder_layers is not None:
            return sorted(set(self.decoder_layers))
        return evenly_spaced_layers(int(self.backbone_config.num_hidden_layers))


def evenly_spaced_layers(depth: int) -> list[int]:
    """Up to four evenly spaced blocks of a backbone, ending with the last.

    >>> evenly_spaced_layers(12), evenly_spaced_layers(2)
    ([3, 6, 9, 12], [1, 2])
    """
    num_taken = min(4, depth)
    return [round(depth * (index + 1) / num_taken) for index in range(num_taken)]


def _is_at_least(smallest: float, value: float) -> bool:
    return smallest <= value < math.inf


def config_fields() -> list[str]:
    """The fields that callers may set: those of `BrainFoundConfig`, and the labels of the task."""
    own = [name for name in BrainFoundConfig.__annotations__ if name not in ("backbone_config", "backbone_source")]
    return [*own, "id2label", "label2id", "num_labels", "problem_type"]


def require_known_fields(given: Iterable[str]) -> None:
    """Refuse unknown configuration arguments, with the nearest known one."""
    known = config_fields()
    for name in given:
        if name not in known:
            raise UsageError(f"unknown configuration argument {name!r}", remedy=did_you_mean(name, known))


def _count_labels(fields: dict[str, Any]) -> int | None:
    names = fields.get("id2label")
    return fields.get("num_labels") if names is None else len(names)


def _require_known(field: str, value: object, known: Iterable[str]) -> None:
    if value not in (known := tuple(known)):
        close = closest_name(str(value), known)
        raise ModelError(
            f"{value!r} is not available",
            where=f"config.{field}",
            expected=f"one of {', '.join(known)}",
            remedy=f"Did you mean {close}?" if close else f"Set {field} to one of them",
        )


def _as_backbone_config(value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    content = dict(value or {})
    model_type = content.pop("model_type", SUPPORTED_BACKBONES[0])
    _require_known("backbone_config.model_type", model_type, SUPPORTED_BACKBONES)
    return FAMILIES[model_type].config_class(**content)
