"""The methods of `explanation`: slice weights, attention rollout, gradient × input, components of patch features.

Axis legend: B images (or volumes), T tokens, S slices that are read, C contrasts, H W pixels, h w patch rows and
columns, N foreground patches of all slices, D width, K components.

Sources:

- Attention rollout: Abnar and Zuidema, "Quantifying attention flow in transformers", ACL 2020, section 3. With the mean
  over heads A of a block, (A + I) / 2 is the share of each token that a block passes on; the product over blocks is the
  share of each input token in each output token. Attention kernels return no attention, so queries and keys are
  recomputed from the tokens that enter a block; model, kernel and adapters stay unchanged.
- Gradient × input: Shrikumar et al., "Not just a black box", arXiv 1605.01713. Pixels are in 0–1 with background 0, so
  background and absent contrasts give 0. The products are summed over the pixels of a patch, because the model reads a
  patch through one linear kernel and the signs within a patch would show that kernel.
- Components: Oquab et al. (DINOv2), arXiv 2304.07193, figure 1: the first three components over the foreground, one per
  colour. The foreground comes from the scans, not from a first component.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfound.data.batches import collate, to_unit_range
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import ModelError
from brainfound.models.encoder import SliceEncoding, ValidSlices
from brainfound.models.model import BrainFoundForSegmentation
from brainfound.models.stack_prediction import require_same_contrasts, unwrap_peft
from brainfound.models.stem import PresentImages


def weighs_slices(model: nn.Module) -> bool:
    """Whether a model's aggregator weighs slices by their content."""
    inner = unwrap_peft(model)
    aggregator = getattr(inner, "brainfound", inner).aggregator
    return aggregator.has_weights and not aggregator.has_uniform_weights


def block_attention(block: Any, tokens: Float[Tensor, "images tokens width"]) -> Float[Tensor, "images tokens tokens"]:
    """Attention of a backbone's block on the tokens that enter it, as a mean over heads."""
    attention, normed = block.attention, block.norm1(tokens)
    num_heads, projected = attention.num_attention_heads, (attention.q_proj(normed), attention.k_proj(normed))
    query, key = (part.float().unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in projected)
    total = query.new_zeros(len(query), query.shape[2], key.shape[2])
    # One head at a time: all heads of a ViT-g together take a gigabyte.
    for head in range(num_heads):
        total += (query[:, head] @ key[:, head].transpose(-1, -2) * attention.scaling).softmax(dim=-1)
    return total / num_heads


