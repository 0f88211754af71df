"""Inference on one stack, shared by training, evaluation and prediction; a segmentation runs in chunks of slices.

Axis legend: S slices, C contrasts, H W pixels, K classes or overlapping labels, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from brainfound.data.batches import collate, evenly_spaced_slices
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import ModelError
from brainfound.models.model import (
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)


@dataclass(frozen=True)
class InferenceAugmentation:
    """Test-time augmentation of a segmentation, whose variants are averaged; the default is the plain slice alone."""

    flips: bool = False
    """Also mirror each slice left to right."""
    overlap: bool = False
    """Also shift each slice by half a patch down, right, and both: the edge of a patch becomes the middle of one."""
    mirrored_channels: tuple[int, ...] = ()
    """For each label, that of the other side, which takes its place in a mirrored slice; empty: none has a side."""

    def variants(self, patch_size: int) -> list[FlipAndShift]:
        """The 1, 2, 4 or 8 variants, the plain one first."""
        half = patch_size // 2 if self.overlap else 0
        shifts = [(0, 0), (half, 0), (0, half), (half, half)] if half else [(0, 0)]
        return [FlipAndShift(flip, *shift) for flip in ((False, True) if self.flips else (False,)) for shift in shifts]


class FlipAndShift(NamedTuple):
    """One variant of slices (…, H, W), and its inverse for the model's output."""

    flipped: bool = False
    rows: int = 0
    columns: int = 0

    def apply(self, images: Float[Tensor, "... height width"]) -> Float[Tensor, "... height width"]:
        """Flip, then shift down and right; the new border is 0, which is background."""
        images = images.flip(-1) if self.flipped else images
        height, width = images.shape[-2:]
        moved = torch.zeros_like(images)
        moved[..., self.rows :, self.columns :] = images[..., : height - self.rows, : width - self.columns]
        return moved

    def undo(self, images: Float[Tensor, "... height width"]) -> Float[Tensor, "... height width"]:
        """Map the output for a variant back to the original grid; 0 where the shift pushed the slice out."""
        height, width = images.shape[-2:]
        back = torch.zeros_like(images)
        back[..., : height - self.rows, : width - self.columns] = images[..., self.rows :, self.columns :]
        return back.flip(-1) if self.flipped else back


SEGMENTATION_CHUNK = 32
"""Slices per forward pass of a segmentation; bounds the memory of the full-resolution class scores."""


@dataclass(frozen=True)
class StackPrediction:
    """The output of a model for one stack; fields of other tasks are None."""

    probabilities: Float[np.ndarray, "K"] | None = None
    value: float | None = None
    """Regression: in the unit of the target."""
    value_std: float | None = None
    classes: Int[np.ndarray, "S H W"] | None = None
    """Segmentation: the class index of every pixel; None where labels overlap."""
    labels: Bool[np.ndarray, "S K H W"] | None = None
    """Segmentation with overlapping labels: the labels of every pixel."""
    foreground_probability: Float[np.ndarray, "S H W"] | None = None
    """Segmentation: the probability that a pixel is not background; with overlapping labels, the largest of them."""
    class_probabilities: Float[np.ndarray, "S K H W"] | None = None
    """Segmentation, on request: the probability of every class or label."""
    embedding: Float[np.ndarray, "D"] | None = None
    slice_embeddings: Float[np.ndarray, "S D"] | None = None
    slice_weights: Float[np.ndarray, "S"] | None = None
    slices: Int[np.ndarray, "S"] | None = None
    """Indices of the slices that were read; None for all."""


@torch.inference_mode()
def segment(
    model: nn.Module,
    config: Any,
    stack: Stack,
    chunk: int,
    patch_size: int,
    augmentation: InferenceAugmentation = InferenceAugmentation(),
    class_probabilities: bool = False,
) -> StackPrediction:
    """Segment a stack with a `BrainFoundForSegmentation`, or a PEFT model around one; arguments as for `infer`.

    A model that mixes neighbouring slices also reads those adjacent to a chunk, so that the output equals that of the
    whole stack.
    """
    num_slices, height, width = stack.grid
    num_classes, overlapping = config.num_classes, config.overlapping_labels
    # One slice on either side for each: a slice that is mixed in was itself encoded with its neighbours.
    reach = int(config.stem == "slices") + int(config.decoder_slice_mixing)
    # The smallest type that holds every class index.
    index_type = np.min_scalar_type(num_classes - 1)
    classes = None if overlapping else np.empty((num_slices, height, width), dtype=index_type)
    labels = np.empty((num_slices, num_classes, height, width), dtype=bool) if overlapping else None
    foreground = np.empty((num_slices, height, width), dtype=np.float32)
    saved = np.empty((num_slices, num_classes, height, width), dtype=np.float32) if class_probabilities else None
    for first in range(0, num_slices, chunk):
        index = np.arange(first, min(first + chunk, num_slices))
        read = np.arange(max(first - reach, 0), min(first + chunk + reach, num_slices))
        probabilities = _probabilities(model, stack, read, augmentation, patch_size, overlapping)
        probabilities = probabilities[first - read[0] :][: len(index)]
        if labels is not None:
            labels[index] = (probabilities > 0.5).cpu().numpy()
            foreground[index] = probabilities.amax(dim=1).cpu().numpy()
        if classes is not None:
            classes[index] = probabilities.argmax(dim=1).to(torch.int32).cpu().numpy()
            foreground[index] = (1 - probabilities[:, 0]).cpu().numpy()
        if saved is not None:
            saved[index] = probabilities.cpu().numpy()
    return StackPrediction(classes=classes, labels=labels, foreground_probability=foreground, class_probabilities=saved)


