"""The foreground of a scan: its head or brain.

A skull-stripped scan has one exact background value, often 0, on the faces of its volume; all other voxels are
foreground. Around a whole head the air is noisy: the foreground is the largest component above Otsu's threshold, with
holes filled. A padded scan is treated alike: its voxels off the background value fill a box larger than a head.

Axis legend: X left → right, Y posterior → anterior, Z inferior → superior.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from brainfound.data.preprocessing.grids import bounding_box, faces

MAX_HEAD_ML = 5500.0
"""More than an adult's head and neck."""
MAX_BOX_SHARE = 0.75
"""An ellipsoid fills 52 % of its box, a head and neck about 60 %."""
COARSE_MM = 3.0
"""Spacing of the grid on which air noise is separated: fast, and robust to single bright voxels."""


def foreground(data: Float[np.ndarray, "X Y Z"], affine: Float[np.ndarray, "4 4"]) -> Bool[np.ndarray, "X Y Z"]:
    """The head or brain in the voxels of a scan, as a mask on their grid; ``affine`` is index → millimetres."""
    exact = _constant_background(data)
    if exact is not None:
        inside = data != exact
        if not _is_padded_air(inside, abs(float(np.linalg.det(affine[:3, :3])))):
            return inside
    return _segment_head(data, np.linalg.norm(affine[:3, :3], axis=0))


def _is_padded_air(inside: Bool[np.ndarray, "X Y Z"], voxel_mm3: float) -> bool:
    """Whether the mask is the field of view of a padded scan: too large for a head, and filling its box."""
    count = np.count_nonzero(inside)
    if count * voxel_mm3 <= MAX_HEAD_ML * 1000:
        return False
    return bool(count > MAX_BOX_SHARE * np.prod([part.stop - part.start for part in bounding_box(inside)]))


def _constant_background(data: Float[np.ndarray, "X Y Z"]) -> float | None:
    """The value that covers nearly all of most faces of the volume, if there is one."""
    planes = faces(data)
    # A value that fills most of a face is its median; a value that fills most faces is the median of those medians.
    medians = [np.partition(face, face.size // 2, axis=None)[face.size // 2] for face in planes]
    value = sorted(medians)[len(medians) // 2]
    counts = [int(np.count_nonzero(face == value)) for face in planes]
    # A neck or a tight crop may fill one or two faces; noise in air never leaves a face constant.
    if np.median([count / face.size for count, face in zip(counts, planes, strict=True)]) < 0.98:
        return None
    if 2 * sum(counts) > sum(face.size for face in planes):
        return float(value)
    # Two large faces may outweigh the four others: then the most common value of all faces decides.
    values, totals = np.unique(np.concatenate([face.ravel() for face in planes]), return_counts=True)
    return float(value) if values[totals.argmax()] == value else None


def _segment_head(data: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    size = [max(int(step), 1) for step in np.rint(COARSE_MM / spacing_mm)]
    coarse = _block_means_3d(data, size)
    head = coarse > _otsu(coarse)
    components, count = ndimage.label(head)
    if count > 1:
        sizes = np.bincount(components.ravel())
        sizes[0] = 0
        head = components == sizes.argmax()
    head = ndimage.binary_dilation(ndimage.binary_closing(np.pad(head, 3), iterations=2))[3:-3, 3:-3, 3:-3]
    # Holes are filled in the volume, and in each axial slice: a head cut at the neck is open below.
    head = ndimage.binary_fill_holes(head)
    head = np.stack([ndimage.binary_fill_holes(head[:, :, z]) for z in range(head.shape[2])], axis=2)
    for axis in range(3):
        index = np.minimum((np.arange(data.shape[axis]) + size[axis] // 2) // size[axis], head.shape[axis] - 1)
        head = head.take(index, axis=axis)
    return head


def _block_means_3d(data: np.ndarray, size: list[int]) -> np.ndarray:
    """The mean of each block of ``size`` voxels, centred on every ``size``-th voxel; faces are repeated outwards."""
    # The axis with the largest stride comes first: the summands are then contiguous.
    for axis in sorted(range(3), key=lambda axis: -abs(data.strides[axis])):
        if size[axis] > 1:
            data = np.moveaxis(_block_means(np.moveaxis(data, axis, 0), size[axis]), 0, axis)
    return data


def _block_means(rows: np.ndarray, size: int) -> np.ndarray:
    num_blocks = -(-len(rows) // size)
    total = np.zeros_like(rows, shape=(num_blocks, *rows.shape[1:]))
    for offset in range(-(size // 2), size - size // 2):
        first = 1 if offset < 0 else 0
        part = rows[first * size + offset :: size][: num_blocks - first]
        total[first : first + len(part)] += part
        total[:first] += rows[0]
        total[first + len(part) :] += rows[-1]
    total *= np.float32(1 / size)
    return total


def _otsu(values: np.ndarray, bins: int = 256) -> float:
    """Threshold that maximises the variance between two classes (Otsu, IEEE SMC 9:62, 1979)."""
    top = np.percentile(values, 99.9)
    capped = np.minimum(values, top)
    with np.errstate(over="ignore"):
        span = np.ptp(capped)
    if not bins * np.spacing(np.abs(capped).max()) < span < np.inf:  # single precision has no such bins
        capped = capped.astype(np.float64)
    counts, edges = np.histogram(capped, bins=bins)
    centres = (edges[:-1] + edges[1:]) / 2
    weight_low = np.cumsum(counts)
    weight_high = weight_low[-1] - weight_low
    sum_low = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sum_low / weight_low - (sum_low[-1] - sum_low) / weight_high
        between = np.nan_to_num(weight_low * weight_high * gap**2)
    return float(centres[between.argmax()])