class AttentionRollout:
    """Accumulates the rollout while a transformer runs; a context manager.

    `blocks` are in the order in which they run; a block that does not run does not count.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self._blocks = list(blocks)
        self._handles: list[Any] = []
        self._product: Tensor | None = None

    def __enter__(self) -> Self:
        self._handles = [block.register_forward_pre_hook(self._accumulate) for block in self._blocks]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _accumulate(self, block: nn.Module, arguments: tuple[Any, ...]) -> None:
        attention = block_attention(block, arguments[0])
        step = (attention + torch.eye(attention.shape[-1], device=attention.device)) / 2
        self._product = step if self._product is None else step @ self._product

    def take(self) -> Float[Tensor, "images tokens tokens"]:
        """The rollout of the last pass (row: output token, column: input token); the next pass starts from scratch."""
        assert self._product is not None, "no block has run"
        product, self._product = self._product, None
        return product


@torch.no_grad()
def slice_weights(
    model: nn.Module, embeddings: Float[Tensor, "slices width"], positions_mm: Float[Tensor, "1 slices"]
) -> Float[Tensor, "slices"] | None:
    """The weight of each slice in the volume, with sum 1; None for an aggregator without weights."""
    if not weighs_slices(model):
        return None
    weights = model(slice_embeddings=embeddings[None], positions_mm=positions_mm).slice_weights[0]
    return weights / weights.sum()


CHUNK = 8
"""Images whose autograd graph is in memory at a time."""


def gradient_times_input(
    inputs: ExplanationInputs, embeddings: Float[Tensor, "slices width"], score: Callable[[Any], Tensor]
) -> tuple[Float[np.ndarray, "S C h w"], float]:
    """The first-order contribution of each patch and contrast to a score, and the score.

    The gradient passes head and aggregator once, then the encoder a few slices at a time, so memory does not grow with
    the number of slices. The model's weights get no gradients.

    Args:
        embeddings: slice embeddings.
        score: output of the model → one number.
    """
    with torch.enable_grad():
        leaves = embeddings.detach().clone().requires_grad_()
        explained = score(inputs.model(slice_embeddings=leaves[None], positions_mm=inputs.batch.positions_mm))
        (slice_gradients,) = torch.autograd.grad(explained, leaves)
        pixels = to_unit_range(inputs.batch.pixel_values).detach().clone().requires_grad_()
        first = 0
        for encoding in inputs.encode(pixels, min(CHUNK, inputs.inner.config.slice_chunk)):
            embedding = encoding.embedding(inputs.inner.config.slice_features)
            part = slice_gradients[first : first + len(embedding)]
            first += len(embedding)
            torch.autograd.backward(embedding, part.to(embedding.dtype), inputs=[pixels])
    assert pixels.grad is not None
    products = (pixels.grad * pixels.detach())[0]
    side = inputs.encoder.patch_size
    patches = products.unfold(2, side, side).unfold(3, side, side).sum(dim=(-1, -2))
    return patches.cpu().numpy(), float(explained.detach())


NUM_COMPONENTS = 3
_PERCENTILES = (1.0, 99.0)
_ROWS = 4096


def principal_components(features: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "K"]]:
    """Scores on the first components, and the share of variance that each explains.

    The sign of a component is chosen so that its largest loading in absolute value is positive.

    Raises:
        ModelError: too few patches, or features that are too narrow.
    """
    num = NUM_COMPONENTS
    if min(features.shape) <= num:
        raise ModelError(
            "too few or too narrow features for principal components",
            got=f"{features.shape[0]} foreground patches of width {features.shape[1]}",
            expected=f"more than {num} of each",
            remedy="Leave out the method pca",
        )
    mean = features.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((features.shape[1], features.shape[1]))
    for first in range(0, len(features), _ROWS):
        part = features[first : first + _ROWS] - mean
        covariance += part.T @ part
    values, vectors = np.linalg.eigh(covariance)
    loadings = vectors[:, ::-1][:, :num]
    loadings = loadings * np.where(loadings[np.abs(loadings).argmax(axis=0), np.arange(num)] < 0, -1.0, 1.0)
    scores = (features - mean.astype(np.float32)) @ loadings.astype(np.float32)
    total = values.sum()
    return scores, np.clip(values[::-1][:num] / total, 0, 1) if total > 0 else np.zeros(num)


def scale_to_unit_range(scores: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Each component in 0–1, from its 1st to its 99th percentile, so that outliers do not take the whole range."""
    low, high = np.percentile(scores, _PERCENTILES, axis=0)
    span = np.where(high > low, high - low, 1.0)
    return np.clip((scores - low) / span, 0, 1).astype(np.float32)


def component_maps(
    inputs: ExplanationInputs, shares: Float[np.ndarray, "N K"], foreground: Bool[np.ndarray, "S h w"]
) -> Float[np.ndarray, "X Y Z K"]:
    """Values of the foreground patches on the scan's grid; background is 0 and does not bleed into the edge."""
    weight = inputs.to_pixels(foreground.astype(np.float32))
    inside = weight >= 0.5
    maps = []
    for values in shares.T:
        patches = np.zeros(foreground.shape, dtype=np.float32)
        patches[foreground] = values
        spread = inputs.to_pixels(patches) / np.where(inside, weight, 1.0)
        maps.append(inputs.to_native(np.where(inside, spread, 0.0)))
    return np.stack(maps, axis=-1)


FOREGROUND_SHARE = 0.5
"""Minimum share of foreground pixels in a foreground patch."""


class EncodedStack(NamedTuple):
    """The outputs of one pass through the encoder."""

    embeddings: Float[Tensor, "slices width"]
    rollout: Float[Tensor, "slices rows columns"] | None
    """Per slice, with sum 1."""
    features: Float[np.ndarray, "patches width"] | None
    """Features of the foreground patches, slice by slice and row by row."""