def _probabilities(
    model: nn.Module,
    stack: Stack,
    index: np.ndarray,
    augmentation: InferenceAugmentation,
    patch_size: int,
    overlapping: bool,
) -> Float[Tensor, "S K H W"]:
    """Probabilities of some slices, averaged over the variants that contain each pixel."""
    variants = augmentation.variants(patch_size)
    batch = collate([stack], [index]).to(next(model.parameters()).device)

    def predict(pixel_values: Tensor) -> Tensor:
        logits = model(**replace(batch, pixel_values=pixel_values).inputs()).logits[0].float()
        return logits.sigmoid() if overlapping else logits.softmax(dim=1)

    if len(variants) == 1:
        return predict(batch.pixel_values)
    total = count = torch.zeros((), device=batch.pixel_values.device)
    for variant in variants:
        probabilities = variant.undo(predict(variant.apply(batch.pixel_values)))
        if variant.flipped and augmentation.mirrored_channels:
            probabilities = probabilities[:, list(augmentation.mirrored_channels)]
        total, count = total + probabilities, count + variant.undo(torch.ones_like(probabilities[0, 0]))
    return total / count


@torch.inference_mode()
def infer(
    model: nn.Module,
    stack: Stack,
    num_slices: int | None = None,
    augmentation: InferenceAugmentation = InferenceAugmentation(),
    class_probabilities: bool = False,
) -> StackPrediction:
    """Run a model on a stack.

    Args:
        model: one of the four BrainFound models, or a PEFT model around one; left in eval mode.
        stack: prepared with the model's own preprocessing.
        num_slices: evenly spaced slices to read; None for all. A segmentation always reads all.
        class_probabilities: also return those of all classes for a segmentation, at K times the memory.

    Raises:
        ModelError: if `model` is not a BrainFound model, or its contrasts are not the stack's.
    """
    inner = unwrap_peft(model)
    model.eval()
    require_same_contrasts(inner, stack)
    device = next(inner.parameters()).device
    if isinstance(inner, BrainFoundForSegmentation):
        return segment(
            model, inner.config, stack, SEGMENTATION_CHUNK, inner.encoder.patch_size, augmentation, class_probabilities
        )
    index = evenly_spaced_slices(len(stack.pixels), num_slices)
    return _to_stack_prediction(inner, model(**collate([stack], [index]).to(device).inputs()), index)


@torch.inference_mode()
def infer_embedded(model: nn.Module, inputs: Mapping[str, Tensor]) -> StackPrediction:
    """Run a classification, regression or embedding model on one volume of slices that its backbone embedded.

    `inputs` are ``slice_embeddings (1, S, D)``, ``slice_mask`` and ``positions_mm``.
    """
    inner = unwrap_peft(model)
    model.eval()
    device = next(inner.parameters()).device
    return _to_stack_prediction(inner, model(**{name: value.to(device) for name, value in inputs.items()}), None)


def _to_stack_prediction(inner: Any, output: Any, index: np.ndarray | None) -> StackPrediction:
    if not isinstance(inner, (BrainFoundModel, BrainFoundForClassification, BrainFoundForRegression)):
        remedy = "Load the model with brainfound.load"
        raise ModelError(f"{type(inner).__name__} is not a BrainFound model", remedy=remedy)
    prediction = StackPrediction(
        embedding=output.volume_embedding[0].float().cpu().numpy(),
        slice_embeddings=output.slice_embeddings[0].float().cpu().numpy(),
        slice_weights=None if output.slice_weights is None else output.slice_weights[0].float().cpu().numpy(),
        slices=index,
    )
    if isinstance(inner, BrainFoundForClassification):
        logits = output.logits[0].float()
        multi_label = inner.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if multi_label else logits.softmax(-1)
        return replace(prediction, probabilities=probabilities.cpu().numpy())
    if isinstance(inner, BrainFoundForRegression):
        std = None if output.prediction_std is None else float(output.prediction_std[0])
        return replace(prediction, value=float(output.predictions[0]), value_std=std)
    return prediction


def unwrap_peft(model: Any) -> Any:
    """The BrainFound model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def require_same_contrasts(model: Any, stack: Stack) -> None:
    """Refuse a stack whose contrasts, or their order, differ from the model's."""
    contrasts = tuple(model.config.contrasts)
    if contrasts != tuple(stack.contrasts):
        raise ModelError(
            "the data's contrasts are not the model's",
            got=", ".join(stack.contrasts),
            expected=", ".join(contrasts),
            remedy=f"Prepare the data with --contrasts {','.join(contrasts)}",
            usage=True,
        )
