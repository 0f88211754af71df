"""What the features of patches have in common: their first principal components as colours.

Axis legend: N foreground patches of a session, D width, K components, S slices, h w patch rows and columns.

As DINOv2 shows its features (Oquab et al., arXiv 2304.07193, figure 1): the first three components over the foreground,
one per colour. Foreground is what is not background in the scans, and not chosen by a first component.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from brainfound.errors import ModelError
from brainfound.predict.explanation_stack import ReadStack

NUM_COMPONENTS = 3
_PERCENTILES = (1.0, 99.0)
_ROWS = 4096


def principal_components(
    features: Float[np.ndarray, "N D"], num: int = NUM_COMPONENTS
) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "K"]]:
    """Scores on the first components, and the share of the variance that each explains.

    The sign of a component is free; it is chosen so that the largest of its D loadings in absolute value is positive.

    Raises:
        ModelError: there are too few patches or too few numbers in a feature.
    """
    if min(features.shape) <= num:
        raise ModelError(
            "too little to find principal components in",
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


def as_shares(scores: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Each component in 0–1, from its 1st to its 99th percentile: a few odd patches must not take all of the range."""
    low, high = np.percentile(scores, _PERCENTILES, axis=0)
    span = np.where(high > low, high - low, 1.0)
    return np.clip((scores - low) / span, 0, 1).astype(np.float32)


def component_maps(
    read: ReadStack, shares: Float[np.ndarray, "N K"], foreground: Bool[np.ndarray, "S h w"]
) -> Float[np.ndarray, "X Y Z K"]:
    """Values of the foreground patches on the scan's grid; background is 0 and does not run into the edge."""
    weight = read.to_pixels(foreground.astype(np.float32))
    inside = weight >= 0.5
    maps = []
    for values in shares.T:
        patches = np.zeros(foreground.shape, dtype=np.float32)
        patches[foreground] = values
        spread = read.to_pixels(patches) / np.where(inside, weight, 1.0)
        maps.append(read.to_native(np.where(inside, spread, 0.0)))
    return np.stack(maps, axis=-1)
