"""One stack through a model: the one way in which training, evaluation and prediction ask for an answer.

Axis legend: S slices, H W pixels, K classes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from brainfound.data.batches import collate, even_slices
from brainfound.data.stack import Stack
from brainfound.errors import ModelError
from brainfound.models.model import (
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)
from brainfound.models.segmenting import Readings, segment

SEGMENTATION_CHUNK = 32
"""Slices per forward pass of a segmentation; bounds the memory of the full-resolution class scores."""


@dataclass(frozen=True)
class Answer:
    """What a model says of one stack; fields of other tasks are None."""

    probabilities: Float[np.ndarray, "K"] | None = None
    value: float | None = None
    """Regression: in the unit of the target."""
    value_std: float | None = None
    classes: Int[np.ndarray, "S H W"] | None = None
    """Segmentation: the class index of every pixel of the stack; None where labels overlap."""
    labels: Bool[np.ndarray, "S K H W"] | None = None
    """Segmentation with overlapping labels: which of them every pixel has."""
    foreground_probability: Float[np.ndarray, "S H W"] | None = None
    """Segmentation: the probability that a pixel is not background."""
    class_probabilities: Float[np.ndarray, "S K H W"] | None = None
    """Segmentation, on request: the probability of every class or label."""
    embedding: Float[np.ndarray, "D"] | None = None
    slice_embeddings: Float[np.ndarray, "S D"] | None = None
    slice_weights: Float[np.ndarray, "S"] | None = None
    slices: Int[np.ndarray, "S"] | None = None
    """The slices that were read, where not all were."""


@torch.inference_mode()
def infer(
    model: nn.Module,
    stack: Stack,
    num_slices: int | None = None,
    readings: Readings = Readings(),
    class_probabilities: bool = False,
) -> Answer:
    """Ask a model about a stack.

    Args:
        model: one of the four BrainFound models, or a PEFT model around one; left in eval mode.
        stack: prepared with the model's own preprocessing.
        num_slices: evenly spaced slices to read; None for all. A segmentation always reads all.
        readings: how often a segmentation looks at each slice.
        class_probabilities: whether a segmentation returns the probabilities of all classes.

    Raises:
        ModelError: the model is of another kind, or the stack's contrasts are not the model's.
    """
    inner = inner_model(model)
    model.eval()
    require_same_contrasts(inner, stack)
    device = next(inner.parameters()).device
    if isinstance(inner, BrainFoundForSegmentation):
        found = segment(
            model, inner.config, stack, SEGMENTATION_CHUNK, inner.encoder.patch_size, readings, class_probabilities
        )
        return Answer(**vars(found))
    index = even_slices(len(stack.pixels), num_slices)
    return _answer(inner, model(**collate([stack], [index]).to(device).inputs()), index)


@torch.inference_mode()
def infer_embedded(model: nn.Module, inputs: Mapping[str, Tensor]) -> Answer:
    """Ask a model about one volume whose slices its backbone has embedded before.

    Args:
        model: a BrainFound model, but for segmentation, or a PEFT model around one; left in eval mode.
        inputs: ``slice_embeddings (1, S, D)``, ``slice_mask`` and ``positions_mm``.
    """
    inner = inner_model(model)
    model.eval()
    device = next(inner.parameters()).device
    return _answer(inner, model(**{name: value.to(device) for name, value in inputs.items()}), None)


def _answer(inner: Any, output: Any, index: np.ndarray | None) -> Answer:
    common = {
        "embedding": output.volume_embedding[0].float().cpu().numpy(),
        "slice_embeddings": output.slice_embeddings[0].float().cpu().numpy(),
        "slice_weights": None if output.slice_weights is None else output.slice_weights[0].float().cpu().numpy(),
        "slices": index,
    }
    if isinstance(inner, BrainFoundForClassification):
        logits = output.logits[0].float()
        multi_label = inner.config.problem_type == "multi_label_classification"
        return Answer(probabilities=(logits.sigmoid() if multi_label else logits.softmax(-1)).cpu().numpy(), **common)
    if isinstance(inner, BrainFoundForRegression):
        std = None if output.prediction_std is None else float(output.prediction_std[0])
        return Answer(value=float(output.predictions[0]), value_std=std, **common)
    if isinstance(inner, BrainFoundModel):
        return Answer(**common)
    raise ModelError(f"{type(inner).__name__} is not a BrainFound model")


def inner_model(model: Any) -> Any:
    """The BrainFound model itself, of one that an adapter may be wrapped around."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def require_same_contrasts(model: Any, stack: Stack) -> None:
    """Refuse a stack of other contrasts than the model's, or in another order.

    Raises:
        ModelError: names both.
    """
    contrasts = tuple(model.config.contrasts)
    if contrasts != tuple(stack.contrasts):
        raise ModelError(
            "the data's contrasts are not the model's",
            got=", ".join(stack.contrasts),
            expected=", ".join(contrasts),
            remedy=f"Prepare the data with --contrasts {','.join(contrasts)}",
        )
