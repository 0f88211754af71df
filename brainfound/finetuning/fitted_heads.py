"""Heads and decoders whose last layer starts from a fit on the frozen backbone: linear probing, then fine-tuning.

The gradients of a random head distort good features of the backbone (Kumar et al., "Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution", ICLR 2022). The last layer of a decoder is linear and followed only
by an interpolation, so it is fitted as a logistic regression on sampled pixels of each class, weighted to restore the
class frequencies.

Axis legend: N slices, F feature channels of the last layer, H W pixels, n sampled pixels, K classes or labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from brainfound.data.batches import evenly_spaced_slices
from brainfound.finetuning.linear_models import LabelledFeatures, standardise, subject_group_indices
from brainfound.finetuning.tasks import Segmentation, VolumeTask
from brainfound.finetuning.volumes import EmbeddedReader, VolumeAugmentation, VolumeReader, augment_volumes
from brainfound.training.randomness import VIEWS, StepKey, numpy_generator

HEAD_FIT_STEP = 2_000_000_000
"""The step that seeds the random numbers of the fit; training never reaches it."""
MAX_VOLUMES, MAX_PIXELS, MAX_PIXELS_PER_CLASS = 500, 60_000, 60
"""Limits of a decoder's fit: volumes (sessions × passes), pixels, and pixels per class and volume, where neighbours are
alike. More would take long and add little."""


@dataclass(frozen=True)
class AugmentedPasses:
    """Passes over the training part, each with different slices and augmentation."""

    reader: VolumeReader | EmbeddedReader
    augmentation: VolumeAugmentation
    num_passes: int
    batch_size: int
    seed: int

    def batches(self, device: torch.device) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield augmented volumes and the session index of each."""
        count = len(self.reader.sessions)
        for number in range(self.num_passes):
            for first in range(0, count, self.batch_size):
                key = StepKey(self.seed, HEAD_FIT_STEP, number * count + first, 0)
                volumes, indices = self.reader.read(range(first, min(first + self.batch_size, count)), key)
                yield augment_volumes(volumes.to(device), self.augmentation, key), indices


@torch.no_grad()
def fit_head(model: Any, task: VolumeTask, passes: AugmentedPasses) -> None:
    """Fit the last layer of a classification or regression head to frozen embeddings, as a linear model.

    The model must not have an adapter yet; it is changed in place. Volumes are augmented as in training: weights fitted
    to clean volumes would rely on differences that augmentation and contrast dropout remove.

    Raises:
        TrainingError: the embeddings are not finite.
    """
    layer = model.head.score
    model.eval()
    embedded, sessions = [], []
    for volumes, indices in passes.batches(layer.weight.device):
        embeddings = model.brainfound(**volumes.inputs()).volume_embedding
        embedded.append(model.head.norm(embeddings).double().cpu().numpy())
        sessions.append(indices)
    features, mean, std = standardise(embedded, "the model that the run starts from gives embeddings")
    order, store = np.concatenate(sessions), passes.reader.store
    subject_groups = subject_group_indices(store.sessions["subject"].tolist(), order)
    data = LabelledFeatures(features, task.values(store, order.tolist()), subject_groups)
    _set_layer(layer, *task.fit_head(data, model.config), mean, std)