class ExplanationInputs:
    """The slices of a stack that a model reads.

    Args:
        model: a BrainFound model, or a PEFT model around one, in evaluation mode.
        stack: prepared with the model's own preprocessing.
        index: the slices to read, in increasing order.

    Raises:
        ModelError: the contrasts of stack and model differ, or the slices are not a multiple of the patch size.
    """

    def __init__(self, model: nn.Module, stack: Stack, index: Int[np.ndarray, "S"]) -> None:
        self.model, self.stack, self.index = model, stack, index
        self.inner: Any = unwrap_peft(model)
        self.device = next(self.inner.parameters()).device
        self.encoder = self.inner.encoder
        require_same_contrasts(self.inner, stack)
        self.batch = collate([stack], [index]).to(self.device)
        self.encoder.require_shape(self.batch.pixel_values)
        self.grid: tuple[int, int] = self.encoder.grid(*stack.grid[1:])

    def encode(
        self, pixels: Tensor | None = None, chunk: int | None = None, layers: tuple[int, ...] = ()
    ) -> Iterator[SliceEncoding]:
        """Encode the slices, at most `chunk` images at once; `pixels` replace the stack's."""
        slices = ValidSlices(
            self.encoder,
            chunk or self.inner.config.slice_chunk,
            self.batch.pixel_values if pixels is None else pixels,
            self.batch.contrast_mask,
            None,
        )
        return slices.encode(layers)

    @torch.no_grad()
    def encode_all(self, rollout: bool = False, features: bool = False) -> EncodedStack:
        """One pass over the slices.

        Features are the normalised patch tokens; for a segmentation, the tokens of the deepest block that its decoder
        reads.
        """
        is_segmentation = isinstance(self.inner, BrainFoundForSegmentation)
        layer = max(self.inner.config.resolved_decoder_layers) if is_segmentation else None
        foreground = torch.from_numpy(self.foreground()).to(self.device).flatten(1)
        embeddings, rollouts, patch_features, first = [], [], [], 0
        with AttentionRollout(self.encoder.blocks if rollout else ()) as attention:
            for encoding in self.encode(layers=() if layer is None else (layer,)):
                part = slice(first, first + len(encoding.cls))
                first = part.stop
                embeddings.append(encoding.embedding(self.inner.config.slice_features))
                if rollout:
                    rollouts.append(self._slice_rollout(attention.take(), len(encoding.cls)))
                if features:
                    tokens = encoding.patches if layer is None else encoding.hidden[layer]
                    patch_features.append(tokens[foreground[part]].float().cpu().numpy())
        return EncodedStack(
            torch.cat(embeddings),
            torch.cat(rollouts).unflatten(1, self.grid) if rollout else None,
            np.concatenate(patch_features) if features else None,
        )

    def _slice_rollout(
        self, rollout: Float[Tensor, "images tokens tokens"], num_images: int
    ) -> Float[Tensor, "slices patches"]:
        """Share of each patch in the slice embedding, with sum 1; the mean over the images of a slice."""
        prefix = self.encoder.num_prefix_tokens
        cls, patches = rollout[:, 0, prefix:], rollout[:, prefix:, prefix:].mean(dim=1)
        features = self.inner.config.slice_features
        patches = {"cls": cls, "patches": patches, "cls_and_patches": (cls + patches) / 2}[features]
        patches = patches / patches.sum(dim=1, keepdim=True)
        if self.encoder.stem == "per_contrast":
            patches = PresentImages(self.batch.contrast_mask.expand(num_images, -1)).mean(patches)
        return patches

    def foreground(self) -> Bool[np.ndarray, "S h w"]:
        """Which patches are foreground in some contrast."""
        inside = self.stack.pixels[self.index].any(axis=1)
        rows, columns = self.grid
        tiles = inside.reshape(len(inside), rows, self.encoder.patch_size, columns, self.encoder.patch_size)
        return tiles.mean(axis=(2, 4)) >= FOREGROUND_SHARE

    def to_pixels(self, values: Float[np.ndarray, "S h w"]) -> Float[np.ndarray, "S H W"]:
        """Patch values on the pixels of their slices, bilinear between patch centres."""
        maps = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[:, None]
        return F.interpolate(maps, size=self.stack.grid[1:], mode="bilinear", align_corners=False)[:, 0].numpy()

    def to_native(self, values: Float[np.ndarray, "S H W"], order: int = 1) -> Float[np.ndarray, "X Y Z"]:
        """Pixel values of the slices that were read → voxels of the reference scan.

        A slice that was not read takes the values of the nearest one (in a tie, the lower).

        Raises:
            ModelError: a value is not finite.
        """
        if not np.isfinite(values).all():
            raise ModelError("an explanation is not finite", remedy="Check what the model predicts of this session")
        nearest = np.abs(np.arange(self.stack.grid[0])[:, None] - self.index).argmin(axis=1)
        return np.asarray(self.stack.to_native(values[nearest].astype(np.float32), order=order).dataobj)
