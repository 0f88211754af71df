"""What an answer hangs on: gradient × input, patch by patch and contrast by contrast.

Axis legend: S slices, C contrasts, H W pixels, h w patch rows and columns, P side of a patch, D width.

Source: gradient × input (Shrikumar et al., "Not just a black box", arXiv 1605.01713). Pixels are in 0–1 with background
at 0, so that background and absent contrasts give 0. The products are summed over the pixels of a patch and a
contrast: the model reads a patch through one linear kernel, and within a patch the signs show that kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from brainfound.data.batches import unit_range
from brainfound.predict.explanation_stack import ReadStack

CHUNK = 8
"""Images whose graph is in memory at once."""


def gradient_times_input(
    read: ReadStack, embeddings: Float[Tensor, "slices width"], score: Callable[[Any], Tensor]
) -> tuple[Float[np.ndarray, "S C h w"], float]:
    """The first-order share of each patch and contrast in a score, and the score.

    The gradient goes through the head and the aggregator once, and then back through the encoder some slices at a time,
    so that memory does not grow with the number of slices. The model's weights get no gradients.

    Args:
        embeddings: what the encoder said of the slices.
        score: output of the model → one number.
    """
    with torch.enable_grad():
        leaves = embeddings.detach().clone().requires_grad_()
        explained = score(read.model(slice_embeddings=leaves[None], positions_mm=read.batch.positions_mm))
        (of_slices,) = torch.autograd.grad(explained, leaves)
        pixels = unit_range(read.batch.pixel_values).detach().clone().requires_grad_()
        first = 0
        for encoding in read.encode(pixels, min(CHUNK, read.inner.config.slice_chunk)):
            embedding = encoding.embedding(read.inner.config.slice_features)
            part = of_slices[first : first + len(embedding)]
            first += len(embedding)
            torch.autograd.backward(embedding, part.to(embedding.dtype), inputs=[pixels])
    assert pixels.grad is not None
    products = (pixels.grad * pixels.detach())[0]
    side = read.encoder.patch_size
    patches = products.unfold(2, side, side).unfold(3, side, side).sum(dim=(-1, -2))
    return patches.cpu().numpy(), float(explained.detach())