def _set_layer(layer: Any, weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Write a linear model of standardised features into the first rows of a layer, which standardises from now on.

    Raw features are large, and far from 0 in a direction that all volumes share: a step of the size that suits
    standardised ones moves all answers at once, and undoes the fit.
    """
    rows = torch.from_numpy(weight).reshape(len(weight), *layer.weight.shape[1:])
    layer.weight[: len(rows)] = rows.to(layer.weight)
    layer.bias[: len(rows)] = torch.from_numpy(bias).to(layer.bias)
    shape = -1, *[1] * (layer.weight.dim() - 2)
    for name, values in (("input_mean", mean), ("input_std", std)):
        # Not saved: a resumed run fits again, and an exported model has them in its weights.
        layer.register_buffer(name, torch.from_numpy(values).to(layer.weight).reshape(shape), persistent=False)
    layer.register_forward_pre_hook(_standardise_input)


def _standardise_input(layer: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return ((arguments[0] - layer.input_mean) / layer.input_std,)


@torch.no_grad()
def fold_standardisation(model: nn.Module) -> None:
    """Move the standardisation of a fitted last layer into its weights: the model answers as before."""
    for layer in model.modules():
        if "input_mean" not in layer._buffers:
            continue
        fitted: Any = layer
        mean, std = fitted.input_mean.flatten().double(), fitted.input_std.flatten().double()
        weight = fitted.weight.double().reshape(len(fitted.weight), -1) / std
        fitted.bias.copy_(fitted.bias.double() - weight @ mean)
        fitted.weight.copy_(weight.reshape(fitted.weight.shape))
        del fitted.input_mean, fitted.input_std
        for key, hook in list(fitted._forward_pre_hooks.items()):
            if hook is _standardise_input:
                del fitted._forward_pre_hooks[key]


@torch.no_grad()
def fit_decoder(model: Any, task: Segmentation, passes: AugmentedPasses) -> None:
    """Fit the last layer of a segmentation decoder to the features that it reads, as a linear model.

    The model must not have an adapter yet; it is changed in place. At most `MAX_VOLUMES` volumes are read. A class
    without any sampled pixel gets zero weights and a small probability.

    Raises:
        TrainingError: the features are not finite.
    """
    model.eval()
    layer, reader = model.decoder.score, passes.reader
    rng = numpy_generator(VIEWS, passes.seed, HEAD_FIT_STEP)
    passes = replace(passes, num_passes=min(passes.num_passes, max(1, MAX_VOLUMES // len(reader.sessions))))
    if len(reader.sessions) > MAX_VOLUMES:
        assert isinstance(reader, VolumeReader)  # no embeddings are cached for a segmentation
        subset = reader.sessions[evenly_spaced_slices(len(reader.sessions), MAX_VOLUMES)]
        passes = replace(passes, reader=replace(reader, sessions=subset))
    num_volumes = passes.num_passes * len(passes.reader.sessions)
    wanted = min(MAX_PIXELS_PER_CLASS, max(1, MAX_PIXELS // (num_volumes * len(task.names))))
    sampled, truth, weights = [], [], []
    for volumes, _ in passes.batches(layer.weight.device):
        maps = _capture_layer_input(layer, model, volumes.inputs())
        labels = task.pixel_labels(np.asarray(volumes.to("cpu").masks)[volumes.slice_mask.cpu().numpy()])
        first = 0
        for count in volumes.slice_mask.sum(dim=1).tolist():
            own = slice(first, first + count)
            pixels, weight = _choose_pixels(labels[own], wanted, rng)
            sampled.append(_sample_at_pixels(maps[own], pixels, labels.shape[1:3]))
            truth.append(labels[own][tuple(pixels)])
            weights.append(weight)
            first += count
    features, mean, std = standardise(sampled, "the model that the run starts from gives features")
    pixel_weights = np.concatenate(weights)
    fitted = task.fit_pixels(features, np.concatenate(truth), pixel_weights / pixel_weights.mean())
    _set_layer(layer, *fitted, mean, std)


def _capture_layer_input(layer: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Float[Tensor, "N F h w"]:
    read: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return torch.cat(read)


def _choose_pixels(
    labels: Int[np.ndarray, "N H W K"], wanted: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "3 n"], Float[np.ndarray, "n"]]:
    """Sample pixels (slice, row, column) of a volume, up to ``wanted`` per class, and how many pixels each stands for.

    Where labels overlap, each combination of labels is a class.
    """
    flat = labels.reshape(-1, labels.shape[-1])
    # One number per combination of labels: the class, or the sum of 2ᵏ over the labels.
    classes = flat.astype(np.int64) @ (1 << np.arange(flat.shape[1]))
    chosen, weights = [], []
    for k in np.unique(classes):
        members = np.flatnonzero(classes == k)
        drawn = np.sort(rng.choice(members, min(len(members), wanted), replace=False))
        chosen.append(drawn)
        weights.append(np.full(len(drawn), len(members) / len(drawn)))
    return np.stack(np.unravel_index(np.concatenate(chosen), labels.shape[:3])), np.concatenate(weights)


def _sample_at_pixels(
    maps: Float[Tensor, "N F h w"], pixels: Int[np.ndarray, "3 n"], size: tuple[int, int]
) -> Float[np.ndarray, "n F"]:
    """Maps interpolated at pixels. The decoder interpolates its scores instead; both orders give the same."""
    values = np.empty((pixels.shape[1], maps.shape[1]), dtype=np.float32)
    for number in np.unique(pixels[0]):
        in_slice = pixels[0] == number
        fine = F.interpolate(maps[number : number + 1].float(), size=size, mode="bilinear", align_corners=False)[0]
        values[in_slice] = fine[:, pixels[1][in_slice], pixels[2][in_slice]].T.cpu().numpy()
    return values
