"""Tokens of an encoder for one session: slice embeddings, patch tokens, and patch tokens of earlier blocks.

Axis legend: S slices, P patches of a slice (row by row), L blocks, D width, E width of a slice embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from brainfound.data.batches import collate, evenly_spaced_slices
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import UsageError
from brainfound.models.encoder import ValidSlices
from brainfound.models.stack_prediction import unwrap_peft


@dataclass(frozen=True)
class TokenOptions:
    """Which tokens are written.

    Attributes:
        slices: the embedding of each slice, as the aggregator reads it.
        patches: the patch tokens after the last layer norm.
        layers: 1-based blocks whose patch tokens, before the last layer norm, are added.
    """

    slices: bool = False
    patches: bool = False
    layers: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return self.slices or self.patches or bool(self.layers)

    def require_layers(self, num_layers: int) -> None:
        """UsageError for a block that an encoder of this many does not have, or one that is given twice."""
        if wrong := [layer for layer in self.layers if not 1 <= layer <= num_layers]:
            remedy, expected = "Give blocks that the model has", f"1 to {num_layers}"
            raise UsageError(
                "the model has no such block", where="layers", got=wrong[0], expected=expected, remedy=remedy
            )
        if len(set(self.layers)) < len(self.layers):
            got = ",".join(map(str, self.layers))
            raise UsageError("a block is given twice", where="layers", got=got, remedy="Give each block once")


@torch.inference_mode()
def session_tokens(model: Any, stack: Stack, num_slices: int | None, options: TokenOptions) -> dict[str, np.ndarray]:
    """The tokens of one stack by the names in the file; tokens are float16, places and numbers are not.

    Always ``slices (S,)`` (indices in the stack), ``positions_mm (S,)``, ``affine (4, 4)`` (slice, row and column of
    the stack → mm in RAS+), ``grid (2,)`` (rows and columns of patches) and ``patch_size ()`` in pixels. On request
    ``slice_embeddings (S, E)``, ``patch_tokens (S, P, D)``, and ``layers (L,)`` with
    ``layer_patch_tokens (L, S, P, D)``.
    The slices go through the encoder in the chunks of the model's configuration, and are float16 from then on.

    Raises:
        UsageError: there is no such block, or a token is too large for float16.
    """
    inner = unwrap_peft(model)
    encoder = inner.encoder
    options.require_layers(encoder.num_layers)
    model.eval()
    index = evenly_spaced_slices(len(stack.pixels), num_slices)
    batch = collate([stack], [index]).to(next(inner.parameters()).device)
    valid = ValidSlices(encoder, inner.config.slice_chunk, batch.pixel_values, batch.contrast_mask, batch.slice_mask)
    parts: dict[str, list[np.ndarray]] = {}
    for encoding in valid.encode(options.layers):
        if options.slices:
            parts.setdefault("slice_embeddings", []).append(
                _as_float16(encoding.embedding(inner.config.slice_features))
            )
        if options.patches:
            parts.setdefault("patch_tokens", []).append(_as_float16(encoding.patches))
        if options.layers:
            blocks = torch.stack([encoding.hidden[layer] for layer in options.layers], dim=1)
            parts.setdefault("layer_patch_tokens", []).append(_as_float16(blocks))
    tokens = {name: _joined(values) for name, values in parts.items()}
    if options.layers:
        tokens["layer_patch_tokens"] = np.moveaxis(tokens["layer_patch_tokens"], 1, 0)
        tokens["layers"] = np.array(options.layers)
    return tokens | {
        "slices": index,
        "positions_mm": stack.positions_mm[index],
        "affine": np.asarray(stack.affine),
        "grid": np.array(encoder.grid(*stack.pixels.shape[2:])),
        "patch_size": np.array(encoder.patch_size),
    }


def _as_float16(values: torch.Tensor) -> np.ndarray:
    half = values.to(torch.float16)
    if not half.isfinite().all():
        what, got = "a token has no value in float16", f"{float(values.abs().max()):g}"
        raise UsageError(what, got=got, expected="up to 65504", remedy="Leave out the last blocks of --layers")
    return half.cpu().numpy()


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
