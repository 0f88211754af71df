"""Resampling volumes between voxel grids by affines: into the stack, and back to the native grid.

Axis legend: I J K voxels of any grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from jaxtyping import Num
from scipy import ndimage

_CACHE_VOXELS = 2**17
"""For smaller volumes, such as the box of one label, a loop over planes costs more than it saves."""
_TIE_BREAKING_SHIFT = np.array([1.0e-3, 1.3e-3, 1.7e-3])
"""In voxels of the input; far smaller than the accuracy of a border."""


def resample(
    volume: Num[np.ndarray, "I J K"], matrix: np.ndarray, shape: tuple[int, int, int], order: int
) -> np.ndarray:
    """Sample a volume on another grid of this shape; the dtype is kept, and values outside of the volume are 0.

    ``matrix`` is ``(4, 4)``, index on the output grid → index in the volume; order 0 is the nearest voxel, 1 trilinear.
    """
    axes = _permutation(matrix[:3, :3])
    if axes is None:
        return _sample_obliquely(volume, matrix, shape, order)
    # Grids with parallel axes: after reordering the matrix is diagonal, and each axis is sampled separately.
    volume = np.transpose(volume, axes)
    inside = []
    for axis in range(3):
        scale, offset = float(matrix[axes[axis], axis]), float(matrix[axes[axis], 3])
        volume, part = _sample_axis(volume, axis, scale, offset, shape[axis], order)
        inside.append(part)
    if volume.shape == tuple(shape):
        return np.ascontiguousarray(volume)
    out = np.zeros(shape, dtype=volume.dtype)
    out[tuple(inside)] = volume
    return out


def smooth_before_downsampling(volume: np.ndarray, ratios: np.ndarray) -> np.ndarray:
    """Blur each axis against aliasing, before it is sampled ``ratio`` times more coarsely.

    The kernel widens the point spread from one input voxel to one output voxel, both taken as the full width at half
    maximum of a Gaussian (Cardoso et al., "Scale factor point spread function matching", MICCAI 2015). A ratio is
    output / input voxel size; at most 1 means no blur.
    """
    for axis, ratio in enumerate(ratios):
        if ratio > 1.05:
            sigma = np.sqrt((ratio**2 - 1) / (8 * np.log(2)))
            volume = ndimage.gaussian_filter1d(volume, sigma, axis=axis, mode="nearest", truncate=3.0)
    return volume


def resample_labels(labels: np.ndarray, matrix: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Bring a label map to another grid by trilinear interpolation of each label's membership.

    Each output voxel takes the label, or the background, with the largest membership. For different spacings this is
    closer to the border than the nearest voxel; for equal spacings both agree. Ties are broken in one direction along
    each axis, so that no label grows.
    """
    # Grids that differ by half a voxel make ties common (2 mm from 1 mm: any flat border). If the label won them, small
    # lesions would grow by a fifth; with a small shift one side of an object gains what the other side loses.
    matrix = np.array(matrix, dtype=np.float64)
    matrix[:3, 3] += _TIE_BREAKING_SHIFT
    inverse = np.linalg.inv(matrix)
    best, total = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    out = np.zeros(shape, dtype=labels.dtype)
    for label, box in enumerate(ndimage.find_objects(labels.astype(np.int32)), start=1):
        if box is None:
            continue
        region = _image_of_box(box, inverse, shape)
        size = tuple(part.stop - part.start for part in region)
        if min(size) <= 0:
            continue
        padded = _with_margin(box)
        from_region, to_padded = shift([part.start for part in region]), shift([-part.start for part in padded])
        member = (labels[padded] == label).astype(np.float32)
        share = resample(member, to_padded @ matrix @ from_region, size, order=1)
        winner = share > best[region]
        best[region] = np.where(winner, share, best[region])
        out[region] = np.where(winner, np.asarray(label, labels.dtype), out[region])
        total[region] += share
    # The rest is background; where three labels meet, the largest may be below one half.
    out[best <= 1 - total] = 0
    return out


def bounding_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, ...]:
    """The smallest box around the True voxels of a mask, with a margin within its shape; all of it without any."""
    box = []
    for axis, size in enumerate(mask.shape):
        line = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        first, last = (int(line[0]), int(line[-1])) if line.size else (0, size - 1)
        box.append(slice(max(first - margin, 0), min(last + 1 + margin, size)))
    return tuple(box)


def faces(volume: Num[np.ndarray, "I J K"]) -> list[Num[np.ndarray, "..."]]:
    """The six outer planes of a volume."""
    return [volume[(slice(None),) * axis + (end,)] for axis in range(3) for end in (0, -1)]


def shift(voxels: float | Sequence[float]) -> np.ndarray:
    """A translation as a ``(4, 4)`` matrix."""
    matrix = np.eye(4)
    matrix[:3, 3] = voxels
    return matrix


def _with_margin(box: tuple[slice, ...]) -> tuple[slice, ...]:
    """The box with one more voxel on each side, for the interpolation at its border."""
    return tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)


