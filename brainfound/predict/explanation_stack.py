"""The slices that an explanation looks at: through the encoder, and back to the scan's own grid.

Axis legend: S slices that are read, C contrasts, H W pixels, P patches of a slice, h w patch rows and columns,
N foreground patches of all slices, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from brainfound.data.batches import collate
from brainfound.data.stack import Stack
from brainfound.errors import ModelError
from brainfound.models.encoder import SliceEncoding
from brainfound.models.inference import inner_model, require_same_contrasts
from brainfound.models.model import BrainFoundForSegmentation
from brainfound.models.slice_batch import SliceBatch
from brainfound.models.stem import PresentImages
from brainfound.predict.explanation_attention import AttentionRollout, block_attention

FOREGROUND_SHARE = 0.5
"""A patch is foreground if at least this share of its pixels is not background."""


class Look(NamedTuple):
    """What one pass through the encoder gives."""

    embeddings: Float[Tensor, "slices width"]
    rollout: Float[Tensor, "slices rows columns"] | None
    """Of each slice by itself, with sum 1."""
    features: Float[np.ndarray, "patches width"] | None
    """Of the foreground patches, slice by slice and row by row."""


class ReadStack:
    """The slices of a stack that a model reads.

    Args:
        model: a BrainFound model, or a PEFT model around one, in evaluation mode.
        stack: prepared with the model's own preprocessing.
        index: the slices that are read, rising.

    Raises:
        ModelError: the stack's contrasts are not the model's, or its slices are no multiple of the patch size.
    """

    def __init__(self, model: nn.Module, stack: Stack, index: Int[np.ndarray, "S"]) -> None:
        self.model, self.stack, self.index = model, stack, index
        self.inner: Any = inner_model(model)
        self.device = next(self.inner.parameters()).device
        self.encoder = self.inner.encoder
        require_same_contrasts(self.inner, stack)
        self.batch = collate([stack], [index]).to(self.device)
        self.encoder.require_shape(self.batch.pixel_values)
        self.grid: tuple[int, int] = self.encoder.grid(*stack.grid[1:])

    def encode(
        self, pixels: Tensor | None = None, chunk: int | None = None, layers: tuple[int, ...] = ()
    ) -> Iterator[SliceEncoding]:
        """The slices through the encoder, at most `chunk` images at once; `pixels` take the place of the stack's."""
        slices = SliceBatch(
            self.encoder,
            chunk or self.inner.config.slice_chunk,
            self.batch.pixel_values if pixels is None else pixels,
            self.batch.contrast_mask,
            None,
        )
        return slices.encode(layers)

    @torch.no_grad()
    def look(self, rollout: bool = False, features: bool = False) -> Look:
        """One pass over the slices.

        Features are the normalised patch tokens; of a segmentation, the tokens of the deepest block that its decoder
        reads.
        """
        layer = max(self.inner.config.resolved_decoder_layers) if self.is_segmentation else None
        foreground = torch.from_numpy(self.foreground()).to(self.device).flatten(1)
        embedded, rolled, kept, first = [], [], [], 0
        with AttentionRollout(self.encoder.blocks if rollout else (), block_attention) as attention:
            for encoding in self.encode(layers=() if layer is None else (layer,)):
                part = slice(first, first + len(encoding.cls))
                first = part.stop
                embedded.append(encoding.embedding(self.inner.config.slice_features))
                if rollout:
                    rolled.append(self._of_slices(attention.take(), len(encoding.cls)))
                if features:
                    tokens = encoding.patches if layer is None else encoding.hidden[layer]
                    kept.append(tokens[foreground[part]].float().cpu().numpy())
        return Look(
            torch.cat(embedded),
            torch.cat(rolled).unflatten(1, self.grid) if rollout else None,
            np.concatenate(kept) if features else None,
        )

    def _of_slices(self, rollout: Float[Tensor, "images tokens tokens"], count: int) -> Float[Tensor, "slices patches"]:
        """What a slice's embedding draws from the patches, with sum 1; the mean over the images of a slice."""
        prefix = self.encoder.num_prefix_tokens
        of_cls, of_patches = rollout[:, 0, prefix:], rollout[:, prefix:, prefix:].mean(dim=1)
        features = self.inner.config.slice_features
        patches = {"cls": of_cls, "patches": of_patches, "cls_and_patches": (of_cls + of_patches) / 2}[features]
        patches = patches / patches.sum(dim=1, keepdim=True)
        if self.encoder.stem == "per_contrast":
            patches = PresentImages(self.batch.contrast_mask.expand(count, -1)).mean(patches)
        return patches

    @property
    def is_segmentation(self) -> bool:
        return isinstance(self.inner, BrainFoundForSegmentation)

    def foreground(self) -> Bool[np.ndarray, "S h w"]:
        """Which patches are foreground in some contrast."""
        inside = self.stack.pixels[self.index].any(axis=1)
        rows, columns = self.grid
        tiles = inside.reshape(len(inside), rows, self.encoder.patch_size, columns, self.encoder.patch_size)
        return tiles.mean(axis=(2, 4)) >= FOREGROUND_SHARE

    def to_pixels(self, values: Float[np.ndarray, "S h w"]) -> Float[np.ndarray, "S H W"]:
        """Values of patches on the pixels of their slices, bilinear between the patches' middles."""
        maps = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[:, None]
        return F.interpolate(maps, size=self.stack.grid[1:], mode="bilinear", align_corners=False)[:, 0].numpy()

    def to_native(self, values: Float[np.ndarray, "S H W"], order: int = 1) -> Float[np.ndarray, "X Y Z"]:
        """Values of the pixels that are read → voxels of the reference scan.

        A slice that was not read shows the nearest one that was (of two, the lower).

        Raises:
            ModelError: a value is not finite.
        """
        if not np.isfinite(values).all():
            raise ModelError("an explanation is not finite", remedy="Check what the model predicts of this session")
        nearest = np.abs(np.arange(self.stack.grid[0])[:, None] - self.index).argmin(axis=1)
        return np.asarray(self.stack.to_native(values[nearest].astype(np.float32), order=order).dataobj)