def _image_of_box(box: tuple[slice, ...], inverse: np.ndarray, shape: tuple[int, int, int]) -> tuple[slice, ...]:
    corners = np.array(list(product(*((part.start - 1, part.stop) for part in box))))
    mapped = corners @ inverse[:3, :3].T + inverse[:3, 3]
    low = np.maximum(np.floor(mapped.min(0)).astype(int), 0)
    high = np.minimum(np.ceil(mapped.max(0)).astype(int) + 1, shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _permutation(linear: np.ndarray) -> tuple[int, int, int] | None:
    """The input axis of each output axis; None unless the matrix has one entry per row and column."""
    largest = np.abs(linear).max()
    significant = np.abs(linear) > 1e-6 * largest
    if not ((significant.sum(0) == 1).all() and (significant.sum(1) == 1).all()):
        return None
    axes = significant.argmax(0)
    return (int(axes[0]), int(axes[1]), int(axes[2]))


def _sample_obliquely(volume: np.ndarray, matrix: np.ndarray, shape: tuple[int, int, int], order: int) -> np.ndarray:
    """Sample all axes at once, only where the output can differ from 0."""
    out = np.zeros(shape, dtype=volume.dtype)
    if not volume.any():
        return out
    box = bounding_box(volume != 0)
    region = _image_of_box(box, np.linalg.inv(matrix), shape)
    size = tuple(part.stop - part.start for part in region)
    if min(size) <= 0:
        return out
    padded = _with_margin(box)
    linear = matrix[:3, :3]
    offset = matrix[:3, 3] + linear @ [part.start for part in region] - [part.start for part in padded]
    ndimage.affine_transform(
        volume[padded], linear, offset, output_shape=size, output=out[region], order=order, mode="constant"
    )
    return out


def _sample_axis(
    volume: np.ndarray, axis: int, scale: float, offset: float, length: int, order: int
) -> tuple[np.ndarray, slice]:
    """Sample one axis at ``scale · i + offset``; returns the samples inside of the volume, and their range."""
    size = volume.shape[axis]
    position = scale * np.arange(length) + offset
    # Positions within rounding error of a voxel centre are that centre, so equal grids are copied.
    nearest = np.rint(position)
    position = np.where(np.abs(position - nearest) < 1e-6, nearest, position)
    if order == 0:
        position = np.floor(position + 0.5)
    # Unlike scipy's mode="constant", the outermost voxels extend half a voxel beyond their centres: a resampled field
    # of view does not lose its faces.
    valid = np.flatnonzero((position >= -0.5) & (position <= size - 0.5))
    inside = slice(int(valid[0]), int(valid[-1]) + 1) if len(valid) else slice(0, 0)
    position = position[inside]
    lower = np.floor(position).astype(int)
    weight = (position - lower).astype(np.float32)
    upper = np.clip(lower + 1, 0, size - 1)
    lower = np.clip(lower, 0, size - 1)
    if not weight.any():
        return _pick(volume, _as_slice(lower), axis), inside
    return _interpolate(volume, lower, upper, weight, axis), inside


def _as_slice(index: np.ndarray) -> slice | np.ndarray:
    """Indices as a slice, which gives a view, if they are consecutive in either direction."""
    steps = np.diff(index)
    if len(steps) == 0 or steps[0] not in (1, -1) or (steps != steps[0]).any():
        return index
    stop = int(index[-1] + steps[0])
    return slice(int(index[0]), stop if stop >= 0 else None, int(steps[0]))


def _pick(volume: np.ndarray, chosen: slice | np.ndarray, axis: int) -> np.ndarray:
    if isinstance(chosen, slice):
        return volume[(slice(None),) * axis + (chosen,)]
    return volume.take(chosen, axis=axis)


def _interpolate(volume: np.ndarray, lower: np.ndarray, upper: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    """Interpolate along an axis; large volumes plane by plane, within the processor's cache."""
    dtype = np.result_type(volume.dtype, np.float32)
    shape = [*volume.shape]
    shape[axis] = len(lower)
    complement = 1 - weight
    below, above = _as_slice(lower), _as_slice(upper)
    if np.prod(shape) <= _CACHE_VOXELS:
        along = [1, 1, 1]
        along[axis] = len(lower)
        out = _pick(volume, below, axis) * complement.reshape(along).astype(dtype, copy=False)
        out += _pick(volume, above, axis) * weight.reshape(along).astype(dtype, copy=False)
        return out.astype(volume.dtype, copy=False)
    out, part = np.empty(shape, dtype=dtype), np.empty(shape[1:], dtype=dtype)
    if axis == 0:
        for plane, first, second, far, near in zip(out, lower, upper, weight, complement, strict=True):
            np.multiply(volume[first], near, out=plane)
            np.multiply(volume[second], far, out=part)
            plane += part
    else:
        column = (-1, 1) if axis == 1 else (1, -1)
        weight, complement = weight.reshape(column), complement.reshape(column)
        for plane, source in zip(out, volume, strict=True):
            np.multiply(_pick(source, below, axis - 1), complement, out=plane)
            np.multiply(_pick(source, above, axis - 1), weight, out=part)
            plane += part
    return out.astype(volume.dtype, copy=False)
